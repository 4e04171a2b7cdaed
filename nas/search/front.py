"""The front of the trials that no other trial beats in every objective."""

import csv
import html
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nas.errors import LimitError, RunError
from nas.latency import LatencyModel
from nas.search.accuracy import Least, is_error, told
from nas.search.pareto import nondominated
from nas.search.trials import Trial
from nas.space import Space

if TYPE_CHECKING:
    from pandas import DataFrame

    from nas.drawing import Drawing
    from nas.search.explain import Explanation

_SHOWN = 20  # trials of a front's text form


@dataclass(frozen=True, eq=False)
class Setting:
    """What was searched: what a front needs to be explained and drawn."""

    space: Space
    device: str | None = None  # whose latency `latency_ms` is
    models: Mapping[str, LatencyModel] = field(default_factory=dict)  # by cost: "latency_ms", "latency_ms@note10"
    limits: Mapping[str, float] = field(default_factory=dict)  # by cost, in its unit
    accuracy: str = "top1"  # what was counted first, see `Problem.accuracies`
    least: Mapping[str, Least] = field(default_factory=dict)  # limits on accuracies


@dataclass(frozen=True, repr=False)
class Front:
    """The undominated trials, fastest first. Build it with `Front.of`.

    Example:
        >>> front = Front.of(trials)
        >>> front.best(latency_ms=5).genotype
    """

    trials: tuple[Trial, ...]
    costs: tuple[str, ...] = ()  # that were counted, error among them; no other can be asked for
    evaluated: tuple[Trial, ...] = field(default=(), compare=False)  # all that were compared, failed ones too
    setting: Setting | None = field(default=None, compare=False)

    @classmethod
    def of(cls, trials: Iterable[Trial], costs: Sequence[str] | None = None, setting: Setting | None = None) -> "Front":
        """The front of any trials; failed ones and later copies of equal costs are left out.

        So are those on fewer images than others: their errors do not compare; and those that miss a limit on accuracy
        of the `setting`.

        Args:
            trials: with the same costs.
            costs: that count, all if None: `("error", "latency_ms@note10")` is the front of one device of several.
            setting: what was searched, where it is known; `explain` needs it.

        Raises:
            LimitError: one of `costs` was not measured.
        """
        trials = list(trials)
        most = max((t.total for t in trials), default=0)
        trials = [t for t in trials if t.total == most]
        if not trials:
            return cls((), tuple(costs or ()), (), setting)
        known = tuple(trials[0].costs)
        counted = known if costs is None else tuple(costs)
        if unknown := [name for name in counted if name not in known]:
            raise LimitError(f"No cost is called {unknown[0]!r}. A front can be made of: {', '.join(known)}.")
        least = {} if setting is None else setting.least
        compared = [t for t in trials if t.correct is not None and not t.missing(least)]
        matrix = np.array([[t.costs[name] for name in counted] for t in compared]).reshape(-1, len(counted))
        order = sorted(counted, key=is_error)  # fastest first, errors last
        front = [compared[i] for i in np.flatnonzero(nondominated(matrix))]
        ordered = sorted(front, key=lambda t: [t.costs[name] for name in order])
        return cls(tuple(ordered), counted, tuple(trials), setting)

    def counting(self, *costs: str) -> "Front":
        """The front of the same trials with only these `costs`: `front.counting("error", "latency_ms@note10")`."""
        return Front.of(self.evaluated, costs, self.setting)

    def __len__(self) -> int:
        return len(self.trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)

    def best(self, *, device: str | None = None, **at_most: float) -> Trial:
        """The most accurate trial within limits, for example `front.best(latency_ms=5)`; the cheaper one of equals.

        Of a front that counts no error, the cheapest: in the first of its costs, then in the next.

        Only costs that were counted can be limited: within a limit on another one, a trial that is not on this front
        may be better than all that are.

        Args:
            device: whose latency `latency_ms` limits: `front.best(latency_ms=5, device="note10")` is
                `front.best(**{"latency_ms@note10": 5})`.
            at_most: by cost.

        Raises:
            LimitError: no trial is within the limits, or a limit is on something that was not counted.
        """
        known = tuple(self._any().costs)
        if device is not None:
            at_most = self._of_device(device, at_most)
        if unknown := [name for name in at_most if name not in self.costs]:
            if unknown[0] in known:
                counted = ", ".join(self.costs)
                wider = ", ".join(map(repr, (*self.costs, *unknown)))
                raise LimitError(
                    f"{unknown[0]} was not counted in this front, which is of {counted}: a trial that is not on it may "
                    f"be better. Ask `front.counting({wider})`."
                )
            also = "; or give `device=`" if unknown[0] == "latency_ms" else ""
            counted = ", ".join(self.costs)
            raise LimitError(f"No cost is called {unknown[0]!r}. Limits can be set on: {counted}{also}.")
        within = [t for t in self if all(t.costs[name] <= limit for name, limit in at_most.items())]
        if not within:
            least = ", ".join(f"{name} >= {min(t.costs[name] for t in self):.4g}" for name in at_most)
            wanted = ", ".join(f"{name} <= {limit:g}" for name, limit in at_most.items())
            raise LimitError(f"No trial of the front has {wanted}: it has {least}. Raise the limit or search on.")
        order = sorted(self.costs, key=lambda name: not is_error(name))
        return min(within, key=lambda t: (*(t.costs[name] for name in order), t.error))

    def _of_device(self, device: str, at_most: Mapping[str, float]) -> dict[str, float]:
        """`at_most` with the cost that is the latency on `device` in place of `latency_ms`."""
        if "latency_ms" not in at_most:
            raise LimitError(f"device={device!r} says whose latency is limited: give `latency_ms` too.")
        own = self.setting.device if self.setting is not None else None
        name = "latency_ms" if device == own else f"latency_ms@{device}"
        if name not in self.costs:
            further = [c.partition("@")[2] for c in self.costs if c.startswith("latency_ms@")]
            known = ", ".join(([own] if own and "latency_ms" in self.costs else []) + further) or "none by name"
            raise LimitError(f"The latency on {device!r} was not counted in this front; its devices: {known}.")
        return {name if cost == "latency_ms" else cost: limit for cost, limit in at_most.items()}

    def knee(self) -> Trial:
        """Where the front bends most: the least sum of error and cost, each scaled to 0..1 over the front.

        With two objectives that is the trial farthest below the line through the two ends (Das 1999). Of
        several costs the mean counts, and of several errors: they mostly grow together.

        Example:
            >>> space.describe(Front.of(trials).knee().genotype)
        """
        self._any()
        costs = np.array([[t.costs[name] for name in self.costs] for t in self])
        low, span = costs.min(axis=0), np.ptp(costs, axis=0)
        scaled = (costs - low) / np.where(span > 0, span, 1)
        errors = np.array([is_error(name) for name in self.costs])
        weight = np.where(errors, 1 / max(1, errors.sum()), 1 / max(1, (~errors).sum()))
        return self.trials[int((scaled @ weight).argmin())]

    def plot(self, against: Mapping[str, "Front"] = types.MappingProxyType({})) -> "Drawing":
        """Accuracy over each counted cost as SVG: trials, front, limits, knee; one panel a cost.

        Args:
            against: further fronts to compare with, by name.

        Example:
            >>> front.plot().save("front.svg")
        """
        from nas.search.plot import plot

        return plot(self, against)

    def explain(self, trial: Trial | int) -> "Explanation":
        """Which choices drive the costs of the evaluated trials, and where `trial`, or the one of that number, spends
        its milliseconds.

        Raises:
            RunError: it is not known what was searched (`Front.of` without `setting`), or there is no such trial.
        """
        from nas.search.explain import explain

        return explain(self, trial if isinstance(trial, Trial) else self._numbered(trial))

    def _numbered(self, number: int) -> Trial:
        found = next((t for t in self.evaluated if t.trial == number), None)
        if found is None:
            raise RunError(
                f"{number!r} is not the number of a trial that this front compared; those on it: "
                f"{', '.join(str(t.trial) for t in self) or 'none'}. Give one of them, or a trial."
            )
        return found

    @property
    def nearest(self) -> Trial | None:
        """Of the trials that did not fail, the one that misses limits on accuracy by the least; None if all failed."""
        sound = [t for t in self.evaluated if t.correct is not None]
        return min(sound, key=lambda t: (t.missing(self.least), t.error), default=None)

    def rows(self) -> list[dict[str, int | float | str | None]]:
        """One flat row a trial: trial, top1 (or top1_int8), correct, total, further accuracies with their counts, each
        cheap cost, genotype."""
        return [self._row(t) for t in self]

    def _row(self, t: Trial) -> dict[str, int | float | str | None]:
        return {
            "trial": t.trial,
            self.accuracy: t.top1,
            "correct": t.correct,
            "total": t.total,
            **t.shares,
            **{f"correct{name.removeprefix('top1')}": count for name, count in t.also.items()},
            **t.cheap,
            "genotype": "-".join(map(str, t.genotype)),
        }

    def to_frame(self) -> "DataFrame":
        """The rows as a pandas table.

        Raises:
            RunError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as e:
            raise RunError("A table needs pandas, which is not installed: `pip install pandas`.") from e
        return pandas.DataFrame(self.rows())

    def write_csv(self, path: Path | str) -> None:
        """The rows as CSV.

        Raises:
            RunError: the file cannot be written.
        """
        rows = self.rows()
        some = rows or [self._row(t) for t in self.evaluated[:1]]
        columns = list(some[0]) if some else ["trial", self.accuracy, "correct", "total", "latency_ms", "genotype"]
        try:
            with open(path, "w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, columns, lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
        except OSError as e:
            raise RunError(f"{path}: cannot write the front: {e.strerror}. Check the folder and the free space.") from e

    def __repr__(self) -> str:
        if not self.trials:
            return self._title()
        shown = self.trials if len(self) <= _SHOWN else (*self.trials[: _SHOWN // 2], *self.trials[-_SHOWN // 2 :])
        knee, cheap, also = self.knee(), tuple(self.trials[0].cheap), tuple(self.trials[0].also)
        width = max(10, *map(len, cheap)) if cheap else 10
        lines = [
            f"{t.top1:8.4f}  "
            + "".join(f"{t.shares[name]:{len(name)}.4f}  " for name in also)
            + "  ".join(f"{t.cheap[name]:{width}.4g}" for name in cheap)
            + f"  {t.trial:6d}"
            f"{'  knee' if t is knee and len(self) > 2 else ''}"
            for t in shown
        ]
        if len(shown) < len(self):
            lines.insert(_SHOWN // 2, f"{'...':>8}  {len(self) - len(shown)} more, see .to_frame()")
        head = f"{self.accuracy:>8}" + "".join(f"  {name}" for name in also)
        head += "".join(f"  {name:>{width}}" for name in cheap) + f"  {'trial':>6}"
        return "\n".join([self._title(), head, *lines])

    def _repr_html_(self) -> str:
        rows = self.rows()
        head = "".join(f"<th>{html.escape(name)}</th>" for name in (rows[0] if rows else ()))
        body = "".join("<tr>" + "".join(f"<td>{_shown(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        picture = self.plot().svg if self.trials and len(self.costs) > 1 else ""
        return f"<p>{html.escape(self._title())}</p>{picture}<details><summary>trials</summary>{table}</details>"

    @property
    def accuracy(self) -> str:
        """What was counted first, as tables call it: top1, or top1_int8."""
        return "top1" if self.setting is None else self.setting.accuracy

    @property
    def least(self) -> Mapping[str, Least]:
        """Limits on accuracies, by their names."""
        return {} if self.setting is None else self.setting.least

    def _title(self) -> str:
        of = f" of {len(self.evaluated)}: {', '.join(self.costs)}" if self.evaluated else ""
        limited = f"; {told(self.least)}" if self.least and self.evaluated else ""
        return f"Front({len(self)} trials{of}{limited}{'' if self.trials else self._missed()})"

    def _missed(self) -> str:
        """How near the best came, where limits on accuracy were missed by all."""
        if not self.least or (nearest := self.nearest) is None:
            return ""
        shares = ", ".join(f"{name} {(nearest.count(name) or 0) / nearest.total:.4g}" for name in self.least)
        return f"; none reaches that, the nearest, trial {nearest.trial}, has {shares}"

    def _any(self) -> Trial:
        if not self.trials:
            if missed := self._missed():
                raise LimitError(
                    f"No trial reaches {told(self.least)}{missed.removeprefix('; none reaches that')}. Lower that "
                    f"limit, allow what costs more, or search on."
                )
            failures = [t.failure for t in self.evaluated if t.failure]
            last = f" The last: {failures[-1]}" if failures else " Look at the failures of the trials first."
            raise LimitError(f"The front is empty: no trial succeeded.{last}")
        return self.trials[0]


def _shown(value: int | float | str | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
