"""When enough was timed: what is asked for is known well enough, not every single call."""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from nas.ondevice.timing import Samples, Timing

K = TypeVar("K", bound=Hashable)

_NEARLY = 0.99  # the share that is told at most before all is done
ANCHOR = "anchor "  # how names of networks begin by which a recording is judged


def combined(terms: Mapping[K, float], timings: Mapping[K, Timing]) -> tuple[float, float]:
    """A weighted sum of timings, and half its 95 % interval, in milliseconds. Errors of calls are independent.

    Args:
        terms: timing -> weight.
    """
    latency_ms = sum(weight * timings[name].latency_ms for name, weight in terms.items())
    each = (weight * timings[name].latency_ms * timings[name].interval for name, weight in terms.items())
    return latency_ms, math.hypot(*each)


def rounds_for(half: float, wanted: float, *, rounds: int) -> float:
    """The number of rounds by which an interval is `wanted`, if it is `half` after `rounds`; infinite if never.

    Intervals of independent samples shrink with the root of their number.
    """
    if half <= wanted:
        return rounds
    return rounds * (half / wanted) ** 2 if wanted > 0 and math.isfinite(half) else math.inf


class Outlook:
    """How much of a measuring is done and how long it still takes, by what is known so far.

    It ends when the widest interval is narrow enough, but neither before the fewest rounds nor after the longest time.
    What it still takes may turn out to be more than was thought; the share that is told never falls.
    """

    def __init__(self, *, min_rounds: float, max_seconds: float):
        self._min_rounds, self._max_seconds, self._share = min_rounds, max_seconds, 0.0

    def __call__(
        self, *, rounds: int, seconds: float, round_seconds: float, needed_rounds: float
    ) -> tuple[float, float]:
        """The share that is done, below 1, and the seconds that it still takes, 0 or more.

        Args:
            rounds: timed so far.
            seconds: that they took.
            round_seconds: that the next ones take, each.
            needed_rounds: by which all is known well enough.
        """
        left = min((needed_rounds - rounds) * round_seconds, self._max_seconds - seconds)
        left = max(left, (self._min_rounds - rounds) * round_seconds, 0.0)
        self._share = max(self._share, min(seconds / (seconds + left), _NEARLY) if seconds > 0 else 0.0)
        return self._share, left


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a measuring is to find out.

    An entry of a table is a difference of calls, so its error is theirs together. What it does to the prediction of a
    network does not depend on how small the block is: so it is stated relative to the median network, and times the
    root of the number of blocks, by which independent errors grow in a sum. Of a network itself it is the relative
    error. A tolerance of 1 % then is the same for both: sums of entries, and what they are compared with, to 1 %.
    """

    entries: Mapping[str, Mapping[str, float]]  # a block's call -> the weights of the calls that its entry is made of
    networks: Sequence[str]
    blocks: float  # of a network

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "Wanted":
        """As the manifest of a bundle says."""
        return cls(manifest["entries"], manifest["networks"], manifest["network_blocks"])

    def intervals(self, timings: Mapping[str, Timing]) -> dict[str, float]:
        """Call of a block or network -> half a 95 % interval, to be compared with the tolerance.

        Empty if no network was timed: nothing says then what is enough.
        """
        networks = [name for name in self.networks if name in timings]
        found = {name: timings[name].interval for name in networks}
        if networks:
            scale = math.sqrt(self.blocks) / float(np.median([timings[name].latency_ms for name in networks]))
            for name, terms in self.entries.items():
                if all(term in timings for term in terms):
                    found[name] = combined(terms, timings)[1] * scale
        return found

    def unsteadiness(self, samples: Samples[str]) -> float:
        """Of the worst anchor (`Samples.unsteadiness`); 0 where none was timed, or too few rounds tell."""
        anchors = [name for name in self.networks if name.startswith(ANCHOR) and name in samples.names]
        worst = float(samples.unsteadiness(anchors).max()) if anchors else 0.0
        return worst if math.isfinite(worst) else 0.0

    def noise(self, intervals: Mapping[str, float]) -> float:
        """Half the 95 % interval of the sum for a network, relative; without entries, of a network. NaN: not known."""
        found = [intervals[name] for name in (self.entries or intervals) if name in intervals]
        return float(np.sqrt(np.mean(np.square(found)))) if found else float("nan")
