"""The simplest executor: this process, one evaluation after the other, each when its result is asked for."""

from collections import deque
from collections.abc import Mapping
from typing import Any, Self

from nas.search.executor import Evaluate, Factory, Result, Weights, build, evaluate_one
from nas.search.strategy import Genotype


class InlineExecutor:
    """Evaluates in this process. `workers` and what follows are not used: they make executors interchangeable."""

    slots = 1

    def __init__(
        self,
        factory: Factory,
        kwargs: Mapping[str, Any] | None = None,
        weights: Weights | None = None,
        *,
        workers: int = 1,
        address: str = "local",
        timeout_seconds: float = 300.0,
        threads: int = 1,
    ):
        self._recipe = factory, kwargs or {}, weights
        self._evaluate: Evaluate | None = None
        self._queue: deque[tuple[int, Genotype]] = deque()

    def submit(self, trial: int, genotype: Genotype) -> None:
        self._queue.append((trial, genotype))

    def next(self) -> tuple[int, Result]:
        if self._evaluate is None:
            self._evaluate = build(*self._recipe)
        trial, genotype = self._queue.popleft()
        return trial, evaluate_one(self._evaluate, genotype)

    def close(self) -> None:
        self._queue.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
