"""SMS-EMOA (Beume, Naujoks & Emmerich 2007, doi:10.1016/j.ejor.2006.08.008): who adds least hypervolume goes."""

import numpy as np

from nas.search.pareto import Matrix, contributions, ranks
from nas.search.strategy import Costs, Genotype, Genotypes, Population, Strategy, check_population, children, uniform


def sms_emoa(sizes: tuple[int, ...], *, population: int = 32) -> Strategy:
    """Selection by hypervolume contribution (Beume et al. 2007, sec. 3.1, algorithms 1 and 2), for any number of costs.

    It needs no reference point from outside: that is one span of the last front beyond the worst of it in each cost,
    so units do not matter. Hypervolume is exact; a `tell` computes the contributions within the last front, which takes
    O(p log p) for two costs, O(p^2) for three, and about a factor p more for each cost beyond.

    State: a `Population` of at most `population` trials, oldest first.

    Args:
        sizes: the number of values of each gene.
        population: proposals are uniform until it is full, then children of two members drawn uniformly.

    Raises:
        ValueError: `population` is out of range.
    """
    check_population(population)

    def ask(rng: np.random.Generator, state: Population, n: int) -> Genotypes:
        if len(state) < population:
            return uniform(rng, sizes, n)
        mothers, fathers = rng.integers(0, len(state), (2, n))
        return children(rng, state.genotypes[mothers], state.genotypes[fathers], sizes)

    def tell(state: Population, genotype: Genotype, costs: Costs) -> Population:
        grown = state.add(genotype, costs)
        if len(grown) <= population:
            return grown
        return grown.take(np.arange(len(grown)) != _least(grown.costs))

    return Strategy(
        init=lambda: Population.empty(len(sizes)), ask=ask, tell=tell, identity=f"sms_emoa(population={population})"
    )


def _least(costs: Matrix) -> int:
    """The row of the last front that adds least to it; the oldest of equals. Failed rows are the last front of all."""
    rank = ranks(costs)
    last = np.flatnonzero(rank == rank.max())
    front = costs[last]
    if len(last) == 1 or not np.isfinite(front).all():
        return int(last[0])
    span = np.ptp(front, axis=0)
    scaled = (front - front.min(axis=0)) / np.where(span > 0, span, 1.0)
    return int(last[contributions(scaled, [2.0] * costs.shape[1]).argmin()])
