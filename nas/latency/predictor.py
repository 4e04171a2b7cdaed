"""A learned predictor of whole-network latency, for devices on which sums of blocks fail, with intervals.

A Gaussian process on the logarithm of latency (Rasmussen and Williams 2006, gaussianprocess.org/gpml, ch. 2 and 5).
What it knows of a network comes in *groups* of columns: counts of ops, say, or latencies on other devices. Each group
has a linear and a smooth (squared exponential) part, and one smooth part joins all groups; how much each of them
matters is learned by marginal likelihood.

Intervals have the width of a scale of each network times a factor, the quantile of leave-one-out errors on the
measurements (in the same scale): the jackknife form of conformal prediction (Barber et al., Predictive inference with
the jackknife+, Annals of Statistics 2021, arXiv:1905.02928). So they are as wide as errors were, whatever the model
thinks. The scale is the root of the process's standard deviation. Errors grow less than it does where networks are
unlike those measured: on the benchmarks of experiments/benchmarks/few_shot.py 80 % intervals that grow as fast held
69-81 %, intervals of one width 81-89 %, these 75-83 %.
"""

import contextlib
import dataclasses
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, optimize

from nas.errors import LatencyError
from nas.files import write_bytes

Floats = NDArray[np.float64]
Groups = Sequence[ArrayLike]  # each [networks, columns]

