"""Expected hypervolume improvement in closed form against sampling."""

import numpy as np
import pytest

from nas.search.improvement import expected_improvement, expected_shortfall, front_of
from nas.search.pareto import hypervolume

FRONT = np.array([[0.5, 1.0], [0.3, 2.0], [0.2, 4.0], [0.6, 3.0], [np.nan, 0.1]])
REFERENCE = np.array([0.9, 5.0])


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.9])
def test_the_shortfall_is_the_mean_of_samples(threshold):
    samples = np.exp(-1.2 + 0.4 * np.random.default_rng(0).standard_normal(400_000))
    expected = np.maximum(threshold - samples, 0)
    error = 5 * expected.std() / np.sqrt(len(samples)) + 1e-12
    got = expected_shortfall(np.array(-1.2), np.array(0.4), np.array(threshold))
    assert got == pytest.approx(expected.mean(), abs=error)


@pytest.mark.parametrize("cost", [0.5, 1.0, 1.7, 2.0, 3.9, 4.5, 5.0, 6.0])
@pytest.mark.parametrize("mean", [0.1, 0.25, 0.8])
def test_the_improvement_is_the_mean_of_samples(cost, mean):
    rng = np.random.default_rng(1)
    samples = np.exp(np.log(mean) + 0.3 * rng.standard_normal(1000))
    before = hypervolume(FRONT, tuple(REFERENCE))
    gains = np.array([hypervolume(np.r_[FRONT, [[s, cost]]], tuple(REFERENCE)) - before for s in samples])
    got = expected_improvement(
        front_of(FRONT, REFERENCE), np.array([np.log(mean)]), np.array([0.3]), np.array([[cost]])
    )
    assert got[0] == pytest.approx(gains.mean(), abs=5 * gains.std() / np.sqrt(len(gains)) + 1e-6)


def test_without_doubt_it_is_the_improvement_itself():
    point = np.array([[0.25, 1.5]])
    exact = hypervolume(np.r_[FRONT, point], tuple(REFERENCE)) - hypervolume(FRONT, tuple(REFERENCE))
    got = expected_improvement(front_of(FRONT, REFERENCE), np.log(point[:, 0]), np.zeros(1), point[:, 1:])
    assert got[0] == pytest.approx(exact)


def test_one_objective_is_plain_expected_improvement():
    front = front_of(np.array([[0.4], [0.3], [np.nan]]), np.array([0.9]))
    got = expected_improvement(front, np.array([-1.0]), np.array([0.2]), np.empty((1, 0)))
    assert got[0] == pytest.approx(expected_shortfall(np.array(-1.0), np.array(0.2), np.array(0.3)))


def test_two_cheap_costs_are_integrated_by_points():
    """A second cheap cost that is the same for all changes nothing but the unit."""
    twice = np.c_[FRONT, np.full(len(FRONT), 2.0)]
    front = front_of(twice, np.array([0.9, 5.0, 3.0]))
    cheap = np.array([[1.5], [3.0]])
    mean, deviation = np.log([0.25, 0.15]), np.array([0.3, 0.1])
    one = expected_improvement(front_of(FRONT, REFERENCE), mean, deviation, cheap)
    two = expected_improvement(front, mean, deviation, np.c_[cheap, [2.0, 2.0]])
    np.testing.assert_allclose(two, one, rtol=0.05)


def test_nothing_known_yet_is_improved_up_to_the_reference():
    front = front_of(np.empty((0, 2)), REFERENCE)
    got = expected_improvement(front, np.log([0.4]), np.zeros(1), np.array([[2.0]]))
    assert got[0] == pytest.approx((0.9 - 0.4) * (5.0 - 2.0))


@pytest.mark.parametrize(
    "point", [(0.25, 0.5, 1.0), (0.1, 0.2, 0.4), (0.4, 3.0, 0.2), (0.25, 2.5, 2.5), (0.15, 0.0, 0.0)]
)
def test_a_network_cheaper_than_all_before_gains_what_it_adds(point):
    """With two cheap costs, wherever it lies: below all told costs in one of them or in both, or among them."""
    told = np.array([[0.5, 1.0, 2.0], [0.3, 2.0, 1.5], [0.2, 4.0, 1.0], [np.nan, 0.1, 0.1]])
    reference = np.array([0.9, 5.0, 3.0])
    new = np.array([point])
    exact = hypervolume(np.r_[told, new], reference) - hypervolume(told, reference)
    got = expected_improvement(front_of(told, reference), np.log(new[:, 0]), np.zeros(1), new[:, 1:])
    assert got[0] == pytest.approx(exact, rel=0.02)
