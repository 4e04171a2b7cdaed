"""Searches of others, on the problems of `search_tasks.py`: pymoo's NSGA-II, Once-for-All's evolution, plain ageing."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from search_tasks import Task

from nas.search.strategy import Genotypes, mutate, uniform

Floats = NDArray[np.float64]
Function = Callable[[Genotypes], Floats]


def pymoo_nsga2(task: Task, trials: int, seed: int, *, population: int = 20) -> Floats:
    """Costs [trials, 2] of the distinct networks that pymoo's NSGA-II evaluates first (extra `benchmark`).

    Genes are categories, so its moves are uniform crossover and genes drawn anew, one a child on average; simulated
    binary crossover would take neighbouring numbers to be alike. Networks that it evaluates twice count once.
    """
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.mutation import Mutation
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.sampling.rnd import IntegerRandomSampling

    sizes = np.array(task.problem.sizes)

    class GenesAnew(Mutation):
        def _do(self, problem: Any, X: Any, *, random_state: np.random.Generator, **_: Any) -> Any:
            anew = random_state.integers(0, sizes, X.shape)
            return np.where(random_state.random(X.shape) < 1 / len(sizes), anew, X)

    algorithm = NSGA2(
        pop_size=population,
        sampling=IntegerRandomSampling(),
        crossover=UniformCrossover(prob=0.9),
        mutation=GenesAnew(),
        eliminate_duplicates=True,
    )
    problem = Problem(n_var=len(sizes), n_obj=2, xl=0, xu=sizes - 1, vtype=int)
    algorithm.setup(problem, termination=("n_gen", 100 * trials), seed=seed, verbose=False)
    seen: dict[bytes, Floats] = {}
    while len(seen) < trials and algorithm.has_next():
        asked = algorithm.ask()
        genotypes = task.problem.canonical(asked.get("X").astype(np.uint8))
        costs = task.costs(genotypes)
        for genotype, row in zip(genotypes, costs, strict=True):
            seen.setdefault(genotype.tobytes(), row)
        asked.set("F", costs)
        algorithm.tell(infills=asked)
    return np.array(list(seen.values()))[:trials]


def _within(draw: Callable[[], Genotypes], cost: Function, limit: float, count: int) -> Genotypes:
    """The first `count` of what is drawn that are within the limit."""
    out: list[Genotypes] = []
    while sum(map(len, out)) < count:
        drawn = draw()
        out.append(drawn[cost(drawn) <= limit])
    return np.concatenate(out)[:count]


def ofa_evolution(
    sizes: tuple[int, ...],
    canonical: Callable[[Genotypes], Genotypes],
    score: Function,
    cost: Function,
    limit: float,
    *,
    evaluations: int,
    rng: np.random.Generator,
) -> float:
    """The best score of Once-for-All's evolutionary search (`EvolutionFinder` of its tutorial), with its settings.

    Population 100; a quarter are parents; half of each generation are mutants, every gene drawn anew with probability
    .1, and half are crossed; what is outside the limit is drawn again.
    """

    def several(parents: Genotypes) -> Genotypes:
        return parents[rng.integers(0, len(parents), 100)]

    def mutants(parents: Genotypes) -> Genotypes:
        some = several(parents)
        return canonical(np.where(rng.random(some.shape) < 0.1, uniform(rng, sizes, 100), some).astype(np.uint8))

    def crossed(parents: Genotypes) -> Genotypes:
        a, b = several(parents), several(parents)
        return canonical(np.where(rng.random(a.shape) < 0.5, a, b))

    population = _within(lambda: canonical(uniform(rng, sizes, 5_000)), cost, limit, 100)
    scores = score(population)
    for _ in range(evaluations // 100 - 1):
        parents = population[(best := np.argsort(-scores)[:25])]
        children = np.concatenate(
            [_within(lambda p=parents, make=make: make(p), cost, limit, 50) for make in (mutants, crossed)]
        )
        population, scores = np.concatenate([parents, children]), np.concatenate([scores[best], score(children)])
    return float(scores.max())


def ageing(
    sizes: tuple[int, ...],
    canonical: Callable[[Genotypes], Genotypes],
    score: Function,
    cost: Function,
    limit: float,
    *,
    evaluations: int,
    rng: np.random.Generator,
    population: int = 100,
    tournament: int = 25,
    batch: int = 50,
) -> float:
    """The best score of ageing evolution (Real et al. 2019, arXiv:1802.01548), `batch` children at a time.

    A child differs from the winner of a tournament in one gene; what is outside the limit is drawn again.
    """

    def children(living: Genotypes, scores: Floats) -> Iterator[Genotypes]:
        while True:
            rivals = rng.integers(0, len(living), (2 * batch, tournament))
            parents = living[np.take_along_axis(rivals, scores[rivals].argmax(1)[:, None], 1)[:, 0]]
            where = np.arange(len(sizes)) == rng.integers(0, len(sizes), 2 * batch)[:, None]
            yield canonical(mutate(rng, parents, sizes, where))

    living = _within(lambda: canonical(uniform(rng, sizes, 5_000)), cost, limit, population)
    scores = score(living)
    best, used = float(scores.max()), population
    while used < evaluations:
        source = children(living, scores)
        born = _within(lambda source=source: next(source), cost, limit, min(batch, evaluations - used))
        of_born = score(born)
        used += len(born)
        best = max(best, float(of_born.max()))
        living = np.concatenate([living, born])[-population:]
        scores = np.concatenate([scores, of_born])[-population:]
    return best
