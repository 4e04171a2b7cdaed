import importlib.util
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from synthetic_tables import a_table

from nas.errors import LatencyError, SpaceError, UnmeasuredBlock
from nas.latency import Transfer, transfer
from nas.space import Space, load_space

BENCHMARK = Path(__file__).parents[2] / "experiments" / "benchmarks" / "few_shot.py"


def devices(n: int = 300, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Features [n, 4] and latencies [n, 4] of devices that weigh them differently, the last one like none of them."""
    rng = np.random.default_rng(seed)
    columns = rng.uniform(1, 5, (n, 4))
    weights = np.array([[1, 1, 1, 1], [2, 1, 1, 3], [1, 3, 1, 2], [3, 1, 2, 1]], float)
    return [np.log(columns)], columns @ weights.T * rng.lognormal(0, 0.01, (n, 4))


@pytest.fixture(scope="module")
def known() -> tuple[list[np.ndarray], np.ndarray, transfer.Prior]:
    features, latency = devices()
    return features, latency, transfer.learn_prior(features, latency[:, :3])


def rank_correlation(a, b) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def test_a_scaled_copy_of_a_known_device_is_recovered(known):
    features, latency, prior = known
    rows = np.arange(12)
    for device in range(3):
        truth = 7.3 * latency[:, device]
        found = transfer.fit(features, latency[:, :3], truth[rows], rows, prior=prior).predict(features, latency[:, :3])
        assert np.abs(found.latency_ms / truth - 1).mean() < 0.02
        np.testing.assert_allclose(transfer.most_similar(latency[:, :3], truth[rows], rows), truth)


def test_a_device_unlike_each_known_one_is_predicted_better_than_by_the_most_similar(known):
    features, latency, prior = known
    rows, rest, truth = np.arange(15), np.arange(15, 300), latency[:, 3]
    found = transfer.fit(features, latency[:, :3], truth[rows], rows, prior=prior)
    ours = found.predict([f[rest] for f in features], latency[rest, :3]).latency_ms
    baseline = transfer.most_similar(latency[:, :3], truth[rows], rows)[rest]
    assert rank_correlation(ours, truth[rest]) > rank_correlation(baseline, truth[rest]) + 0.02


def test_the_unit_of_the_measurements_is_that_of_the_predictions(known):
    features, latency, prior = known
    rows = np.arange(10)
    ms, us = (
        transfer.fit(features, latency[:, :3], u * latency[rows, 3], rows, prior=prior).predict(
            features, latency[:, :3]
        )
        for u in (1, 1000)
    )
    for name in ("latency_ms", "low_ms", "high_ms"):
        np.testing.assert_allclose(1000 * getattr(ms, name), getattr(us, name), rtol=1e-8)


def test_the_order_of_networks_and_of_devices_does_not_matter(known):
    features, latency, _ = known
    rows = np.arange(10)
    first = transfer.fit(features, latency[:, :3], latency[rows, 3], rows).predict(features, latency[:, :3])
    order, swapped = np.random.default_rng(0).permutation(300), [2, 0, 1]
    where = np.argsort(order)[rows]
    moved, other = [f[order] for f in features], latency[order][:, swapped]
    second = transfer.fit(moved, other, latency[rows, 3], where).predict(moved, other)
    for name in ("latency_ms", "low_ms", "high_ms"):
        np.testing.assert_allclose(getattr(second, name), getattr(first, name)[order], rtol=2e-3)
    a = transfer.most_similar(latency[:, :3], latency[rows, 3], rows)
    np.testing.assert_allclose(transfer.most_similar(other, latency[rows, 3], where), a[order])


def test_fewer_measurements_never_give_narrower_intervals_on_average(known):
    features, latency, prior = known
    widths = []
    for count in (8, 20, 60):
        width = []
        for seed in range(20):
            rows = np.random.default_rng(seed).permutation(300)[:count]
            fitted = transfer.fit(features, latency[:, :3], latency[rows, 3], rows, prior=prior)
            found = fitted.predict(features, latency[:, :3])
            width.append(np.log(found.high_ms / found.low_ms).mean())
        widths.append(np.mean(width))
    assert widths[0] > widths[1] > widths[2]


def test_intervals_hold_their_share_on_average(known):
    features, latency, prior = known
    for count in (10, 20, 50):
        shares = []
        for seed in range(30):
            order = np.random.default_rng(seed).permutation(300)
            rows, rest = order[:count], order[count:]
            fitted = transfer.fit(features, latency[:, :3], latency[rows, 3], rows, prior=prior)
            found = fitted.predict([f[rest] for f in features], latency[rest, :3])
            shares.append(((found.low_ms <= latency[rest, 3]) & (latency[rest, 3] <= found.high_ms)).mean())
        assert 0.75 < np.mean(shares) < 0.87


def test_chosen_networks_leave_less_variance_than_random_ones(known):
    features, latency, prior = known
    truth = latency[:, 3]

    def left(rows) -> float:
        process = transfer.fit(features, latency[:, :3], truth[rows], rows, prior=prior).predictor
        groups = process.scaling([np.log(latency[:, :3]), *features])
        across = process.kernel.between(groups, process.known)
        return float((process.kernel.variance(groups) - ((across @ process.inverse) * across).sum(1)).mean())

    chosen = transfer.choose(features, latency[:, :3], 10, prior=prior)
    assert len(set(chosen.tolist())) == 10
    assert left(chosen) < min(left(np.random.default_rng(s).permutation(300)[:10]) for s in range(20))


def test_a_choice_of_fewer_is_the_beginning_of_one_of_more(known):
    features, latency, prior = known
    few, more = (transfer.choose(features, latency[:, :3], n, prior=prior) for n in (5, 12))
    assert few.tolist() == more[:5].tolist()


def test_one_known_device_is_enough(known):
    features, latency, _ = known
    rows = np.arange(20)
    found = transfer.fit(features, latency[:, :1], latency[rows, 3], rows).predict(features, latency[:, :1])
    baseline = transfer.most_similar(latency[:, :1], latency[rows, 3], rows)
    assert rank_correlation(found.latency_ms, latency[:, 3]) > rank_correlation(baseline, latency[:, 3])


def test_a_saved_transfer_comes_back_to_the_last_bit(known, tmp_path):
    features, latency, prior = known
    fitted = transfer.fit(features, latency[:, :3], latency[:10, 3], np.arange(10), prior=prior)
    fitted.save(tmp_path / "device.npz")
    again = Transfer.load(tmp_path / "device.npz")
    a, b = (t.predict(features, latency[:, :3]) for t in (fitted, again))
    assert (a.latency_ms.tolist(), a.low_ms.tolist()) == (b.latency_ms.tolist(), b.low_ms.tolist())
    fitted.predictor.save(tmp_path / "process.npz")
    with pytest.raises(LatencyError, match="not a saved predictor: 'share'"):
        Transfer.load(tmp_path / "process.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measured_ms": np.ones(3), "indices": [0, 1, 2]}, "3 measured networks: at least 5"),
        ({"measured_ms": np.r_[np.nan, np.ones(9)]}, "latency 0 is nan"),
        ({"measured_ms": np.zeros(10)}, r"latency 0 is 0\.0: milliseconds above 0"),
        ({"measured_ms": np.ones(9)}, r"shape \(9,\): one for each of 10"),
        ({"indices": [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]}, "different whole numbers in 0..299"),
        ({"indices": [0, 1, 2, 3, 4, 5, 6, 7, 8, 300]}, "different whole numbers in 0..299"),
        ({"indices": [0, 1, 2, 3, 4, 5, 6, 7, 8, -1]}, "different whole numbers in 0..299"),
        ({"indices": np.arange(10) + 0.5}, "different whole numbers in 0..299"),
        ({"known_ms": np.zeros((300, 3))}, r"known_ms has 900 values like 0\.0"),
        ({"known_ms": np.full((300, 3), np.nan)}, "known_ms has 900 values like nan"),
        ({"known_ms": np.ones((300, 0))}, r"known_ms has shape \(300, 0\).*at least one device"),
        ({"known_ms": np.ones(300)}, r"known_ms has shape \(300,\)"),
        ({"known_ms": np.ones((299, 3))}, r"shapes \[\(299, 3\), \(300, 4\)\]"),
        ({"features": [np.full((300, 4), np.nan)]}, "is nan at"),
    ],
)
def test_input_that_cannot_be_used_is_refused(known, change, message):
    features, latency, _ = known
    good = {
        "features": features,
        "known_ms": latency[:, :3],
        "measured_ms": latency[:10, 3],
        "indices": np.arange(10),
    }
    with pytest.raises(LatencyError, match=message):
        transfer.fit(**good | change)


def test_other_devices_than_fitted_on_are_refused(known):
    features, latency, prior = known
    fitted = transfer.fit(features, latency[:, :3], latency[:10, 3], np.arange(10), prior=prior)
    with pytest.raises(LatencyError, match=r"\[2, 4\] columns by group.*fitted on \[3, 4\]"):
        fitted.predict(features, latency[:, :2])


def test_the_simple_answer_gets_more_weight_where_it_is_right(known):
    features, latency, prior = known
    shares = []
    for truth in (3 * latency[:, 1], latency[:, 3]):
        shares.append(transfer.fit(features, latency[:, :3], truth[:30], np.arange(30), prior=prior).share)
    assert 0 <= shares[0] < shares[1] <= 1


def test_a_design_is_half_random_and_half_chosen_for_those(known):
    features, latency, prior = known
    rows, drawn = transfer.design(features, latency[:, :3], 11, np.random.default_rng(0), prior=prior)
    assert len(set(rows.tolist())) == 11
    assert drawn.tolist() == [True] * 6 + [False] * 5
    chosen = transfer.choose(features, latency[:, :3], 5, prior=prior, given=rows[:6])
    assert chosen.tolist() == rows[6:].tolist()


def test_errors_on_chosen_networks_do_not_make_intervals(known):
    features, latency, prior = known
    rows, drawn = transfer.design(features, latency[:, :3], 20, np.random.default_rng(0), prior=prior)
    truth = latency[rows, 3].copy()
    fitted = transfer.fit(features, latency[:, :3], truth, rows, prior=prior, calibrating=drawn)
    assert len(fitted.predictor.errors) == drawn.sum()
    every = transfer.fit(features, latency[:, :3], truth, rows, prior=prior)
    assert set(fitted.predictor.errors) < set(every.predictor.errors)


@pytest.mark.parametrize("count", [0, -1, 301])
def test_a_number_of_networks_that_cannot_be_chosen_is_refused(known, count):
    features, latency, prior = known
    with pytest.raises(LatencyError, match=f"{count} networks to choose: between 1 and 300"):
        transfer.choose(features, latency[:, :3], count, prior=prior)


# spaces and tables


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits_mixed", input_shape=(16, 16, 1), classes=10)


def test_tables_and_a_few_genotypes_predict_a_space(space):
    tables, new = tuple(a_table(space, s) for s in range(3)), a_table(space, 7)
    known = transfer.KnownDevices(space, tables)
    rng = np.random.default_rng(0)
    measured, others = space.sample(rng, 30), space.sample(rng, 300)
    found = transfer.fit_space(known, measured, new.price(space, measured)).predict(others)
    truth = new.price(space, others)
    prices = np.stack([t.price(space, np.concatenate([measured, others])) for t in tables], 1)
    baseline = transfer.most_similar(prices, new.price(space, measured), np.arange(30))[30:]
    assert np.abs(found.latency_ms / truth - 1).mean() < np.abs(baseline / truth - 1).mean()
    assert 0.65 < ((found.low_ms <= truth) & (truth <= found.high_ms)).mean() < 0.95


def test_tables_and_genotypes_that_do_not_fit_are_refused(space):
    table = a_table(space, 0)
    measured = space.sample(np.random.default_rng(0), 10)
    with pytest.raises(LatencyError, match="no table of a known device"):
        transfer.KnownDevices(space, ())
    with pytest.raises(LatencyError, match=r"shape \(9,\): one for each of 10"):
        transfer.fit_space(transfer.KnownDevices(space, (table,)), measured, np.ones(9))
    with pytest.raises(SpaceError, match="Is it of another space"):
        transfer.fit_space(transfer.KnownDevices(space, (table,)), measured[:, :-1], np.ones(10))
    less = msgspec.structs.replace(table, entries=dict(list(table.entries.items())[1:]))
    with pytest.raises(UnmeasuredBlock):
        transfer.fit_space(transfer.KnownDevices(space, (less,)), measured, np.ones(10))


# real devices


@pytest.fixture(scope="module")
def tasks(real_data):
    spec = importlib.util.spec_from_file_location("few_shot", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["few_shot"] = module
    spec.loader.exec_module(module)
    yield module.load(real_data)
    del sys.modules["few_shot"]


@pytest.mark.slow  # 15 s
def test_ten_measurements_of_a_real_device_beat_the_most_similar_one(tasks):
    found = tasks["nb201"]([10], 3, 1500)["random 10"]
    assert found["difference"]["spearman"]["mean"] > 0.02
    assert found["difference"]["within_10"]["mean"] > 0.05


def test_latency_of_a_gpu_bound_by_launches_is_predicted_beyond_sums_of_blocks(tasks):
    found = tasks["ofa_2080ti_batch1"]([250], 1, None)["random 250"]
    assert found["ours"]["spearman"]["mean"] > 0.70
    assert found["ours"]["within_10"]["mean"] > 0.70
    assert found["difference"]["spearman"]["mean"] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("task", "margin"), [("nb201", 0.03), ("accel_tpuv2", 0.0)])
def test_the_bars_of_transfer(tasks, task, margin):
    found = tasks[task]([10, 20, 50], 20, 3000)
    for count in (10, 20, 50):
        for how in ("random", "chosen", "designed"):
            row = found[f"{how} {count}"]
            assert row["difference"]["spearman"]["mean"] > margin
            assert row["difference"]["within_10"]["low"] > 0
        assert 0.75 < found[f"random {count}"]["ours"]["coverage_80"]["mean"] < 0.85
        assert 0.74 < found[f"designed {count}"]["ours"]["coverage_80"]["mean"] < 0.85


@pytest.mark.slow
def test_the_bars_of_one_device(tasks):
    found = tasks["ofa_2080ti_batch1"]([1000], 3, None)["random 1000"]["ours"]
    assert found["spearman"]["mean"] > 0.74
    assert found["within_10"]["mean"] > 0.74
    assert 0.75 < found["coverage_80"]["mean"] < 0.85
