"""What is known of a search while it runs: how fast it goes, how busy its workers are, how good its front is."""

import time
import types
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from nas.search.accuracy import Least
from nas.search.pareto import hypervolume
from nas.search.trials import Trial

_WINDOW = 256  # trials that rate and utilisation are taken over
_COSTS = 5  # at most, of a volume: of 400 networks it takes 3 s, with one cost more 25
_PATIENCE = 20  # times as long as a volume took to compute, the next one waits


class Progress:
    """Takes in the trials of a search, in their order, and sums them up. What it keeps does not grow with them.

    Args:
        reference: [costs] the worst value of each cost, the error first: where the volume ends. No volume is told of
            costs that may be zero or less at worst, nor of more than five, where it takes too long.
        workers: that evaluate.
        start: the first trial that is not merely read from a journal: only from there on do times count.
        costs: whose worst values these are; None: all, in the order that trials have them.
        least: limits on accuracies: trials that miss one dominate nothing.

    Attributes:
        best: the trial of the least error, or first cost where no error counts, or that misses `least` by the fewest
            images; of those on most images, none that failed.

    Example:
        >>> progress = Progress([1.0, 20.0], workers=2)
        >>> search(..., on_trial=lambda trial: (progress.add(trial), print(progress.values())))
    """

    def __init__(
        self,
        reference: Sequence[float],
        *,
        workers: int,
        start: int = 0,
        costs: Sequence[str] | None = None,
        least: Mapping[str, Least] = types.MappingProxyType({}),
    ):
        self.best: Trial | None = None
        self._costs, self._least = costs, least
        worst = np.asarray(reference, np.float64)
        self._bounded = bool((worst > 0).all()) and len(worst) <= _COSTS
        self._reference = np.where(worst > 0, worst, 1.0)
        self._workers, self._start = workers, start
        self._front = np.empty((0, len(self._reference)))  # in units of the reference
        self._volume, self._known, self._not_before = 0.0, 0, 0.0
        self._changes = 0
        self._window: deque[tuple[float, float]] = deque(maxlen=_WINDOW)  # when a trial came, and the seconds it took

    def add(self, trial: Trial) -> None:
        """Takes in the next trial."""
        if trial.trial >= self._start:
            self._window.append((time.monotonic(), trial.seconds))
        if trial.correct is None:
            return
        if self.best is None or trial.total > self.best.total:  # errors on fewer images do not compare
            self.best, self._front = None, self._front[:0]
        elif trial.total < self.best.total:
            return
        if self.best is None or self._order(trial) < self._order(self.best):
            self.best = trial
        if trial.missing(self._least):
            return
        values = trial.costs
        costs = np.array(list(values.values()) if self._costs is None else [values[n] for n in self._costs])
        costs /= self._reference
        if not (self._front <= costs).all(axis=1).any():
            self._front = np.vstack([self._front[~(costs <= self._front).all(axis=1)], costs])
            self._changes += 1

    def _order(self, trial: Trial) -> tuple[float, float]:
        first = "error" if self._costs is None or "error" in self._costs else self._costs[0]
        return trial.missing(self._least), trial.costs[first]

    @property
    def volume(self) -> float:
        """The share of the box between zero and the reference that the front dominates; it may lag behind a little."""
        now = time.monotonic()
        if self._known < self._changes and now >= self._not_before:
            self._volume, self._known = hypervolume(self._front, np.ones(len(self._reference))), self._changes
            self._not_before = now + _PATIENCE * (time.monotonic() - now)
        return self._volume

    @property
    def trials_per_second(self) -> float:
        """Of late; NaN while it is not known."""
        return (len(self._window) - 1) / self._span if self._span else float("nan")

    @property
    def utilisation(self) -> float:
        """The share of the workers' time, of late, in which they evaluated; NaN while it is not known."""
        busy = sum(seconds for _, seconds in self._window) - (self._window[0][1] if self._window else 0.0)
        return min(1.0, busy / (self._workers * self._span)) if self._span else float("nan")

    @property
    def _span(self) -> float:
        return self._window[-1][0] - self._window[0][0] if self._window else 0.0

    def values(self) -> dict[str, str]:
        """For a line of progress."""
        out = {}
        if self._span:
            out |= {"trials/s": f"{self.trials_per_second:.3g}", "busy": f"{self.utilisation:.0%}"}
        if self.best is not None:
            best = "nearest" if self.best.missing(self._least) else "best"
            out |= {"volume": f"{self.volume:.4f}"} if self._bounded else {}
            out |= {f"{best} top-1": f"{self.best.top1:.2%}"}
            out |= {name.replace("_", " "): f"{share:.2%}" for name, share in self.best.shares.items()}
            cheap = list(self.best.cheap.items())[:2]
            out |= {"at ms" if name == "latency_ms" else f"at {name}": f"{value:.4g}" for name, value in cheap}
        return out