FEWEST = 5  # measurements
_CONSTANT = 100.0  # prior variance of the level: whatever it is, the measurements tell
_FREEDOM = 4.0  # of the noise where outliers are expected, a Student's t
_REWEIGHTINGS = 12
_LEARN_FROM = 200  # measurements; the cost is cubic
_STRENGTH = 0.02  # of the prior on the kernel, per measurement
_GROWTH = 0.5  # power of the standard deviation that intervals grow with
_ROWS = 512  # networks predicted at a time, always so many
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Prediction:
    """latency_ms [n], and the interval [low_ms, high_ms] that holds a measurement with probability `level`."""

    latency_ms: Floats
    low_ms: Floats
    high_ms: Floats
    level: float


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Columns of each group to mean 0 and, over a group, mean square 1 in all, as a reference sample has them."""

    mean: tuple[Floats, ...]
    factor: tuple[Floats, ...]

    @classmethod
    def of(cls, groups: Sequence[Floats]) -> "Scaling":
        """That of the networks in `groups`. Columns without variation are not scaled."""
        spread = [np.where(g.std(0) > 1e-12, g.std(0), 1.0) for g in groups]
        return cls(tuple(g.mean(0) for g in groups), tuple(1 / (s * max(len(s), 1) ** 0.5) for s in spread))

    def __call__(self, groups: Sequence[Floats]) -> list[Floats]:
        """`groups`, scaled.

        Raises:
            LatencyError: other numbers of groups or columns than those of the reference.
        """
        came, need = [g.shape[1] for g in groups], [len(m) for m in self.mean]
        if came != need:
            raise LatencyError(f"features have {came} columns by group, and the predictor was fitted on {need}.")
        return [(g - m) * f for g, m, f in zip(groups, self.mean, self.factor, strict=True)]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How much networks resemble each other: logarithms of parameters, [3 * groups + 2].

    The variance of each group's linear part, then of each group's smooth part; each group's length scale; the variance
    of the part that joins all groups; that of the noise of one measurement.
    """

    log: Floats

    @property
    def noise(self) -> float:
        """Variance of one measurement's logarithm."""
        return float(np.exp(self.log[-1]))

    def between(self, a: Sequence[Floats], b: Sequence[Floats]) -> Floats:
        """Covariances [n, m] of log latency, without noise, of scaled groups [n, columns] and [m, columns]."""
        linear, smooth, joint, _ = _parts(self.log, _relations(a, b))
        return _CONSTANT + sum(linear) + sum(smooth) + joint

    def variance(self, a: Sequence[Floats]) -> Floats:
        """The diagonal [n] of `between(a, a)`."""
        v, groups = np.exp(self.log), len(a)
        linear = sum(v[i] * (x * x).sum(1) for i, x in enumerate(a))
        return linear + v[groups : 2 * groups].sum() + v[-2] + _CONSTANT


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A fitted predictor: arrays only, and `load(save(...))` predicts the same to the last bit."""

    kernel: Kernel
    scaling: Scaling
    known: tuple[Floats, ...]  # scaled groups of the measured networks
    level_log_ms: float  # what is taken off their logarithms first
    weights: Floats  # [measured] inverse covariance times logarithms
    inverse: Floats  # [measured, measured] of the covariance of measurements
    errors: Floats  # [calibrating] sizes of leave-one-out errors, in the scale of intervals, in ascending order

    def predict(self, features: Groups, *, level: float = 0.8) -> Prediction:
        """Of networks with `features` [n, columns] in each group; intervals for one measurement of each.

        To the last bit the same for a network whichever others are asked for with it.

        Raises:
            LatencyError: other columns than those fitted on, NaN, or more certainty than the measurements can give.
        """
        fewest = int(np.ceil(level / (1 - level) - 1e-9)) if 0 < level < 1 else 0
        if not 0 < level < 1 or len(self.errors) < fewest:
            raise LatencyError(
                f"intervals of level {level} from {len(self.errors)} measurements: a level is between 0 and 1, and "
                f"needs level / (1 - level) measurements{f', {fewest} here' if fewest else ''}."
            )
        groups = self.scaling(checked(features))
        count = len(groups[0])
        mean, deviation = np.empty(count), np.empty(count)
        for start in range(0, count, _ROWS):
            # Filled up with the last one: matrices of equal shapes are multiplied alike, row by row.
            rows = np.minimum(np.arange(start, start + _ROWS), count - 1)
            some = [g[rows] for g in groups]
            across = self.kernel.between(some, self.known)
            left = self.kernel.variance(some) - np.einsum("ij,ij->i", across @ self.inverse, across)
            part = slice(start, min(start + _ROWS, count))
            mean[part] = (self.level_log_ms + across @ self.weights)[: count - start]
            deviation[part] = np.sqrt(np.maximum(left, 0.0) + self.kernel.noise)[: count - start]
        # The k-th smallest of m errors has a share k / (m + 1) of future ones below it.
        rank = level * (len(self.errors) + 1) - 1
        half = deviation**_GROWTH * np.interp(rank, np.arange(len(self.errors)), self.errors)
        return Prediction(np.exp(mean), np.exp(mean - half), np.exp(mean + half), level)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything, by name; `of_arrays` takes it back."""
        out: dict[str, NDArray[Any]] = {f"known{i}": g for i, g in enumerate(self.known)}
        out |= {f"mean{i}": m for i, m in enumerate(self.scaling.mean)}
        out |= {f"factor{i}": f for i, f in enumerate(self.scaling.factor)}
        out |= {"kernel": self.kernel.log, "weights": self.weights, "inverse": self.inverse, "errors": self.errors}
        return out | {"level_log_ms": np.asarray(self.level_log_ms)}

    @classmethod
    def of_arrays(cls, found: Mapping[str, NDArray[Any]]) -> "Predictor":
        """What `arrays` gave."""
        groups = range((len(found["kernel"]) - 2) // 3)
        mean, factor, known = (tuple(found[f"{n}{i}"] for i in groups) for n in ("mean", "factor", "known"))
        arrays = {name: found[name] for name in ("weights", "inverse", "errors")}
        return cls(Kernel(found["kernel"]), Scaling(mean, factor), known, float(found["level_log_ms"]), **arrays)

    def save(self, path: Path) -> None:
        """Writes an `.npz` file, atomically.

        Raises:
            RunError: it cannot be written.
        """
        write_arrays(path, self.arrays())

    @classmethod
    def load(cls, path: Path) -> "Predictor":
        """What `save` wrote.

        Raises:
            LatencyError: the file is missing, damaged, or of another version.
        """
        with reading(path) as found:
            return cls.of_arrays(found)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """An `.npz` file of `arrays`, written atomically.

    Raises:
        RunError: it cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{"format": np.asarray(_FORMAT), **arrays})
    write_bytes(path, buffer.getvalue())


@contextlib.contextmanager
def reading(path: Path) -> Iterator[dict[str, NDArray[Any]]]:
    """The arrays of a file by `write_arrays`.

    Raises:
        LatencyError: the file is missing, damaged or of another version; or what is sought in it is not there.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if found["format"] != _FORMAT:
            raise ValueError(f"it has format {found['format']}, not {_FORMAT}")
        yield found
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as e:
        raise LatencyError(f"{path}: not a saved predictor: {e}. Fit it again and save it.") from e


def fit(features: Groups, latency_ms: ArrayLike) -> Predictor:
    """The predictor from networks with `features` [n, columns] in each group and latencies [n].

    The kernel is learned from the same measurements, of which some may be outliers.

    Raises:
        LatencyError: fewer than `FEWEST` measurements, unequal lengths, NaN, or latencies that are not above 0.
    """
    groups = checked(features)
    log_ms = logarithms(latency_ms, len(groups[0]))
    scaling = Scaling.of(groups)
    scaled = scaling(groups)
    some = spread(log_ms, scaled, _LEARN_FROM)
    part, values = [g[some] for g in scaled], log_ms[some]
    kernel = learn([(part, values)])
    kernel = learn([(part, values)], noise=[_noise_weights(kernel, part, values)])
    return condition(kernel, scaling, scaled, log_ms, noise=_noise_weights(kernel, scaled, log_ms))


def learn(
    tasks: Sequence[tuple[Sequence[Floats], Floats]], *, noise: Sequence[Floats] | None = None, steps: int = 60
) -> Kernel:
    """The kernel of greatest marginal likelihood over all tasks together, with a weak prior.

    Args:
        tasks: each the scaled groups of some networks [n, columns], and the logarithms of their latencies [n].
        noise: for each task, the variances of measurements [n] relative to the usual one.
        steps: of L-BFGS.
    """
    weights = [np.ones(len(y)) for _, y in tasks] if noise is None else noise
    ready = [(_relations(g, g), y - y.mean(), w) for (g, y), w in zip(tasks, weights, strict=True)]
    each, count = np.ones(len(tasks[0][0])), sum(len(y) for _, y in tasks)
    center = np.r_[-1.0 * each, -3.0 * each, 0.0 * each, -3.0, -6.0]
    width = np.r_[3 * each, 3 * each, each, 3.0, 3.0]

    def loss(log: Floats) -> tuple[float, Floats]:
        away = (log - center) / width
        value, slope = _STRENGTH * (away**2).sum(), 2 * _STRENGTH * away / width
        for task in ready:
            one, its = _surprise(log, *task)
            value, slope = value + one / count, slope + its / count
        return float(value), slope

    bounds = list(zip(center - 8, center + 8, strict=True))
    found = optimize.minimize(loss, center, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps})
    return Kernel(found.x)


