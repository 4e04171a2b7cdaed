"""Predictor in the loop: what holds beyond the laws of every strategy."""

import numpy as np
import pytest
import search_toy as toy
from test_strategies import lived
from threadpoolctl import threadpool_info, threadpool_limits

from nas.search import Problem, nsga2, predictor_search, trial_rng
from nas.search.pareto import hypervolume, nondominated
from nas.search.predictor_search import _REMEMBERED, worst_of
from nas.search.problem import choose

REFERENCE = (1.0, 18.0)


def costs_of(problem, genotype, fails=lambda genotype: False):
    error = np.nan if fails(genotype) else 1 - toy.correct(genotype) / toy.TOTAL
    return np.array([error, *problem.cheap(genotype[None])[0]])


def volume(problem, strategy, trials, seed, fails=lambda genotype: False):
    """The hypervolume of a search without lag."""
    state, seen, costs = strategy.init(), set(), []
    for k in range(trials):
        rng = trial_rng(seed, k)
        genotype = choose(problem, rng, strategy.ask(rng, state, 16), seen)
        assert genotype is not None
        seen.add(genotype.tobytes())
        costs.append(costs_of(problem, genotype, fails))
        state = strategy.tell(state, genotype, costs[-1])
    return hypervolume(np.array(costs), REFERENCE)


def test_thirty_trials_find_more_than_three_times_as_many_of_nsga2():
    problem = toy.problem()
    ours = [volume(problem, predictor_search(problem.sizes, population=10, problem=problem), 30, s) for s in range(2)]
    theirs = [volume(problem, nsga2(problem.sizes, population=20), 90, s) for s in range(2)]
    assert np.mean(ours) > np.mean(theirs)


def test_a_small_space_is_solved():
    problem = toy.problem((3, 2, 3, 2, 3))
    everything = np.stack(np.unravel_index(np.arange(108), problem.sizes), 1).astype(np.uint8)
    everything = everything[problem.feasible(everything)]
    whole = hypervolume(np.array([costs_of(problem, g) for g in everything]), REFERENCE)
    strategy = predictor_search(problem.sizes, population=8, problem=problem)
    assert volume(problem, strategy, 40, 0) > 0.99 * whole


def test_regions_that_fail_are_left():
    problem = toy.problem()
    strategy = predictor_search(problem.sizes, population=10, problem=problem)
    failing = volume(problem, strategy, 25, 0, fails=lambda genotype: genotype[2] == 0)
    assert failing > 0.9 * volume(problem, nsga2(problem.sizes, population=20), 25, 0, lambda g: g[2] == 0)


@pytest.mark.parametrize("known", [True, False])
def test_proposals_are_new_feasible_and_different(known):
    problem = toy.problem()
    strategy = predictor_search(problem.sizes, population=8, problem=problem if known else None)
    state = strategy.init()
    for k in range(20):
        genotype = problem.canonical(strategy.ask(trial_rng(0, k), state, 4))[0]
        state = strategy.tell(state, genotype, costs_of(problem, genotype))
    proposals = strategy.ask(trial_rng(0, 20), state, 16)
    assert len(np.unique(proposals, axis=0)) == 16
    assert not {g.tobytes() for g in proposals} & {g.tobytes() for g in state.trials.genotypes}
    if known:
        assert problem.feasible(proposals).all()
        spread = problem.cheap(proposals[:8])[:, 0]
        assert np.ptp(spread) > 1.0  # not eight times the same network in disguise


def test_what_is_remembered_is_bounded_and_keeps_the_front():
    rng = np.random.default_rng(0)
    costs = rng.random((_REMEMBERED + 300, 2))
    strategy = predictor_search((4,) * 10, population=100_000)
    state = strategy.init()
    for row in costs:
        state = strategy.tell(state, rng.integers(0, 4, 10).astype(np.uint8), row)
    assert len(state.trials) == _REMEMBERED
    front = {tuple(row) for row in costs[nondominated(costs)]}
    assert front <= {tuple(row) for row in state.trials.costs}


def test_other_features_help_where_they_tell_the_error():
    """The error is a function of a number that the genes only give in products."""

    def work(genotypes):
        return np.prod(1.0 + genotypes, axis=1)

    def error(genotypes):
        return 0.5 / (1 + np.log(work(genotypes)))

    problem = Problem(
        sizes=(4,) * 6,
        canonical=lambda genotypes: genotypes,
        cheap=lambda genotypes: 1.0 + genotypes[:, :2].sum(1, keepdims=True),
        feasible=lambda genotypes: np.ones(len(genotypes), bool),
        smallest=np.zeros(6, np.uint8),
        digest="work",
        total=1000,
    )
    found = []
    for features in (None, lambda genotypes: work(genotypes)[:, None]):
        strategy = predictor_search(problem.sizes, population=6, problem=problem, features=features)
        state, seen, least = strategy.init(), set(), []
        for k in range(12):
            genotype = choose(problem, trial_rng(0, k), strategy.ask(trial_rng(0, k), state, 8), seen)
            seen.add(genotype.tobytes())
            least.append(error(genotype[None])[0])
            state = strategy.tell(state, genotype, np.array([least[-1], *problem.cheap(genotype[None])[0]]))
        found.append(min(least))
    assert found[1] <= found[0]


def test_it_learns_the_same_from_the_same_trials_however_often_it_is_asked():
    strategy = predictor_search((3, 4, 2, 5), population=6)
    costs = np.random.default_rng(2).random((20, 2))
    asked, state = strategy.init(), strategy.init()
    for k, row in enumerate(costs):
        strategy.ask(trial_rng(9, k), asked, 3)
        genotype = np.array([k % 3, k % 4, k % 2, k % 5], np.uint8)
        asked, state = strategy.tell(asked, genotype, row), strategy.tell(state, genotype, row)
    np.testing.assert_array_equal(strategy.ask(trial_rng(0, 20), asked, 9), strategy.ask(trial_rng(0, 20), state, 9))


def test_its_linear_algebra_runs_on_one_thread_and_leaves_the_setting_as_it_was():
    def threads():
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    seen = []

    def features(genotypes):
        seen.append(threads())
        return 1.0 + genotypes

    with threadpool_limits(2, "blas"):
        before = threads()
        strategy = predictor_search((3, 4, 2, 5), population=6, features=features)
        state = lived(strategy, np.random.default_rng(2).random((8, 2)))
        strategy.ask(trial_rng(0, 8), state, 3)
        assert threads() == before
    assert seen
    assert all(count == {1} for count in seen)


def test_one_objective_alone():
    strategy = predictor_search((3, 4, 2, 5), population=6)
    state = lived(strategy, np.random.default_rng(3).random((15, 1)))
    assert strategy.ask(trial_rng(0, 15), state, 5).shape == (5, 4)


def test_networks_that_err_at_random_do_not_set_the_scale():
    rng = np.random.default_rng(0)
    usual = 0.1 * np.exp(0.2 * rng.standard_normal(20))
    assert worst_of(np.r_[usual, [0.9, 0.9, np.nan]]) == pytest.approx(worst_of(np.r_[usual, [0.5, 0.5]]))
    assert 0.12 < worst_of(np.r_[usual, [0.9, 0.9]]) < 0.3
    assert worst_of(usual) <= 1.1 * usual.max()
    assert worst_of(np.array([np.nan, 0.0])) == 1.0
