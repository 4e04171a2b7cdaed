"""Laws that hold for every strategy of the table, and what each has of its own."""

import inspect
import math
import sys
import typing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import search_toy as toy

from nas.errors import ConfigError
from nas.search import (
    STRATEGIES,
    Front,
    InlineExecutor,
    Trial,
    check_settings,
    feasible_only,
    grid,
    make_strategy,
    nsga2,
    random_search,
    reinforce,
    search,
    sms_emoa,
    successive_halving,
    trial_rng,
    warm_start,
)
from nas.search.nsga3 import das_dennis, reference_directions
from nas.search.pareto import hypervolume
from nas.search.problem import choose, with_shares

SIZES = (3, 1, 4, 2, 5, 1)


def lived(strategy, costs, seed=0):
    """The state after one trial per row of `costs`, each with the strategy's own first proposal."""
    state = strategy.init()
    for k, row in enumerate(costs):
        state = strategy.tell(state, strategy.ask(trial_rng(seed, k), state, 4)[0], row)
    return state


def sizes_of(strategy, sizes=SIZES):
    """With the gene that picks a share of the images, where the strategy has one."""
    return (*sizes, len(strategy.shares)) if len(strategy.shares) > 1 else sizes


def arrays(state):
    """Every array in a state."""
    if isinstance(state, np.ndarray):
        return [state]
    inner = state if isinstance(state, tuple) else vars(state).values() if hasattr(state, "__dict__") else ()
    return [a for s in inner for a in arrays(s)]


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return STRATEGIES[request.param](SIZES, population=8)


@pytest.mark.parametrize("told", [0, 1, 7, 8, 40])
@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_stays_in_the_space(strategy, told, objectives):
    state = lived(strategy, np.random.default_rng(1).random((told, objectives)))
    proposals = strategy.ask(trial_rng(0, told), state, 50)
    assert proposals.shape == (50, len(sizes_of(strategy)))
    assert proposals.dtype == np.uint8
    assert (proposals < np.array(sizes_of(strategy))).all()


def test_same_key_same_answer_and_the_state_is_left_alone(strategy):
    costs = np.random.default_rng(2).random((30, 2))
    state = lived(strategy, costs)
    before = [a.copy() for a in arrays(state)]
    once = strategy.ask(trial_rng(7, 30), state, 20)
    strategy.tell(state, once[0], np.zeros(2))
    for now, then in zip(arrays(state), before, strict=True):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_array_equal(strategy.ask(trial_rng(7, 30), state, 20), once)
    np.testing.assert_array_equal(strategy.ask(trial_rng(7, 30), lived(strategy, costs), 20), once)
    if not strategy.identity.startswith("grid"):  # it draws nothing
        assert (strategy.ask(trial_rng(7, 31), state, 20) != once).any()
        assert (strategy.ask(trial_rng(8, 30), state, 20) != once).any()


def test_survives_trials_that_all_fail(strategy):
    state = lived(strategy, np.full((30, 2), np.nan))
    assert (strategy.ask(trial_rng(0, 30), state, 20) < np.array(sizes_of(strategy))).all()


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("values", [[0.0], [0.0, 1.0], [0.0, 1e-300, 1e12], [0.0, 1.0, 2.0, np.inf, np.nan]])
def test_survives_costs_that_are_equal_extreme_or_not_finite(strategy, values, objectives):
    state = lived(strategy, np.random.default_rng(4).choice(values, (40, objectives)))
    assert (strategy.ask(trial_rng(0, 40), state, 20) < np.array(sizes_of(strategy))).all()


def test_a_failure_never_wins(strategy):
    """Fresh trials by a fixed schedule, every other one failed: no more of a failure is in proposals than of others."""
    rng = np.random.default_rng(3)
    state, failed = strategy.init(), np.array([2, 0, 3, 1, 4, 0], np.uint8)
    for k in range(60):
        genotype = failed if k % 2 else rng.integers(0, (2, 1, 3, 1, 4, 1)).astype(np.uint8)
        if len(strategy.shares) > 1:
            genotype = np.append(genotype, np.uint8(0))
        state = strategy.tell(state, genotype, np.full(2, np.nan) if k % 2 else rng.random(2))
    proposals = strategy.ask(trial_rng(0, 60), state, 64)[:, : len(SIZES)]
    assert (proposals == failed).all(axis=1).mean() <= 0.05
    assert (proposals == failed).mean(axis=0)[[0, 2, 4]].max() < 0.6


