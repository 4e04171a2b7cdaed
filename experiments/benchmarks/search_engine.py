"""Question: what does the engine of the search cost: the driver for each trial, and the executors between candidates?

Run: python experiments/benchmarks/search_engine.py [--quick] [--json FILE]; `search.py` runs it too, as its last task.
Candidates sleep, so that two workers need no two free cores; others on the machine disturb it less than they would.

`ray`, and `engine.processes`: overhead_100ms and overhead_10ms: by how much a search with two workers exceeds the time
    that its candidates of 100 and 10 ms take by themselves, halved, as a share of that; starting the workers is not
    counted. utilisation: the share of the workers' time in which they evaluate, where candidates take 10 to 50 ms.
    Medians of three searches with a lag of eight times the workers.
`engine.utilisation`: the same of 8, 32 and 128 simulated workers whose times vary fivefold, by the lag in multiples of
    their number.
`engine.driver`: milliseconds of the driver (ask, tell, journal) for a trial, about trial 100, 10,000 and 100,000, and
    by how many MB its memory grows from trial 1,000 on, with an evaluator that takes no time.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nas.files import write_json
from nas.measure import hardware, load
from nas.pipeline.measure import git_commit
from nas.search import (
    Executor,
    ProcessExecutor,
    RayExecutor,
    SimulatedExecutor,
    Trial,
    ageing_evolution,
    nsga2,
    random_search,
    search,
)
from nas.search.executor import Evaluate
from nas.search.inline import InlineExecutor
from nas.search.problem import Problem
from nas.search.strategy import Strategy

SIZES = (4,) * 24
WORKERS = 2
LAG = 8  # of the real workers, in multiples of their number: enough that short candidates share calls
EXECUTORS = {"ray": RayExecutor, "processes": ProcessExecutor}
STRATEGIES = {"random": random_search, "ageing_evolution": ageing_evolution, "nsga2": nsga2}


def problem() -> Problem:
    """Accuracy and latency both grow with the genes; no network is outside the limits."""
    weights = 1.0 + 0.1 * np.arange(len(SIZES))
    return Problem(
        sizes=SIZES,
        canonical=lambda genotypes: genotypes,
        cheap=lambda genotypes: (1.0 + genotypes @ weights)[:, None],
        feasible=lambda genotypes: np.ones(len(genotypes), bool),
        smallest=np.zeros(len(SIZES), np.uint8),
        digest="engine",
        total=10_000,
    )


def sleeper(least_ms: float, most_ms: float) -> Evaluate:
    """Sleeps for a time that the genes decide, uniform between these."""

    def evaluate(genotypes: Any) -> list[int]:
        time.sleep(_milliseconds(genotypes[0], least_ms, most_ms) / 1000)
        return [int(1000 * np.sqrt(genotypes[0]).mean())]

    return evaluate


def _milliseconds(genotype: Any, least: float, most: float) -> float:
    share = int.from_bytes(np.packbits(genotype & 1).tobytes()) / (2 ** len(genotype) - 1)
    return least + (most - least) * share


def instant() -> Evaluate:
    return lambda genotypes: [int(1000 * np.sqrt(g).mean()) for g in genotypes]


def _searched(
    executor: Executor, strategy: Strategy, trials: int, lag: int, on_trial: Callable[[Trial], None] | None = None
) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        return search(
            problem(), strategy, executor, trials=trials, lag=lag, seed=0, journal_path=path, on_trial=on_trial
        )


class Timed:
    """An executor that notes when each result came."""

    def __init__(self, executor: Any):
        self._executor = executor
        self.slots = executor.slots
        self.submit, self.close = executor.submit, executor.close
        self.came: list[tuple[float, float]] = []  # (when, the seconds that it took)

    def next(self) -> Any:
        trial, result = self._executor.next()
        self.came.append((time.perf_counter(), result.seconds))
        return trial, result

    def __enter__(self) -> "Timed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def executor_figures(made: type, *, repeats: int, seconds: float) -> dict[str, float]:
    """Of two real workers, in searches of about `seconds` each."""

    def busy(least_ms: float, most_ms: float) -> float:
        """The share of the workers' time in which they evaluate; the median of the searches."""
        trials, shares = int(WORKERS * seconds * 2000 / (least_ms + most_ms)), []
        for _ in range(repeats):
            timed = Timed(made("search_engine:sleeper", {"least_ms": least_ms, "most_ms": most_ms}, workers=WORKERS))
            _searched(timed, random_search(SIZES), trials, lag=LAG * WORKERS)
            came = timed.came[2 * WORKERS - 1 : -2 * WORKERS]  # all workers have begun, and none is out of work yet
            shares.append(sum(took for _, took in came[1:]) / (WORKERS * (came[-1][0] - came[0][0])))
        return float(np.median(shares))

    overhead = {f"overhead_{ms:g}ms": 1 / busy(ms, ms) - 1 for ms in (100.0, 10.0)}
    return overhead | {"utilisation": busy(10.0, 50.0)}


