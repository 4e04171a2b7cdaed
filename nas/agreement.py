"""How far two orders of the same networks agree: Kendall's tau-b, with a bootstrap interval."""

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
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(f"lists of shapes {x.shape} and {y.shape}: two of one length >= 2 are needed")
    tau: Any = stats.kendalltau(x, y)  # whose type scipy does not tell
    low, high = np.quantile(resampled(x, y, np.random.default_rng(seed)), (0.025, 0.975))
    return Agreement(float(tau.statistic), float(low), float(high))


def resampled(x: Floats, y: Floats, rng: np.random.Generator) -> Floats:
    """Tau-b of `_RESAMPLES` lists of networks drawn with replacement, those without two different values left out.

    How often each network was drawn, w, is all that a resample is: with S and T the signs of all differences in `x`
    and `y`, tau-b is w'(S*T)w / sqrt(w'(S*S)w w'(T*T)w). With the same generator, other values of the same networks
    are resampled alike, so that two results may be subtracted.
    """
    s, t = (np.sign(v[:, None] - v) for v in (x, y))
    drawn = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=_RESAMPLES).astype(np.float64)
    both, first, second = (((drawn @ signs) * drawn).sum(1) for signs in (s * t, s * s, t * t))
    pairs = first * second
    taus = both[pairs > 0] / np.sqrt(pairs[pairs > 0])
    return taus if len(taus) else np.full(1, np.nan)
