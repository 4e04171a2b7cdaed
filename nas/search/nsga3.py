"""NSGA-III (Deb & Jain 2014, doi:10.1109/TEVC.2013.2281535): an elite spread along reference directions."""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nas.search.pareto import Matrix, ranks
from nas.search.strategy import Costs, Genotype, Genotypes, Population, Strategy, check_population, children, uniform


@dataclass(frozen=True)
class _State:
    elite: Population
    ideal: Costs  # [objectives]: the least of each cost that was ever told


def nsga3(sizes: tuple[int, ...], *, population: int = 32) -> Strategy:
    """For three costs or more, where crowding distances no longer spread a front; steady state, as `nsga2`.

    The directions are those of Das & Dennis (1998), as many as the population holds. Where the paper draws at random
    (sec. IV-E: among equally empty niches, and in a niche that has members), the first direction and the nearest
    member are taken, since a state must follow from its trials alone.

    State: a `Population` of at most `population` trials and the ideal point.

    Args:
        sizes: the number of values of each gene.
        population: the size of the elite; proposals are uniform until it is full, then children of two members drawn
            uniformly, as in the paper.

    Raises:
        ValueError: `population` is out of range.
    """
    check_population(population)

    def init() -> _State:
        return _State(Population.empty(len(sizes)), np.empty(0))

    def ask(rng: np.random.Generator, state: _State, n: int) -> Genotypes:
        if len(state.elite) < population:
            return uniform(rng, sizes, n)
        mothers, fathers = rng.integers(0, len(state.elite), (2, n))
        return children(rng, state.elite.genotypes[mothers], state.elite.genotypes[fathers], sizes)

    def tell(state: _State, genotype: Genotype, costs: Costs) -> _State:
        elite = state.elite.add(genotype, costs)
        ideal = state.ideal if len(state.ideal) else np.full(elite.costs.shape[1], np.inf)
        if np.isfinite(costs).all():
            ideal = np.minimum(ideal, costs)
        if len(elite) > population:
            directions = reference_directions(elite.costs.shape[1], population)
            elite = elite.take(np.arange(len(elite)) != _crowded_out(elite.costs, ideal, directions))
        return replace(state, elite=elite, ideal=ideal)

    return Strategy(init=init, ask=ask, tell=tell, identity=f"nsga3(population={population})")


def das_dennis(objectives: int, divisions: int) -> Matrix:
    """All points [n, objectives] of multiples of 1/divisions that sum to 1 (Das & Dennis 1998); of 0 the centre."""
    if divisions == 0:
        return np.full((1, objectives), 1 / objectives)
    if objectives == 1:
        return np.ones((1, 1))
    parts = [
        np.column_stack(
            [np.full(_points(objectives - 1, left), divisions - left), left * das_dennis(objectives - 1, left)]
        )
        for left in range(divisions + 1)
    ]
    return np.concatenate(parts) / divisions


@functools.lru_cache(maxsize=64)
def reference_directions(objectives: int, most: int) -> Matrix:
    """At most `most` directions [n, objectives], but at least one for each objective.

    One layer where that has points inside the simplex, which takes as many divisions as objectives; else an outer layer
    and one more, shrunk to half, inside it (Deb & Jain 2014, sec. V).
    """
    if objectives == 1:
        return das_dennis(1, 1)
    divisions = 1
    while _points(objectives, divisions + 1) <= most:
        divisions += 1
    if divisions >= objectives:
        return das_dennis(objectives, divisions)
    divisions = 1
    while _points(objectives, divisions + 1) + _points(objectives, divisions) <= most:
        divisions += 1
    outer, inner = das_dennis(objectives, divisions), das_dennis(objectives, divisions - 1)
    return np.concatenate([outer, (inner + 1 / objectives) / 2])[: max(most, objectives)]


def _points(objectives: int, divisions: int) -> int:
    return math.comb(objectives + divisions - 1, divisions)


def _crowded_out(costs: Matrix, ideal: Costs, directions: Matrix) -> int:
    """The row of the last front that niching (sec. IV-E) leaves out; of failed rows the oldest."""
    rank = ranks(costs)
    last = np.flatnonzero(rank == rank.max())
    if len(last) == 1 or not np.isfinite(costs[last]).all():
        return int(last[0])
    direction, distance = _associated(_normalised(costs - ideal), directions)
    members = np.bincount(direction[rank < rank.max()], minlength=len(directions))
    left = list(last[np.argsort(distance[last], kind="stable")])  # the nearest to its direction first
    while len(left) > 1:
        niches = direction[left]
        chosen = int(np.lexsort((niches, members[niches]))[0])
        members[niches[chosen]] += 1
        del left[chosen]
    return int(left[0])


def _normalised(costs: Matrix) -> Matrix:
    """Translated costs [n, objectives] over the intercepts of the plane through the extreme points (sec. IV-C)."""
    count = costs.shape[1]
    worst = costs.max(axis=0)
    worst = np.where(worst > 0, worst, 1.0)
    scaled = costs / worst  # so that units do not decide which points are extreme
    weights = np.where(np.eye(count, dtype=bool), 1.0, 1e-6)
    extremes = scaled[[(scaled / row).max(axis=1).argmin() for row in weights]]
    try:
        plane = np.linalg.solve(extremes, np.ones(count))  # 1 / intercepts
    except np.linalg.LinAlgError:
        plane = np.zeros(count)
    sound = (plane >= 1.0 - 1e-9) & (plane < 1e6)  # each intercept above 0 and not beyond the worst
    return scaled * np.where(sound.all(), plane, 1.0)


def _associated(costs: Matrix, directions: Matrix) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each row the nearest direction, and the perpendicular distance to it (sec. IV-D)."""
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    along = costs @ unit.T  # [n, directions]
    squared = np.maximum((costs**2).sum(axis=1, keepdims=True) - along**2, 0.0)
    nearest = squared.argmin(axis=1)
    return nearest, np.sqrt(squared[np.arange(len(costs)), nearest])
