"""What every executor owes the driver: the same outcome, whatever the executor, the workers and the hash seed."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import search_toy as toy

from nas.search import EXECUTORS, STRATEGIES, SimulatedExecutor, search
from nas.search.journal import read

WORKERS = (1, 2, 4, 8)


def digest(path) -> str:
    """Of all that a journal says, but for seconds."""
    header, records = read(path)
    outcome = [header, *({k: v for k, v in r.items() if k != "seconds"} for r in records)]
    return hashlib.sha256(json.dumps(outcome, sort_keys=True).encode()).hexdigest()


def outcome(path, executor, *, strategy="nsga2", trials=40, **more) -> str:
    """The digest of a search with an executor of EXECUTORS; every seventh genotype fails."""
    if executor == "ray":
        more["schedule_seconds"] = 120.0  # eight workers start slowly on two cores
    with EXECUTORS[executor]("search_toy:choosy_evaluator", {}, {"bonus": np.ones(3, int)}, **more) as made:
        chosen = STRATEGIES[strategy](toy.SIZES, population=10)
        search(toy.problem(), chosen, made, trials=trials, lag=8, seed=3, journal_path=path)
    return digest(path)


def of_hash_seed(seed, path, executor, **more) -> str:
    code = "import sys, json, test_executors as t; print(t.outcome(*sys.argv[1:3], **json.loads(sys.argv[3])))"
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, str(path), executor, json.dumps(more)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    return done.stdout.split()[-1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> str:
    return outcome(tmp_path_factory.mktemp("alone") / "journal", "inline")


@pytest.mark.parametrize("executor", ["inline", "simulated"])
@pytest.mark.parametrize("workers", WORKERS)
def test_the_outcome_is_the_same_in_this_process(executor, workers, alone, tmp_path):
    assert outcome(tmp_path / "journal", executor, workers=workers) == alone


@pytest.mark.parametrize("workers", [1, 3])
def test_the_outcome_is_the_same_in_worker_processes(workers, alone, tmp_path):
    assert outcome(tmp_path / "journal", "processes", workers=workers) == alone


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["processes", "ray"])
@pytest.mark.parametrize("workers", WORKERS)
def test_the_outcome_is_the_same_for_any_number_of_workers(executor, workers, alone, tmp_path):
    assert outcome(tmp_path / "journal", executor, workers=workers) == alone


def test_the_outcome_does_not_depend_on_how_python_hashes(alone, tmp_path):
    assert {of_hash_seed(seed, tmp_path / str(seed), "inline") for seed in (0, 1, 4242)} == {alone}


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", ["predictor", "bananas", "successive_halving"])
def test_no_strategy_depends_on_hashes_or_executors(executor, strategy, tmp_path):
    expected = outcome(tmp_path / "here", "inline", strategy=strategy)
    for seed in (0, 99):
        found = of_hash_seed(seed, tmp_path / str(seed), executor, strategy=strategy, workers=2)
        assert found == expected


def test_a_digest_tells_outcomes_apart(alone, tmp_path):
    assert outcome(tmp_path / "journal", "inline", trials=39) != alone


# the simulated clock


def simulated(durations, *, workers, lag, seconds=None, path):
    """The executor after a random search in which trial k takes `durations[k]`."""
    left = iter(durations)
    executor = SimulatedExecutor(toy.evaluator, workers=workers, seconds=seconds or (lambda genotype: next(left)))
    problem = toy.problem((4,) * 20, limit_ms=1e9)
    random_search = STRATEGIES["random"](problem.sizes)
    search(problem, random_search, executor, trials=len(durations), lag=lag, seed=0, journal_path=path)
    return executor


def test_a_simulated_clock_gives_the_times_that_can_be_worked_out_by_hand(tmp_path):
    one = simulated([3.0, 1.0, 1.0, 1.0], workers=1, lag=4, path=tmp_path / "1")
    assert (one.makespan_seconds, one.busy_seconds, one.utilisation) == (6.0, 6.0, 1.0)
    two = simulated([3.0, 1.0, 1.0, 1.0], workers=2, lag=4, path=tmp_path / "2")
    assert (two.makespan_seconds, two.utilisation) == (3.0, 1.0)
    waiting = simulated([3.0, 1.0, 1.0, 1.0], workers=2, lag=2, path=tmp_path / "3")
    assert waiting.makespan_seconds == 4.0  # trial 2 waits for trial 0: 0-3 and 0-1, then 3-4 twice
    alternating = simulated([1.0, 5.0] * 20, workers=2, lag=1, path=tmp_path / "4")
    assert alternating.utilisation == 0.5  # a lag of 1 leaves one of two workers idle


@pytest.mark.parametrize("workers", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (32, 128))])
def test_a_lag_of_a_few_times_the_workers_keeps_them_busy_though_times_vary_fivefold(workers, tmp_path):
    durations = np.random.default_rng(0).uniform(1, 5, 40 * workers).tolist()
    busy = simulated(durations, workers=workers, lag=4 * workers, path=tmp_path / "long")
    idle = simulated(durations, workers=workers, lag=workers, path=tmp_path / "short")
    assert busy.utilisation >= 0.95
    assert idle.utilisation < 0.8


def test_without_a_table_a_simulated_evaluation_takes_as_long_as_it_does_here(tmp_path):
    executor = SimulatedExecutor(toy.evaluator, {"delay_seconds": 0.01}, workers=4)
    problem = toy.problem()
    done = search(
        problem, STRATEGIES["random"](problem.sizes), executor, trials=8, lag=8, seed=0, journal_path=tmp_path / "j"
    )
    assert executor.busy_seconds == pytest.approx(sum(t.seconds for t in done))
    assert 0.02 <= executor.makespan_seconds < executor.busy_seconds
