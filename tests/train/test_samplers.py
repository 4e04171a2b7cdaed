"""Laws that hold for every sampler of the table, and what sets each of them apart."""

import math

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from nas import config, cost
from nas.errors import ConfigError
from nas.space import load_space
from nas.train.samplers import SAMPLERS, sampler
from nas.train.samplers.strict_fairness import fair_values

PHASES = ("kernel", "depth", "expand")
STEPS = 40

FREE = """
[stem]
block = "conv_stem"
width = 4
[[stage]]
block = "mbconv"
depth = 2
width = 4
kernel = [3, 5, 7]
expand = [1, 2, 4]
act = "relu"
[head]
block = "classifier"
width = 8
"""


BLOCKS = """
[stem]
block = "conv_stem"
width = 4
[[stage]]
block = ["identity", { mbconv = { kernel = 3, expand = 2 } }, { mbconv = { kernel = 5, expand = 6 } }]
depth = 3
width = 4
act = ["relu", "hard_swish"]
tied = ["act"]
[head]
block = "classifier"
width = 8
"""


@pytest.fixture(scope="module")
def spaces(tmp_path_factory):
    """Spaces by name: full of conditions; tiny; one in which every choice counts; one of blocks fixed in place."""
    folder = tmp_path_factory.mktemp("spaces")
    for name, text in {"free": FREE, "blocks": BLOCKS}.items():
        (folder / f"{name}.toml").write_text(text)
    return {
        "digits_mixed": load_space("digits_mixed", input_shape=(16, 16, 1)),
        "tiny": tiny.space(folder),
        **{name: load_space(str(folder / f"{name}.toml"), input_shape=(8, 8, 1)) for name in ("free", "blocks")},
    }


@pytest.fixture(scope="module")
def mixed(spaces):
    return spaces["digits_mixed"]


def make(name, space, **settings):
    return sampler(config.Train(sampler=name, **settings), space, steps=STEPS)


def rng(step, seed=0):
    return np.random.default_rng([seed, step])


def macs(space, genotypes):
    return space.price(genotypes, space.costs(cost.macs))


def noise(genotypes):
    """A loss that depends on the genotype alone, and on nothing that a sampler could know."""
    return np.array([np.random.default_rng(g.tolist()).random() for g in genotypes])


# every sampler


