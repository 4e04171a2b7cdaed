import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import deque

import numpy as np
import pytest
import search_toy as toy

from nas.errors import ExecutorError, JournalError, LimitError
from nas.search import STRATEGIES, Front, InlineExecutor, Result, search
from nas.search.executor import evaluate_one
from nas.search.journal import read
from nas.search.problem import with_shares


class Shuffled:
    """Answers in any order, as `workers` busy machines would."""

    def __init__(self, evaluate, workers, seed):
        self.evaluate, self.slots, self.random = evaluate, workers, random.Random(seed)
        self.queue = deque()
        self.closed = False

    def submit(self, trial, genotype):
        self.queue.append((trial, genotype))

    def next(self):
        i = self.random.randrange(min(self.slots, len(self.queue)))
        trial, genotype = self.queue[i]
        del self.queue[i]
        return trial, evaluate_one(self.evaluate, genotype)

    def close(self):
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def go(path, *, strategy="nsga2", executor=None, problem=None, trials=60, lag=6, seed=1, **more):
    problem = problem or toy.problem()
    executor = executor or InlineExecutor(toy.evaluator, {"shares": toy.shares_of(strategy)})
    chosen = STRATEGIES[strategy](problem.sizes, population=10)
    return search(problem, chosen, executor, trials=trials, lag=lag, seed=seed, journal_path=path, **more)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_outcome_depends_on_neither_executor_nor_workers_nor_timing(strategy, tmp_path):
    alone = go(tmp_path / "inline", strategy=strategy)
    for workers in (1, 2, 5, 50):
        executor = Shuffled(toy.evaluator(shares=toy.shares_of(strategy)), workers, seed=workers)
        assert go(tmp_path / f"{workers}", strategy=strategy, executor=executor) == alone
        assert executor.closed
    if strategy != "grid":
        assert go(tmp_path / "seed", strategy=strategy, seed=2) != alone
    if strategy not in ("random", "grid"):
        assert go(tmp_path / "lag", strategy=strategy, lag=2) != alone


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_evaluated_genotype_is_feasible_canonical_and_new(strategy, tmp_path):
    problem = toy.problem(limit_ms=9.0)  # 0.6 % of the space
    log, shares = tmp_path / "log", toy.shares_of(strategy)
    executor = InlineExecutor(toy.evaluator, {"log": str(log), "shares": shares})
    trials = go(tmp_path / "j", strategy=strategy, problem=problem, executor=executor)
    problem = with_shares(problem, shares)
    evaluated = np.array([line.split("-") for line in log.read_text().split()], np.uint8)
    assert problem.feasible(evaluated).all()
    np.testing.assert_array_equal(problem.canonical(evaluated), evaluated)
    assert len({g.tobytes() for g in evaluated}) == len(evaluated) == len(trials) == 60
    assert all(t.latency_ms <= 9.0 for t in trials)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cut", [0, 1, 17, 59])
def test_resumed_is_uninterrupted_and_evaluates_nothing_twice(strategy, cut, tmp_path):
    whole = go(tmp_path / "whole", strategy=strategy)
    assert go(tmp_path / "parts", strategy=strategy, trials=cut) == whole[:cut]
    log = tmp_path / "log"
    log.touch()
    seen = []
    resumed = go(
        tmp_path / "parts",
        strategy=strategy,
        executor=InlineExecutor(toy.evaluator, {"log": str(log), "shares": toy.shares_of(strategy)}),
        on_trial=seen.append,
    )
    assert resumed == seen == whole
    assert len(log.read_text().split()) == 60 - cut
    assert [r["seconds"] for r in read(tmp_path / "parts")[1]] == [t.seconds for t in resumed]


def test_a_finished_search_does_not_touch_its_executor(tmp_path):
    go(tmp_path / "j")
    go(tmp_path / "j", executor=InlineExecutor(toy.broken_evaluator))


def test_a_small_space_ends_exhausted_and_complete(tmp_path):
    problem = toy.problem((3, 3, 2), limit_ms=5.0)
    everything = np.stack(np.unravel_index(np.arange(18), (3, 3, 2)), axis=1).astype(np.uint8)
    feasible = {g.tobytes() for g in problem.canonical(everything) if problem.feasible(g[None])[0]}
    for strategy in STRATEGIES:
        shares = toy.shares_of(strategy)
        for executor in (None, Shuffled(toy.evaluator(shares=shares), 4, 0)):
            trials = go(tmp_path / strategy, strategy=strategy, problem=problem, executor=executor)
            assert trials.status == "exhausted"
            whole = [t for t in trials if t.total == problem.total]
            assert {np.array(t.genotype, np.uint8).tobytes() for t in whole} == feasible
            assert len(trials) == len(feasible) * len(shares)
    assert go(tmp_path / "nsga2", problem=problem, trials=3).status == "complete"


def test_a_large_space_with_few_feasible_networks_ends_too(tmp_path):
    trials = go(tmp_path / "j", problem=toy.problem((4,) * 12, limit_ms=2.15))
    assert trials.status == "exhausted"
    assert {t.genotype for t in trials} == {(0,) * 12, (1,) + (0,) * 11}  # gene 1 has no effect alone


