import io

import numpy as np
import pytest
from scipy import optimize, stats

from nas import cost
from nas.errors import LatencyError
from nas.latency import Prediction, Predictor, feature_groups, features
from nas.latency import predictor as module
from nas.latency.predictor import Scaling, condition, fit
from nas.space import load_space


def networks(n: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Counts of three ops and a size, and the latencies of a device with a floor, with 2 % of noise."""
    rng = np.random.default_rng(seed)
    counts, size = rng.integers(1, 8, (n, 3)).astype(float), rng.uniform(1, 2, (n, 1))
    latency = np.maximum(2.0, counts @ [0.3, 0.5, 0.2] * size[:, 0]) + 1.0
    return [counts, size], latency * rng.lognormal(0, 0.02, n)


def spearman(a, b) -> float:
    return float(np.asarray(stats.spearmanr(a, b))[0])


@pytest.fixture(scope="module")
def fitted() -> Predictor:
    return fit(*networks(80))


def test_networks_not_measured_are_predicted_within_their_intervals(fitted):
    held_out, truth = networks(1000, seed=1)
    found = fitted.predict(held_out)
    assert np.median(np.abs(found.latency_ms / truth - 1)) < 0.03
    assert 0.7 < ((found.low_ms <= truth) & (truth <= found.high_ms)).mean() < 0.9
    assert (found.low_ms < found.latency_ms).all()
    assert (found.latency_ms < found.high_ms).all()


def test_coverage_is_the_level_on_average_over_draws():
    shares = []
    for seed in range(12):
        groups, latency = networks(330, seed)
        found = fit([g[:30] for g in groups], latency[:30]).predict([g[30:] for g in groups])
        shares.append(((found.low_ms <= latency[30:]) & (latency[30:] <= found.high_ms)).mean())
    assert 0.72 < np.mean(shares) < 0.88


def test_a_tenth_of_outliers_changes_little(fitted):
    groups, latency = networks(80)
    spoilt = latency.copy()
    spoilt[::10] *= 2
    held_out, truth = networks(300, seed=2)
    clean, robust = fitted.predict(held_out), fit(groups, spoilt).predict(held_out)
    error = [np.abs(p.latency_ms / truth - 1).mean() for p in (clean, robust)]
    assert error[1] < error[0] + 0.02  # a plain mean would be 10 % off


def test_the_order_of_measurements_does_not_matter(fitted):
    groups, latency = networks(80)
    order = np.random.default_rng(0).permutation(80)
    held_out, _ = networks(50, seed=3)
    other = fit([g[order] for g in groups], latency[order])
    np.testing.assert_allclose(other.predict(held_out).latency_ms, fitted.predict(held_out).latency_ms, rtol=1e-4)


def test_intervals_are_wider_for_networks_unlike_those_measured(fitted):
    near, _ = networks(50, seed=4)
    far = [near[0] + 20, near[1] + 3]

    def width(p: Prediction) -> np.ndarray:
        return p.high_ms / p.low_ms

    assert width(fitted.predict(far)).min() > np.median(width(fitted.predict(near)))


def test_more_certainty_takes_wider_intervals(fitted):
    held_out, _ = networks(50, seed=5)
    narrow, wide = (fitted.predict(held_out, level=v) for v in (0.5, 0.9))
    assert (wide.low_ms < narrow.low_ms).all()
    assert (narrow.high_ms < wide.high_ms).all()
    np.testing.assert_array_equal(narrow.latency_ms, wide.latency_ms)


def test_a_saved_predictor_comes_back_to_the_last_bit(fitted, tmp_path):
    held_out, _ = networks(100, seed=6)
    fitted.save(tmp_path / "device.npz")
    before, after = fitted.predict(held_out), Predictor.load(tmp_path / "device.npz").predict(held_out)
    for name in ("latency_ms", "low_ms", "high_ms"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


def test_the_same_predictor_is_the_same_file(fitted, tmp_path):
    fitted.save(tmp_path / "a.npz")
    Predictor.load(tmp_path / "a.npz").save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, kernel=np.array([{"any": "object"}], dtype=object), format=np.int64(1))
    return buffer.getvalue()


@pytest.mark.parametrize("damage", ["missing", "half", "empty", "text", "pickled", "version"])
def test_a_file_that_is_no_predictor_is_refused(fitted, tmp_path, damage):
    path = tmp_path / "device.npz"
    fitted.save(path)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "version":
        np.savez(path, format=np.int64(99))
    else:
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"hi", "pickled": pickled()}[damage])
    with pytest.raises(LatencyError, match=r"device\.npz: not a saved predictor.*Fit it again"):
        Predictor.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, y: (g, np.where(np.arange(len(y)) == 3, np.nan, y)), "latency 3 is nan: milliseconds above 0"),
        (lambda g, y: (g, np.where(np.arange(len(y)) == 2, 0.0, y)), r"latency 2 is 0\.0"),
        (lambda g, y: (g, -y), "latency 0 is -"),
        (lambda g, y: (g, y[:-1]), r"latencies have shape \(9,\): one for each of 10"),
        (lambda g, y: ([v[:4] for v in g], y[:4]), "4 measured networks: at least 5 are needed"),
        (lambda g, y: ([g[0], g[1][:-1]], y), r"shapes \[\(10, 3\), \(9, 1\)\]"),
        (lambda g, y: (g[0], y), r"each is \[networks, columns\].*put it in a list"),
        (lambda g, y: ([], y), r"groups of features have shapes \[\]"),
        (lambda g, y: ([g[0], g[1] * np.inf], y), r"group 1 of features is inf at \[0, 0\]"),
    ],
)
def test_measurements_that_cannot_be_used_are_refused(change, message):
    with pytest.raises(LatencyError, match=message):
        fit(*change(*networks(10)))


def test_other_features_than_fitted_on_are_refused(fitted):
    groups, _ = networks(3)
    with pytest.raises(LatencyError, match=r"features have \[2, 1\] columns by group.*fitted on \[3, 1\]"):
        fitted.predict([groups[0][:, :2], groups[1]])
    with pytest.raises(LatencyError, match="is nan"):
        fitted.predict([groups[0] * np.nan, groups[1]])


@pytest.mark.parametrize("level", [0.0, 1.0, 1.5, 0.95])
def test_more_certainty_than_the_measurements_give_is_refused(level):
    groups, latency = networks(10)
    with pytest.raises(LatencyError, match=r"from 10 measurements"):
        fit(groups, latency).predict(groups, level=level)


def test_leave_one_out_errors_are_those_of_leaving_one_out(fitted):
    groups, latency = networks(12)
    scaling = Scaling.of(groups)
    scaled, log_ms = scaling(groups), np.log(latency)
    whole = condition(fitted.kernel, scaling, scaled, log_ms)
    errors = []
    for i in range(12):
        rest = np.delete(np.arange(12), i)
        one = condition(fitted.kernel, scaling, [g[rest] for g in scaled], log_ms[rest])
        own, across = [g[[i]] for g in scaled], fitted.kernel.between([g[[i]] for g in scaled], one.known)
        mean = one.level_log_ms + across @ one.weights
        variance = fitted.kernel.variance(own) - across @ one.inverse @ across.T + fitted.kernel.noise
        errors.append(float(abs(log_ms[i] - mean[0]) / variance[0, 0] ** 0.25))
    np.testing.assert_allclose(whole.errors, np.sort(errors), rtol=0.02)  # the level is a mean with one more


def test_the_gradient_of_the_likelihood_is_its_gradient():
    groups, latency = networks(15)
    scaled, y = Scaling.of(groups)(groups), np.log(latency)
    relations, noise = module._relations(scaled, scaled), np.random.default_rng(0).uniform(1, 3, 15)
    log = np.array([-1.0, -0.5, -2.0, -1.5, 0.1, -0.2, -2.5, -4.0])
    numeric = optimize.approx_fprime(log, lambda v: module._surprise(v, relations, y, noise)[0], 1e-6)
    np.testing.assert_allclose(module._surprise(log, relations, y, noise)[1], numeric, rtol=1e-3, atol=1e-3)


def test_the_variance_is_the_diagonal_of_the_covariance(fitted):
    scaled = fitted.scaling(networks(20, seed=7)[0])
    np.testing.assert_allclose(fitted.kernel.variance(scaled), np.diag(fitted.kernel.between(scaled, scaled)))


@pytest.mark.parametrize("name", ["digits_mixed", "mobilenet_v3_32"])
def test_features_add_up_to_what_the_network_costs(name):
    space = load_space(name, input_shape=(32, 32, 3), classes=10)
    network = space.decode(space.largest())
    found, graph = features(network), network.flat()
    assert sum(np.expm1(v) for k, v in found.items() if k.endswith("_macs")) == pytest.approx(cost.macs(graph))
    assert np.expm1(found["parameters"]) == pytest.approx(cost.parameters(graph))
    assert np.expm1(found["input_elements"]) == pytest.approx(np.prod(network.input))
    ops = sum(v for k, v in found.items() if k.endswith("_ops"))
    assert ops == sum(type(op).__name__ != "Norm" for op in graph.ops)
    assert 0 < found["depth"] <= ops


def test_groups_of_features_are_those_of_each_network():
    space = load_space("mobilenet_v3_32", input_shape=(32, 32, 3), classes=10)
    genotypes = space.sample(np.random.default_rng(0), 5)
    totals, macs = feature_groups(space, genotypes)
    every = [features(space.decode(g)) for g in genotypes]
    varies = [name for name in every[0] if len({f[name] for f in every}) > 1]
    assert {tuple(f[name] for f in every) for name in varies} <= {tuple(c) for c in totals.T}
    constant = space.price(genotypes, space.costs(cost.macs)) - np.expm1(macs).sum(1)
    assert np.ptp(constant) < 1  # positions where no two networks differ are left out
