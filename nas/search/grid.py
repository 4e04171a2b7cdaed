"""Grid search: the full factorial design, every genotype once, in an order whose every beginning is spread evenly."""

import math
from typing import Any

import numpy as np

from nas.search.problem import Problem
from nas.search.strategy import Costs, Genotype, Genotypes, Strategy

_SMALL = 2**16  # genotypes up to which it is known of each whether it was told
_WINDOW = 4096  # beyond that: proposals ahead in which a told genotype is looked for


def grid(sizes: tuple[int, ...], *, population: int = 0, problem: Problem | None = None) -> Strategy:
    """Visits genotype number `k * step mod count` for k = 0, 1, ..., genes being the digits of that number.

    The step is next to the golden section of the number of genotypes and has no divisor in common with it: that visits
    each once, and leaves no large gap at any time (Knuth 1998, TAOCP vol. 3, sec. 6.4, theorem S). It is for small
    spaces, and a bar without chance: beyond what can be visited wholly, random search is as good or better (Bergstra &
    Bengio 2012, sec. 2).

    Up to 65,536 genotypes none is proposed twice before all others were told, in whatever order others than its own
    proposals come in between (designs to begin with, what the driver evaluates in their place). Of a `problem`, only
    feasible genotypes in canonical form are visited, so each network once.

    State: of a small space, which genotypes were told. Of a large one the k of the next proposal: it goes on behind the
    last trial that was one of its next 4,096 proposals, and by one otherwise.

    Args:
        sizes: the number of values of each gene.
        population: taken for the sake of the common signature; nothing is remembered.
        problem: knows which genotypes of a small space are canonical and feasible; None: all count as that.
    """
    count = math.prod(sizes)
    step = max(1, count * 618_034 // 1_000_000)
    while math.gcd(step, count) > 1:
        step += 1
    if count <= _SMALL:
        digits = np.unravel_index(np.arange(count) * step % count, sizes)
        return _of_few(np.stack(digits, axis=1).astype(np.uint8), problem)
    return _of_many(sizes, count, step)


def _of_few(visits: Genotypes, problem: Problem | None) -> Strategy:
    """Of genotypes [n, genes] in their order."""
    if problem is not None:
        proper = problem.feasible(visits) & (problem.canonical(visits) == visits).all(axis=1)
        visits = visits[proper] if proper.any() else visits
    place = {genotype.tobytes(): k for k, genotype in enumerate(visits)}

    def ask(rng: np.random.Generator, state: Any, n: int) -> Genotypes:
        return (
            visits[np.resize(np.flatnonzero(~state), n)] if not state.all() else np.resize(visits, (n, len(visits.T)))
        )

    def tell(state: Any, genotype: Genotype, costs: Costs) -> Any:
        told = state.copy()
        if (k := place.get(genotype.tobytes())) is not None:
            told[k] = True
        return told

    return Strategy(
        init=lambda: np.zeros(len(visits), bool),
        ask=ask,
        tell=tell,
        identity=f"grid(exact={problem is not None})",
    )


def _of_many(sizes: tuple[int, ...], count: int, step: int) -> Strategy:
    back = pow(step, -1, count)
    places = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]

    def ask(rng: np.random.Generator, state: int, n: int) -> Genotypes:
        numbers = [(state + i) * step % count for i in range(n)]
        digits = [[number // place % size for place, size in zip(places, sizes, strict=True)] for number in numbers]
        return np.array(digits, np.uint8).reshape(n, len(sizes))

    def tell(state: int, genotype: Genotype, costs: Costs) -> int:
        number = sum(int(gene) * place for gene, place in zip(genotype, places, strict=True))
        ahead = (number * back - state) % count
        return (state + (ahead if ahead < _WINDOW else 0) + 1) % count

    return Strategy(init=lambda: 0, ask=ask, tell=tell, identity="grid()")
