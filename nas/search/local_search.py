"""Local search (White et al. 2021, arXiv:2005.02960): all neighbours of the best, from many starts.

With several costs it is Pareto local search (Paquete et al. 2004, doi:10.1007/978-3-642-17144-4_7): the neighbourhoods
of all undominated trials.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.search.pareto import crowding, nondominated
from nas.search.strategy import Costs, Genotype, Genotypes, Population, Strategy, check_population, neighbours, uniform


@dataclass(frozen=True)
class _State:
    archive: Population  # undominated since the last start
    spent: NDArray[np.float64]  # [a]: trials that went to the neighbourhood of each


def local_search(sizes: tuple[int, ...], *, population: int = 32) -> Strategy:
    """Changes one gene of an undominated trial; starts anew, from a random genotype, once all neighbours are known.

    A neighbourhood counts as known after as many trials as it has members, trials being shared evenly among those that
    are still open: the driver never evaluates a genotype twice, so that is once for each.

    State: the undominated trials since the last start, at most `population` of them (the most crowded leaves), and how
    many trials each has had.

    Args:
        sizes: the number of values of each gene.
        population: most trials in the archive.

    Raises:
        ValueError: `population` is out of range.
    """
    check_population(population)
    around = sum(size - 1 for size in sizes)

    def ask(rng: np.random.Generator, state: _State, n: int) -> Genotypes:
        centres = np.flatnonzero(state.spent < around)
        if not len(centres):
            return uniform(rng, sizes, n)
        return neighbours(rng, state.archive.genotypes[rng.choice(centres, n)], sizes)

    def tell(state: _State, genotype: Genotype, costs: Costs) -> _State:
        unknown = state.spent < around
        archive, spent = state.archive, state.spent + unknown / max(1, unknown.sum())
        if not unknown.any():  # a new start
            archive, spent = Population.empty(len(sizes)), np.empty(0)
        archive, spent = archive.add(genotype, costs), np.append(spent, 0.0)
        keep = np.flatnonzero(nondominated(archive.costs))
        if len(keep) > population:
            front = archive.costs[keep]
            keep = np.delete(keep, crowding(front, np.zeros(len(front), np.int64)).argmin())
        return _State(archive.take(keep), spent[keep])

    return Strategy(
        init=lambda: _State(Population.empty(len(sizes)), np.empty(0)),
        ask=ask,
        tell=tell,
        identity=f"local_search(population={population})",
    )
