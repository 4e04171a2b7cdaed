"""What an executor is: something that evaluates genotypes somewhere, in any order.

The driver makes the outcome independent of that order, so executors need not be: they may be slow, parallel and lossy,
but each submitted trial must come back once, with a count or a failure.
"""

import importlib
import operator
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from nas.errors import ExecutorError
from nas.search.strategy import Genotype, Genotypes

Count = int | tuple[int, ...]  # of correct images; where a problem has several accuracies, one for each
# [n, genes] -> n counts; genotypes as the strategy has them (`Strategy.shares`)
Evaluate = Callable[[Genotypes], Sequence[Count]]
Factory = Callable[..., Evaluate] | str  # "package.module:function", or the function where everything is in one process
Weights = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Result:
    """What came of one evaluation: a count, or a failure."""

    correct: Count | None
    seconds: float
    failure: str | None = None


class Executor(Protocol):
    """The contract. Constructors take `(factory, kwargs, weights, *, workers, address, timeout_seconds, threads)`."""

    @property
    def slots(self) -> int:
        """Evaluations that it keeps busy with; a lag below this leaves workers idle."""
        ...

    def submit(self, trial: int, genotype: Genotype) -> None:
        """Queues one evaluation; returns at once."""
        ...

    def next(self) -> tuple[int, Result]:
        """Waits for any submitted trial.

        Raises:
            ExecutorError: the workers cannot do their work, whatever the genotype.
        """
        ...

    def close(self) -> None:
        """Stops the workers and drops what is queued; may be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def build(factory: Factory, kwargs: Mapping[str, Any], weights: Weights | None) -> Evaluate:
    """The evaluate function: `factory(**kwargs)`, with `weights=` if there are any.

    Raises:
        ExecutorError: `factory` names no function.
    """
    if isinstance(factory, str):
        module, _, name = factory.partition(":")
        try:
            factory = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as e:
            raise ExecutorError(f"No evaluator {factory!r}: {e}. Expected 'package.module:function'.") from e
    assert callable(factory)
    return factory(**kwargs) if weights is None else factory(weights=weights, **kwargs)


def evaluate_one(evaluate: Evaluate, genotype: Genotype) -> Result:
    """Evaluates one genotype; an exception becomes the trial's failure.

    One at a time everywhere: the batch shape changes the last bits of float results, and executors must agree.
    """
    start = time.perf_counter()
    try:
        (count,) = evaluate(genotype[None])
        right = tuple(map(operator.index, count)) if isinstance(count, tuple) else operator.index(count)
        return Result(right, time.perf_counter() - start)
    except Exception as e:
        return Result(None, time.perf_counter() - start, f"{type(e).__name__}: {e}")


def worker_environment(threads: int) -> dict[str, str]:
    """Variables for a worker process of `threads` cores: libraries start no more threads than that, JAX is on CPU."""
    flags = os.environ.get("XLA_FLAGS", "")
    if threads == 1:
        flags += " --xla_cpu_multi_thread_eigen=false"
    counts = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "OPENBLAS", "MKL")}
    return {**counts, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
