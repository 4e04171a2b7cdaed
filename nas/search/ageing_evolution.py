"""Ageing evolution (Real et al. 2019, arXiv:1802.01548): tournament winners mutate, the oldest die, however good."""

import numpy as np

from nas.search.pareto import order
from nas.search.strategy import (
    Costs,
    Genotype,
    Genotypes,
    Population,
    Strategy,
    check_number,
    check_population,
    neighbours,
    uniform,
)


def ageing_evolution(sizes: tuple[int, ...], *, population: int = 32, tournament: int | None = None) -> Strategy:
    """Evolution with age-based removal, for one objective or several.

    Rivals are compared by non-dominated rank within the living population, then by crowding (the order of NSGA-II).
    With one objective that is the paper's comparison; with several, a scalar such as the error alone would draw every
    descendant to the slow end of the front.

    Args:
        sizes: the number of values of each gene.
        population: how many of the latest trials live; the first `population` are drawn uniformly.
        tournament: rivals of one tournament, drawn with repetition; a quarter of the population if None, as in the
            paper.

    Raises:
        ValueError: `population` or `tournament` is out of range.
    """
    check_population(population)
    if tournament is not None:
        check_number("tournament", tournament, 1, population)
    rivals_each = max(2, population // 4) if tournament is None else tournament

    def ask(rng: np.random.Generator, state: Population, n: int) -> Genotypes:
        if len(state) < population:
            return uniform(rng, sizes, n)
        place = np.argsort(order(state.costs))  # [p], 0 is the best
        rivals = rng.integers(0, len(state), (n, rivals_each))
        parents = np.take_along_axis(rivals, place[rivals].argmin(1, keepdims=True), 1)[:, 0]
        return neighbours(rng, state.genotypes[parents], sizes)

    def tell(state: Population, genotype: Genotype, costs: Costs) -> Population:
        return state.add(genotype, costs).take(slice(-population, None))

    return Strategy(
        init=lambda: Population.empty(len(sizes)),
        ask=ask,
        tell=tell,
        identity=f"ageing_evolution(population={population}, tournament={rivals_each})",
    )
