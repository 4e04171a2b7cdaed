"""Laws that hold for every strategy of the table."""

import numpy as np
import pytest
import search_toy as toy

from nas.search import STRATEGIES, Front, InlineExecutor, search, trial_rng
from nas.search.pareto import hypervolume_2d

SIZES = (3, 1, 4, 2, 5, 1)


def lived(strategy, costs, seed=0):
    """The state after one trial per row of `costs`, each with the strategy's own first proposal."""
    state = strategy.init()
    for k, row in enumerate(costs):
        state = strategy.tell(state, strategy.ask(trial_rng(seed, k), state, 4)[0], row)
    return state


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return STRATEGIES[request.param](SIZES, population=8)


@pytest.mark.parametrize("told", [0, 1, 7, 8, 40])
@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_stays_in_the_space(strategy, told, objectives):
    state = lived(strategy, np.random.default_rng(1).random((told, objectives)))
    proposals = strategy.ask(trial_rng(0, told), state, 50)
    assert proposals.shape == (50, len(SIZES))
    assert proposals.dtype == np.uint8
    assert (proposals < np.array(SIZES)).all()


def test_same_key_same_answer_and_the_state_is_left_alone(strategy):
    costs = np.random.default_rng(2).random((30, 2))
    state = lived(strategy, costs)
    once = strategy.ask(trial_rng(7, 30), state, 20)
    strategy.tell(state, once[0], np.zeros(2))
    np.testing.assert_array_equal(strategy.ask(trial_rng(7, 30), state, 20), once)
    np.testing.assert_array_equal(strategy.ask(trial_rng(7, 30), lived(strategy, costs), 20), once)
    assert (strategy.ask(trial_rng(7, 31), state, 20) != once).any()
    assert (strategy.ask(trial_rng(8, 30), state, 20) != once).any()


def test_survives_trials_that_all_fail(strategy):
    state = lived(strategy, np.full((30, 2), np.nan))
    assert (strategy.ask(trial_rng(0, 30), state, 20) < np.array(SIZES)).all()


def test_a_space_of_one_genotype_is_no_trap(strategy):
    only = STRATEGIES[strategy.identity.partition("(")[0]]((1, 1), population=2)
    assert not only.ask(trial_rng(0, 9), lived(only, np.zeros((9, 2))), 5).any()


def test_identity_names_what_the_proposals_depend_on():
    for name in ("ageing_evolution", "nsga2"):
        assert STRATEGIES[name](SIZES, population=8).identity != STRATEGIES[name](SIZES, population=9).identity


def test_nsga2_forgets_failures_first():
    nsga2 = STRATEGIES["nsga2"](SIZES, population=4)
    rows = [[np.nan, 1], [1, 2], [2, 1], [np.nan, 0], [3, 3], [0, 4]]
    state = lived(nsga2, np.array(rows, float))
    assert sorted(map(tuple, state.costs.tolist())) == [(0, 4), (1, 2), (2, 1), (3, 3)]


def test_ageing_evolution_forgets_the_oldest_however_good():
    ageing = STRATEGIES["ageing_evolution"](SIZES, population=3)
    state = lived(ageing, np.array([[0, 0], [1, 1], [2, 2], [3, 3]], float))
    assert state.costs[:, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["ageing_evolution", "nsga2"])
def test_beats_random_on_a_constrained_toy(name, tmp_path):
    """Hypervolume after 150 trials, mean over 3 seeds, of the same problem and seeds."""

    def mean(name):
        volumes = []
        for seed in range(3):
            problem = toy.problem()
            trials = search(
                problem,
                STRATEGIES[name](problem.sizes, population=20),
                InlineExecutor(toy.evaluator),
                trials=150,
                lag=4,
                seed=seed,
                journal_path=tmp_path / f"{name}{seed}.jsonl",
            )
            assert len(Front.of(trials)) > 3
            volumes.append(hypervolume_2d(np.array([list(t.costs.values()) for t in trials]), (1.0, 18.0)))
        return np.mean(volumes)

    assert mean(name) > 1.1 * mean("random")
