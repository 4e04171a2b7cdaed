"""NSGA-II (Deb et al. 2002, doi:10.1109/4235.996017), steady state: one child in, the worst out."""

import numpy as np

from nas.search.pareto import order
from nas.search.strategy import Costs, Genotype, Genotypes, Population, Strategy, check_population, children, uniform


def nsga2(sizes: tuple[int, ...], *, population: int = 32) -> Strategy:
    """Binary tournaments, uniform crossover and per-gene mutation over an elite of `population` trials.

    The steady-state form (mu + 1) learns from each trial as it comes; generations would leave workers idle.

    Args:
        sizes: the number of values of each gene.
        population: the size of the elite; proposals are uniform until it is full.

    Raises:
        ValueError: `population` is out of range.
    """
    check_population(population)

    def ask(rng: np.random.Generator, state: Population, n: int) -> Genotypes:
        if len(state) < population:
            return uniform(rng, sizes, n)
        # the population is kept in NSGA-II's order, so the smaller index wins the tournament
        mothers, fathers = rng.integers(0, len(state), (2, n, 2)).min(axis=2)
        return children(rng, state.genotypes[mothers], state.genotypes[fathers], sizes)

    def tell(state: Population, genotype: Genotype, costs: Costs) -> Population:
        grown = state.add(genotype, costs)
        return grown.take(order(grown.costs)[:population])

    return Strategy(
        init=lambda: Population.empty(len(sizes)), ask=ask, tell=tell, identity=f"nsga2(population={population})"
    )