def simulated_utilisation(*, rounds: int, sizes: Sequence[int] = (8, 32, 128)) -> dict[str, dict[str, float]]:
    """By workers and lag / workers: of searches of `rounds` trials a worker whose times vary fivefold."""
    out: dict[str, dict[str, float]] = {}
    for workers in sizes:
        for times in (1, 2, 3, 4):
            executor = SimulatedExecutor(instant, workers=workers, seconds=lambda g: _milliseconds(g, 1.0, 5.0))
            _searched(executor, random_search(SIZES), rounds * workers, lag=times * workers)
            out.setdefault(str(workers), {})[f"lag_{times}x"] = executor.utilisation
    return out


def driver_figures(strategy: Strategy, levels: Sequence[int]) -> dict[str, Any]:
    """Of one search up to the last of `levels`: milliseconds for a trial before each of them, and how memory grows."""
    process = psutil.Process()
    times: dict[int, float] = {}
    resident: list[int] = []
    spans = {level: min(level // 2, 1000) for level in levels}
    marks = set(levels) | {level - span for level, span in spans.items()}

    def on_trial(trial: Trial) -> None:
        if trial.trial + 1 in marks:
            times[trial.trial + 1] = time.perf_counter()
        if trial.trial + 1 in (1000, levels[-1]):
            gc.collect()
            resident.append(process.memory_info().rss)

    _searched(InlineExecutor(instant), strategy, levels[-1], 8, on_trial)
    milliseconds = {str(n): 1000 * (times[n] - times[n - span]) / span for n, span in spans.items()}
    return {"milliseconds": milliseconds, "growth_mb": (resident[-1] - resident[0]) / 1e6}


def figures(*, quick: bool) -> dict[str, Any]:
    """`ray` and `engine`."""
    levels = (100, 10_000) if quick else (100, 10_000, 100_000)
    # each in a process of its own: what others leave free would hide how memory grows
    command = [sys.executable, __file__, "--levels", *map(str, levels), "--driver"]
    driver = {
        name: json.loads(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout)
        for name in STRATEGIES
    }
    repeats, seconds = (1, 5.0) if quick else (3, 20.0)
    executors = {name: executor_figures(made, repeats=repeats, seconds=seconds) for name, made in EXECUTORS.items()}
    utilisation = simulated_utilisation(rounds=20 if quick else 50)
    engine = {"processes": executors["processes"], "utilisation": utilisation, "driver": driver}
    return {"ray": executors["ray"], "engine": engine}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short search each, 10,000 trials of the driver")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--driver", choices=STRATEGIES, help="only what the driver costs with this strategy")
    parser.add_argument("--levels", type=int, nargs="+", default=(100, 10_000), help="trials about which it is told")
    options = parser.parse_args(arguments)
    if options.driver:
        print(json.dumps(driver_figures(STRATEGIES[options.driver](SIZES, population=32), options.levels)))
        return
    found = figures(quick=options.quick)
    print(json.dumps(found, indent=1))
    if options.json:
        about = {
            "question": __doc__.partition("\n")[0].removeprefix("Question: "),
            "lag_of_real_workers": LAG * WORKERS,
        }
        write_json(options.json, about | {"commit": git_commit(), "machine": hardware(), "load": load()} | found)


if __name__ == "__main__":
    main()
