import numpy as np
import pytest
from scipy import stats

from nas.agreement import advantage, agreement, resampled, resampled_rho, spearman_rho


@pytest.fixture
def ties():
    """Accuracies of 15 networks with ties, and two predictors of them."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 8, 15).astype(float)
    return truth, truth + rng.integers(-1, 2, 15), truth + rng.integers(-4, 5, 15)


def test_tau_is_scipys_in_every_resample(ties):
    truth, near, _ = ties
    drawn = np.random.default_rng(5).multinomial(15, np.full(15, 1 / 15), size=1000)
    wanted = [stats.kendalltau(*(np.repeat(v, times) for v in (near, truth))).statistic for times in drawn[:50]]
    np.testing.assert_allclose(resampled(near, truth, np.random.default_rng(5))[:50], wanted)


def test_an_advantage_is_the_difference_of_taus_over_common_resamples(ties):
    truth, near, far = ties
    found = advantage(near, far, truth, seed=3)
    assert found.tau == agreement(near, truth).tau - agreement(far, truth).tau
    apart = [resampled(v, truth, np.random.default_rng(3)) for v in (near, far)]
    assert (found.low, found.high) == pytest.approx(np.quantile(apart[0] - apart[1], (0.025, 0.975)))
    opposite = advantage(far, near, truth, seed=3)
    assert (opposite.low, opposite.high) == pytest.approx((-found.high, -found.low))


def test_two_that_order_alike_have_no_advantage_however_wide_their_own_intervals(ties):
    truth, near, _ = ties
    assert str(advantage(near, 2 * near + 1, truth)) == "0.00 [0.00, 0.00]"


def test_resamples_without_an_order_are_left_out_and_none_at_all_gives_no_number():
    few = agreement([1, 2], [1, 2])  # half of the resamples have one network twice
    assert (few.tau, few.low, few.high) == (1, 1, 1)
    flat = agreement([1, 1, 1], [1, 2, 3])
    assert np.isnan([flat.tau, flat.low, flat.high]).all()
    assert np.isnan(advantage([1, 1, 1], [1, 2, 3], [1, 2, 3]).tau)


def test_lists_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="two of one length"):
        advantage([1, 2], [1, 2, 3], [1, 2, 3])


def test_rho_is_scipys_in_every_resample(ties):
    truth, near, _ = ties
    drawn = np.random.default_rng(5).multinomial(15, np.full(15, 1 / 15), size=1000)
    wanted = [stats.spearmanr(*(np.repeat(v, times) for v in (near, truth))).statistic for times in drawn[:50]]
    np.testing.assert_allclose(resampled_rho(near, truth, np.random.default_rng(5))[:50], wanted)


def test_rho_of_one_value_is_none():
    assert np.isnan(spearman_rho([1, 1, 1], [1, 2, 3]))
    assert np.isnan(resampled_rho(np.ones(3), np.arange(3.0), np.random.default_rng(0))).all()
