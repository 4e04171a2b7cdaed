"""Interleaved timing: everything that is to be compared is measured in the same moments.

Rounds run every call once, in fresh random order. A shared machine changes speed by half, for a second or for minutes
(another virtual CPU on the same core, the clock), and preempts; so a sample is first divided by the machine's *level*
at that moment, the running median over neighbouring samples of how much slower than usual they were. A low quartile
of what is left is robust against preemption. On 2 CPUs at load 7 to 9, held-out error of tables of small networks,
from 40 rounds at 16 and 32 pixels: this 2.6 and 1.9 %; plain p25 3.0 and 2.1, median 2.9 and 2.3, p10 3.7 and 2.4,
minimum 11.1 and 5.2 %. With 200 rounds all but the minimum come within 0.3 % of each other.
"""

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import median_filter

from nas.measure.machine import pinned

K = TypeVar("K", bound=Hashable)
Call = Callable[[int], object]  # runs so many inferences, and returns when the last has finished
Floats = NDArray[np.float64]

_SAMPLE_SECONDS = 100e-6  # a sample of tiny calls repeats them to last so long: timer and loop cost stay below 0.1 %
_FIXED_SHARE = 0.01  # of a sample, at most, for what comes once a call: waiting for an accelerator to end
_FIXED_TOLD = 0.2  # of the quickest call: less cannot be told from the noise of a CPU
_NEIGHBOURS = 15  # samples that a level is the median of: a few milliseconds, shorter than the machine's moods
_QUARTILE = 25  # percentile of levelled samples that stands for a call
_QUIET = 10  # percentile of the level that results are stated at: this machine when others leave it alone


@dataclasses.dataclass(frozen=True)
class Timing:
    """One call. `latency_ms` is what to compare; the percentiles say what came, the machine's busy moments included."""

    latency_ms: float  # a low quartile of levelled samples, stated at the machine's quiet level
    spread: float  # half the interquartile range of levelled samples, relative
    p10_ms: float  # of the samples as they came, like the next two
    median_ms: float
    p90_ms: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Samples(Generic[K]):
    """All samples of one interleaved measuring."""

    names: tuple[K, ...]
    times_ms: Floats  # [rounds, names]
    order: NDArray[np.intp]  # [rounds, names]: names in the order they ran

    def timings(self) -> dict[K, Timing]:
        """Of every call."""
        low, high = np.exp(np.percentile(self._levelled(slice(None)), (_QUARTILE, 75), axis=0))
        found = np.percentile(self.times_ms, (10, 50, 90), axis=0)
        columns = np.stack([low, (high / low - 1) / 2, *found], axis=1).tolist()
        return {n: Timing(*row, rounds=len(self.times_ms)) for n, row in zip(self.names, columns, strict=True)}

    def disagreement(self, names: list[K], *, parts: int) -> float:
        """Mean absolute relative difference of `names` between the first and the last of `parts` equal parts in time.

        A factor common to all is set aside: it is the machine's level, which anchors take out of every comparison.
        """
        size = max(len(self.times_ms) // parts, 1)
        columns = [self.names.index(n) for n in names]
        first, last = (
            np.percentile(self._levelled(rows)[:, columns], _QUARTILE, axis=0)
            for rows in (slice(size), slice(-size, None))
        )
        ratio = last - first
        return float(np.abs(np.expm1(ratio - np.median(ratio))).mean())

    def _levelled(self, rows: slice) -> Floats:
        """Log of the given rounds' samples [rounds, names], as they would be at the machine's quiet level."""
        log_ms, order = np.log(self.times_ms[rows]), self.order[rows]
        typical = np.median(log_ms, axis=0)
        level = np.zeros_like(log_ms)
        for _ in range(3):  # typical times and levels explain each other; three passes settle it
            in_time = np.take_along_axis(log_ms - typical, order, axis=1).ravel()
            in_time = median_filter(in_time, _NEIGHBOURS, mode="nearest").reshape(order.shape)
            np.put_along_axis(level, order, in_time, axis=1)
            typical = np.median(log_ms - level, axis=0)
        return log_ms - level + np.percentile(level, _QUIET)


def interleave(
    calls: Mapping[K, Call],
    *,
    seconds: float,
    min_rounds: int,
    seed: int,
    progress: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples[K]:
    """Times `calls` in rounds of random order until `seconds` are used up, but never in fewer than `min_rounds`.

    The caller pins the process, before the calls are built. Garbage collection is off meanwhile.

    Args:
        progress: told the share that is done, 0 to 1, after each round.
        clock: seconds; for tests.
    """
    names, functions = tuple(calls), list(calls.values())
    rng = np.random.default_rng(seed)
    times: list[list[float]] = []
    orders: list[NDArray[np.intp]] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        repeats = _repeats(functions, clock)
        start = clock()
        while len(times) < min_rounds or clock() - start < seconds:
            order, row = rng.permutation(len(names)), [0.0] * len(names)
            for index in order.tolist():
                call, count = functions[index], repeats[index]
                call(1)  # the call before left the caches to another network
                begin = clock()
                call(count)
                row[index] = (clock() - begin) / count * 1e3
            times.append(row)
            orders.append(order)
            if progress is not None:
                used = (clock() - start) / seconds if seconds else 1.0
                progress(min(len(times) / min_rounds, used, 1.0))
    finally:
        if collecting:
            gc.enable()
    return Samples(names, np.maximum(np.array(times), 1e-9), np.array(orders))


def measure_files(
    openers: Mapping[K, Callable[[], Call]], *, seconds: float, min_rounds: int = 15, seed: int = 0, threads: int = 1
) -> dict[K, Timing]:
    """Opens sessions and times them against each other, pinned and interleaved.

    They are opened here since threads keep the CPUs that their process was held on when they started: so these sessions
    run where those of a table did. To compare with a table, time its anchors (`nas.measure.prepare`) along with them
    and divide by `Table.level`.

    Args:
        openers: each opens a session and returns its prepared inferences.
    """
    with pinned(threads):
        calls = {name: opened() for name, opened in openers.items()}
        return interleave(calls, seconds=seconds, min_rounds=min_rounds, seed=seed).timings()


def _repeats(calls: Sequence[Call], clock: Callable[[], float]) -> list[int]:
    """How many inferences one sample of each call takes.

    As many as fill a sample, and as many as make what comes once a call, like waiting for an accelerator, a hundredth.
    """
    alone = [_fastest(call, 1, clock) for call in calls]
    fixed = _once(calls[int(np.argmin(alone))], min(alone), clock) if alone else 0.0
    each = [max(seconds - fixed, 1e-7) for seconds in alone]
    return [max(1, min(1000, math.ceil(max(_SAMPLE_SECONDS, fixed / _FIXED_SHARE) / seconds))) for seconds in each]


def _once(call: Call, alone: float, clock: Callable[[], float]) -> float:
    """Seconds that come once in `call(n)`, whatever n is; 0 where they are too few to tell from noise."""
    many = 8
    fixed = alone - (_fastest(call, many, clock) - alone) / (many - 1)
    return fixed if fixed > _FIXED_TOLD * alone else 0.0


def _fastest(call: Call, count: int, clock: Callable[[], float]) -> float:
    """Seconds of the quickest of five `call(count)`."""
    fastest = float("inf")
    for _ in range(5):
        begin = clock()
        call(count)
        fastest = min(fastest, clock() - begin)
    return max(fastest, 1e-7)
