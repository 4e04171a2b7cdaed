"""Trials: what came of each evaluation, and a sequence of them that stays small however long a search goes on."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from nas.errors import JournalError
from nas.search import journal
from nas.search.accuracy import Least, error_of, is_error

_BLOCK = 1024  # trials that are given room at a time


@dataclass(frozen=True)
class Trial:
    """One evaluated genotype, or why its evaluation failed. Equal trials differ at most in the time they took."""

    trial: int
    genotype: tuple[int, ...]
    correct: int | None  # images classified correctly; None if it failed
    total: int  # images it was evaluated on
    cheap: Mapping[str, float] = field(hash=False)  # exact costs, such as latency_ms
    failure: str | None = None
    seconds: float = field(default=0.0, compare=False)
    also: Mapping[str, int | None] = field(default_factory=dict, hash=False)
    """Further counts of right answers on the same images, by what they are called: {"top1_int8": 480}."""

    @property
    def top1(self) -> float:
        """Share of images classified correctly; NaN if the trial failed."""
        return float("nan") if self.correct is None else self.correct / self.total

    @property
    def error(self) -> float:
        """1 - top1; NaN if the trial failed."""
        return float("nan") if self.correct is None else (self.total - self.correct) / self.total

    @property
    def latency_ms(self) -> float:
        return self.cheap["latency_ms"]

    def count(self, accuracy: str) -> int | None:
        """Images classified correctly, by the name of what is counted; None if the trial failed."""
        return self.also.get(accuracy, self.correct)

    def missing(self, least: Mapping[str, Least]) -> int:
        """The images, all limits on accuracies together, by which it misses them; a failed one has no right answer."""
        return sum(limit.missing(self.count(name) or 0, self.total) for name, limit in least.items())

    @property
    def shares(self) -> dict[str, float]:
        """Shares of images classified correctly by further counts; NaN if the trial failed."""
        return {name: float("nan") if n is None else n / self.total for name, n in self.also.items()}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Trial":
        """The trial of a journal's record."""
        cheap = {name: value for name, value in record["costs"].items() if not is_error(name)}
        genotype, also = tuple(record["genotype"]), dict(record.get("also", {}))
        number, correct, total = record["trial"], record["correct"], record["total"]
        return cls(number, genotype, correct, total, cheap, record["failure"], record["seconds"], also)

    @property
    def record(self) -> dict[str, Any]:
        """What a journal keeps of it."""
        return {
            "trial": self.trial,
            "genotype": list(self.genotype),
            "correct": self.correct,
            "total": self.total,
            "costs": {name: None if math.isnan(cost) else cost for name, cost in self.costs.items()},
            "seconds": self.seconds,
            "failure": self.failure,
            **({"also": dict(self.also)} if self.also else {}),
        }

    @property
    def costs(self) -> dict[str, float]:
        """All costs, minimised, in the order of `Problem.cost_names`."""
        out = {"error": self.error}
        for name, count in self.also.items():
            out[error_of(name)] = float("nan") if count is None else (self.total - count) / self.total
        return out | dict(self.cheap)


class Trials(Sequence[Trial]):
    """The trials of a search in their order, and why there are no more: `status` is "complete" or "exhausted".

    A trial takes its genes and some 30 bytes here; `Trial` objects are made when they are asked for.
    """

    def __init__(self, trials: Iterable[Trial] = ()):
        self.status = "complete"
        self._names: tuple[str, ...] = ()  # of the cheap costs
        self._also: tuple[str, ...] = ()  # of the further counts
        self._blocks: list[NDArray[Any]] = []  # rows of `_BLOCK` trials
        self._failures: dict[int, str] = {}  # by index
        self._length = 0
        for trial in trials:
            self.append(trial)

    def append(self, trial: Trial) -> None:
        """Adds a trial.

        Raises:
            ValueError: it has other costs, or not as many genes, as the trials before it.
        """
        if not self._length:
            self._names, self._also = tuple(trial.cheap), tuple(trial.also)
        elif (tuple(trial.cheap), tuple(trial.also)) != (self._names, self._also) or len(trial.genotype) != len(
            self._blocks[0]["genotype"][0]
        ):
            raise ValueError(f"trial {trial.trial} is of another search than trial {self[0].trial}: its costs or genes")
        if self._length % _BLOCK == 0:
            fields = [("trial", "i4"), ("genotype", "u1", (len(trial.genotype),)), ("correct", "i4"), ("total", "i4")]
            fields += [("cheap", "f8", (len(self._names),)), ("seconds", "f8"), ("also", "i4", (len(self._also),))]
            self._blocks.append(np.zeros(_BLOCK, fields))
        row = self._blocks[-1][self._length % _BLOCK]
        row["trial"], row["genotype"] = trial.trial, trial.genotype
        row["correct"], row["total"] = -1 if trial.correct is None else trial.correct, trial.total
        row["cheap"], row["seconds"] = tuple(trial.cheap.values()), trial.seconds
        row["also"] = tuple(-1 if n is None else n for n in trial.also.values())
        if trial.failure is not None:
            self._failures[self._length] = trial.failure
        self._length += 1

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Trial]:
        return map(self._at, range(self._length))

    @overload
    def __getitem__(self, index: int) -> Trial: ...

    @overload
    def __getitem__(self, index: slice) -> "Trials": ...

    def __getitem__(self, index: int | slice) -> "Trial | Trials":
        chosen = range(self._length)[index]
        return self._at(chosen) if isinstance(chosen, int) else Trials(map(self._at, chosen))

    def _at(self, index: int) -> Trial:
        number, genotype, correct, total, cheap, seconds, further = self._blocks[index // _BLOCK][index % _BLOCK].item()
        costs = dict(zip(self._names, cheap.tolist(), strict=True))
        also = {name: None if n < 0 else n for name, n in zip(self._also, further.tolist(), strict=True)}
        failure, right = self._failures.get(index), None if correct < 0 else correct
        return Trial(number, tuple(genotype.tolist()), right, total, costs, failure, seconds, also)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trials | list):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]  it grows

    def __repr__(self) -> str:
        return repr(list(self))


def read_trials(path: Path | str) -> Trials:
    """The committed trials of a search's journal, which may be in use.

    Raises:
        JournalError: it cannot be read, is damaged before its last line, or was written by another version.
    """
    _, records = journal.read(path)
    try:
        return Trials(map(Trial.of, records))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
        raise JournalError(f"{path}: a record is not a trial ({e!r}). Was it written by another version?") from e
