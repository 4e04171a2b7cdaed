"""Whether a supernet is worth trusting: which networks are asked, the statistics, and the rule."""

import itertools

import msgspec
import numpy as np
import pytest
import tiny
from scipy import stats

from nas import cost
from nas.agreement import Agreement
from nas.errors import RunError
from nas.fidelity import Fidelity, answer, draw, enough, judge, limits, read_fidelity, table, verdict_of
from nas.ops import weights
from nas.supernet import Supernet


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return tiny.elastic_space(tmp_path_factory.mktemp("space"))


def judged(space, alone, supernet=None, *, images=1000, seed=0, **settings) -> Fidelity:
    """Of networks that classify so many images correctly alone, `alone` [n] or [n, seeds], each at random ones."""
    rng = np.random.default_rng(seed)
    alone = np.asarray(alone).reshape(len(alone), -1)
    right = np.array([[rng.permutation(images) < count for count in of] for of in alone])
    supernet = alone[:, 0].tolist() if supernet is None else supernet
    settings = {"epochs": 5.0, "supernet_epochs": 5.0} | settings
    return judge(space, draw(space, len(alone), seed=0), supernet, right, **settings)


# which networks


def test_networks_are_spread_evenly_over_the_logarithm_of_macs(space):
    drawn = draw(space, 40, seed=0)
    macs = space.costs(cost.macs)
    low, high = (np.log(space.price(g[None], macs)[0]) for g in (space.smallest(), space.largest()))
    places = (np.log(space.price(drawn, macs)) - low) / (high - low)
    assert stats.kstest(places, "uniform").statistic < 0.08  # 40 random ones: 0.13 half of the time
    assert len(np.unique(drawn, axis=0)) == 40
    np.testing.assert_array_equal(drawn, space.canonical(drawn))


def test_more_networks_are_the_same_and_others(space):
    np.testing.assert_array_equal(draw(space, 40, seed=1)[:13], draw(space, 13, seed=1))
    assert (draw(space, 13, seed=1) != draw(space, 13, seed=2)).any()


def test_of_a_small_space_all_networks_are_drawn(tmp_path):
    small = tiny.space(tmp_path)
    assert len(draw(small, 10_000, seed=0)) == small.count()


def test_a_space_of_one_network_is_that_network_with_weights_of_its_own_shapes(space):
    for genotype in space.sample(np.random.default_rng(0), 10):
        network, only = space.decode(genotype), space.only(genotype)
        assert only.decode(()) == network
        assert (only.count(), only.input) == (1, network.input)
        np.testing.assert_array_equal(only.sample(np.random.default_rng(0), 2), np.empty((2, 0)))
        stored = {name: (w.shape, w.fan_in) for name, w in Supernet(only).weights.items()}
        assert stored == {w.name: (w.shape, w.fan_in) for w in weights(network.flat())}


# the statistics


def test_taus_are_scipys_and_costs_those_of_the_networks(space):
    alone = np.random.default_rng(0).permutation(np.arange(700, 940, 20))
    supernet = (alone + np.random.default_rng(1).normal(0, 40, 12)).astype(int).tolist()
    found = judged(space, alone, supernet)
    graphs = [space.decode(n.genotype).flat() for n in found.networks]
    of = {
        "supernet": supernet,
        "macs": [cost.macs(g) for g in graphs],
        "parameters": [cost.parameters(g) for g in graphs],
    }
    taus = {name: stats.kendalltau(values, alone).statistic for name, values in of.items()}
    assert {name: found.tau[name].tau for name in of} == pytest.approx(taus)
    assert found.beyond_macs.tau == pytest.approx(taus["supernet"] - taus["macs"])
    assert [n.macs for n in found.networks] == of["macs"]
    assert [n.alone for n in found.networks] == [(a,) for a in alone]


def test_pairs_are_told_apart_as_mcnemars_test_tells_them(space):
    rng = np.random.default_rng(0)
    right = rng.random((10, 1, 300)) < np.linspace(0.80, 0.95, 10)[:, None, None]
    found = judge(space, draw(space, 10, seed=0), right.sum((1, 2)).tolist(), right, epochs=1.0, supernet_epochs=1.0)
    apart = 0
    for a, b in itertools.combinations(right[:, 0], 2):
        only_a, only_b = (a & ~b).sum(), (b & ~a).sum()
        apart += bool((only_a - only_b) ** 2 / max(only_a + only_b, 1) > stats.chi2.ppf(0.95, 1))
    assert 0 < apart < found.pairs == 45
    assert found.told_apart == found.ordered["supernet"] == apart


def test_few_images_lower_the_ceiling_and_many_raise_it(space):
    shares = np.linspace(0.80, 0.95, 12)
    few, many = (judged(space, (shares * n).astype(int), images=n) for n in (100, 5_000))
    assert few.ceiling.tau < 0.8 < 0.9 < many.ceiling.tau
    assert few.told_apart < many.told_apart
    assert "100 validation images cannot tell" in " ".join(limits(few))
    assert f"more than about {few.ceiling.tau:.2f}" in " ".join(limits(few))


def test_the_ceiling_is_scipys_tau_with_the_order_on_images_drawn_again(space):
    rng = np.random.default_rng(0)
    right = rng.random((10, 1, 200)) < np.linspace(0.80, 0.95, 10)[:, None, None]
    found = judge(space, draw(space, 10, seed=0), [1] * 10, right, epochs=1.0, supernet_epochs=1.0)
    counts = right[:, 0].sum(1)
    taus = [stats.kendalltau(counts, right[:, 0, rng.integers(0, 200, 200)].sum(1)).statistic for _ in range(400)]
    assert found.ceiling.tau == pytest.approx(np.mean(taus), abs=0.02)
    assert (found.ceiling.low, found.ceiling.high) == pytest.approx(np.quantile(taus, (0.025, 0.975)), abs=0.05)


