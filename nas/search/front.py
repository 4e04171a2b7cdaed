"""The front of the trials that no other trial beats in every objective."""

import csv
import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nas.errors import LimitError, RunError
from nas.search.pareto import nondominated
from nas.search.trials import Trial

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class Front:
    """The undominated trials, fastest first. Build it with `Front.of`.

    Example:
        >>> front = Front.of(trials)
        >>> front.best(latency_ms=5).genotype
    """

    trials: tuple[Trial, ...]

    @classmethod
    def of(cls, trials: Iterable[Trial], costs: Sequence[str] | None = None) -> "Front":
        """The front of any trials; failed ones and later copies of equal costs are left out.

        So are those on fewer images than others: their errors do not compare.

        Args:
            trials: with the same costs.
            costs: that count, all if None: `("error", "latency_ms@note10")` is the front of one device of several.

        Raises:
            LimitError: one of `costs` was not measured.
        """
        trials = list(trials)
        most = max((t.total for t in trials), default=0)
        trials = [t for t in trials if t.total == most]
        if not trials:
            return cls(())
        known = tuple(trials[0].costs)
        counted = known if costs is None else tuple(costs)
        if unknown := [name for name in counted if name not in known]:
            raise LimitError(f"No cost is called {unknown[0]!r}. A front can be made of: {', '.join(known)}.")
        matrix = np.array([[t.costs[name] for name in counted] for t in trials])
        order = sorted(counted, key="error".__eq__)  # fastest first, error last
        front = [trials[i] for i in np.flatnonzero(nondominated(matrix))]
        return cls(tuple(sorted(front, key=lambda t: [t.costs[name] for name in order])))

    def __len__(self) -> int:
        return len(self.trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)

    def best(self, **at_most: float) -> Trial:
        """The most accurate trial within limits, for example `front.best(latency_ms=5)`; the faster one of equals.

        Raises:
            LimitError: no trial is within the limits, or a limit is on something that was not measured.
        """
        known = tuple(self._any().costs)
        if unknown := [name for name in at_most if name not in known]:
            raise LimitError(f"No cost is called {unknown[0]!r}. Limits can be set on: {', '.join(known)}.")
        within = [t for t in self if all(t.costs[name] <= limit for name, limit in at_most.items())]
        if not within:
            least = ", ".join(f"{name} >= {min(t.costs[name] for t in self):.4g}" for name in at_most)
            wanted = ", ".join(f"{name} <= {limit:g}" for name, limit in at_most.items())
            raise LimitError(f"No trial of the front has {wanted}: it has {least}. Raise the limit or search on.")
        return min(within, key=lambda t: (t.error, *t.cheap.values()))

    def knee(self) -> Trial:
        """Where the front bends most: the least sum of costs, each scaled to 0..1 over the front.

        With two objectives that is the trial farthest below the line through the two ends (Das 1999).

        Example:
            >>> space.describe(Front.of(trials).knee().genotype)
        """
        self._any()
        costs = np.array([list(t.costs.values()) for t in self])
        low, span = costs.min(axis=0), np.ptp(costs, axis=0)
        return self.trials[int(((costs - low) / np.where(span > 0, span, 1)).sum(axis=1).argmin())]

    def rows(self) -> list[dict[str, int | float | str | None]]:
        """One flat row a trial: trial, top1, correct, total, each cheap cost, genotype."""
        return [
            {
                "trial": t.trial,
                "top1": t.top1,
                "correct": t.correct,
                "total": t.total,
                **t.cheap,
                "genotype": "-".join(map(str, t.genotype)),
            }
            for t in self
        ]

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
        columns = list(rows[0]) if rows else ["trial", "top1", "correct", "total", "latency_ms", "genotype"]
        try:
            with open(path, "w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, columns, lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
        except OSError as e:
            raise RunError(f"{path}: cannot write the front: {e.strerror}. Check the folder and the free space.") from e

    def __repr__(self) -> str:
        if not self.trials:
            return "Front(0 trials)"
        lines = [
            f"{t.top1:8.4f}  " + "  ".join(f"{v:10.4g}" for v in t.cheap.values()) + f"  {t.trial:5d}" for t in self
        ]
        head = f"{'top1':>8}" + "".join(f"  {name:>10}" for name in self.trials[0].cheap) + "  trial"
        return "\n".join([f"Front({len(self)} trials)", head, *lines])

    def _repr_html_(self) -> str:
        rows = self.rows()
        head = "".join(f"<th>{html.escape(name)}</th>" for name in (rows[0] if rows else ()))
        body = "".join("<tr>" + "".join(f"<td>{_shown(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
        return f"<p>Front, {len(self)} trials</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _any(self) -> Trial:
        if not self.trials:
            raise LimitError("The front is empty: no trial succeeded. Look at the failures of the trials first.")
        return self.trials[0]


def _shown(value: int | float | str | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
