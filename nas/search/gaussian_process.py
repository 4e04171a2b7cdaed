"""An accuracy predictor that knows what it does not know: Gaussian process regression over choices.

The covariance of two networks is the sum of three parts, whose weights the data choose by marginal likelihood
(Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, ch. 2 and 5):

- main effects: each gene adds its own effect, alike for networks that share its value;
- interactions: networks are the more alike the fewer genes they differ in, `exp(-sum of w_g over genes that differ)`,
  where w_g says how much gene g matters (a product of one exponential a gene; Ru et al. 2020, arXiv:1906.08878,
  use the sum and product of such overlaps);
- features: networks of like cheap costs (MACs, latency) are alike, a squared exponential. Twenty-five accuracies say
  little about which choice is good, but that larger networks are better, they say at once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular

from nas.search.strategy import Genotype, Genotypes

Floats = NDArray[np.float64]

_ITERATIONS = 60  # of L-BFGS
_JITTER = 1e-6
_PRIOR_VARIANCE = 1.0  # of the logarithms of hyper-parameters around what is expected
_PART = 1024  # networks whose covariances with some hundred others stay in cache


@dataclass(frozen=True)
class Hyperparameters:
    """Of the covariance, as logarithms. Variances are in units of the variance of the values."""

    log: Floats  # main effects, [genes] of them, interactions, [genes], features, [features], noise
    genes: int

    def split(self) -> tuple[Any, Floats, Any, Floats, Any, Floats, Any]:
        """variance of main effects, share of each gene [genes]; of interactions, weight of each gene [genes]; of
        features, inverse squared length of each [features]; of noise."""
        g, value = self.genes, np.exp(self.log)
        return (
            value[0],
            value[1 : 1 + g],
            value[1 + g],
            value[2 + g : 2 + 2 * g],
            value[2 + 2 * g],
            value[3 + 2 * g : -1],
            value[-1],
        )

    @classmethod
    def expected(cls, genes: int, features: int) -> "Hyperparameters":
        """Where fits start, and what few data do not refute: without it thirty trials often let interactions vanish,
        and the process is then sure of what is wrong."""
        even = np.full(genes, np.log(1 / max(genes, 1)))
        return cls(
            np.concatenate(
                [[np.log(0.5)], even, [np.log(0.5)], even, [np.log(0.3)], np.zeros(features), [np.log(0.03)]]
            ),
            genes,
        )


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """What `fit` learned. Values and predictions are in the units of what it was given."""

    sizes: tuple[int, ...]  # number of values of each gene
    hyperparameters: Hyperparameters
    genotypes: Genotypes  # [n, genes]
    features: Floats  # [n, features], standardised
    mean: float
    scale: float
    feature_mean: Floats
    feature_scale: Floats
    factor: Floats  # [n, n], lower Cholesky factor of the covariance with noise
    weights: Floats  # [n]

    def __len__(self) -> int:
        return len(self.genotypes)

    def standardised(self, features: Floats) -> Floats:
        return (np.asarray(features, np.float64) - self.feature_mean) / self.feature_scale

    def mean_of(self, genotypes: Genotypes, features: Floats) -> Floats:
        """The expected value [m] of genotypes [m, genes] with features [m, features], for many at once.

        It is that of `predict` up to the rounding of float32, some 1e-5 of the spread of the values, and ten times as
        quick.
        """
        standard = self.standardised(features)
        parts = [slice(i, i + _PART) for i in range(0, len(genotypes), _PART)]
        means = [self._means.of(genotypes[part], standard[part]) for part in parts]
        return np.concatenate([np.zeros(0), *means]) * self.scale + self.mean

    def predict(self, genotypes: Genotypes, features: Floats) -> tuple[Floats, Floats]:
        """The mean [m] and standard deviation [m] of the values of genotypes [m, genes], without noise."""
        mean, deviation, _ = self.explained(genotypes, features)
        return mean, deviation

    def explained(self, genotypes: Genotypes, features: Floats) -> tuple[Floats, Floats, Floats]:
        """`predict`, and [n, m] whose products are the covariance that the observations explain."""
        between = self._between(genotypes, self.standardised(features))
        solved = solve_triangular(self.factor, between.T, lower=True, check_finite=False)
        variance = np.maximum(self.prior_variance - (solved**2).sum(0), 1e-12)
        return between @ self.weights * self.scale + self.mean, np.sqrt(variance) * self.scale, solved

    @property
    def prior_variance(self) -> float:
        main, share, interactions, _, of_features, _, _ = self.hyperparameters.split()
        return float(main * share.sum() + interactions + (of_features if self.features.shape[1] else 0.0))

    @property
    def noise(self) -> float:
        """Variance of the noise, in units of `scale` squared."""
        return float(self.hyperparameters.split()[-1]) + _JITTER

    def covariance(self, a: Genotypes, features_a: Floats, b: Genotypes, features_b: Floats) -> Floats:
        """The prior covariance [n, m], in units of `scale` squared, of networks with standardised features."""
        main, share, interactions, weight, of_features, inverse, _ = self.hyperparameters.split()
        # As products of matrices: the loop over genes takes twenty times as long.
        one_hot_a, one_hot_b = one_hot(a, self.sizes), one_hot(b, self.sizes)
        out = one_hot_a @ (one_hot_b * np.repeat(main * share, self.sizes)).T
        apart = one_hot_a @ (one_hot_b * np.repeat(weight, self.sizes)).T
        out += interactions * np.exp(apart - weight.sum())
        if features_a.shape[1]:
            root = np.sqrt(inverse)
            out += of_features * np.exp(-0.5 * _squared_distances(features_a * root, features_b * root))
        return out

    def observe(self, genotypes: Genotypes, features: Floats, values: Floats) -> "GaussianProcess":
        """The process after more observations, with the same hyper-parameters: the factor grows by rows."""
        if not len(genotypes):
            return self
        standard = self.standardised(features)
        between = self._between(genotypes, standard)
        corner = self.covariance(genotypes, standard, genotypes, standard) + self.noise * np.eye(len(genotypes))
        below = solve_triangular(self.factor, between.T, lower=True, check_finite=False).T
        lower = cholesky(corner - below @ below.T + _JITTER * np.eye(len(corner)), lower=True, check_finite=False)
        n = len(self)
        factor = np.zeros((n + len(lower), n + len(lower)))
        factor[:n, :n], factor[n:, :n], factor[n:, n:] = self.factor, below, lower
        known = self.factor @ (self.factor.T @ self.weights)  # the values told so far
        told = np.concatenate([known, (np.asarray(values, np.float64) - self.mean) / self.scale])
        return GaussianProcess(
            self.sizes,
            self.hyperparameters,
            np.concatenate([self.genotypes, genotypes]),
            np.concatenate([self.features, standard]),
            self.mean,
            self.scale,
            self.feature_mean,
            self.feature_scale,
            factor,
            cho_solve((factor, True), told, check_finite=False),
        )

    def _between(self, genotypes: Genotypes, standard: Floats) -> Floats:
        return self.covariance(genotypes, standard, self.genotypes, self.features)

    @functools.cached_property
    def _means(self) -> "_Means":
        return _Means(self)


class _Means:
    """What the mean of a process is summed from, in float32: two matrices of exponents and a sum over genes.

    What a gene adds is taken relative to its first value, which saves a third of the products.
    """

    def __init__(self, process: GaussianProcess) -> None:
        main, share, interactions, weight, of_features, inverse, _ = process.hyperparameters.split()
        gene, value = np.repeat(np.arange(len(share)), process.sizes), _values(process.sizes)
        same = process.genotypes[:, gene] == value  # [known, values]
        first, others = np.flatnonzero(value == 0), np.flatnonzero(value)
        alike, effect = same * weight[gene], main * share[gene] * (process.weights @ same)
        self.genes, self.values = gene[others], value[others]
        self.alike = (alike - alike[:, first[gene]])[:, others].astype(np.float32)  # [known, values of all genes but 1]
        self.alike_first = (alike[:, first].sum(1) - weight.sum())[:, None].astype(np.float32)
        self.effect = (effect - effect[first[gene]])[others].astype(np.float32)
        self.effect_first = float(effect[first].sum())
        self.weights = (interactions * process.weights).astype(np.float32)
        self.root = np.sqrt(inverse)
        known = process.features * self.root
        self.known = known.astype(np.float32)
        self.known_square = 0.5 * (known**2).sum(1)[:, None].astype(np.float32)
        self.feature_weights = (of_features * process.weights).astype(np.float32)

    def of(self, genotypes: Genotypes, standard: Floats) -> Floats:
        """The means [m] in units of `scale`, of features [m, features] that are `standardised`."""
        hot = (np.ascontiguousarray(genotypes.T)[self.genes] == self.values[:, None]).astype(np.float32)
        overlap = self.alike @ hot
        overlap += self.alike_first
        out = self.weights @ np.exp(overlap, out=overlap) + self.effect @ hot
        if len(self.root):
            ours = (standard * self.root).T.astype(np.float32)
            near = self.known @ ours
            near -= self.known_square
            near -= 0.5 * (ours**2).sum(0)
            out += self.feature_weights @ np.exp(near, out=near)
        return out + self.effect_first


def _values(sizes: tuple[int, ...]) -> Genotype:
    """0, 1, ... of the first gene, then of the second ..., [sum of sizes]."""
    return np.concatenate([np.zeros(0, np.uint8), *(np.arange(size, dtype=np.uint8) for size in sizes)])


def one_hot(genotypes: Genotypes, sizes: tuple[int, ...]) -> Floats:
    """[n, sum of sizes]."""
    out = np.zeros((len(genotypes), sum(sizes)))
    offsets = np.cumsum((0, *sizes[:-1]))
    out[np.arange(len(genotypes))[:, None], genotypes + offsets] = 1
    return out


def fit(
    sizes: tuple[int, ...],
    genotypes: Genotypes,
    features: Floats,
    values: Floats,
) -> GaussianProcess:
    """The process of highest marginal likelihood, under log-normal priors, for `values` [n] of genotypes [n, genes].

    Args:
        sizes: the number of values of each gene.
        genotypes: canonical ones, of 2 or more networks.
        features: [n, features] of the same networks; no columns: none.
        values: what is predicted.
    """
    from scipy.optimize import minimize  # here, since it takes a third of a second that every worker would wait

    genotypes, features = np.asarray(genotypes, np.uint8), np.asarray(features, np.float64)
    values = np.asarray(values, np.float64)
    n, genes = genotypes.shape
    feature_mean, feature_scale = features.mean(0), np.maximum(features.std(0), 1e-9)
    standard = (features - feature_mean) / feature_scale
    mean, scale = float(values.mean()), max(float(values.std()), 1e-9)
    objective = _objective(genotypes, standard, (values - mean) / scale)
    first = Hyperparameters.expected(genes, features.shape[1])
    found: Any = minimize(
        objective, first.log, jac=True, method="L-BFGS-B", bounds=[(-9.0, 4.0)] * len(first.log),
        options={"maxiter": _ITERATIONS},
    )  # fmt: skip
    chosen = Hyperparameters(found.x, genes)
    empty = GaussianProcess(
        sizes,
        chosen,
        genotypes[:0],
        standard[:0],
        mean,
        scale,
        feature_mean,
        feature_scale,
        np.zeros((0, 0)),
        np.zeros(0),
    )
    covariance = empty.covariance(genotypes, standard, genotypes, standard) + empty.noise * np.eye(n)
    factor = cholesky(covariance, lower=True)
    weights = cho_solve((factor, True), (values - mean) / scale)
    return GaussianProcess(
        sizes, chosen, genotypes, standard, mean, scale, feature_mean, feature_scale, factor, weights
    )


def _objective(genotypes: Genotypes, standard: Floats, values: Floats) -> Callable[[Floats], tuple[float, Floats]]:
    """Minus the log marginal likelihood and log prior of logarithms of hyper-parameters, and its gradient."""
    n, genes = genotypes.shape
    features = standard.shape[1]
    differ = (genotypes[:, None] != genotypes[None]).astype(np.float64).reshape(n * n, genes)
    distance = ((standard[:, None] - standard[None]) ** 2).reshape(n * n, features)
    expected = Hyperparameters.expected(genes, features).log

    def objective(log: Floats) -> tuple[float, Floats]:
        main, share, interactions, weight, of_features, inverse, noise = Hyperparameters(log, genes).split()
        alike = share.sum() - (differ @ share).reshape(n, n)
        overlap = np.exp(-(differ @ weight).reshape(n, n))
        near = np.exp(-0.5 * (distance @ inverse).reshape(n, n)) if features else np.zeros((n, n))
        covariance = main * alike + interactions * overlap + of_features * near
        covariance[np.diag_indices(n)] += noise + _JITTER
        try:
            factor = cho_factor(covariance, lower=True, check_finite=False)
        except np.linalg.LinAlgError:  # outside of what L-BFGS should try
            return 1e12, np.zeros_like(log)
        solved = cho_solve(factor, values, check_finite=False)
        value = 0.5 * values @ solved + np.log(np.diag(factor[0])).sum()
        # the derivative by the covariance
        slope = 0.5 * (cho_solve(factor, np.eye(n), check_finite=False) - np.outer(solved, solved))
        gradient = np.zeros_like(log)
        gradient[0] = main * (slope * alike).sum()
        gradient[1 : 1 + genes] = main * share * (slope.sum() - slope.ravel() @ differ)
        pull = interactions * slope * overlap
        gradient[1 + genes] = pull.sum()
        gradient[2 + genes : 2 + 2 * genes] = -weight * (pull.ravel() @ differ)
        if features:
            pull = of_features * slope * near
            gradient[2 + 2 * genes] = pull.sum()
            gradient[3 + 2 * genes : -1] = -0.5 * inverse * (pull.ravel() @ distance)
        gradient[-1] = noise * np.trace(slope)
        off = log - expected
        return float(value + 0.5 * (off**2).sum() / _PRIOR_VARIANCE), gradient + off / _PRIOR_VARIANCE

    return objective


def _squared_distances(a: Floats, b: Floats) -> Floats:
    """Between rows of [n, k] and [m, k]."""
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0.0)