def condition(
    kernel: Kernel, scaling: Scaling, scaled: Sequence[Floats], log_ms: Floats, *, noise: Floats | None = None
) -> Predictor:
    """The predictor of a known kernel, given measurements: scaled groups [n, columns] and logarithms [n].

    `noise`: variances [n] of the measurements relative to the usual one, 1 if not given.
    """
    level = float(log_ms.mean())
    variance = kernel.noise * (np.ones(len(log_ms)) if noise is None else noise)
    inverse = _inverse(kernel.between(scaled, scaled) + np.diag(variance))
    weights = inverse @ (log_ms - level)
    # Sec. 5.4.2 of the book: each measurement as the others predict it.
    errors = weights / np.diag(inverse)
    spread = np.sqrt(np.maximum(1 / np.diag(inverse) - variance, 0.0) + kernel.noise)
    return Predictor(kernel, scaling, tuple(scaled), level, weights, inverse, in_scale(errors, spread))


def in_scale(errors: Floats, deviation: Floats) -> Floats:
    """Sizes of leave-one-out errors [n], of standard deviations [n], in the scale of intervals, in ascending order."""
    return np.sort(np.abs(errors) / deviation**_GROWTH)


def spread(key: Floats, groups: Sequence[Floats], count: int) -> NDArray[np.intp]:
    """Indices of at most `count` networks, evenly spaced in the order of `key` [n]: the same whatever their order."""
    order = np.lexsort((*(column for group in groups for column in group.T), key))
    return order[np.linspace(0, len(key) - 1, min(len(key), count)).round().astype(int)]