@pytest.mark.parametrize("step", [0, 1, STEPS // 2, STEPS - 1])
@pytest.mark.parametrize("space", ["digits_mixed", "tiny", "free", "blocks"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_canonical_genotypes_of_the_space(name, space, step, spaces):
    space = spaces[space]
    draw = make(name, space)(step, rng(step), noise)
    assert draw.genotypes.dtype == np.uint8
    assert draw.genotypes.ndim == 2
    assert len(draw.genotypes) >= 1
    np.testing.assert_array_equal(space.canonical(space.check(draw.genotypes)), draw.genotypes)
    if draw.distil:
        np.testing.assert_array_equal(draw.genotypes[0], space.largest())
        assert len(draw.genotypes) > 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_draw_depends_on_step_generator_and_score_alone(name, mixed):
    draw = make(name, mixed)
    whole = [draw(step, rng(step), noise).genotypes for step in range(STEPS)]
    resumed = make(name, mixed)
    for step in (29, 30, 31, 7):  # another sampler, entered late, and asked out of order
        np.testing.assert_array_equal(resumed(step, rng(step), noise).genotypes, whole[step])
    other = draw(STEPS - 1, rng(STEPS - 1, seed=1), noise).genotypes
    assert (other != whole[-1]).any()


@pytest.mark.parametrize("name", SAMPLERS)
def test_asks_for_scores_at_most_once_a_step_and_of_networks_of_the_space(name, mixed):
    asked = []

    def score(genotypes):
        asked.append(genotypes)
        return noise(genotypes)

    make(name, mixed, random_subnets=2, candidates=4)(STEPS - 1, rng(0), score)
    assert len(asked) <= 1
    for genotypes in asked:
        assert genotypes.shape == (8, len(mixed.sizes))
        np.testing.assert_array_equal(mixed.canonical(mixed.check(genotypes)), genotypes)


@pytest.mark.parametrize("name", SAMPLERS)
def test_in_the_end_every_value_of_every_choice_is_trained(name, mixed):
    draw = make(name, mixed)
    drawn = np.concatenate([draw(STEPS - 1, rng(i), noise).genotypes for i in range(60)])
    for gene, choice in enumerate(mixed.choices):
        assert set(drawn[:, gene]) == set(range(len(choice.values))), choice.name


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"strict_fairness", "strict_fairness_distilled"}))
def test_too_few_subnets_are_refused_before_the_training(name, mixed):
    with pytest.raises(ConfigError, match=rf"train\.random_subnets is -1; sampler `{name}` needs [01] or more"):
        make(name, mixed, random_subnets=-1)


def test_an_unknown_sampler_is_told_with_the_nearest(mixed):
    with pytest.raises(ConfigError, match=r"unknown sampler `sandwitch`\. Did you mean `sandwich`"):
        make("sandwitch", mixed)


# sandwich, single path


@pytest.mark.parametrize("subnets", [0, 1, 5])
def test_a_sandwich_is_the_largest_the_smallest_and_random_ones(mixed, subnets):
    draw = make("sandwich", mixed, random_subnets=subnets)(3, rng(3), noise)
    np.testing.assert_array_equal(draw.genotypes[:2], [mixed.largest(), mixed.smallest()])
    assert len(draw.genotypes) == 2 + subnets
    assert draw.distil


def test_a_single_path_is_uniform(mixed):
    draw = make("single_path", mixed, random_subnets=4000)(0, rng(0), noise)
    assert not draw.distil
    block = next(i for i, c in enumerate(mixed.choices) if c.name == "stage1/layer1/block")
    share = np.bincount(draw.genotypes[:, block]) / 4000
    np.testing.assert_allclose(share, 0.5, atol=0.03)  # four standard deviations


# strict fairness


def counts(sizes, steps):
    """How often each value of each choice is dealt, [choices][values], over `steps`."""
    dealt = np.concatenate([fair_values(sizes, step, rng(step)) for step in steps])
    return [np.bincount(column, minlength=size) for column, size in zip(dealt.T, sizes, strict=True)]


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple), start=st.integers(0, 10**6))
def test_strictly_fair_in_each_step_where_it_divides_and_over_steps_always(sizes, start):
    k = max(sizes)
    for size, used in zip(sizes, counts(sizes, [start]), strict=True):
        assert used.sum() == k
        if k % size == 0:
            assert set(used) == {k // size}
    for length in (1, 2, 5):
        for used in counts(sizes, range(start, start + length)):
            assert used.max() - used.min() <= 1
    for used in counts(sizes, range(start, start + math.lcm(*sizes))):
        assert len(set(used)) == 1


def test_the_pairing_of_values_is_random():
    drawn = np.concatenate([fair_values((3, 3), step, rng(step)) for step in range(600)])
    pairs = np.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)
    np.testing.assert_allclose(pairs / len(drawn), 1 / 9, atol=0.02)


def test_each_step_trains_every_value_once_where_every_choice_counts(spaces):
    draw = make("strict_fairness", spaces["free"])
    for step in range(10):
        genotypes = draw(step, rng(step), noise).genotypes
        np.testing.assert_array_equal(np.sort(genotypes, axis=0), np.arange(3)[:, None] + np.zeros(4))


def test_with_conditions_what_is_dealt_is_fair_and_what_is_trained_is_canonical(mixed):
    draw = make("strict_fairness", mixed)
    for step in range(5):
        dealt = fair_values(mixed.sizes, step, rng(step))
        assert len(dealt) == max(mixed.sizes)
        np.testing.assert_array_equal(draw(step, rng(step), noise).genotypes, mixed.canonical(dealt))


