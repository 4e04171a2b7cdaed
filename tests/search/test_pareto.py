import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nas.search.pareto import crowding, hypervolume_2d, nondominated, order, ranks

VALUES = st.sampled_from([0.0, 1.0, 2.0, 3.0, 0.5, -1.0, np.nan, np.inf])  # few values: many ties


@st.composite
def matrices(draw):
    return draw(arrays(np.float64, (draw(st.integers(0, 12)), draw(st.integers(1, 4))), elements=VALUES))


def dominates(a, b):
    return bool((a <= b).all() and (a < b).any())


def front_by_definition(costs):
    valid = np.isfinite(costs).all(axis=1)
    return [
        bool(valid[i])
        and not any(valid[j] and dominates(costs[j], costs[i]) for j in range(len(costs)))
        and not any((costs[j] == costs[i]).all() for j in range(i))
        for i in range(len(costs))
    ]


@given(matrices())
def test_front_is_the_definition(costs):
    assert nondominated(costs).tolist() == front_by_definition(costs)


@given(matrices())
def test_ranks_peel_fronts(costs):
    rank = ranks(costs)
    valid = np.isfinite(costs).all(axis=1)
    for i in np.flatnonzero(valid):
        better = [rank[j] for j in np.flatnonzero(valid) if dominates(costs[j], costs[i])]
        assert rank[i] == max(better, default=-1) + 1
    assert (rank[~valid] == max(rank[valid], default=-1) + 1).all()


@given(matrices())
def test_order_is_a_permutation_with_failures_last(costs):
    best_first = order(costs)
    assert sorted(best_first) == list(range(len(costs)))
    failed = ~np.isfinite(costs).all(axis=1)[best_first]
    assert (np.diff(failed.astype(int)) >= 0).all()


def test_crowding_by_hand():
    costs = np.array([[0, 10], [1, 6], [4, 2], [10, 0], [np.nan, 0], [11, 11]], float)
    expected = [np.inf, 4 / 10 + 8 / 10, 9 / 10 + 6 / 10, np.inf, 0, np.inf]
    np.testing.assert_allclose(crowding(costs, ranks(costs)), expected)


@given(
    arrays(np.float64, st.tuples(st.integers(0, 8), st.just(2)), elements=st.sampled_from([0.0, 1, 2, 3, 4, 5, np.nan]))
)
def test_hypervolume_counts_cells(costs):
    cells = sum(any(a <= i and b <= j for a, b in costs) for i in range(5) for j in range(4))
    assert hypervolume_2d(costs, (5, 4)) == cells


def test_empty():
    assert nondominated(np.empty((0, 2))).tolist() == []
    assert ranks(np.empty((0, 2))).tolist() == []
    assert hypervolume_2d(np.empty((0, 2)), (1, 1)) == 0


@pytest.mark.parametrize("n", [100_000])
def test_two_objectives_are_quick(n):
    costs = np.random.default_rng(0).random((n, 2))
    start = time.perf_counter()
    nondominated(costs)
    assert time.perf_counter() - start < 1