def checked(features: Groups) -> list[Floats]:
    """Groups as float64 arrays [networks, columns].

    Raises:
        LatencyError: no group, not two axes, unequal lengths, or values that are not finite.
    """
    groups = [np.asarray(g, np.float64) for g in features]
    shapes = [g.shape for g in groups]
    if not groups or any(len(s) != 2 for s in shapes) or len({s[0] for s in shapes}) > 1:
        raise LatencyError(
            f"groups of features have shapes {shapes}: each is [networks, columns], for the same networks. (One array "
            f"of features is one group: put it in a list.)"
        )
    for index, group in enumerate(groups):
        if not np.isfinite(group).all():
            row, column = np.argwhere(~np.isfinite(group))[0]
            raise LatencyError(f"group {index} of features is {group[row, column]} at [{row}, {column}]: leave the "
                               f"network out, or give what is missing.")  # fmt: skip
    return groups


def logarithms(latency_ms: ArrayLike, networks: int) -> Floats:
    """Of measured latencies [networks].

    Raises:
        LatencyError: too few, another number than `networks`, NaN, or not above 0.
    """
    latency = np.asarray(latency_ms, np.float64)
    if latency.shape != (networks,):
        raise LatencyError(f"latencies have shape {latency.shape}: one for each of {networks} networks is needed.")
    if not (np.isfinite(latency) & (latency > 0)).all():
        first = int(np.argmin(np.isfinite(latency) & (latency > 0)))
        raise LatencyError(f"latency {first} is {latency[first]}: milliseconds above 0 are needed; leave out what "
                           f"failed.")  # fmt: skip
    if networks < FEWEST:
        raise LatencyError(f"{networks} measured networks: at least {FEWEST} are needed. Measure some more.")
    return np.log(latency)


def _relations(a: Sequence[Floats], b: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
    """Inner products and squared distances [n, m] of each group."""
    out = []
    for x, y in zip(a, b, strict=True):
        product = x @ y.T
        out.append((product, np.maximum((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * product, 0.0)))
    return out


def _parts(
    log: Floats, relations: list[tuple[Floats, Floats]]
) -> tuple[list[Floats], list[Floats], Floats, list[Floats]]:
    """Linear parts, smooth parts, the joint part, and squared distances over the squared length scales."""
    v, groups = np.exp(log), len(relations)
    near = [d / v[2 * groups + i] ** 2 for i, (_, d) in enumerate(relations)]
    linear = [v[i] * p for i, (p, _) in enumerate(relations)]
    smooth = [v[groups + i] * np.exp(-0.5 * d) for i, d in enumerate(near)]
    return linear, smooth, v[-2] * np.exp(-0.5 * sum(near)), near


def _surprise(log: Floats, relations: list[tuple[Floats, Floats]], y: Floats, noise: Floats) -> tuple[float, Floats]:
    """Negative logarithm of the marginal likelihood, and its gradient (eq. 5.8 and 5.9 of the book)."""
    linear, smooth, joint, near = _parts(log, relations)
    variance = np.exp(log[-1]) * noise
    factor = linalg.cholesky(_CONSTANT + sum(linear) + sum(smooth) + joint + np.diag(variance), lower=True)
    inverse = linalg.cho_solve((factor, True), np.eye(len(y)))
    weights = inverse @ y
    sensitivity = 0.5 * (inverse - np.outer(weights, weights))
    lengths = [(s + joint) * d for s, d in zip(smooth, near, strict=True)]
    slope = [np.vdot(sensitivity, part) for part in (*linear, *smooth, *lengths, joint)]
    slope.append(np.diag(sensitivity) @ variance)
    return float(0.5 * y @ weights + np.log(np.diag(factor)).sum()), np.array(slope)


def _noise_weights(kernel: Kernel, scaled: Sequence[Floats], log_ms: Floats) -> Floats:
    """Noise [n] relative to the usual one if it is Student's t: large for outliers, by expectation maximisation."""
    prior, y, weights = kernel.between(scaled, scaled), log_ms - log_ms.mean(), np.ones(len(log_ms))
    for _ in range(_REWEIGHTINGS):
        variance = kernel.noise * weights
        inverse = _inverse(prior + np.diag(variance))
        # Residual and variance of each measurement's own noise, given all of them.
        squared = (variance * (inverse @ y)) ** 2 + np.maximum(variance - variance**2 * np.diag(inverse), 0.0)
        weights = (_FREEDOM + squared / kernel.noise) / (_FREEDOM + 1)
    return weights


def _inverse(covariance: Floats) -> Floats:
    return linalg.cho_solve((linalg.cholesky(covariance, lower=True), True), np.eye(len(covariance)))
