"""Each form of correction, where it is the truth, is found and chosen; noise alone chooses none of them."""

import itertools
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest

from nas.latency import FORMS, Correction, Entry, Table, calibrate, op_counts
from nas.latency.calibration import _Anchors, _choose, begins, borders, ends
from nas.ops import Graph, Recorder
from nas.space import Space, load_space

Network = tuple[Graph, ...]


@pytest.fixture(scope="module")
def space() -> Space:
    """With four types of blocks in it."""
    return load_space("digits_mixed", input_shape=(16, 16, 1), classes=10)


@pytest.fixture(scope="module")
def entries(space) -> dict[str, Entry]:
    rng = np.random.default_rng(0)
    return {
        key: Entry(float(rng.lognormal(-4, 0.6)), 0.0, block.label, role, 30)
        for key, (block, role) in space.blocks().items()
    }


@pytest.fixture(scope="module")
def networks(space) -> list[Network]:
    genotypes = space.sample(np.random.default_rng(1), 84)
    return [tuple(b.graph for b in space.decode(g).blocks) for g in genotypes]


def of(correction: Correction, entries: dict[str, Entry], network: Sequence[Graph]) -> float:
    """What a correction says of a network, by its definition."""
    between = [correction.border_ms.get(name, 0.0) for name in borders(network) if name is not None]
    return correction.offset_ms + sum(correction.block_ms(entries[g.key], g) for g in network) + sum(between)


def fitted(
    truth: Callable[[Network], float],
    entries: dict[str, Entry],
    networks: list[Network],
    *,
    anchors: int,
    noise: float = 0.005,
    seed: int = 0,
) -> tuple[Correction, float]:
    """The correction from the first so many networks, and its mean error on the others, which have no noise."""
    noisy = [truth(n) * f for n, f in zip(networks, np.random.default_rng(seed).normal(1, noise, 99), strict=False)]
    found = calibrate(entries, networks[:anchors], noisy[:anchors])
    return found, float(np.mean([abs(of(found, entries, n) / truth(n) - 1) for n in networks[anchors:]]))


def sums(entries: dict[str, Entry]) -> Callable[[Network], float]:
    return lambda network: sum(entries[g.key].latency_ms for g in network)


def test_norms_are_not_counted():
    net = Recorder((4, 4, 8))
    x = net.act(net.norm(net.conv(net.input, "conv", 8), "norm"), "relu")
    net.add(x, net.input)
    assert op_counts(net.graph()) == {"conv": 1, "act": 1, "add": 1}


def test_a_block_begins_and_ends_with_what_is_not_folded_away():
    net = Recorder((4, 4, 8))
    net.norm(net.conv(net.conv(net.input, "depthwise", 8, kernel=3, groups=8), "project", 8), "norm")
    assert (begins(net.graph()), ends(net.graph())) == ("depthwise", "conv")
    nothing = Graph((4, 4, 8))
    assert (begins(nothing), ends(nothing)) == (None, None)
    assert borders([net.graph(), nothing, net.graph()]) == [None, None, "conv > depthwise"]


def test_one_anchor_fits_a_scale_and_few_do_not_choose_freely(entries, networks):
    total = sums(entries)
    one = calibrate(entries, networks[:1], [1.1 * total(networks[0])])
    assert (one.scale, one.form, one.leave_one_out, one.tried) == (pytest.approx(1.1), "scale", None, ())
    three = calibrate(entries, networks[:3], [1.1 * total(n) for n in networks[:3]])
    assert (three.scale, three.form, three.offset_ms, three.op_ms) == (pytest.approx(1.1), "scale", 0.0, {})
    nine = calibrate(entries, networks[:9], [1.1 * total(n) for n in networks[:9]])
    assert [t.form for t in nine.tried] == ["scale", "affine", "weights"]


def test_a_scale_is_the_choice_where_it_is_the_truth(entries, networks):
    found, error = fitted(lambda n: 1.3 * sums(entries)(n), entries, networks, anchors=20)
    assert found.form == "scale"
    assert found.scale == pytest.approx(1.3, rel=0.005)
    assert error < 0.005


def test_an_offset_is_found(entries, networks):
    found, error = fitted(lambda n: 1.2 * sums(entries)(n) - 0.02, entries, networks, anchors=16, noise=0.001)
    assert found.form == "affine"
    assert found.offset_ms == pytest.approx(-0.02, rel=0.1)
    assert error < 0.002


def megabytes(network: Network) -> float:
    from nas.cost import parameters

    return sum(map(parameters, network)) * 4 / 2**20


def test_weights_that_a_network_does_not_find_in_the_cache_are_found(entries, networks):
    """Norms, folded away, are the difference between parameters and weights: 2 % of either here."""
    found, error = fitted(lambda n: sums(entries)(n) + 2.0 * megabytes(n), entries, networks, anchors=16)
    plain = _Anchors.of(entries, networks, np.array([sums(entries)(n) + 2.0 * megabytes(n) for n in networks]))
    affine = plain.predict(plain.fit(FORMS["affine"])) / plain.measured_ms - 1
    assert found.form == "weights"
    assert found.weights_ms == pytest.approx(2.0, rel=0.15)
    assert error < 0.5 * np.abs(affine).mean()