def test_a_space_of_one_genotype_is_no_trap(strategy):
    only = STRATEGIES[strategy.identity.partition("(")[0]]((1, 1), population=2)
    assert not only.ask(trial_rng(0, 9), lived(only, np.zeros((9, 2))), 5)[:, :2].any()


IDENTITIES = {name: {"population": 9} for name in STRATEGIES if name not in ("random", "grid", "reinforce")}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_names_what_the_proposals_depend_on(name):
    assert STRATEGIES[name](SIZES, population=8).identity != STRATEGIES[name](SIZES, population=9).identity


def test_identities_differ():
    assert len({s(SIZES, population=8).identity for s in STRATEGIES.values()}) == len(STRATEGIES)
    for more in ({"target": 3.0}, {"beta": -0.1}, {"learning_rate": 0.2}, {"memory": 0.8}):
        assert reinforce(SIZES, **more).identity != reinforce(SIZES).identity
    for more in ({"eta": 4}, {"rungs": 2}, {"explorer": nsga2(SIZES, population=4)}):
        assert (
            successive_halving(SIZES, population=8, **more).identity
            != STRATEGIES["successive_halving"](SIZES, population=8).identity
        )


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_has_a_population_of_its_own_where_none_is_asked_for(name):
    made = partial(make_strategy, STRATEGIES[name], toy.problem())
    usual = inspect.signature(STRATEGIES[name]).parameters["population"].default
    assert made().identity == made(population=usual or None).identity
    if name in IDENTITIES:
        assert made(population=9).identity not in (made().identity, made(population=8).identity)


BAD = {
    "int": [0, -1, 10**9, float("inf"), float("nan")],
    "float": [0.0, -1.0, 1e300, 1e-300, float("inf"), float("-inf"), float("nan")],
}
NUMBERS = [
    (name, number, value)
    for name, factory in STRATEGIES.items()
    for number, hint in typing.get_type_hints(factory).items()
    if number in inspect.signature(factory).parameters and number not in ("sizes", "problem", "features", "explorer")
    if name not in ("random", "grid", "reinforce") or number != "population"  # which they leave alone
    for value in BAD["float" if "float" in str(hint) else "int"]
]


@pytest.mark.parametrize(("name", "number", "value"), NUMBERS)
def test_a_number_is_refused_at_once_or_the_strategy_works_with_it(name, number, value):
    """By the factory, so that an experiment is refused when it is read and not after training."""
    try:
        strategy = STRATEGIES[name](SIZES, **{"population": 8, number: value})
    except ValueError as e:
        told = str(e)
    else:
        told = number
        assert math.isfinite(value)
        state = lived(strategy, np.random.default_rng(1).random((40, 2)))
        proposals = strategy.ask(trial_rng(0, 40), state, 50)
        assert (proposals < np.array(sizes_of(strategy))).all()
        assert all(np.isfinite(a[~np.isneginf(a)]).all() for a in arrays(state) if a.dtype.kind == "f")
    assert number in told


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ageing_evolution", {"tournament": 0}),
        ("ageing_evolution", {"tournament": 9}),
        ("reinforce", {"target": 0}),
        ("reinforce", {"beta": 0.1}),
        ("reinforce", {"memory": 1.0}),
        ("reinforce", {"learning_rate": float("nan")}),
        ("successive_halving", {"rungs": 300}),
        ("successive_halving", {"eta": 100, "rungs": 5}),
        ("nsga2", {"population": 0}),
        ("nsga3", {"population": 10**6}),
    ],
)
def test_settings_that_make_no_sense_are_refused_when_an_experiment_is_read(name, settings):
    settings = {"population": 8, **settings}
    with pytest.raises(ConfigError, match=f"strategy {name}"):
        check_settings(STRATEGIES[name], population=settings.pop("population"), settings=settings)


