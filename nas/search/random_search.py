"""Uniform random search: the bar that every other strategy has to clear (Li & Talwalkar 2019, arXiv:1902.07638)."""

import numpy as np

from nas.search.strategy import Costs, Genotype, Genotypes, Strategy, uniform


def random_search(sizes: tuple[int, ...], *, population: int = 0) -> Strategy:
    """Draws each gene uniformly and learns nothing.

    Args:
        sizes: the number of values of each gene.
        population: taken for the sake of the common signature; nothing is remembered.
    """

    def ask(rng: np.random.Generator, state: None, n: int) -> Genotypes:
        return uniform(rng, sizes, n)

    def tell(state: None, genotype: Genotype, costs: Costs) -> None:
        return None

    return Strategy(init=lambda: None, ask=ask, tell=tell, identity="random()")