def test_a_dispatch_floor_is_found(space, entries, networks):
    an_op = [entries[k].latency_ms / sum(op_counts(b.graph).values()) for k, (b, _) in space.blocks().items()]
    floor_ms = float(np.quantile(an_op, 0.6))

    def truth(network: Network) -> float:
        return sum(max(entries[g.key].latency_ms, floor_ms * sum(op_counts(g).values())) for g in network) + 0.01

    found, error = fitted(truth, entries, networks, anchors=24)
    plain = np.array([sums(entries)(n) for n in networks])
    true = np.array([truth(n) for n in networks])
    affine = np.polynomial.Polynomial.fit(plain, true, 1)(plain) / true - 1
    assert found.form == "dispatch floor"
    assert found.floor_ms == pytest.approx(floor_ms, rel=0.35)
    assert error < 0.5 * np.abs(affine).mean()


def test_a_type_of_block_that_is_slower_in_company_is_found(entries, networks):
    def truth(network: Network) -> float:
        return sum(
            entries[g.key].latency_ms * (1.6 if entries[g.key].kind == "shufflenet_v2" else 1.0) for g in network
        )

    found, error = fitted(truth, entries, networks, anchors=24)
    assert found.form == "block kinds"
    assert found.kind_scale["shufflenet_v2"] / found.kind_scale["mbconv"] == pytest.approx(1.6, rel=0.1)
    assert error < 0.02


def test_an_op_that_costs_more_in_company_is_found(entries, networks):
    def truth(network: Network) -> float:
        return sum(entries[g.key].latency_ms + 0.01 * op_counts(g).get("add", 0) for g in network)

    found, error = fitted(truth, entries, networks, anchors=24)
    assert found.form in ("op kinds", "neighbours")  # an add ends its block: both can tell
    assert error < 0.02


def test_what_one_block_costs_another_is_found(entries, networks):
    kinds = sorted({name for n in networks for name in borders(n) if name})
    assert len(kinds) > 3
    worst = max(kinds, key=lambda kind: np.std([borders(n).count(kind) for n in networks]))

    def truth(network: Network) -> float:
        return sums(entries)(network) + 0.03 * borders(network).count(worst)

    found, error = fitted(truth, entries, networks, anchors=30, noise=0.002)
    assert found.form == "neighbours"
    assert found.border_ms[worst] - np.mean([v for k, v in found.border_ms.items() if k != worst]) > 0.015
    assert error < 0.02


def test_noise_leaves_the_simple_form(entries, networks):
    forms = [
        fitted(lambda n: 1.1 * sums(entries)(n), entries, networks, anchors=16, noise=0.03, seed=seed)[0].form
        for seed in range(10)
    ]
    assert forms.count("scale") >= 8  # 54 of 60 seeds


def test_every_form_that_was_tried_is_kept_with_its_error(entries, networks):
    found, _ = fitted(lambda n: sums(entries)(n) + 2.0 * megabytes(n), entries, networks, anchors=16)
    assert [t.form for t in found.tried] == list(FORMS)
    chosen = next(t for t in found.tried if t.form == found.form)
    assert chosen.error == found.leave_one_out
    assert all(t.error_low <= t.error <= t.error_high for t in found.tried)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Correction) == found


def test_leave_one_out_error_is_that_of_fitting_without_each_anchor(entries, networks):
    rng = np.random.default_rng(2)
    measured = np.array([sums(entries)(n) for n in networks[:5]]) * rng.normal(1, 0.05, 5)
    anchors = _Anchors.of(entries, networks[:5], measured)
    errors = []
    for i in range(5):
        rest = np.arange(5) != i
        columns = np.c_[[sums(entries)(n) for n in networks[:5]], np.ones(5)] / measured[:, None]
        solution = np.linalg.lstsq(columns[rest], np.ones(4), rcond=None)[0]
        errors.append(columns[i] @ solution - 1)
    np.testing.assert_allclose(anchors.left_out(FORMS["affine"]), errors, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_fit_predicts_is_what_its_correction_says_of_each_network(form, entries, networks):
    rng = np.random.default_rng(3)
    measured = np.array([sums(entries)(n) + 0.02 * len(n) for n in networks]) * rng.normal(1, 0.02, len(networks))
    anchors = _Anchors.of(entries, networks, measured)
    found = anchors.fit(FORMS[form])
    each = [of(found, entries, n) for n in networks]
    np.testing.assert_allclose(anchors.predict(found), each, rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_table_prices_every_form_alike_alone_and_by_the_thousand(form, space, entries, networks):
    rng = np.random.default_rng(4)
    measured = np.array([sums(entries)(n) + 0.02 * len(n) for n in networks]) * rng.normal(1, 0.02, len(networks))
    found = _Anchors.of(entries, networks, measured).fit(FORMS[form])
    table = Table(
        device="a test", runtime="none", runtime_version="1", precision="float32", threads=1, batch=1, hardware="none",
        space=space.name, space_digest=space.digest, date="", command="", overhead_ms=0.0, anchors=(), entries=entries,
        correction=found,
    )  # fmt: skip
    genotypes = space.sample(rng, 500)
    prices = table.price(space, genotypes)
    assert prices.tolist() == [table.network_ms(space.decode(g)) for g in genotypes]
    blocks_ms, once_ms = table.parts_ms(space.decode(genotypes[0]))
    assert sum(blocks_ms) + once_ms == pytest.approx(prices[0])
    low, fastest, high, slowest = table.reachable(space)
    assert low <= prices.min() <= prices.max() <= high
    assert [low, high] == [table.network_ms(space.decode(g)) for g in (fastest, slowest)]


def test_a_freer_form_must_be_better_by_more_than_its_error():
    simple, freer = list(itertools.islice(FORMS, 2))
    errors = np.random.default_rng(0).uniform(0.5, 1.5, 16)
    assert _choose({simple: errors, freer: 0.5 * errors}) == freer
    assert _choose({simple: errors, freer: 0.99 * errors}) == simple
    assert _choose({simple: errors, freer: errors}) == simple
    assert _choose({}) == simple
