"""A new device from a handful of measurements: other devices' latencies of all networks tell most of the rest.

The new device is a Gaussian process (`nas.latency.predictor`) over the logarithms of the known devices' latencies and
the networks' own features. Ten measurements cannot tell how smooth such a function is or how far devices follow one
another, so that is learned before from the known devices: each in turn plays the new one.

The simplest answer, and often a good one, is `most_similar`: the known device that orders the measured networks best,
scaled to them. Its errors are others than those of the process, so the estimate is a weighted geometric mean of both
(stacking; Wolpert 1992, doi:10.1016/S0893-6080(05)80023-1), whose weight has the smallest leave-one-out error.

What to measure is half drawn at random, half chosen to tell most given those (`design`). Chosen networks are unlike the
others on purpose, so that errors on them say little of errors on others; the random half gives the intervals.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from nas.errors import LatencyError
from nas.latency.features import branch_groups, feature_groups
from nas.latency.predictor import (
    FEWEST,
    Floats,
    Groups,
    Kernel,
    Prediction,
    Predictor,
    Scaling,
    checked,
    condition,
    in_scale,
    learn,
    logarithms,
    reading,
    spread,
    write_arrays,
)
from nas.latency.table import Table
from nas.ops import Network
from nas.space import Space
from nas.space.space import Between, Genotypes

Indices = NDArray[np.intp]

_LEARN_FROM = 100  # networks of each known device; the cost is cubic
_CANDIDATES = 400
_SHARE, _SHARE_WORTH = 0.8, 20.0  # of the process before anything is measured, worth so many measurements


@dataclasses.dataclass(frozen=True)
class Prior:
    """What the known devices tell about any other: learned once, for however many new devices."""

    kernel: Kernel
    scaling: Scaling


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Predicts the new device: latency = process ^ share * (scale * similar device) ^ (1 - share)."""

    predictor: Predictor  # the process
    share: float
    similar: int  # number of the most similar known device
    log_scale: float

    def predict(self, features: Groups, known_ms: ArrayLike, *, level: float = 0.8) -> Prediction:
        """Of networks with groups of `features` [n, columns], and latencies `known_ms` [n, devices] as in `fit`.

        Raises:
            LatencyError: other columns or devices than fitted on, NaN, or a level too high for the measurements.
        """
        groups = _groups(features, known_ms)
        process = self.predictor.predict(groups, level=level)
        away = groups[0][:, self.similar] + self.log_scale - np.log(process.latency_ms)
        factor = np.exp((1 - self.share) * away)
        return Prediction(process.latency_ms * factor, process.low_ms * factor, process.high_ms * factor, level)

    def save(self, path: Path) -> None:
        """Writes an `.npz` file, atomically; what `load` makes of it predicts the same to the last bit.

        Raises:
            RunError: it cannot be written.
        """
        mixture = {"share": self.share, "similar": self.similar, "log_scale": self.log_scale}
        write_arrays(path, self.predictor.arrays() | {name: np.asarray(v) for name, v in mixture.items()})

    @classmethod
    def load(cls, path: Path) -> "Transfer":
        """What `save` wrote.

        Raises:
            LatencyError: the file is missing, damaged, of another version, or of a predictor without known devices.
        """
        with reading(path) as found:
            mixture = float(found["share"]), int(found["similar"]), float(found["log_scale"])
            return cls(Predictor.of_arrays(found), *mixture)


def learn_prior(features: Groups, known_ms: ArrayLike) -> Prior:
    """From groups of features [networks, columns] and the known devices' latencies [networks, devices].

    Raises:
        LatencyError: no device, fewer than `FEWEST` networks, unequal lengths, NaN, or latencies not above 0.
    """
    groups = _groups(features, known_ms)
    known = groups[0]
    if len(known) < FEWEST:
        raise LatencyError(f"{len(known)} networks of known devices: at least {FEWEST} are needed.")
    some = spread(known.mean(1), [np.sort(known, axis=1), *groups[1:]], _LEARN_FROM)
    tasks = []
    for device in range(known.shape[1]):
        task = [np.delete(known, device, axis=1), *groups[1:]]
        tasks.append(([g[some] for g in Scaling.of(task)(task)], known[some, device]))
    return Prior(learn(tasks), Scaling.of(groups))


