"""The accuracy predictor: its gradient, its honesty about what it does not know, and growth by observations."""

import numpy as np
import pytest
from scipy.optimize import check_grad
from scipy.stats import kendalltau

from nas.search.gaussian_process import Hyperparameters, _objective, fit, one_hot

SIZES = (3, 2, 4, 1, 3, 3)


def toy(n, seed, noise=0.1):
    """Main effects, one interaction, one feature, noise: genotypes, features, values, values without noise."""
    rng = np.random.default_rng(seed)
    genotypes = rng.integers(0, SIZES, (n, len(SIZES))).astype(np.uint8)
    features = rng.random((n, 1))
    effects = [np.random.default_rng(9 + g).normal(size=size) for g, size in enumerate(SIZES)]
    truth = sum(e[genotypes[:, g]] for g, e in enumerate(effects)) + 2 * features[:, 0]
    truth = truth + 1.5 * ((genotypes[:, 0] == 1) & (genotypes[:, 2] == 2))
    return genotypes, features, truth + noise * rng.standard_normal(n), truth


def test_one_hot():
    assert one_hot(np.array([[2, 0], [0, 1]], np.uint8), (3, 2)).tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 0, 1]]


@pytest.mark.parametrize("features", [0, 2])
def test_the_gradient_is_that_of_the_likelihood(features):
    genotypes, _, values, _ = toy(20, 0)
    standard = np.random.default_rng(0).standard_normal((20, features))
    objective = _objective(genotypes, standard, values)
    for seed in range(3):
        log = Hyperparameters.expected(len(SIZES), features).log
        log = log + 0.5 * np.random.default_rng(seed).standard_normal(len(log))
        slope = np.linalg.norm(objective(log)[1])
        assert check_grad(lambda x: objective(x)[0], lambda x: objective(x)[1], log) < 1e-5 * slope + 1e-4


def test_it_ranks_what_it_has_not_seen_and_knows_how_well():
    inside, error, tau = [], [], []
    for seed in range(8):
        genotypes, features, values, truth = toy(260, seed)
        process = fit(SIZES, genotypes[:60], features[:60], values[:60])
        mean, deviation = process.predict(genotypes[60:], features[60:])
        inside.append((np.abs(mean - truth[60:]) < 1.2816 * deviation).mean())
        error.append(np.abs(mean - truth[60:]).mean())
        tau.append(kendalltau(mean, truth[60:]).statistic)
    assert np.mean(tau) > 0.85
    assert 0.7 < np.mean(inside) < 0.95  # of intervals that are to hold 80 %
    assert np.mean(error) < 0.3


def test_far_from_data_it_is_less_sure():
    genotypes, features, values, _ = toy(40, 1)
    process = fit(SIZES, genotypes, features, values)
    _, known = process.predict(genotypes, features)
    _, other = process.predict(*toy(200, 2)[:2])
    assert known.mean() < 0.8 * other.mean()
    assert other.max() <= np.sqrt(process.prior_variance) * process.scale + 1e-12


def test_observations_are_learned_as_if_they_had_been_there():
    genotypes, features, values, _ = toy(50, 3)
    process = fit(SIZES, genotypes[:40], features[:40], values[:40])
    grown = process.observe(genotypes[40:45], features[40:45], values[40:45])
    grown = grown.observe(genotypes[45:], features[45:], values[45:])
    standard = process.standardised(features)
    covariance = process.covariance(genotypes, standard, genotypes, standard) + process.noise * np.eye(50)
    new, new_features = toy(30, 4)[:2]
    between = process.covariance(new, process.standardised(new_features), genotypes, standard)
    mean = between @ np.linalg.solve(covariance, (values - process.mean) / process.scale) * process.scale + process.mean
    variance = process.prior_variance - np.einsum("ij,ji->i", between, np.linalg.solve(covariance, between.T))
    got_mean, got_deviation = grown.predict(new, new_features)
    np.testing.assert_allclose(got_mean, mean, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(got_deviation, np.sqrt(variance) * process.scale, rtol=1e-3)


@pytest.mark.parametrize("known", [3, 100, 300])
@pytest.mark.parametrize("features", [0, 1])
def test_means_of_many_at_once_are_those_of_predictions(known, features):
    genotypes, columns, values, _ = toy(known, 5, noise=0.02)
    process = fit(SIZES, genotypes, columns[:, :features], values)
    new, new_columns = toy(1500, 6)[:2]
    mean, _ = process.predict(new, new_columns[:, :features])
    got = process.mean_of(new, new_columns[:, :features])
    np.testing.assert_allclose(got, mean, rtol=0, atol=1e-4 * process.scale)
    assert process.mean_of(new[:0], new_columns[:0, :features]).shape == (0,)


@pytest.mark.parametrize("values", [np.zeros(5), np.array([1.0, 1.0, 1.0, 1.0, 50.0])])
def test_values_without_spread_and_repeated_networks_are_no_trap(values):
    genotypes = np.zeros((5, 3), np.uint8)
    mean, deviation = fit((2, 2, 2), genotypes, np.ones((5, 1)), values).predict(genotypes, np.ones((5, 1)))
    assert np.isfinite(mean).all()
    assert np.isfinite(deviation).all()