def test_several_seeds_are_averaged_and_compared_with_one_another(space):
    rng = np.random.default_rng(0)
    alone = np.linspace(700, 900, 12)[:, None] + rng.normal(0, 40, (12, 3))
    found = judged(space, alone.astype(int))
    counts = np.array([n.alone for n in found.networks])
    taus = [stats.kendalltau(a, b).statistic for a, b in itertools.combinations(counts.T, 2)]
    assert found.between_seeds.tau == pytest.approx(np.mean(taus))
    assert found.between_seeds.low < found.between_seeds.tau < found.between_seeds.high
    mean = stats.kendalltau([n.supernet for n in found.networks], counts.mean(1)).statistic
    assert found.tau["supernet"].tau == pytest.approx(mean)
    assert not [line for line in limits(found) if "trained once" in line]


# the rule


@pytest.mark.parametrize(
    ("tau", "beyond_macs", "networks", "told_apart", "verdict"),
    [
        ((0.8, 0.6, 0.9), (0.3, 0.1, 0.5), 24, 0.5, "trustworthy"),
        ((0.3, 0.1, 0.45), (0.5, 0.3, 0.7), 24, 0.5, "trustworthy"),  # weak, but all there is
        ((0.8, 0.6, 0.9), None, 24, 0.5, "trustworthy"),  # MACs are all equal
        ((0.8, 0.6, 0.9), (0.3, 0.1, 0.5), 7, 0.5, "too few networks to tell"),
        ((0.8, 0.6, 0.9), (0.2, -0.1, 0.5), 24, 0.5, "too few networks to tell"),  # not shown to beat MACs
        ((0.4, -0.1, 0.8), (0.5, 0.1, 0.9), 24, 0.5, "too few networks to tell"),  # not shown to beat chance
        ((0.8, 0.6, 0.9), (0.3, 0.1, 0.5), 24, 0.1, "too few images to tell"),
        ((0.1, -0.2, 0.4), (0.3, 0.1, 0.5), 24, 0.1, "too few images to tell"),  # not the supernet's fault
        ((0.9, 0.8, 0.95), (0.02, -0.05, 0.09), 24, 0.5, "no better than counting MACs"),
        ((0.5, 0.2, 0.7), (-0.3, -0.5, -0.1), 24, 0.5, "no better than counting MACs"),
        ((0.1, -0.2, 0.4), (0.3, 0.1, 0.5), 24, 0.5, "not worth trusting"),
        ((-0.6, -0.8, -0.3), (-0.2, -0.3, 0.0), 24, 0.5, "not worth trusting"),
        (None, None, 24, 0.5, "not worth trusting"),  # scores all alike
    ],
)
def test_the_rule(tau, beyond_macs, networks, told_apart, verdict):
    tau, beyond_macs = (None if v is None else Agreement(*v) for v in (tau, beyond_macs))
    assert verdict_of(tau, beyond_macs, networks=networks, told_apart=told_apart) == verdict


def test_each_verdict_is_said_in_words_with_what_to_do(space):
    alone = 700 + 20 * np.random.default_rng(0).permutation(12)  # an order of its own, not that of MACs
    by_macs = np.argsort(np.argsort(space.price(draw(space, 12, seed=0), space.costs(cost.macs))))
    for expected, words, found in (
        ("trustworthy", "is worth trusting: Kendall's tau is 1.00 [1.00, 1.00], ", judged(space, alone)),
        ("no better than counting MACs", "or rank networks by MACs", judged(space, 700 + 20 * by_macs)),
        ("not worth trusting", "Train it longer", judged(space, alone, (-alone).tolist())),
        ("not worth trusting", "it scores all networks alike", judged(space, alone, [500] * 12)),
        ("too few networks to tell", "6 networks are too few to tell: ", judged(space, alone[:6])),
        ("too few images to tell", "tell only 0 of 66 pairs of networks apart", judged(space, [800] * 12)),
    ):
        assert found.verdict == expected
        assert words in answer(found)


def test_how_many_networks_would_tell_follows_the_width_of_the_intervals(space):
    found = judged(space, np.linspace(700, 900, 12).astype(int))
    wide = {"tau": {**found.tau, "supernet": Agreement(0.6, 0.2, 0.9)}, "beyond_macs": Agreement(0.2, -0.2, 0.5)}
    assert enough(msgspec.structs.replace(found, **wide)) == 48  # twice as wide as it may be: four times as many
    no_hope = {"beyond_macs": Agreement(-0.2, -0.5, 0.3)}
    assert enough(msgspec.structs.replace(found, **no_hope)) is None


def test_a_shorter_training_is_said_to_be_one(space):
    found = judged(space, np.arange(700, 940, 20), epochs=5.0, supernet_epochs=20.0)
    assert "for 5 epochs, the supernet for 20: this is not the same recipe" in " ".join(table(found))


def test_the_result_keeps_its_numbers_through_json(space, tmp_path):
    path = tmp_path / "fidelity.json"
    for found in (judged(space, np.arange(700, 940, 20)), judged(space, [800] * 12)):
        path.write_bytes(msgspec.json.encode(found))
        assert read_fidelity(path) == found
    path.write_text("{}")
    with pytest.raises(RunError, match=r"fidelity.json: missing or damaged: .*`nas fidelity"):
        read_fidelity(path)
