"""Pareto dominance over costs [n, objectives]. Costs are minimised; a row that is not finite dominates nothing."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]  # [n, objectives]
Reference = Sequence[float] | NDArray[np.float64]  # [objectives]


def nondominated(costs: Matrix) -> NDArray[np.bool_]:
    """Which rows no other row dominates, bool [n]; of equal rows only the first, and never a row with NaN or infinity.

    One or two objectives take a sort, O(n log n); more compare each row with the front so far, O(n * front).
    """
    costs = np.asarray(costs, np.float64)
    on_front = np.zeros(len(costs), bool)
    valid = np.flatnonzero(np.isfinite(costs).all(axis=1))
    if not len(valid):
        return on_front
    rows = valid[np.lexsort(costs[valid].T[::-1])]  # by the first cost, then the second ...; stable: first copy first
    ordered = costs[rows]
    if costs.shape[1] == 1:
        on_front[rows[0]] = True
    elif costs.shape[1] == 2:
        second = ordered[:, 1]
        on_front[rows[0]] = True
        on_front[rows[1:]] = second[1:] < np.minimum.accumulate(second)[:-1]
    else:
        front: list[int] = []
        for i, row in enumerate(ordered):  # whatever dominates a row comes before it in this order
            if not (ordered[front] <= row).all(axis=1).any():
                front.append(i)
        on_front[rows[front]] = True
    return on_front


def ranks(costs: Matrix) -> NDArray[np.int64]:
    """The front each row belongs to, int [n]: 0 is undominated, 1 is undominated without those, and so on.

    Equal rows share a rank. Rows that are not finite share the one after the last.
    """
    costs = np.asarray(costs, np.float64)
    valid = np.isfinite(costs).all(axis=1)
    distinct, copy_of = np.unique(costs[valid], axis=0, return_inverse=True)
    rank, level = np.zeros(len(distinct), np.int64), 0
    left = np.arange(len(distinct))
    while len(left):
        front = nondominated(distinct[left])
        rank[left[front]] = level
        left, level = left[~front], level + 1
    out = np.full(len(costs), level, np.int64)
    out[valid] = rank[copy_of.reshape(-1)]
    return out


def crowding(costs: Matrix, rank: NDArray[np.int64]) -> NDArray[np.float64]:
    """The crowding distance of each row within its rank, [n] (Deb et al. 2002, sec. III-B).

    Infinite at the ends of a front, 0 for rows that are not finite.
    """
    costs = np.asarray(costs, np.float64)
    valid = np.isfinite(costs).all(axis=1)
    distance = np.zeros(len(costs))
    for level in np.unique(rank[valid]):
        members = np.flatnonzero(valid & (rank == level))
        for cost in costs[members].T:
            by_cost = np.argsort(cost, kind="stable")
            ordered = cost[by_cost]
            span = ordered[-1] - ordered[0]
            distance[members[by_cost[[0, -1]]]] = np.inf
            if span > 0:
                distance[members[by_cost[1:-1]]] += (ordered[2:] - ordered[:-2]) / span
    return distance


def order(costs: Matrix) -> NDArray[np.int64]:
    """The rows from best to worst, int [n]: by rank, then the less crowded, then the earlier."""
    rank = ranks(costs)
    return np.lexsort((-crowding(costs, rank), rank))


def hypervolume(costs: Matrix, reference: Reference) -> float:
    """The volume that `costs` [n, objectives] dominate below `reference` [objectives], the worst value of each.

    Exact for any number of objectives: a sort for two, O(n log n); a sweep over a grid row for three, O(n^2); beyond,
    each further objective costs another factor n at worst (WFG: While et al. 2012, doi:10.1109/TEVC.2010.2077298).

    Raises:
        ValueError: `reference` is not of as many objectives as `costs`, or not finite.
    """
    return _volume(*_below(costs, reference)[:2])


def contributions(costs: Matrix, reference: Reference) -> NDArray[np.float64]:
    """The volume [n] that each row of the front adds to the rest of the front.

    It is 0 for rows that are dominated, have an equal, or failed.

    As quick as `hypervolume` for up to three objectives, n times that beyond.

    Raises:
        ValueError: as `hypervolume`.
    """
    front, corner, rows = _below(costs, reference)
    out = np.zeros(len(costs))
    if not len(front):
        return out
    if front.shape[1] == 1:
        exclusive = corner - front[:, 0]
    elif front.shape[1] == 2:
        next_first = np.append(front[1:, 0], corner[0])
        before_second = np.append(corner[1], front[:-1, 1])
        exclusive = (next_first - front[:, 0]) * (before_second - front[:, 1])
    elif front.shape[1] == 3:
        exclusive = _sweep(front, corner)[1]
    else:
        others = ~np.eye(len(front), dtype=bool)
        exclusive = np.array([_exclusive(row, front[o], corner) for row, o in zip(front, others, strict=True)])
    _, copy_of, copies = np.unique(np.asarray(costs), axis=0, return_inverse=True, return_counts=True)
    alone = copies[copy_of.reshape(-1)] == 1  # what two equal rows dominate is lost with neither
    out[rows] = np.where(alone[rows], exclusive, 0.0)
    return out


def _below(costs: Matrix, reference: Reference) -> tuple[Matrix, NDArray[np.float64], NDArray[np.int64]]:
    """The front of the rows better than `reference` everywhere, by its first cost; the reference; where they were."""
    corner = np.asarray(reference, np.float64)
    costs = np.asarray(costs, np.float64)
    if costs.size == 0:
        costs = costs.reshape(0, len(corner))
    if costs.shape[1:] != corner.shape or not np.isfinite(corner).all():
        raise ValueError(f"costs {costs.shape}, reference {corner}: one finite value for each objective is needed")
    with np.errstate(invalid="ignore"):
        rows = np.flatnonzero((costs < corner).all(axis=1))
    rows = rows[nondominated(costs[rows])]
    rows = rows[np.argsort(costs[rows, 0], kind="stable")]
    return costs[rows], corner, rows


def _volume(front: Matrix, corner: NDArray[np.float64]) -> float:
    """Of undominated rows [n, objectives] better than `corner` and sorted by their first cost."""
    if not len(front):
        return 0.0
    if len(front) == 1:
        return float((corner - front[0]).prod())
    if len(corner) == 2:
        heights = np.append(corner[1], front[:, 1])
        return float(((corner[0] - front[:, 0]) * (heights[:-1] - heights[1:])).sum())
    if len(corner) == 3:
        return _sweep(front, corner)[0]
    # WFG: the volume is the sum of what each row adds to those after it. With the worst first cost in front, all that
    # a row shares with later ones reaches from its own first cost to the corner, which leaves one objective less.
    total = 0.0
    for index, row in enumerate(worst_first := front[::-1]):
        total += (corner[0] - row[0]) * _exclusive(row[1:], worst_first[index + 1 :, 1:], corner[1:])
    return total


def _exclusive(row: NDArray[np.float64], others: Matrix, corner: NDArray[np.float64]) -> float:
    """The volume that `row` dominates and none of `others` does."""
    shared, corner, _ = _below(np.maximum(others, row), corner)
    return float((corner - row).prod()) - _volume(shared, corner)


def _sweep(front: Matrix, corner: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """The volume of three-objective rows, sorted by their first cost, and what each alone adds to it.

    Between two first costs, the section is a staircase over the second cost: at each of its steps the lowest third
    cost counts, and what the lowest alone adds reaches up to the second lowest.
    """
    seconds, place = np.unique(front[:, 1], return_inverse=True)
    depth = np.diff(np.append(front[:, 0], corner[0]))
    width = np.diff(np.append(seconds, corner[1]))
    lowest = np.full(len(width), corner[2])
    second_lowest = np.full(len(width), corner[2])
    owner = np.zeros(len(width), np.int64)
    volume, exclusive = 0.0, np.zeros(len(front))
    for index, (start, third) in enumerate(zip(place, front[:, 2], strict=True)):
        first, second, whose = lowest[start:], second_lowest[start:], owner[start:]  # views
        lower = third < first
        second[:] = np.where(lower, first, np.minimum(second, third))
        first[lower], whose[lower] = third, index
        volume += depth[index] * float(width @ (corner[2] - lowest))
        exclusive += depth[index] * np.bincount(owner, width * (second_lowest - lowest), len(front))
    return volume, exclusive
