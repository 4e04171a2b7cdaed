"""Limits on accuracy, known only after an evaluation, and several counts of one network."""

import dataclasses
import re

import numpy as np
import pytest
import search_toy as toy

from nas.errors import JournalError, LimitError, RunError
from nas.search import (
    STRATEGIES,
    Cache,
    Front,
    InlineExecutor,
    ProcessExecutor,
    Progress,
    Setting,
    Trial,
    make_strategy,
    read_trials,
    search,
    warm_start,
)
from nas.search.accuracy import Least
from nas.search.journal import read
from nas.search.pareto import nondominated, ranks
from nas.space import Space

LEAST = Least(0.3, 0.3)
BOTH = ("top1", "top1_int8")


def limited(least=LEAST, *, minimised=("latency_ms",), accuracies=("top1",), limits=None):
    """The toy problem with a limit on its accuracy."""
    return dataclasses.replace(
        toy.problem(),
        least={"top1": least} if limits is None else limits,
        minimised=minimised,
        accuracies=accuracies,
        reach={"latency_ms": (1.0, 18.0)},
    )


def go(path, problem, strategy="nsga2", *, evaluator=toy.evaluator, trials=60, seed=1, executor=None, **more):
    chosen = make_strategy(STRATEGIES[strategy], problem, population=12)
    executor = executor or InlineExecutor(evaluator, {})
    return search(problem, chosen, executor, trials=trials, lag=4, seed=seed, journal_path=path, **more)


@pytest.mark.parametrize(
    ("asked", "tolerated", "total", "needed"),
    [(0.9, 0.9, 1000, 900), (0.9, 0.89, 1000, 890), (0.9, 0.9, 7, 7), (1.0, 1.0, 10, 10), (1 / 3, 1 / 3, 3, 1)],
)
def test_a_limit_is_a_whole_number_of_images(asked, tolerated, total, needed):
    least = Least(asked, tolerated)
    assert least.needed(total) == needed
    assert [least.missing(n, total) for n in (needed - 1, needed, total)] == [1, 0, 0]
    assert (total - needed) / total < least.most_error(total) < (total - needed + 1) / total


def test_what_misses_a_limit_is_told_as_worse_than_all_that_reaches_it_and_the_more_the_more_it_misses():
    problem = limited(minimised=None)
    strategy = STRATEGIES["nsga2"](problem.sizes, population=8)
    reach = [[0.7, 18.0], [0.6, 5.0], [0.1, 17.9]]
    miss = [[0.701, 1.0], [0.75, 1.0], [0.9, 2.0]]
    told = np.array([problem.told(strategy, np.array(row)) for row in (*reach, *miss)])
    np.testing.assert_array_equal(told[:3], reach)
    assert not nondominated(told)[3:].any()
    first, second, third = ranks(told)[3:]
    assert first < second < third
    assert (told[3:] > told[:3].max(0)).all()
    assert np.isnan(problem.told(strategy, np.array([np.nan, 1.0]))).all()  # a failure stays one
    only = limited()
    assert only.told(strategy, np.array([0.7, 3.0])).tolist() == [3.0]
    assert only.told(strategy, np.array([0.9, 3.0]))[0] > 18.0
    assert np.isnan(only.told(strategy, np.array([np.nan, 3.0])))


def test_on_a_share_of_the_images_as_many_must_be_right_as_that_share_of_the_limit_is():
    """.903 of 93 images are 84, which leave more of them wrong than .1; of 10 images it is 10 all the same, not 9."""
    problem = dataclasses.replace(limited(Least(0.903, 0.903), minimised=None), total=93)
    strategy = STRATEGIES["successive_halving"](problem.sizes, population=8, problem=problem)
    for images in (93, 31, 10):
        for count in range(images + 1):
            trial = Trial(0, (0,), count, images, {"latency_ms": 2.0})
            row = np.array(list(trial.costs.values()))
            reached = (problem.told(strategy, row, images) == row).all()
            assert reached == (count >= 0.903 * images) == (trial.missing(problem.least) == 0)
    assert (problem.told(strategy, row) == problem.told(strategy, row, 93)).all()


@pytest.mark.parametrize("limit", [0.2041, 0.2071, 0.25])
def test_each_rung_of_successive_halving_is_told_what_reaches_the_limit_on_its_share(limit, tmp_path):
    problem = limited(Least(limit, limit), minimised=None)
    strategy, told = make_strategy(STRATEGIES["successive_halving"], problem, population=12), []

    def tell(state, genotype, costs):
        told.append(costs)
        return strategy.tell(state, genotype, costs)

    executor = InlineExecutor(toy.evaluator, {"shares": strategy.shares})
    recorded = dataclasses.replace(strategy, tell=tell)
    trials = search(problem, recorded, executor, trials=80, lag=4, seed=1, journal_path=tmp_path / "journal")
    assert {t.total for t in trials} == {111, 333, 1000}
    for trial, costs in zip(trials, told, strict=False):
        assert (costs.tolist() == list(trial.costs.values())) == (trial.missing(problem.least) == 0)


