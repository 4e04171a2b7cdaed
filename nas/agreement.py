"""How far two orders of the same networks agree: Kendall's tau-b or Spearman's rho, with a bootstrap interval."""

from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

_RESAMPLES = 1000


class Agreement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tau-b in [-1, 1] (NaN where one side has but one value), and its 95 % bootstrap interval over networks."""

    tau: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.tau:.2f} [{self.low:.2f}, {self.high:.2f}]"


def agreement(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> Agreement:
    """Of two lists [n] of values of the same networks, n >= 2. `seed`: of the resampling.

    Raises:
        ValueError: fewer than two networks, or unequal lengths.
    """
    x, y = _checked(a, b)
    return Agreement(kendall_tau(x, y), *interval(resampled(x, y, np.random.default_rng(seed))))


def advantage(a: ArrayLike, b: ArrayLike, truth: ArrayLike, *, seed: int = 0) -> Agreement:
    """How much better `a` agrees with `truth` than `b` does: the difference of their taus, in [-2, 2].

    The interval is that of the difference, over the same resamples of networks for both: two taus with one truth vary
    together, so their own intervals may overlap although one is always above the other.

    Raises:
        ValueError: fewer than two networks, or unequal lengths.
    """
    (x, t), (y, _) = _checked(a, truth), _checked(b, truth)
    taus = [resampled(v, t, np.random.default_rng(seed)) for v in (x, y)]
    return Agreement(kendall_tau(x, t) - kendall_tau(y, t), *interval(taus[0] - taus[1]))


def resampled(x: Floats, y: Floats, rng: np.random.Generator) -> Floats:
    """Tau-b of `_RESAMPLES` lists of networks drawn with replacement; NaN where a side has but one value.

    How often each network was drawn, w, is all that a resample is: with S and T the signs of all differences in `x`
    and `y`, tau-b is w'(S*T)w / sqrt(w'(S*S)w w'(T*T)w). With the same generator, other values of the same networks
    are resampled alike, so that two results may be subtracted.
    """
    drawn = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=_RESAMPLES).astype(np.float64)
    s, t = (np.sign(v[:, None] - v) for v in (x, y))
    both, first, second = (((drawn @ signs) * drawn).sum(1) for signs in (s * t, s * s, t * t))
    pairs = first * second
    return np.divide(both, np.sqrt(pairs), out=np.full(len(pairs), np.nan), where=pairs > 0)


def resampled_rho(x: Floats, y: Floats, rng: np.random.Generator) -> Floats:
    """Spearman's rho of as many lists, likewise: the rank of x_i is the sum of w_j over x_j < x_i, ties half."""
    drawn = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=_RESAMPLES).astype(np.float64)
    ranks = [drawn @ ((v[:, None] < v) + 0.5 * (v[:, None] == v)) for v in (x, y)]
    first, second = (r - (drawn * r).sum(1, keepdims=True) / len(x) for r in ranks)
    both, xx, yy = ((drawn * a * b).sum(1) for a, b in ((first, second), (first, first), (second, second)))
    spread = xx * yy
    known = spread > 1e-9 * len(x) ** 6
    return np.divide(both, np.sqrt(spread), out=np.full(len(both), np.nan), where=known)


def spearman_rho(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation of two lists [n]; NaN where one has but one value."""
    if len(set(np.asarray(x).tolist())) < 2 or len(set(np.asarray(y).tolist())) < 2:
        return float("nan")
    rho: Any = stats.spearmanr(x, y)
    return float(rho.statistic)


def kendall_tau(x: ArrayLike, y: ArrayLike) -> float:
    """Tau-b of two lists [n]; NaN where one has but one value."""
    tau: Any = stats.kendalltau(x, y)  # whose type scipy does not tell
    return float(tau.statistic)


def interval(taus: Floats) -> tuple[float, float]:
    """The middle 95 % of `taus`, those that are NaN left out; NaN where all are."""
    known = taus[~np.isnan(taus)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def _checked(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(f"lists of shapes {x.shape} and {y.shape}: two of one length >= 2 are needed")
    return x, y
