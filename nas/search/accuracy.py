"""Accuracy in costs and limits: what counts of right answers are called, and what a limit on one of them asks for.

Costs are minimised, so a strategy and a front see errors. A limit on accuracy is known only after an evaluation: it
cannot keep networks from being evaluated, as limits on exact costs do, but those that reach it are preferred.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass


def error_of(accuracy: str) -> str:
    """What the error of a further count is called among costs: that of "top1_int8" "error_int8". The first has "error",
    whatever it counts."""
    return f"error{accuracy.removeprefix('top1')}"


def is_error(cost: str) -> bool:
    """Whether a cost is the error of a count."""
    return cost == "error" or cost.startswith("error_")


@dataclass(frozen=True)
class Least:
    """What a share of right answers must be."""

    asked: float  # above 0, at most 1
    tolerated: float  # what still counts as reached, not above `asked`

    def needed(self, total: int) -> int:
        """The fewest right answers of `total` that reach it."""
        return math.ceil(self.tolerated * total - 1e-9)

    def missing(self, count: int, total: int) -> int:
        """How many more right answers would reach it."""
        return max(0, self.needed(total) - count)

    def most_error(self, total: int) -> float:
        """The error that the error of a network which reaches it lies below: half an image above what is possible."""
        return (total - self.needed(total) + 0.5) / total

    def __str__(self) -> str:
        tolerated = f", down to {self.tolerated:.4g} tolerated" if self.tolerated < self.asked else ""
        return f"at least {self.asked:.4g}{tolerated}"


def told(least: Mapping[str, Least]) -> str:
    """Limits in words: "top1 at least 0.9"."""
    return ", ".join(f"{name} {limit}" for name, limit in least.items())