def test_initial_genotypes_come_first_and_infeasible_ones_are_skipped_and_recorded(tmp_path):
    problem = toy.problem()
    largest = np.full(10, 3, np.uint8)
    idle = np.array([0, 3, 0, 0, 0, 0, 0, 0, 0, 0])  # the smallest, once gene 1 is dropped
    one = np.array([1, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    trials = go(tmp_path / "j", initial=[largest, problem.smallest, idle, one], trials=20)
    assert [t.genotype for t in trials[:2]] == [(0,) * 10, tuple(one)]
    assert (3,) * 10 not in {t.genotype for t in trials}
    assert len({t.genotype for t in trials}) == 20
    header, _ = read(tmp_path / "j")
    assert header["skipped"] == [[3] * 10]
    with pytest.raises(JournalError, match="initial"):
        go(tmp_path / "j")


def test_failures_are_trials_that_never_win(tmp_path):
    def evaluate(genotypes):
        (g,) = genotypes
        if g.sum() % 2:
            raise RuntimeError("odd")
        return [toy.correct(g)]

    trials = go(tmp_path / "j", executor=InlineExecutor(lambda: evaluate))
    failed = [t for t in trials if t.failure]
    assert failed
    assert all(t.failure == "RuntimeError: odd" and np.isnan(t.top1) and t.correct is None for t in failed)
    assert not set(failed) & set(Front.of(trials))
    again = go(tmp_path / "j")
    assert repr(again) == repr(trials)  # NaN is not itself, so not ==
    everything = go(tmp_path / "all", executor=InlineExecutor(lambda: lambda genotypes: [1 / 0]))
    assert len(everything) == 60
    assert len(Front.of(everything)) == 0


@pytest.mark.parametrize("count", [-1, toy.TOTAL + 1])
def test_an_impossible_count_is_a_failure(count, tmp_path):
    trials = go(tmp_path / "j", executor=InlineExecutor(lambda: lambda genotypes: [count]), trials=2)
    assert "counted" in str(trials[0].failure)


def test_a_changed_strategy_is_found_out(tmp_path):
    go(tmp_path / "j")
    with pytest.raises(JournalError, match=r"strategy: the journal has"):
        go(tmp_path / "j", strategy="random")
    whole = (tmp_path / "j").read_bytes()
    other = toy.problem(limit_ms=17.0)  # but says that it is the same
    with pytest.raises(JournalError, match=r"diverged at trial"):
        go(tmp_path / "j", problem=other)
    with pytest.raises(JournalError, match="problem: the journal has 'toy'"):
        go(tmp_path / "j", problem=toy.problem(digest="new"))
    assert (tmp_path / "j").read_bytes() == whole


def test_a_disk_that_fills_up_ends_the_search_with_an_error_and_the_same_call_goes_on(tmp_path):
    path, executor = tmp_path / "j", Shuffled(toy.evaluator(delay_seconds=0.01), 3, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(JournalError, match="What was committed is intact: make room"):
            go(path, executor=executor)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert executor.closed
    assert 0 < len(read(path)[1]) < 60
    assert go(path) == go(tmp_path / "whole")


def test_an_impossible_limit_is_an_error(tmp_path):
    with pytest.raises(LimitError, match="smallest"):
        go(tmp_path / "j", problem=toy.problem(limit_ms=0.5))


def test_an_interrupt_closes_the_executor_and_keeps_what_is_done(tmp_path):
    def interrupt(trial):
        if trial.trial == 20:
            raise KeyboardInterrupt

    executor = Shuffled(toy.evaluator(), 3, 0)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "j", executor=executor, on_trial=interrupt)
    assert executor.closed
    assert len(read(tmp_path / "j")[1]) == 21
    assert go(tmp_path / "j") == go(tmp_path / "whole")


def test_a_broken_evaluator_is_an_error_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        go(tmp_path / "j", executor=InlineExecutor("search_toy:broken_evaluator"))
    with pytest.raises(ExecutorError, match=r"package\.module:function"):
        go(tmp_path / "j", executor=InlineExecutor("search_toy:nothing"))


DRIVER = """
import sys
from test_driver import go
from nas.search import InlineExecutor
import search_toy as toy
go(sys.argv[1], executor=InlineExecutor(toy.evaluator, {"delay_seconds": 0.01}), trials=60)
"""


def test_killed_at_any_point_the_same_command_reaches_the_same_front(tmp_path):
    whole = go(tmp_path / "whole")
    path = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    kills, done = 0, -1
    for target in (0, 1, 13, 30, 47):
        process = subprocess.Popen([sys.executable, "-c", DRIVER, path], env=environment)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and process.poll() is None:
            if path.exists() and path.read_bytes().count(b"\n") > target:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += process.wait() == -signal.SIGKILL
        records = read(path)[1]
        assert len(records) >= done  # nothing that was committed is lost
        done = len(records)
    assert kills >= 4
    assert go(path) == whole
    assert list(Front.of(go(path))) == list(Front.of(whole))


def test_results_wait_for_each_other_only_as_far_as_the_lag(tmp_path):
    """Trial k is asked for when trial k-lag is known, and not before: in flight are at most `lag`."""
    most = 0

    class Counting(Shuffled):
        def next(self):
            nonlocal most
            most = max(most, len(self.queue))
            return super().next()

    go(tmp_path / "j", executor=Counting(toy.evaluator(), 3, 0), lag=5)
    assert most == 5
    assert Result(1, 2.0) == Result(1, 2.0, None)
