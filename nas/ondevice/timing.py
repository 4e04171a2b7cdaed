"""Interleaved timing: everything that is to be compared is measured in the same moments.

Rounds run every call once, in fresh random order. A shared machine changes speed by half, for a second or for minutes
(another virtual CPU on the same core, the clock), and preempts; so a sample is first divided by the machine's *level*
at that moment, the running median over neighbouring samples of how much slower than usual they were. A low quartile
of what is left is robust against preemption. On 2 CPUs at load 7 to 9, held-out error of tables of small networks,
from 40 rounds at 16 and 32 pixels: this 2.6 and 1.9 %; plain p25 3.0 and 2.1, median 2.9 and 2.3, p10 3.7 and 2.4,
minimum 11.1 and 5.2 %. With 200 rounds all but the minimum come within 0.3 % of each other.

A call is timed once it has settled. After others have run, the caches and all that a CPU learns of a program are
theirs. What the first, second, third, fifth and seventh inference took in terms of the fourteenth, medians of 16
networks of `mobilenet_v3_32` and of 16 of its blocks (2 virtual CPUs of a Zen 5 server, 190 to 290 rounds):

                   networks                          blocks
    OpenVINO       2.12  1.56  1.18  1.04  1.01      2.63  1.09  1.02  1.01  1.01
    LiteRT         1.41  1.22  1.08  1.01  1.00      1.68  1.01  1.00  1.00  1.00
    XLA            1.83  1.45  1.19  1.04  1.02      2.18  1.09  1.04  1.02  1.01
    ONNX Runtime, 224 pixels
                   1.12  1.05  1.03  1.01  1.01      1.37  1.10  1.05  1.02  1.01

Second inferences of networks were so compared with settled ones of blocks, in earlier versions: networks of ONNX
Runtime took 1.25 times the sum of their blocks (standard deviation over networks 4 %), where settled ones take 1.01
times (.7 %).
"""

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nas.ondevice.lock import Say, alone, own_command
from nas.ondevice.machine import pinned

K = TypeVar("K", bound=Hashable)
Call = Callable[[int], object]
Floats = NDArray[np.float64]

_SAMPLE_SECONDS = 100e-6  # a sample of tiny calls repeats them to last so long: timer and loop cost stay below 0.1 %
_FIXED_SHARE = 0.01  # of a sample, at most, for what comes once a call: waiting for an accelerator to end
_FIXED_TOLD = 0.2  # of the quickest call: less cannot be told from the noise of a CPU
_SETTLE_CALLS, _SETTLE_SECONDS = 5, 10e-3  # inferences before those that are timed; fewer of long ones, which lose less
_NEIGHBOURS = 15  # samples that a level is the median of: a few milliseconds, shorter than the machine's moods
_QUARTILE = 25  # percentile of levelled samples that stands for a call
_QUIET = 10  # percentile of the level that results are stated at: this machine when others leave it alone
_PART_ROUNDS = 10  # of a part in time, at least
_STUDENT = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # parts -> 97.5 % quantile of Student's t with one degree less


@dataclasses.dataclass(frozen=True)
class Timing:
    """One call. `latency_ms` is what to compare; the percentiles say what came, the machine's busy moments included."""

    latency_ms: float  # a low quartile of levelled samples, stated at the machine's quiet level
    spread: float  # half the interquartile range of levelled samples, relative
    interval: float  # half the 95 % interval of latency_ms, relative
    p10_ms: float  # of the samples as they came, like the next two
    median_ms: float
    p90_ms: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Round:
    """One pass over the calls, or over those of them that are not yet known well enough."""

    order: tuple[int, ...]  # numbers of the calls, as they ran
    times_ms: tuple[float, ...]  # an inference of each of them


