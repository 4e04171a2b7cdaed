"""The laws of population-based training's decisions, on scores made up here: no network is trained."""

import dataclasses

import numpy as np
import pytest

from nas.train.population import State, best, draw, generation_rng, truncation

RANGES = [(1e-4, 10.0), (0.0, 0.3)]
WRITTEN = [1e-3, 0.0]


def evolution(members=8, replaced=0.25, resampled=0.25, ranges=RANGES, written=WRITTEN):
    return truncation(ranges, written, members=members, replaced=replaced, resampled=resampled)


def same(a: State, b: State) -> bool:
    rest = [dataclasses.replace(s, values=None) for s in (a, b)]
    return rest[0] == rest[1] and np.array_equal(a.values, b.values)


def history(seed, score, generations=12, **settings):
    """The states of a population whose scores are `score(rng, state)`."""
    of = evolution(**settings)
    states = [of.init(generation_rng(seed, 0))]
    for generation in range(1, generations):
        scores = score(np.random.default_rng([seed, generation]), states[-1])
        states.append(of.tell(generation_rng(seed, generation), states[-1], scores))
    return states


def noisy(rng, state):
    scores = rng.integers(0, 50, len(state.parents)).astype(float)
    scores[rng.random(len(scores)) < 0.3] = np.nan
    return scores


def test_the_same_seed_and_scores_give_the_same_lineage_and_another_seed_another():
    one, again, other = (history(seed, noisy) for seed in (3, 3, 4))
    assert all(map(same, one, again))
    assert not all(map(same, one, other))


def test_a_lineage_can_be_gone_on_with_from_any_state():
    states = history(0, noisy)
    of = evolution()
    for generation in range(1, len(states)):
        scores = noisy(np.random.default_rng([0, generation]), states[generation - 1])
        assert same(of.tell(generation_rng(0, generation), states[generation - 1], scores), states[generation])


def test_the_first_member_begins_with_what_is_written_and_the_others_differ():
    first = evolution().init(generation_rng(0, 0))
    assert first.values[0].tolist() == WRITTEN
    assert len(np.unique(first.values, axis=0)) == 8
    assert (first.source, first.parents) == (-1, tuple(range(8)))


@pytest.mark.parametrize("members", [2, 3, 4, 8, 20])
def test_values_stay_in_their_ranges_and_parents_in_the_population_whatever_the_scores(members):
    low, high = np.array(RANGES).T
    for seed in range(20):
        for state in history(seed, noisy, members=members):
            assert np.all((low <= state.values) & (state.values <= high))
            assert all(0 <= parent < members for parent in state.parents)


def test_the_worst_quarter_takes_a_parent_of_the_best_quarter_and_all_others_stay_as_they_are():
    of = evolution()
    before = of.init(generation_rng(0, 0))
    scores = np.array([5, 1, 8, 3, 7, 2, 6, 4.0])  # best: 2 and 4, worst: 1 and 5
    parents = set()
    for seed in range(20):
        after = of.tell(generation_rng(seed, 1), before, scores)
        for member in (0, 2, 3, 4, 6, 7):
            assert after.parents[member] == member
            assert np.array_equal(after.values[member], before.values[member])
        assert {after.parents[1], after.parents[5]} <= {2, 4}
        parents |= {after.parents[1], after.parents[5]}
        assert (after.generation, after.interval, after.source) == (1, 1, 0)
    assert parents == {2, 4}


def test_explored_values_are_the_parents_times_a_factor_or_drawn_anew():
    before = evolution().init(generation_rng(0, 0))
    scores = np.arange(8.0)
    for seed in range(30):
        after = evolution(resampled=0.0).tell(generation_rng(seed, 1), before, scores)
        for member in (0, 1):
            of_parent = before.values[after.parents[member]]
            choices = np.clip(of_parent * np.array([[0.8], [1.2]]), *np.array(RANGES).T)
            assert np.all((after.values[member] == choices).any(0))
    drawn = [evolution(resampled=1.0).tell(generation_rng(s, 1), before, scores).values[0] for s in range(300)]
    assert np.median(np.log10(np.array(drawn)[:, 0])) == pytest.approx(-1.5, abs=0.4)  # evenly in the logarithm
    assert np.median(np.array(drawn)[:, 1]) == pytest.approx(0.15, abs=0.03)


def test_a_member_that_diverged_never_wins_and_never_goes_on():
    of = evolution()
    before = of.init(generation_rng(0, 0))
    for sound in range(1, 8):
        scores = np.full(8, np.nan)
        scores[:sound] = 1.0
        after = of.tell(generation_rng(0, 1), before, scores)
        assert best(scores) < sound
        assert all(parent < sound for parent in after.parents)


def test_a_population_that_diverged_as_a_whole_survives_with_other_values_from_the_weights_it_had():
    of = evolution()
    sound = of.tell(generation_rng(0, 1), of.init(generation_rng(0, 0)), np.arange(8.0))
    state = sound
    for generation in range(2, 6):
        after = of.tell(generation_rng(0, generation), state, np.full(8, np.nan))
        assert (after.interval, after.source, after.parents) == (sound.interval, sound.source, sound.parents)
        assert after.generation == generation
        assert not np.any(after.values == state.values)
        state = after
    assert of.tell(generation_rng(0, 6), state, np.arange(8.0)).interval == sound.interval + 1


def test_a_share_of_half_replaces_half_and_one_below_a_member_replaces_one():
    scores = np.arange(8.0)
    for share, count in ((0.5, 4), (0.26, 2), (0.01, 1)):
        of = evolution(replaced=share)
        after = of.tell(generation_rng(0, 1), of.init(generation_rng(0, 0)), scores)
        assert sum(parent != member for member, parent in enumerate(after.parents)) == count


def test_a_range_drawn_from_holds_its_ends():
    rng = np.random.default_rng(0)
    values = np.stack([draw(rng, [(1e-3, 3e-3), (0.0, 1.0)]) for _ in range(2000)])
    assert values.min(0) == pytest.approx([1e-3, 0], abs=1e-3)
    assert values.max(0) == pytest.approx([3e-3, 1], abs=1e-3)
    assert np.all(values >= [1e-3, 0])
    assert np.all(values <= [3e-3, 1])


def descend(weights, rates, steps=10):
    """Gradient descent on x^2 / 2 from `weights`, [members]: |1 - rate| decides, so a rate of 1 is right."""
    for _ in range(steps):
        weights = weights * (1 - rates)
    return weights


def test_on_a_toy_the_right_learning_rate_is_found_from_a_bad_one():
    """Members begin far too low; a population of copies that never explores stays there."""
    ranges, written = [(1e-4, 1.9)], [1e-3]
    found, reached, alone = [], [], []
    for seed in range(10):
        of = evolution(ranges=ranges, written=written, resampled=0.0)
        state = of.init(generation_rng(seed, 0))
        state = dataclasses.replace(state, values=np.full((8, 1), 1e-3))  # all as bad as the first
        weights = np.ones(8)
        for generation in range(1, 80):
            weights = descend(weights, state.values[:, 0])
            scores = -np.log(np.abs(weights) + 1e-300)
            state = of.tell(generation_rng(seed, generation), state, scores)
            weights = weights[list(state.parents)]
        found.append(state.values[best(scores), 0])
        reached.append(scores.max())
        alone.append(10 * 79 * -np.log(1 - 1e-3))
    assert np.all(np.array(found) > 0.1)  # a hundred times what it began with
    assert np.min(reached) > 20 * np.max(alone)