def fit(
    features: Groups,
    known_ms: ArrayLike,
    measured_ms: ArrayLike,
    indices: ArrayLike,
    *,
    prior: Prior | None = None,
    calibrating: ArrayLike | None = None,
) -> Transfer:
    """The transfer to a device on which the networks `indices` [m] were measured, `measured_ms` [m].

    Args:
        features: groups [networks, columns].
        known_ms: of all networks on the known devices, [networks, devices].
        prior: if it was learned before, from the same networks and devices.
        calibrating: which of the measurements were of networks drawn at random, [m] of bool; their errors give the
            intervals. None: all were.

    Raises:
        LatencyError: fewer than `FEWEST` measurements, unequal lengths, NaN, latencies not above 0, or indices that
            come twice or are not of a network.
    """
    groups = _groups(features, known_ms)
    rows = _rows(indices, len(groups[0]))
    log_ms = logarithms(measured_ms, len(rows))
    prior = learn_prior(features, known_ms) if prior is None else prior
    process = condition(prior.kernel, prior.scaling, prior.scaling([g[rows] for g in groups]), log_ms)
    known = groups[0][rows]
    similar = _similar(known, log_ms)
    ratios = log_ms - known[:, similar]
    # Both as they predict each measurement from the others.
    precision = np.diag(process.inverse)
    ours = process.weights / precision
    simple = ratios - [np.median(np.delete(ratios, i)) for i in range(len(rows))]
    gap = simple - ours
    before = _SHARE_WORTH * np.mean(gap**2)
    share = float(np.clip((gap @ simple + before * _SHARE) / max(gap @ gap + before, 1e-300), 0.0, 1.0))
    those = np.ones(len(rows), bool) if calibrating is None else np.asarray(calibrating, bool)
    errors = in_scale((share * ours + (1 - share) * simple)[those], 1 / np.sqrt(precision[those]))
    return Transfer(dataclasses.replace(process, errors=errors), share, similar, float(np.median(ratios)))


def choose(
    features: Groups, known_ms: ArrayLike, count: int, *, prior: Prior | None = None, given: ArrayLike = ()
) -> Indices:
    """Which `count` networks to measure on a new device: those that leave the least variance in all of them.

    Greedily, one after the other (active learning after Cohn; Seo et al., Gaussian process regression: active data
    selection and test point rejection, IJCNN 2000); no latency of the new device is needed. Beyond `_CANDIDATES`
    networks, so many of them stand for all.

    Args:
        given: networks that are measured anyway, none of which is chosen.

    Raises:
        LatencyError: as `learn_prior`, or more networks asked for than there are candidates.
    """
    prior = learn_prior(features, known_ms) if prior is None else prior
    groups = _groups(features, known_ms)
    before = _rows(given, len(groups[0]))
    evenly = spread(groups[0].mean(1), [np.sort(groups[0], axis=1), *groups[1:]], _CANDIDATES)
    candidates = np.r_[before, np.setdiff1d(evenly, before)]
    if not 0 < count <= len(candidates) - len(before):
        raise LatencyError(
            f"{count} networks to choose: between 1 and {len(candidates) - len(before)} can be chosen here."
        )
    scaled = prior.scaling([g[candidates] for g in groups])
    left, chosen = prior.kernel.between(scaled, scaled), []
    for number in range(len(before) + count):
        gain = (left**2).sum(1) / (np.diag(left) + prior.kernel.noise)
        gain[chosen] = -np.inf
        best = number if number < len(before) else int(gain.argmax())
        chosen.append(best)
        left = left - np.outer(left[best], left[best]) / (left[best, best] + prior.kernel.noise)
    return candidates[chosen[len(before) :]]


