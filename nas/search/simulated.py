"""Evaluates in this process, on a clock of its own: what a search would take on `workers` machines, without them.

For benchmarks and tests over tabulated results, and to choose `lag` before a cluster is rented.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

from nas.search.executor import Evaluate, Factory, Result, Weights, build, evaluate_one
from nas.search.strategy import Genotype


class SimulatedExecutor:
    """Each evaluation keeps one of `workers` busy for a while of simulated time, and results come in that time's order.

    Args:
        factory: as of other executors; so are `kwargs` and `weights`.
        workers: how many machines are simulated. What follows them is not used: it makes executors interchangeable.
        seconds: how long a genotype takes; None: as long as its evaluation takes here.

    Attributes:
        makespan_seconds: simulated time at which the last evaluation ends.
        busy_seconds: simulated time of all evaluations together.

    Example:
        >>> executor = SimulatedExecutor(factory, workers=32, seconds=lambda genotype: table[genotype.tobytes()])
        >>> search(problem, strategy, executor, trials=1000, lag=128, seed=0, journal_path=path)
        >>> executor.utilisation
    """

    def __init__(
        self,
        factory: Factory,
        kwargs: Mapping[str, Any] | None = None,
        weights: Weights | None = None,
        *,
        workers: int = 2,
        address: str = "local",
        timeout_seconds: float = 300.0,
        threads: int = 1,
        seconds: Callable[[Genotype], float] | None = None,
    ):
        self._recipe = factory, kwargs or {}, weights
        self._seconds = seconds
        self._evaluate: Evaluate | None = None
        self._now = 0.0
        self._free = [0.0] * workers  # heap: when each worker is done with what it was given
        self._queue: list[tuple[int, Genotype]] = []  # submitted now
        self._running: list[tuple[float, int, Result]] = []  # heap: (end, trial, result)
        self.makespan_seconds = self.busy_seconds = 0.0

    @property
    def slots(self) -> int:
        return len(self._free)

    @property
    def utilisation(self) -> float:
        """The share of all workers' time, up to the makespan, that they were busy."""
        return self.busy_seconds / (len(self._free) * self.makespan_seconds) if self.makespan_seconds else 1.0

    def submit(self, trial: int, genotype: Genotype) -> None:
        self._queue.append((trial, genotype))

    def next(self) -> tuple[int, Result]:
        if self._evaluate is None:
            self._evaluate = build(*self._recipe)
        for trial, genotype in self._queue:
            result = evaluate_one(self._evaluate, genotype)
            if self._seconds is not None:
                result = replace(result, seconds=float(self._seconds(genotype)))
            end = max(self._now, self._free[0]) + result.seconds
            heapq.heapreplace(self._free, end)
            heapq.heappush(self._running, (end, trial, result))
            self.busy_seconds += result.seconds
            self.makespan_seconds = max(self.makespan_seconds, end)
        self._queue.clear()
        if not self._running:
            raise LookupError("next() without a submitted trial")
        self._now, trial, result = heapq.heappop(self._running)
        return trial, result

    def close(self) -> None:
        self._queue.clear()
        self._running.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