def test_distilled_the_largest_teaches_what_is_dealt_fairly(mixed):
    fair, distilled = (make(name, mixed) for name in ("strict_fairness", "strict_fairness_distilled"))
    for step in range(5):
        draw = distilled(step, rng(step), noise)
        assert draw.distil
        np.testing.assert_array_equal(draw.genotypes[0], mixed.largest())
        np.testing.assert_array_equal(draw.genotypes[1:], fair(step, rng(step), noise).genotypes)


# progressive shrinking


def used(space, draw, steps, option, repeats=12):
    """The values of an option that are taken in `steps`, where it counts."""
    values = set()
    for step in steps:
        for seed in range(repeats):
            for genotype in draw(step, rng(step, seed), noise).genotypes:
                described = space.describe(genotype).items()
                values |= {v for name, v in described if name.rpartition("/")[2] == option}
    return values


def test_phases_set_options_free_one_after_another_from_the_largest_value_down(mixed):
    draw = make("progressive_shrinking", mixed, random_subnets=2)
    quarter = STEPS // 4  # a phase for the largest network, and three options
    for step in range(quarter):
        first = draw(step, rng(step), noise)
        np.testing.assert_array_equal(first.genotypes, mixed.largest()[None])
        assert not first.distil

    def seen(option, start, end):
        return used(mixed, draw, (quarter + start, quarter + end - 1), option)

    whole = {"kernel": {3, 5, 7}, "depth": {1, 2, 3}, "expand": {2, 4}}
    assert seen("depth", 0, quarter) == {3}
    assert seen("expand", 0, 2 * quarter) == {4}
    assert seen("kernel", 0, quarter) == whole["kernel"]
    assert seen("depth", quarter, quarter + quarter // 2) == {3, 2}
    assert seen("depth", quarter + quarter // 2, 2 * quarter) == whole["depth"]
    assert seen("expand", 2 * quarter, 3 * quarter) == whole["expand"]
    assert seen("kernel", 2 * quarter, 3 * quarter) == whole["kernel"]
    for option, values in {"block": {"mbconv", "shufflenet_v2"}, "se": {False, True}}.items():  # in no phase
        assert seen(option, 0, 3 * quarter) == values


def test_within_a_phase_the_smallest_kernel_comes_last(spaces):
    space = spaces["free"]
    draw = make("progressive_shrinking", space, phases=("expand", "kernel"))
    third = STEPS / 3
    early = [s for s in range(STEPS) if third <= s < 1.5 * third]
    assert used(space, draw, early, "expand") == {4, 2}
    assert used(space, draw, early, "kernel") == {7}
    late = [s for s in range(STEPS) if 2 * third <= s < 2.5 * third]
    assert used(space, draw, late, "kernel") == {7, 5}
    assert used(space, draw, late, "expand") == {4, 2, 1}


def test_values_that_are_no_numbers_come_free_by_their_macs(spaces):
    space = spaces["blocks"]
    draw = make("progressive_shrinking", space, phases=("block", "act"))
    big, small = "mbconv kernel=5 expand=6", "mbconv kernel=3 expand=2"
    blocks = [used(space, draw, [step], "block") for step in (0, STEPS // 3 + 1, STEPS // 2 + 1)]
    assert blocks == [{big}, {big, small}, {big, small, "identity"}]
    assert used(space, draw, [STEPS // 2], "act") == {"relu"}  # both cost the same: the largest network keeps its own
    assert used(space, draw, [STEPS - 1], "act") == {"relu", "hard_swish"}


@pytest.mark.parametrize(
    ("name", "phases"),
    [
        ("digits_mixed", ("kernel", "depth", "expand")),
        ("tiny", ("depth", "expand", "width")),
        ("free", ("kernel", "expand")),
        ("blocks", ("block", "act")),
    ],
)
def test_phases_that_are_not_given_are_those_that_the_space_has(name, phases, spaces):
    space = spaces[name]
    mine, wanted = (make("progressive_shrinking", space, **given) for given in ({}, {"phases": phases}))
    for step in range(STEPS):
        np.testing.assert_array_equal(mine(step, rng(step), noise).genotypes, wanted(step, rng(step), noise).genotypes)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (("kernel", "width"), r'names `width`, but space \'digits_mixed\' .* Set train.phases = \["kernel"\]'),
        (("kernal",), "names `kernal`.*Did you mean `kernel`"),
        (("kernel", "depth", "kernel"), r'`kernel` twice.*Set train.phases = \["kernel", "depth"\]'),
        ((), "phases is empty.*depth"),
    ],
)
def test_phases_must_be_options_of_the_space(mixed, phases, message):
    with pytest.raises(ConfigError, match=message):
        make("progressive_shrinking", mixed, phases=phases)


# attentive


def attend(space, name, score, steps, **settings):
    """For every step: what was scored [subnets, candidates, genes], and what of it was picked [subnets, genes]."""
    scored, picked = [], []
    draw = make(name, space, **settings)
    subnets, candidates = settings["random_subnets"], settings["candidates"]

    def recording(genotypes):
        scored.append(genotypes.reshape(subnets, candidates, -1))
        return score(genotypes)

    for step in range(steps):
        out = draw(step, rng(step), recording)
        np.testing.assert_array_equal(out.genotypes[:2], [space.largest(), space.smallest()])
        assert out.distil
        picked.append(out.genotypes[2:])
    return np.array(scored), np.array(picked)


@pytest.mark.parametrize(("name", "best"), [("attentive_best_up", np.argmin), ("attentive_worst_up", np.argmax)])
def test_attentive_sampling_picks_by_the_score(mixed, name, best):
    scored, picked = attend(mixed, name, noise, 10, random_subnets=3, candidates=5)
    for candidates, choice in zip(scored.reshape(30, 5, -1), picked.reshape(30, -1), strict=True):
        np.testing.assert_array_equal(choice, candidates[best(noise(candidates))])


def test_attentive_targets_follow_the_macs_of_the_space_and_candidates_are_near_them(mixed):
    scored, _ = attend(mixed, "attentive_best_up", noise, 150, random_subnets=2, candidates=3)
    price = macs(mixed, scored)  # [steps, subnets, candidates]
    everywhere = macs(mixed, mixed.sample(np.random.default_rng(9), 5000))
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    span = np.ptp(everywhere)
    np.testing.assert_allclose(
        np.quantile(price.mean(-1), shares), np.quantile(everywhere, shares), rtol=0, atol=0.06 * span
    )
    assert np.quantile(np.ptp(price, axis=-1), 0.95) < 0.02 * span


def test_candidates_are_different_networks_where_there_are_enough(spaces):
    scored, _ = attend(spaces["tiny"], "attentive_best_up", noise, 5, random_subnets=2, candidates=6)
    for candidates in scored.reshape(10, 6, -1):
        assert len(np.unique(candidates, axis=0)) == 6


@pytest.mark.parametrize("name", ["attentive_best_up", "attentive_worst_up"])
def test_a_network_whose_loss_is_nan_is_not_picked(mixed, name):
    def score(genotypes):
        losses = noise(genotypes)
        losses[::2] = np.nan
        return losses

    scored, picked = attend(mixed, name, score, 5, random_subnets=2, candidates=4)
    for candidates, choice in zip(scored.reshape(10, 4, -1), picked.reshape(10, -1), strict=True):
        assert any((choice == c).all() for c in candidates[1::2])


def test_attentive_sampling_without_candidates_is_refused(mixed):
    with pytest.raises(ConfigError, match=r"train\.candidates is 0; sampler `attentive_worst_up` needs 1 or more"):
        make("attentive_worst_up", mixed, candidates=0)