def design(
    features: Groups, known_ms: ArrayLike, count: int, rng: np.random.Generator, *, prior: Prior | None = None
) -> tuple[Indices, NDArray[np.bool_]]:
    """Which `count` networks to measure, half of them drawn at random; and which those are, for `fit`.

    On the tasks of experiments/benchmarks/few_shot.py predictions are as good as from chosen networks alone, and 80 %
    intervals hold 75 to 83 % of latencies; with chosen networks alone 74 to 89 %.

    Raises:
        LatencyError: as `choose`.
    """
    networks = len(np.asarray(known_ms))
    drawn = rng.permutation(networks)[: at_random(count).sum()]
    chosen = choose(features, known_ms, count - len(drawn), prior=prior, given=drawn)
    return np.r_[drawn, chosen], at_random(count)


def most_similar(known_ms: ArrayLike, measured_ms: ArrayLike, indices: ArrayLike) -> Floats:
    """The baseline: latency_ms [networks] of the most similar known device, scaled.

    Most similar is the device of greatest Spearman correlation with `measured_ms` [m] on the networks `indices` [m]
    (of equals, that whose ratio to them varies least); the scale is the median ratio.

    Raises:
        LatencyError: as `fit`.
    """
    (known,) = _groups([], known_ms)
    rows = _rows(indices, len(known))
    log_ms = logarithms(measured_ms, len(rows))
    best = _similar(known[rows], log_ms)
    return np.exp(known[:, best] + np.median(log_ms - known[rows, best]))


def _similar(known: Floats, log_ms: Floats) -> int:
    """Number of the device, of logarithms [m, devices], that is most similar to `log_ms` [m]."""
    ranks = stats.rankdata(np.c_[log_ms, known], axis=0)
    ranks = ranks - ranks.mean(0)
    sizes = np.sqrt((ranks**2).sum(0))
    alike = np.round(ranks[:, 0] @ ranks[:, 1:] / np.maximum(sizes[0] * sizes[1:], 1e-12), 9)
    return int(np.lexsort(((log_ms[:, None] - known).std(0), -alike))[0])


@dataclasses.dataclass(frozen=True, eq=False)
class KnownDevices:
    """Tables of other devices, all of which price the networks of one space.

    Raises:
        LatencyError: there is no table.
    """

    space: Space
    tables: tuple[Table, ...]

    def __post_init__(self) -> None:
        if not self.tables:
            raise LatencyError("no table of a known device: at least one is needed. `nas measure` makes one.")

    def price(self, genotypes: Genotypes) -> Floats:
        """latency_ms [n, tables] of genotypes [n, genes], to the last bit as `Table.price` has them.

        Raises:
            UnmeasuredBlock: a table lacks a block of the space.
            SpaceError: genotypes of another space.
        """
        return np.stack([self.space.price(genotypes, *costs) for costs in self._costs], axis=1)

    def network_ms(self, network: Network) -> Floats:
        """latency_ms [1, tables] of a network."""
        return np.array([[table.network_ms(network) for table in self.tables]])

    @functools.cached_property
    def _costs(self) -> list[tuple[list[Floats], Between | None]]:
        return [(table.costs(self.space), table.between(self.space)) for table in self.tables]


@dataclasses.dataclass(frozen=True)
class SpaceTransfer:
    """Predicts a new device for any network of a space."""

    known: KnownDevices
    transfer: Transfer

    @property
    def space(self) -> Space:
        """Whose networks it predicts."""
        return self.known.space

    def predict(self, genotypes: Genotypes, *, level: float = 0.8) -> Prediction:
        """Of genotypes [n, genes].

        Raises:
            SpaceError: they are not of the space.
        """
        return self.transfer.predict(feature_groups(self.space, genotypes), self.known.price(genotypes), level=level)

    def predict_network(self, network: Network, *, level: float = 0.8) -> Prediction:
        """Of one network [1], to the last bit what `predict` gives for its genotype.

        Raises:
            SpaceError: it is not of the space.
        """
        groups = branch_groups(self.space, self.space.branches_of(network)[None])
        return self.transfer.predict(groups, self.known.network_ms(network), level=level)