def test_a_strategy_without_limits_is_told_what_it_always_was():
    problem = toy.problem()
    row = np.array([0.2, 3.0])
    assert problem.told(STRATEGIES["nsga2"](problem.sizes, population=8), row) is row


@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - {"random", "grid", "successive_halving"}))
def test_every_strategy_that_learns_spends_more_on_networks_that_reach_the_limit_than_chance_does(strategy, tmp_path):
    least = Least(0.25, 0.25)
    share = {}
    for name in ("random", strategy):
        runs = [go(tmp_path / f"{name}{seed}", limited(least, minimised=None), name, seed=seed) for seed in range(3)]
        share[name] = np.mean([[t.correct >= 250 for t in run[12:]] for run in runs])
    assert share[strategy] > share["random"]


@pytest.mark.parametrize("minimised", [("latency_ms",), None])
def test_the_predictor_finds_the_fastest_network_that_reaches_the_limit(minimised, tmp_path):
    """Of 150,000 feasible networks some 1 in 1,000 do; chance finds one in 100 trials at 16.1 ms at best."""
    trials = go(tmp_path / "journal", limited(minimised=minimised), "predictor", trials=60)
    assert min(t.latency_ms for t in trials if t.correct >= 300) <= 15.0


def test_as_long_as_nothing_reaches_the_limit_the_predictor_goes_for_the_most_accurate(tmp_path):
    trials = go(tmp_path / "journal", limited(Least(0.99, 0.99)), "predictor", trials=40)
    assert max(t.correct for t in trials) >= 320  # the most of 4,000 random feasible ones is 324


def test_what_wants_to_be_told_more_than_it_would_be_is_refused(tmp_path):
    problem = limited()
    with pytest.raises(ValueError, match=r"the explorer predictor.* wants to be told more than the objectives"):
        STRATEGIES["successive_halving"](
            problem.sizes,
            population=9,
            problem=problem,
            explorer=STRATEGIES["predictor"](problem.sizes, population=9, problem=problem),
        )
    trials = go(tmp_path / "journal", toy.problem(), trials=20)
    several = limited(accuracies=BOTH)
    nsga2 = STRATEGIES["nsga2"](problem.sizes, population=8)
    warm_start(nsga2, problem, trials)
    with pytest.raises(LimitError, match="trial 0 of a warm start has no count of top1_int8"):
        warm_start(nsga2, several, trials)


def front_of(trials, least=LEAST, costs=("latency_ms",)):
    setting = Setting(Space.of_choices({"a": [0, 1]}), least={"top1": least})
    return Front.of(trials, costs, setting)


SOME = [
    Trial(0, (0,), 250, 1000, {"latency_ms": 1.0}),
    Trial(1, (1,), 299, 1000, {"latency_ms": 2.0}),
    Trial(2, (0,), 300, 1000, {"latency_ms": 3.0}),
    Trial(3, (1,), 310, 1000, {"latency_ms": 4.0}),
    Trial(4, (1,), None, 1000, {"latency_ms": 0.5}, "broke"),
]


def test_a_front_has_only_trials_that_reach_the_limit_and_its_best_is_the_fastest_of_them():
    assert [t.trial for t in front_of(SOME)] == [2]
    assert front_of(SOME).best().trial == 2
    both = front_of(SOME, costs=None)
    assert [t.trial for t in both] == [2, 3]
    assert both.best().trial == 3
    assert front_of(SOME, Least(0.3, 0.299)).best().trial == 1
    assert "top1 at least 0.3" in repr(both)
    assert "at least 30 %" in both.plot().svg


def test_a_front_that_no_trial_reaches_says_how_near_the_best_came():
    front = front_of(SOME[:2])
    assert len(front) == 0
    assert front.nearest.trial == 1
    assert repr(front).endswith("top1 at least 0.3; none reaches that, the nearest, trial 1, has top1 0.299)")
    with pytest.raises(LimitError, match=r"No trial reaches top1 at least 0\.3, the nearest, trial 1, has top1 0\.299"):
        front.best()
    assert front_of(SOME[4:]).nearest is None
    with pytest.raises(LimitError, match="no trial succeeded"):
        front_of(SOME[4:]).best()


def test_progress_tells_the_nearest_until_one_reaches_the_limit():
    progress = Progress([18.0], workers=1, costs=("latency_ms",), least={"top1": LEAST})
    seen = []
    for trial in SOME:
        progress.add(trial)
        seen.append((progress.best.trial, progress.volume > 0, next(k for k in progress.values() if "top-1" in k)))
    nearest, best = "nearest top-1", "best top-1"
    assert seen == [(0, False, nearest), (1, False, nearest), (2, True, best), (2, True, best), (2, True, best)]


