"""What a search strategy is: three pure functions over a frozen state, and the moves that several of them share.

A strategy knows nothing of networks, devices, files or time. It sees genotypes and costs, and everything random comes
from the generator that it is handed, so that the same trials always lead to the same proposals.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Genotype = NDArray[np.uint8]  # [genes], one small integer per choice
Genotypes = NDArray[np.uint8]  # [n, genes]
Costs = NDArray[np.float64]  # [objectives] or [n, objectives]; minimised, NaN is a failure


@dataclass(frozen=True)
class Strategy:
    """Proposes genotypes and learns from their costs.

    The contract of every strategy (`tests/search/test_strategies.py` holds each one to it):

    - `init()` is the state before the first trial.
    - `ask(rng, state, n)` gives `n` genotypes, uint8 [n, genes], the most wanted first; they may repeat each other or
      earlier trials (the driver takes the first that is feasible and new). It must not change `state`.
    - `tell(state, genotype [genes], costs [objectives])` is the state after one more trial. Trials are told in their
      order. Costs are minimised. A NaN among them marks a failed trial: it never wins against one that did not fail.
    - `identity` says what the proposals depend on besides seed and trials; a journal of another identity is not
      continued.
    - What ask and tell cost does not grow with the number of trials: the state is bounded.
    - `shares` of more than one: the strategy also chooses how many images a genotype is evaluated on. Its genotypes
      then have one gene more, the last, which picks one of these shares of the validation images, ascending to 1.
    - `heeds_limits`: told all costs of a trial, it keeps to limits on accuracy by itself. Others are told the
      objectives alone, which are made worse where such a limit is missed (`Problem.told`).
    """

    init: Callable[[], Any]
    ask: Callable[[np.random.Generator, Any, int], Genotypes]
    tell: Callable[[Any, Genotype, Costs], Any]
    identity: str
    shares: tuple[float, ...] = (1.0,)
    heeds_limits: bool = False


def check_number(name: str, value: float, least: float, most: float) -> None:
    """Nothing, if `value` is from `least` to `most`.

    Raises:
        ValueError: it is not, or is no number (NaN).
    """
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}: a number from {least:g} to {most:g} is needed")


def check_population(population: int) -> None:
    """Nothing, if a strategy can remember so many trials.

    Raises:
        ValueError: it cannot.
    """
    check_number("population", population, 1, 100_000)


def trial_rng(seed: int, trial: int) -> np.random.Generator:
    """The generator of one trial: counter-based, so that it needs neither the trials before it nor their order."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, trial], np.uint64)))


@dataclass(frozen=True)
class Population:
    """The trials that a strategy remembers, oldest first."""

    genotypes: Genotypes  # [p, genes]
    costs: Costs  # [p, objectives]

    @classmethod
    def empty(cls, genes: int) -> "Population":
        return cls(np.empty((0, genes), np.uint8), np.empty((0, 0)))

    def __len__(self) -> int:
        return len(self.genotypes)

    def add(self, genotype: Genotype, costs: Costs) -> "Population":
        """This population and one more trial."""
        costs = np.asarray(costs, np.float64)[None]
        return Population(
            np.concatenate([self.genotypes, np.asarray(genotype, np.uint8)[None]]),
            np.concatenate([self.costs, costs]) if len(self) else costs,
        )

    def take(self, index: NDArray[np.integer] | slice) -> "Population":
        return replace(self, genotypes=self.genotypes[index], costs=self.costs[index])


def uniform(rng: np.random.Generator, sizes: tuple[int, ...], n: int) -> Genotypes:
    """`n` genotypes drawn uniformly, [n, genes]."""
    return rng.integers(0, np.asarray(sizes), (n, len(sizes))).astype(np.uint8)


def mutate(
    rng: np.random.Generator, genotypes: Genotypes, sizes: tuple[int, ...], where: NDArray[np.bool_]
) -> Genotypes:
    """`genotypes` with another value in each gene that `where` [n, genes] marks; genes of a single value stay."""
    count = np.asarray(sizes)
    step = 1 + rng.integers(0, np.maximum(count - 1, 1), genotypes.shape)  # 1 .. count-1: never back to the same value
    return np.where(where & (count > 1), (genotypes + step) % count, genotypes).astype(np.uint8)


def children(rng: np.random.Generator, mothers: Genotypes, fathers: Genotypes, sizes: tuple[int, ...]) -> Genotypes:
    """Uniform crossover of parents [n, genes], then one mutation a child on average."""
    rate = 1 / max(1, sum(size > 1 for size in sizes))
    crossed = np.where(rng.random(mothers.shape) < 0.5, mothers, fathers)
    return mutate(rng, crossed, sizes, rng.random(crossed.shape) < rate)


def neighbours(rng: np.random.Generator, genotypes: Genotypes, sizes: tuple[int, ...]) -> Genotypes:
    """`genotypes` [n, genes] with exactly one gene changed; as they are where no gene has two values."""
    free = np.flatnonzero(np.asarray(sizes) > 1)
    where = np.zeros(genotypes.shape, bool)
    if len(free):
        where[np.arange(len(genotypes)), rng.choice(free, len(genotypes))] = True
    return mutate(rng, genotypes, sizes, where)