def space_prior(known: KnownDevices, *, seed: int = 0) -> Prior:
    """`learn_prior` of random networks of a space; `seed` is that of their draw.

    Raises:
        LatencyError: a space of fewer than `FEWEST` networks.
        UnmeasuredBlock: a table lacks a block of the space.
    """
    drawn = _drawn(known.space, seed)
    return learn_prior(feature_groups(known.space, drawn), known.price(drawn))


def design_space(
    known: KnownDevices, count: int, *, prior: Prior, seed: int = 0
) -> tuple[Genotypes, NDArray[np.bool_]]:
    """`design` among random networks of a space: genotypes [count, genes], and which were drawn at random.

    Raises:
        LatencyError: as `design`.
    """
    drawn = _drawn(known.space, seed)
    rng = np.random.default_rng([seed, 1])
    rows, drawn_at_random = design(feature_groups(known.space, drawn), known.price(drawn), count, rng, prior=prior)
    return drawn[rows], drawn_at_random


def fit_space(
    known: KnownDevices,
    genotypes: Genotypes,
    measured_ms: ArrayLike,
    *,
    prior: Prior | None = None,
    calibrating: ArrayLike | None = None,
    seed: int = 0,
) -> SpaceTransfer:
    """A new device from known devices and measurements [m] of genotypes [m, genes].

    Args:
        prior: of these devices; None: `space_prior` with this `seed`.
        calibrating: as of `fit`.

    Raises:
        LatencyError: fewer than `FEWEST` measurements, unequal lengths, NaN, or latencies not above 0.
        UnmeasuredBlock: a table lacks a block of the space.
        SpaceError: genotypes of another space.
    """
    genotypes = known.space.check(genotypes)
    logarithms(measured_ms, len(genotypes))  # told before anything is learned
    prior = space_prior(known, seed=seed) if prior is None else prior
    groups, rows = feature_groups(known.space, genotypes), np.arange(len(genotypes))
    known_ms = known.price(genotypes)
    return SpaceTransfer(known, fit(groups, known_ms, measured_ms, rows, prior=prior, calibrating=calibrating))


def at_random(count: int) -> NDArray[np.bool_]:
    """Which of the `count` networks of a `design` were drawn at random, [count]: those that come first."""
    return np.arange(count) < count - count // 2


def _drawn(space: Space, seed: int) -> Genotypes:
    """Different random networks that stand for the space."""
    return np.unique(space.sample(np.random.default_rng(seed), _CANDIDATES), axis=0)


def _groups(features: Groups, known_ms: ArrayLike) -> list[Floats]:
    """Logarithms of the known devices' latencies, then the features."""
    known = np.asarray(known_ms, np.float64)
    if known.ndim != 2 or not known.shape[1] or not (np.isfinite(known) & (known > 0)).all():
        bad = known[~(np.isfinite(known) & (known > 0))]
        came = f"has {len(bad)} values like {bad[0]}" if len(bad) else f"has shape {known.shape}"
        raise LatencyError(
            f"known_ms {came}: milliseconds above 0, [networks, devices], of at least one device are needed. Leave out "
            f"the networks that failed on one."
        )
    return checked([np.log(known), *features])


def _rows(indices: ArrayLike, networks: int) -> Indices:
    rows = np.asarray(indices)
    whole = rows.ndim == 1 and (np.issubdtype(rows.dtype, np.integer) or not len(rows))
    if not whole or len(set(rows.tolist())) < len(rows) or ((rows < 0) | (rows >= networks)).any():
        raise LatencyError(
            f"indices {rows.tolist()} of measured networks: different whole numbers in 0..{networks - 1} are needed."
        )
    return rows.astype(np.intp)
