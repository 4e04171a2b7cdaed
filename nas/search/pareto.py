"""Pareto dominance over costs [n, objectives]. Costs are minimised; a row that is not finite dominates nothing."""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]  # [n, objectives]


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


def hypervolume_2d(costs: Matrix, reference: tuple[float, float]) -> float:
    """The area that two-objective `costs` [n, 2] dominate below `reference`, the worst value of each objective."""
    costs = np.asarray(costs, np.float64).reshape(-1, 2)
    costs = costs[(costs < reference).all(axis=1)]
    front = costs[nondominated(costs)]
    front = front[np.argsort(front[:, 0])]  # the second cost falls
    heights = np.concatenate([[reference[1]], front[:, 1]])
    return float(((reference[0] - front[:, 0]) * (heights[:-1] - heights[1:])).sum())