@dataclasses.dataclass(frozen=True)
class Samples(Generic[K]):
    """All samples of one interleaved measuring."""

    names: tuple[K, ...]
    times_ms: Floats  # [rounds, names]; NaN where a call was left out
    order: NDArray[np.intp]  # [rounds, names]: names in the order they ran, those left out at the end

    @classmethod
    def of(cls, names: Sequence[K], rounds: Sequence[Round]) -> "Samples[K]":
        """The samples of `rounds`."""
        times = np.full((len(rounds), len(names)), np.nan)
        order = np.zeros(times.shape, np.intp)
        for number, ran in enumerate(rounds):
            times[number, list(ran.order)] = ran.times_ms
            order[number] = (*ran.order, *(set(range(len(names))) - set(ran.order)))
        return cls(tuple(names), np.maximum(times, 1e-9), order)

    def timings(self) -> dict[K, Timing]:
        """Of every call."""
        levelled = self._levelled(slice(None))
        rounds = np.isfinite(levelled).sum(axis=0)
        lowest, low, middle, high = _percentiles(levelled, (10, _QUARTILE, 50, 75))
        # The density at a quartile, from the percentiles beside it, gives its standard error (Cramer 1946, sec. 28.5).
        error = np.sqrt(0.25 * 0.75 / rounds) * (middle - lowest) / 0.4
        found = _percentiles(self.times_ms, (10, 50, 90))
        columns = np.stack([np.exp(low), np.expm1(high - low) / 2, 1.96 * error, *found], axis=1).tolist()
        return {n: Timing(*row, rounds=int(r)) for n, row, r in zip(self.names, columns, rounds.tolist(), strict=True)}

    def disagreement(self, names: Sequence[K], *, parts: int) -> float:
        """Mean absolute relative difference of `names` between the first and the last of `parts` equal parts in time.

        A factor common to all is set aside: it is the machine's level, which anchors take out of every comparison.
        """
        first, last = self.apart(names, parts=parts)
        ratio = np.log(last / first)
        return float(np.abs(np.expm1(ratio - np.median(ratio))).mean())

    def unsteadiness(self, names: Sequence[K]) -> Floats:
        """Half the 95 % interval of each of `names`, relative, a common factor set aside: from parts in time.

        `Timing.interval` takes rounds as independent. They are not where a machine has moods: caches that others fill
        for seconds slow large networks by a tenth and small ones not at all, and no level takes that out. Long parts
        are nearly independent, so how far they lie apart tells (batch means: Law and Kelton 1991, sec. 9.5.3).
        Infinite with fewer rounds than three parts take.
        """
        parts = min(len(self.times_ms) // _PART_ROUNDS, max(_STUDENT))
        if parts < min(_STUDENT):
            return np.full(len(names), np.inf)
        size = len(self.times_ms) // parts
        each = np.stack([self._standing(names, slice(size * i, size * (i + 1))) for i in range(parts)])
        return np.expm1(_STUDENT[parts] * each.std(axis=0, ddof=1) / math.sqrt(parts))

    def moved(self, names: Sequence[K], rows: NDArray[np.bool_]) -> Floats:
        """By how much the rounds `rows` [rounds] alone would change `names`, relative, a common factor set aside."""
        return np.expm1(self._standing(names, np.flatnonzero(rows)) - self._standing(names, slice(None)))

    def _standing(self, names: Sequence[K], rows: slice | NDArray[np.intp]) -> Floats:
        """Log of latencies by the given rounds, relative to their median over `names`."""
        columns = [self.names.index(n) for n in names]
        log_ms = _percentiles(self._levelled(rows)[:, columns], (_QUARTILE,))[0]
        return log_ms - np.median(log_ms)

    def apart(self, names: Sequence[K], *, parts: int) -> tuple[Floats, Floats]:
        """Milliseconds [names] by the first and by the last of `parts` equal parts in time."""
        size = max(len(self.times_ms) // parts, 1)
        columns = [self.names.index(n) for n in names]
        first, last = (
            np.exp(_percentiles(self._levelled(rows)[:, columns], (_QUARTILE,))[0])
            for rows in (slice(size), slice(-size, None))
        )
        return first, last

    def _levelled(self, rows: slice | NDArray[np.intp]) -> Floats:
        """Log of the given rounds' samples [rounds, names], as they would be at the machine's quiet level."""
        log_ms, order = np.log(self.times_ms[rows]), self.order[rows]
        ran = np.isfinite(np.take_along_axis(log_ms, order, axis=1))  # in the order of time
        # Calls that were left out later must not be compared with others at another level: whole rounds come first.
        whole = np.isfinite(log_ms).all(axis=1)
        typical = _percentiles(log_ms[whole] if whole.any() else log_ms, (50,))[0]
        level = np.zeros_like(log_ms)
        for _ in range(3):  # typical times and levels explain each other; three passes settle it
            in_time = np.take_along_axis(log_ms - typical, order, axis=1)
            in_time[ran] = _running_median(in_time[ran])
            np.put_along_axis(level, order, in_time, axis=1)
            typical = _percentiles(log_ms - level, (50,))[0]
        return log_ms - level + np.nanpercentile(level, _QUIET)


def rounds(
    calls: Sequence[Call],
    *,
    seed: int,
    done: int = 0,
    wanted: Callable[[], Sequence[int]] | None = None,
    begins: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Round]:
    """Times `calls` round by round, each in an order of its own, for as long as it is asked to.

    Args:
        seed: of the orders.
        done: rounds that an earlier process has timed.
        wanted: the numbers of the calls to time in the next round; all of them where it is None.
        begins: is told the number of each call before it is run.
        clock: seconds, that never go back; for tests.
    """
    begins = begins or (lambda number: None)
    settle, repeats = _inferences(calls, begins, clock)
    while True:
        numbers = range(len(calls)) if wanted is None else wanted()
        order = tuple(np.random.default_rng([seed, done]).permutation(np.array(numbers, np.intp)).tolist())
        times = []
        for number in order:
            call, count = calls[number], repeats[number]
            begins(number)
            call(settle[number])
            begin = clock()
            call(count)
            times.append((clock() - begin) / count * 1e3)
        yield Round(order, tuple(times))
        done += 1


class without_collection:
    """Garbage collection is off inside."""

    def __enter__(self) -> None:
        self._on = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._on:
            gc.enable()


def interleave(
    calls: Mapping[K, Call],
    *,
    seconds: float,
    min_rounds: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples[K]:
    """Times `calls` in rounds of random order until `seconds` are used up, but never in fewer than `min_rounds`.

    The caller pins the process, before the calls are built. Garbage collection is off meanwhile.
    """
    timed: list[Round] = []
    with without_collection():
        start = None
        for ran in rounds(list(calls.values()), seed=seed, clock=clock):
            timed.append(ran)
            start = clock() if start is None else start
            if len(timed) >= min_rounds and clock() - start >= seconds:
                break
    return Samples.of(tuple(calls), timed)


def measure_files(
    openers: Mapping[K, Callable[[], Call]],
    *,
    seconds: float,
    min_rounds: int = 15,
    seed: int = 0,
    threads: int = 1,
    say: Say | None = None,
) -> dict[K, Timing]:
    """Opens sessions and times them against each other, pinned and interleaved.

    They are opened here since threads keep the CPUs that their process was held on when they started: so these sessions
    run where those of a table did. To compare with a table, time its anchors (`nas.measure.prepare`) along with them
    and divide by `Table.level`.

    Args:
        openers: each opens a session and returns its prepared inferences.
        say: is told if another measuring on this machine is waited for (`nas.ondevice.lock.alone`).

    Raises:
        LatencyError: another measuring is running, and is not to be waited for any longer.
    """
    with alone(f"{own_command()} ({len(openers)} files against each other)", say=say), pinned(threads):
        calls = {name: opened() for name, opened in openers.items()}
        return interleave(calls, seconds=seconds, min_rounds=min_rounds, seed=seed).timings()


def _inferences(
    calls: Sequence[Call], begins: Callable[[int], None], clock: Callable[[], float]
) -> tuple[list[int], list[int]]:
    """How many inferences of each call come before a sample of it, for it to settle, and how many the sample takes.

    The sample takes as many as last `_SAMPLE_SECONDS`, and as many as make what comes once a call, like waiting for an
    accelerator, a hundredth.
    """
    alone = []
    for number, call in enumerate(calls):
        begins(number)
        alone.append(_fastest(call, 1, clock))
    fixed = 0.0
    if alone:
        quickest = int(np.argmin(alone))
        begins(quickest)
        fixed = _once(calls[quickest], alone[quickest], clock)
    each = [max(seconds - fixed, 1e-7) for seconds in alone]
    sample = max(_SAMPLE_SECONDS, fixed / _FIXED_SHARE)
    settle = [max(1, min(_SETTLE_CALLS, math.ceil(_SETTLE_SECONDS / seconds))) for seconds in each]
    return settle, [max(1, min(1000, math.ceil(sample / seconds))) for seconds in each]


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


def _percentiles(values: Floats, q: tuple[float, ...]) -> Floats:
    """Percentiles `q` of each column of `values` [rounds, names], those left out aside: [q, names]."""
    if not np.isnan(values).any():
        return np.percentile(values, q, axis=0)
    columns = (column[np.isfinite(column)] for column in values.T)  # NumPy's own NaN-aware form is 20 times slower
    return np.stack([np.percentile(c, q) if len(c) else np.full(len(q), np.nan) for c in columns], axis=1)


def _running_median(values: Floats) -> Floats:
    """Of `_NEIGHBOURS` values around each; the first and last value go on beyond the ends."""
    ends = np.pad(values, _NEIGHBOURS // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(ends, _NEIGHBOURS), axis=1)