@pytest.mark.parametrize(
    ("objectives", "limits"),
    [
        (("error", "error_int8", "latency_ms"), {}),
        (("error", "latency_ms"), {"top1_int8": Least(0.25, 0.25)}),
        (("error_int8", "latency_ms"), {"top1": Least(0.25, 0.25)}),
        (("latency_ms",), {"top1": Least(0.25, 0.25), "top1_int8": Least(0.25, 0.24)}),
    ],
)
@pytest.mark.parametrize("strategy", ["predictor", "nsga2", "bananas"])
def test_two_counts_are_objectives_or_limits_as_one_likes(strategy, objectives, limits, tmp_path):
    problem = limited(minimised=objectives, accuracies=BOTH, limits=limits)
    trials = go(tmp_path / "journal", problem, strategy, evaluator=toy.two_counts, trials=40)
    for t in trials:
        assert [t.correct, t.also["top1_int8"]] == list(toy.two_counts()(np.array([t.genotype]))[0])
        assert t.costs == {"error": t.error, "error_int8": (1000 - t.also["top1_int8"]) / 1000, **t.cheap}
    front = Front.of(trials, objectives, Setting(Space.of_choices({"a": [0, 1]}), least=limits))
    assert len(front)
    for t in front:
        assert all(limit.missing(t.count(name), t.total) == 0 for name, limit in limits.items())
    assert read_trials(tmp_path / "journal") == trials
    assert go(tmp_path / "journal", problem, strategy, evaluator=toy.two_counts, trials=40) == trials  # read back


def test_both_counts_come_back_from_worker_processes_and_from_the_cache(tmp_path):
    problem = limited(minimised=None, accuracies=BOTH, limits={})
    alone = go(tmp_path / "a", problem, evaluator=toy.two_counts, trials=20, cache=Cache(tmp_path / "kept", "of both"))
    workers = ProcessExecutor("search_toy:two_counts", workers=2)
    assert go(tmp_path / "b", problem, executor=workers, trials=20) == alone
    no_worker = InlineExecutor(toy.broken_evaluator)
    known = Cache(tmp_path / "kept", "of both")
    assert go(tmp_path / "c", problem, executor=no_worker, trials=20, cache=known) == alone
    rows = Front.of(alone).rows()
    assert rows[0].keys() == {
        "trial",
        "top1",
        "correct",
        "total",
        "top1_int8",
        "correct_int8",
        "latency_ms",
        "genotype",
    }
    assert "top1_int8" in repr(Front.of(alone))


def test_journals_of_one_count_are_of_the_schema_they_always_were_and_of_two_of_a_new_one(tmp_path):
    go(tmp_path / "one", limited(), trials=3)
    header, records = read(tmp_path / "one")
    assert header["schema"] == 1
    assert "accuracy" not in header
    assert records[0].keys() == {"trial", "genotype", "correct", "total", "costs", "seconds", "failure"}
    problem = limited(minimised=None, accuracies=BOTH, limits={})
    go(tmp_path / "two", problem, evaluator=toy.two_counts, trials=3)
    header, records = read(tmp_path / "two")
    assert (header["schema"], header["accuracy"]) == (2, "top1+top1_int8")
    (count,) = toy.two_counts()(np.array([records[0]["genotype"]]))
    assert (records[0]["correct"], records[0]["also"]) == (count[0], {"top1_int8": count[1]})
    with pytest.raises(JournalError, match="accuracy"):
        go(tmp_path / "two", toy.problem(), trials=3)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([5], "2 counts are needed: top1, top1_int8"),
        ([(5, 2000)], r"counted \(5, 2000\) of 1000"),
        ([(5, 5.5)], "'float' object cannot be interpreted as an integer"),
    ],
)
def test_counts_that_cannot_be_are_failures_of_both(counts, said, tmp_path):
    problem = limited(minimised=None, accuracies=BOTH, limits={})
    (trial,) = go(tmp_path / "journal", problem, evaluator=lambda: lambda genotypes: counts, trials=1)
    assert trial.correct is None
    assert trial.also == {"top1_int8": None}
    assert np.isnan(trial.costs["error_int8"])
    assert re.search(said, trial.failure)


def test_a_front_explains_a_trial_by_its_number_and_says_which_there_are():
    space = Space.of_choices({"a": [0, 1], "b": [0, 1, 2]})
    trials = [
        Trial(k, (k % 2, k % 3), 500 + 10 * (k % 2) + 5 * (k % 3), 1000, {"latency_ms": 1.0 + k % 2}) for k in range(30)
    ]
    front = Front.of(trials, setting=Setting(space))
    assert repr(front.explain(3)) == repr(front.explain(trials[3]))
    with pytest.raises(RunError, match=r"99 is not the number of a trial that this front compared; those on it: "):
        front.explain(99)
    assert list(Front.of(trials, ("latency_ms",), Setting(space)).explain(3).effects) == ["error", "latency_ms"]


def test_a_problem_of_unknown_names_is_refused():
    for wrong in ({"least": {"top2": LEAST}}, {"minimised": ("macs",)}, {"minimised": ()}):
        with pytest.raises(ValueError, match="problem: "):
            dataclasses.replace(toy.problem(), **wrong)
