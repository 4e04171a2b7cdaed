import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nas.search.pareto import contributions, crowding, hypervolume, nondominated, order, ranks

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
    assert hypervolume(costs, (5, 4)) == cells


def by_inclusion_and_exclusion(costs, reference):
    costs = [row for row in costs if (row < reference).all()]
    boxes = [(k, s) for k in range(1, len(costs) + 1) for s in itertools.combinations(costs, k)]
    return math.fsum((-1) ** (k + 1) * np.prod(reference - np.max(s, axis=0)) for k, s in boxes)


@st.composite
def clouds(draw):
    """Up to seven points in one to five objectives, some equal, dominated, beyond the reference or failed."""
    shape = draw(st.integers(0, 7)), draw(st.integers(1, 5))
    return draw(arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.5, 4.0, np.nan])))


@given(clouds())
def test_hypervolume_is_the_volume_of_the_union_of_boxes(costs):
    reference = np.full(costs.shape[1], 3.0)
    assert hypervolume(costs, reference) == pytest.approx(by_inclusion_and_exclusion(costs, reference))


@given(clouds())
def test_contributions_are_what_the_front_loses(costs):
    reference = np.full(costs.shape[1], 3.0)
    on_front = nondominated(costs)
    adds = contributions(costs, reference)
    for i in range(len(costs)):
        rest = np.delete(costs, i, axis=0)[np.delete(on_front, i)]
        twice = (costs == costs[i]).all(axis=1).sum() > 1
        lost = hypervolume(costs[on_front], reference) - hypervolume(rest, reference)
        assert adds[i] == pytest.approx(lost if on_front[i] and not twice else 0.0)


@given(clouds(), st.randoms())
def test_hypervolume_is_monotone_and_knows_no_order(costs, random):
    reference = np.full(costs.shape[1], 3.0)
    volume = hypervolume(costs, reference)
    rows, columns = [*range(len(costs))], [*range(costs.shape[1])]
    random.shuffle(rows)
    random.shuffle(columns)
    assert hypervolume(costs[rows][:, columns], reference) == pytest.approx(volume)
    assert hypervolume(costs[: len(costs) // 2], reference) <= volume + 1e-9
    assert hypervolume(costs - 0.1, reference) >= volume - 1e-9
    np.testing.assert_allclose(contributions(costs[rows], reference), contributions(costs, reference)[rows])


@pytest.mark.parametrize(
    ("objectives", "points", "volume"),
    [  # a sphere's front, computed by moocore 0.3.2 (`moocore.hypervolume`), which shares no code with this
        (2, 500, 0.7841137026512547),
        (3, 200, 0.38538794328722364),
        (4, 60, 0.12550672278572694),
        (5, 30, 0.03822547306350235),
        (6, 20, 0.008063887455025096),
    ],
)
def test_golden_volumes(objectives, points, volume):
    assert hypervolume(sphere(objectives, points), np.ones(objectives)) == pytest.approx(volume, rel=1e-12)


def sphere(objectives, points):
    rays = np.abs(np.sin(1.0 + np.arange(points * objectives)).reshape(points, objectives)) + 0.01
    return 1 - rays / np.linalg.norm(rays, axis=1, keepdims=True)


def test_a_reference_of_another_width_is_refused():
    with pytest.raises(ValueError, match="one finite value for each objective"):
        hypervolume(np.zeros((3, 2)), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="one finite value for each objective"):
        hypervolume(np.zeros((3, 2)), (1.0, np.inf))


def test_empty():
    assert nondominated(np.empty((0, 2))).tolist() == []
    assert ranks(np.empty((0, 2))).tolist() == []
    assert hypervolume(np.empty((0, 2)), (1, 1)) == 0


@pytest.mark.parametrize("n", [100_000])
def test_two_objectives_are_quick(n):
    costs = np.random.default_rng(0).random((n, 2))
    start = time.perf_counter()
    nondominated(costs)
    assert time.perf_counter() - start < 1