def operations(strategy, state, trial):
    """How many functions, Python's and C's, one ask and one tell call."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    rng = trial_rng(0, trial)
    sys.setprofile(count)
    try:
        genotype = strategy.ask(rng, state, 8)[0]
        strategy.tell(state, genotype, np.array([trial % 7, trial % 11], float))
    finally:
        sys.setprofile(None)
    return calls


def costs_at(strategy, trials):
    """(calls of an ask and a tell, bytes of the state) after so many trials; the mean of twenty in a row."""
    rng, state, calls, size = np.random.default_rng(0), strategy.init(), dict.fromkeys(trials, 0), {}
    costs = np.round(rng.random((max(trials) + 20, 2)), 1)  # of which few differ: fronts stay as small as they are
    for k, row in enumerate(costs):
        for at in trials:
            if at <= k < at + 20:
                calls[at] += operations(strategy, state, k) / 20
                size[at] = sum(a.nbytes for a in arrays(state))
        genotype = rng.integers(0, sizes_of(strategy)).astype(np.uint8)
        state = strategy.tell(state, genotype, row)
    return [(calls[at], size[at]) for at in trials]


@pytest.mark.parametrize("trials", [(60, 400), pytest.param((1000, 10_000), marks=pytest.mark.slow)])
def test_ask_and_tell_cost_no_more_later(strategy, trials):
    """Counted, not timed. Every array is at most as large as the state, so constant calls on it are constant work."""
    (calls, size), (calls_later, size_later) = costs_at(strategy, trials)
    # bananas remembers up to 512 trials, predictor up to 400 and how each pair of them is alike
    assert size_later <= max(size, 1_500_000 if strategy.identity.startswith("predictor") else 48_000)
    assert calls_later <= 1.25 * calls


def toy_search(name, folder, *, seed, trials=120):
    problem = toy.problem()
    strategy = STRATEGIES[name](problem.sizes, population=16)
    executor = InlineExecutor(toy.evaluator, {"shares": strategy.shares})
    journal = folder / f"{name}.{seed}.{trials}"
    return search(problem, strategy, executor, trials=trials, lag=4, seed=seed, journal_path=journal)


def volume(trials):
    return hypervolume(np.array([list(t.costs.values()) for t in trials]), (1.0, 18.0))


def surely_above_zero(differences):
    """The mean is two standard errors above."""
    return np.mean(differences) > 2 * np.std(differences, ddof=1) / np.sqrt(len(differences))


@pytest.mark.parametrize("name", ["local_search", "ageing_evolution", "nsga2", "nsga3", "sms_emoa", "bananas"])
def test_finds_a_better_front_than_random_search_does(name, tmp_path):
    """By more than a tenth of its hypervolume, after 120 trials under a limit, over 6 seeds."""
    pairs = [[volume(toy_search(n, tmp_path, seed=seed)) for n in (name, "random")] for seed in range(6)]
    assert surely_above_zero([found - 1.1 * bar for found, bar in pairs])


def test_reinforce_finds_a_more_accurate_network_than_random_search_does(tmp_path):
    """It has one reward, so one network: the most accurate under the limit."""
    best = {
        n: [Front.of(toy_search(n, tmp_path, seed=seed)).best().top1 for seed in range(6)]
        for n in ("reinforce", "random")
    }
    assert surely_above_zero(np.subtract(best["reinforce"], best["random"]))


def test_successive_halving_finds_a_better_front_than_random_search_does_with_as_many_images(tmp_path):
    gains = []
    for seed in range(6):
        trials = toy_search("successive_halving", tmp_path, seed=seed, trials=200)
        whole = sum(t.total for t in trials) // toy.TOTAL
        gains.append(
            volume([t for t in trials if t.total == toy.TOTAL])
            - volume(toy_search("random", tmp_path, seed=seed, trials=whole))
        )
    assert surely_above_zero(gains)


def test_grid_ends_at_the_best_of_a_small_space(tmp_path):
    problem = toy.problem((3, 3, 2), limit_ms=5.0)
    trials = search(
        problem,
        grid(problem.sizes),
        InlineExecutor(toy.evaluator),
        trials=99,
        lag=4,
        seed=0,
        journal_path=tmp_path / "j",
    )
    everything = np.stack(np.unravel_index(np.arange(18), problem.sizes), axis=1).astype(np.uint8)
    within = everything[problem.feasible(everything)]
    assert Front.of(trials).best().correct == max(map(toy.correct, within))


# each on its own


def test_nsga2_forgets_failures_first():
    state = lived(nsga2(SIZES, population=4), np.array(FAILURES, float))
    assert sorted(map(tuple, state.costs.tolist())) == [(0, 4), (1, 2), (2, 1), (3, 3)]


FAILURES = [[np.nan, 1], [1, 2], [2, 1], [np.nan, 0], [3, 3], [0, 4]]


def test_sms_emoa_and_nsga3_forget_failures_first():
    for name, elite in (("sms_emoa", lambda state: state), ("nsga3", lambda state: state.elite)):
        state = elite(lived(STRATEGIES[name](SIZES, population=4), np.array(FAILURES, float)))
        assert sorted(map(tuple, state.costs.tolist())) == [(0, 4), (1, 2), (2, 1), (3, 3)], name


def test_ageing_evolution_forgets_the_oldest_however_good():
    ageing = STRATEGIES["ageing_evolution"](SIZES, population=3)
    state = lived(ageing, np.array([[0, 0], [1, 1], [2, 2], [3, 3]], float))
    assert state.costs[:, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("unit", [1.0, 1e6])
def test_sms_emoa_drops_who_adds_least_hypervolume_whatever_the_units(unit):
    rows = np.array([[0, 10], [1, 6], [1.5, 5.9], [4, 2], [10, 0]], float) * [1, unit]
    state = lived(sms_emoa(SIZES, population=4), rows)
    assert state.costs[:, 0].tolist() == [0, 1, 4, 10]


@pytest.mark.parametrize("units", [(1.0, 1.0, 1.0), (1.0, 100.0, 1e6)])
def test_nsga3_keeps_a_front_spread_in_three_objectives(units):
    """Of 400 random points of a sphere, an elite of 15 has one near each of its 15 directions, whatever the units."""
    points = np.abs(np.random.default_rng(0).normal(size=(400, 3)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    elite = lived(STRATEGIES["nsga3"](SIZES, population=15), points * units).elite
    assert len(elite) == 15
    found = elite.costs / units
    wanted = reference_directions(3, 15)
    wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    gaps = np.linalg.norm(wanted[:, None] - found[None], axis=2).min(axis=1)
    by_chance = np.linalg.norm(wanted[:, None] - points[None, :15], axis=2).min(axis=1)
    assert gaps.max() < 0.2 < by_chance.max()


def test_das_dennis_directions():
    np.testing.assert_allclose(das_dennis(3, 2) * 2, [[2, 0, 0], [1, 1, 0], [1, 0, 1], [0, 2, 0], [0, 1, 1], [0, 0, 2]])
    assert len(das_dennis(3, 12)) == 91  # Deb & Jain 2014, table I
    assert len(das_dennis(5, 6)) == 210
    assert len(reference_directions(3, 100)) == 91
    assert len(reference_directions(8, 156)) == 156  # two layers, 120 and 36
    for objectives in range(1, 9):
        for most in (1, 2, 8, 40):
            directions = reference_directions(objectives, most)
            assert len(directions) <= max(most, objectives)
            np.testing.assert_allclose(directions.sum(axis=1), 1)
            assert len(np.unique(directions.round(9), axis=0)) == len(directions)


@pytest.mark.parametrize("sizes", [SIZES, (256, 256, 2)])
def test_grid_visits_genotypes_once_and_evenly(sizes):
    """All of a small space; of one that has too many to note each, a beginning."""
    strategy = grid(sizes)
    state, visited = strategy.init(), []
    for _ in range(120):
        visited.append(strategy.ask(trial_rng(0, 0), state, 3)[0])
        state = strategy.tell(state, visited[-1], np.zeros(2))
    assert len({g.tobytes() for g in visited}) == 120
    for beginning in (30, 60):
        for gene, size in enumerate(sizes):
            place = np.array(visited)[:beginning, gene].astype(int) * min(size, 5) // size
            counts = np.bincount(place, minlength=min(size, 5))
            assert counts.max() - counts.min() <= 5


@pytest.mark.parametrize("lag", [1, 4, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_grid_proposes_every_network_once_before_any_again_whatever_is_evaluated_in_between(tmp_path, lag, seed):
    """With designs to begin with, genes without effect, a limit and trials under way: in its order, and to the end."""
    problem = toy.problem((3, 3, 2, 3), limit_ms=5.0)
    everything = np.stack(np.unravel_index(np.arange(54), problem.sizes), axis=1).astype(np.uint8)
    networks = np.unique(problem.canonical(everything), axis=0)
    networks = networks[problem.feasible(networks)]
    first = np.random.default_rng(seed).permutation(networks)[:5]
    strategy = grid(problem.sizes, problem=problem)
    order = [tuple(g) for g in strategy.ask(trial_rng(0, 0), strategy.init(), len(networks)).tolist()]
    assert sorted(order) == sorted(map(tuple, networks.tolist()))
    trials = search(
        problem,
        strategy,
        InlineExecutor(toy.evaluator),
        trials=99,
        lag=lag,
        seed=seed,
        journal_path=tmp_path / "j",
        initial=list(first),
    )
    designs = [tuple(g) for g in first.tolist()]
    assert [t.genotype for t in trials] == designs + [g for g in order if g not in designs]
    assert trials.status == "exhausted"


def test_grid_goes_on_behind_what_was_taken():
    for sizes in (SIZES, (256, 256, 2)):
        strategy = grid(sizes)
        ahead = strategy.ask(trial_rng(0, 0), strategy.init(), 10)
        after = strategy.init()
        for genotype in ahead[:7]:
            after = strategy.tell(after, genotype, np.zeros(2))
        np.testing.assert_array_equal(strategy.ask(trial_rng(0, 1), after, 3), ahead[7:])


def test_grid_keeps_its_order_however_many_trials_are_under_way(tmp_path):
    problem = replace(toy.problem((4,) * 5, limit_ms=1e9), canonical=lambda genotypes: genotypes)
    strategy = grid(problem.sizes)
    trials = search(
        problem, strategy, InlineExecutor(toy.evaluator), trials=150, lag=100, seed=0, journal_path=tmp_path / "j"
    )
    asked = strategy.ask(trial_rng(0, 0), strategy.init(), 150)
    assert [t.genotype for t in trials] == [tuple(g) for g in asked.tolist()]


def test_local_search_proposes_neighbours_of_the_best_and_starts_anew_when_they_are_spent():
    strategy = STRATEGIES["local_search"](SIZES, population=8)
    start = np.array([1, 0, 1, 1, 1, 0], np.uint8)
    state = strategy.tell(strategy.init(), start, np.array([0.5]))
    assert ((strategy.ask(trial_rng(0, 1), state, 50) != start).sum(axis=1) == 1).all()
    for k in range(sum(SIZES) - len(SIZES)):
        state = strategy.tell(state, strategy.ask(trial_rng(0, k), state, 1)[0], np.array([1.0]))
    assert ((strategy.ask(trial_rng(0, 99), state, 50) != start).sum(axis=1) > 1).any()
    state = strategy.tell(state, start, np.array([2.0]))
    assert state.archive.costs.tolist() == [[2.0]]


def test_reinforce_learns_what_is_rewarded_and_stays_at_its_target():
    """Accuracy rises with every gene, and so does the time, 0 to 9 ms: the policy must come to rest near the target."""
    sizes = (4,) * 3
    for target in (3.0, 6.0):
        strategy = reinforce(sizes, target=target, beta=-0.5)
        state = strategy.init()
        for k in range(2000):
            genotype = strategy.ask(trial_rng(0, k), state, 1)[0]
            total = float(genotype.sum())
            state = strategy.tell(state, genotype, np.array([1 - 0.01 * total, total]))
        drawn = strategy.ask(trial_rng(1, 0), state, 200).sum(axis=1)
        assert np.mean(drawn) == pytest.approx(target, abs=0.75)


def test_reinforce_gradient_is_that_of_the_log_probability():
    """One step from the uniform policy: the drawn values gain, the others lose, by the sign of the advantage."""
    strategy = reinforce((3, 2), learning_rate=0.1)
    first = strategy.tell(strategy.init(), np.array([0, 0], np.uint8), np.array([0.5]))
    np.testing.assert_array_equal(first.logits, strategy.init().logits)  # no baseline yet
    better = strategy.tell(first, np.array([2, 1], np.uint8), np.array([0.2]))
    assert np.sign(better.logits)[[0, 0, 0, 1, 1], [0, 1, 2, 0, 1]].tolist() == [-1, -1, 1, -1, 1]  # from 0
    assert np.isneginf(better.logits[1, 2])


def test_bananas_proposes_what_its_ensemble_has_learned(tmp_path):
    """After 60 trials, the first proposals are better than the mutations they are picked from."""
    sizes = (4,) * 8
    strategy = STRATEGIES["bananas"](sizes, population=16)
    rng, state = np.random.default_rng(0), strategy.init()
    for _ in range(60):
        genotype = rng.integers(0, 4, 8).astype(np.uint8)
        state = strategy.tell(state, genotype, np.array([1 - genotype.sum() / 24]))
    proposals = strategy.ask(trial_rng(0, 60), state, 64).sum(axis=1)
    assert proposals[:8].mean() > state.elite.genotypes.sum(axis=1).mean() + 1


def test_successive_halving_promotes_the_best_third_once():
    strategy = successive_halving((9,), population=9, eta=3, rungs=2)
    state = strategy.init()
    for value in range(9):
        state = strategy.tell(state, np.array([value, 0], np.uint8), np.array([abs(value - 4) / 10]))
    assert strategy.ask(trial_rng(0, 9), state, 3).tolist() == [[4, 1], [3, 1], [5, 1]]
    state = strategy.tell(state, np.array([4, 1], np.uint8), np.array([0.0]))
    wishes = strategy.ask(trial_rng(0, 10), state, 3)
    assert wishes[:2].tolist() == [[3, 1], [5, 1]]
    assert wishes[2, 1] == 0
    with pytest.raises(ValueError, match="eta is 1: a number from 2"):
        successive_halving((9,), population=9, eta=1)
    with pytest.raises(ValueError, match="the first rung would have 1/2187 of 1000 images"):
        successive_halving((4,) * 10, population=9, rungs=8, problem=toy.problem())
    with pytest.raises(ValueError, match="itself"):
        successive_halving((9,), population=9, explorer=strategy)


def test_successive_halving_sees_more_networks_for_the_same_images(tmp_path):
    problem = toy.problem()
    strategy = successive_halving(problem.sizes, population=27)
    trials = search(
        problem,
        strategy,
        InlineExecutor(toy.evaluator, {"shares": strategy.shares}),
        trials=200,
        lag=4,
        seed=0,
        journal_path=tmp_path / "j",
    )
    on = [sum(t.total == images for t in trials) for images in (111, 333, 1000)]
    assert sum(on) == 200
    assert on[0] > 1.5 * on[1] > 2 * on[2] > 0  # more than a third: the best of a rung change as it fills
    assert {t.total for t in Front.of(trials)} == {1000}


@pytest.mark.parametrize(("sizes", "limit_ms"), [((4,) * 10, 5.0), ((4,) * 20, 4.0)])
def test_successive_halving_gives_more_images_to_promoted_networks_alone_however_tight_the_limit(
    tmp_path, sizes, limit_ms
):
    """Hardly any wish is feasible, so that nearly all trials come from walks, or are any other."""
    problem = toy.problem(sizes, limit_ms=limit_ms)
    assert problem.feasible(random_search(sizes).ask(trial_rng(0, 0), None, 1000)).mean() < 0.01
    strategy = successive_halving(problem.sizes, population=27)
    executor = InlineExecutor(toy.evaluator, {"shares": strategy.shares})
    trials = search(problem, strategy, executor, trials=40, lag=4, seed=0, journal_path=tmp_path / "j")
    on = {111: set(), 333: set(), 1000: set()}
    for trial in trials:
        assert trial.total == 111 or trial.genotype in on[trial.total // 3]
        on[trial.total].add(trial.genotype)
    assert len(on[111]) > len(on[333]) > len(on[1000]) > 0


def test_a_walk_stays_on_the_images_that_were_wished_for():
    problem = with_shares(toy.problem(limit_ms=4.0), (0.25, 0.5, 1.0))
    for share in range(3):
        wishes = np.full((5, 11), 3, np.uint8)
        wishes[:, -1] = share
        found = [choose(problem, trial_rng(0, k), wishes, set()) for k in range(20)]
        assert {int(g[-1]) for g in found} == {share}
    wishes[0, -1] = 1  # a promotion that is infeasible by now takes no images from others
    assert choose(problem, trial_rng(0, 0), wishes, set())[-1] == 1


def test_a_space_is_exhausted_only_when_every_network_was_seen_on_all_images():
    problem = with_shares(toy.problem((2, 2), limit_ms=9.0), (0.5, 1.0))
    seen = set()
    shares = []
    while (found := choose(problem, trial_rng(0, len(seen)), np.zeros((1, 3), np.uint8), seen)) is not None:
        seen.add(found.tobytes())
        shares.append(int(found[-1]))
    assert shares == [0, 0, 0, 1, 1, 1]  # of four genotypes two are one network


def test_feasible_only_draws_uniformly_within_the_limits():
    problem = toy.problem((4,) * 4, limit_ms=6.0)
    plain, wrapped = random_search(problem.sizes), feasible_only(random_search(problem.sizes), problem)
    assert not problem.feasible(plain.ask(trial_rng(0, 0), None, 500)).all()
    drawn = wrapped.ask(trial_rng(0, 0), None, 500)
    assert problem.feasible(drawn).all()
    everything = np.stack(np.unravel_index(np.arange(256), problem.sizes), axis=1).astype(np.uint8)
    expected = everything[problem.feasible(everything)].mean(axis=0)
    np.testing.assert_allclose(drawn.mean(axis=0), expected, atol=0.15)
    assert wrapped.identity != plain.identity


def test_feasible_only_gives_up_and_lets_the_driver_repair():
    problem = toy.problem(limit_ms=1.5)
    wrapped = feasible_only(random_search(problem.sizes), problem, factor=2)
    assert wrapped.ask(trial_rng(0, 0), None, 8).shape == (8, 10)


def test_feasible_only_knows_the_gene_that_picks_images():
    problem = toy.problem(limit_ms=15.0)
    wrapped = feasible_only(successive_halving(problem.sizes, population=9), problem)
    wishes = wrapped.ask(trial_rng(0, 0), wrapped.init(), 20)
    assert wishes.shape == (20, 11)
    assert problem.feasible(wishes[:, :-1]).all()


def test_warm_start_begins_where_the_other_search_stands():
    problem = toy.problem(limit_ms=20.0)
    genotypes = np.random.default_rng(0).integers(0, 4, (60, 10)).astype(np.uint8)
    known = [Trial(k, tuple(g.tolist()), toy.correct(g), 1000, {"ms@other": 1.0}) for k, g in enumerate(genotypes)]
    plain = nsga2(problem.sizes, population=8)
    started = warm_start(plain, problem, known)
    state = started.init()
    assert len(state) == 8
    assert problem.feasible(state.genotypes).all()
    np.testing.assert_array_equal(state.costs[:, 1], problem.cheap(state.genotypes)[:, 0])
    assert started.identity != plain.identity
    assert started.identity != warm_start(plain, problem, known[1:]).identity
    assert len(warm_start(plain, problem, []).init()) == 0


def test_warm_start_refuses_genotypes_of_another_space():
    from nas.errors import LimitError

    problem = toy.problem()
    for genotype in ((1, 2), (9,) * 10):
        with pytest.raises(LimitError, match="another space"):
            warm_start(nsga2(problem.sizes, population=8), problem, [Trial(0, genotype, 1, 2, {"latency_ms": 1.0})])
