"""Which members of a population go on, from whose weights and with which hyper-parameters: pure functions.

Population-based training (Jaderberg et al. 2017, arXiv:1711.09846) with truncation selection (sec. 4.1.1): after every
interval the worst members take weights and hyper-parameters of a member drawn from the best (exploit), and each of the
hyper-parameters is multiplied by 0.8 or 1.2, or drawn anew (explore). What training is, these functions do not know.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nas.config import Range

Values = NDArray[np.float64]  # [members, hyper-parameters]
Scores = NDArray[np.float64]  # [members], more is better; NaN: the member diverged

FACTORS = (0.8, 1.2)


@dataclass(frozen=True)
class State:
    """What the members are to do next: train `interval` from the weights that `parents` of `source` had."""

    generation: int  # from 0
    interval: int  # of the training, from 0; behind `generation` by those in which all members diverged
    source: int  # the generation that the weights are of; -1: the weights before training
    parents: tuple[int, ...]  # of each member, which member of `source`
    values: Values


@dataclass(frozen=True)
class Evolution:
    """`init(rng)` is the first state, `tell(rng, state, scores)` the one after, given how the members did."""

    init: Callable[[np.random.Generator], State]
    tell: Callable[[np.random.Generator, State, Scores], State]


def truncation(
    ranges: Sequence[Range], written: Sequence[float], *, members: int, replaced: float, resampled: float
) -> Evolution:
    """Members that diverged, and the worst up to a share of `replaced`, go on from one of as many of the best.

    Where all diverged, none is worth going on from: all take up their last weights again, with values drawn anew.

    Args:
        ranges: of each hyper-parameter; no value ever leaves it.
        written: the values of the first member; those of the others are drawn.
        members: how many.
        replaced: share of them; at least one member is replaced, and at most half.
        resampled: the chance that a value is drawn anew, not multiplied.
    """
    count = min(max(1, int(replaced * members)), members // 2)
    low, high = np.array(ranges, np.float64).reshape(-1, 2).T

    def init(rng: np.random.Generator) -> State:
        values = np.stack([draw(rng, ranges) for _ in range(members)])
        values[0] = written
        return State(0, 0, -1, tuple(range(members)), values)

    def tell(rng: np.random.Generator, state: State, scores: Scores) -> State:
        ranked = np.argsort(-scores, kind="stable")  # NaN last; of equal ones the first
        sound = int(np.isfinite(scores).sum())
        if not sound:
            values = np.stack([draw(rng, ranges) for _ in range(members)])
            return replace(state, generation=state.generation + 1, values=values)
        best = ranked[: min(count, sound)]
        parents, values = np.arange(members), state.values.copy()
        for member in ranked[max(len(best), min(sound, members - count)) :]:
            parents[member] = rng.choice(best)
            values[member] = perturb(rng, state.values[parents[member]])
        return State(state.generation + 1, state.interval + 1, state.generation, tuple(map(int, parents)), values)

    def perturb(rng: np.random.Generator, values: Values) -> Values:
        factors, anew = rng.choice(FACTORS, len(values)), rng.random(len(values)) < resampled
        return np.where(anew, draw(rng, ranges), np.clip(values * factors, low, high))

    return Evolution(init, tell)


def draw(rng: np.random.Generator, ranges: Sequence[Range]) -> Values:
    """A value of each range: evenly in the logarithm where it begins above 0, else evenly."""
    shares = rng.random(len(ranges))
    values = [
        low * (high / low) ** share if low > 0 else high * share
        for (low, high), share in zip(ranges, shares, strict=True)
    ]
    return np.clip(values, *np.array(ranges, np.float64).T)  # a power may round beyond an end


def best(scores: Scores) -> int:
    """The member with the highest score; of equal ones the first."""
    return int(np.nanargmax(scores))


def generation_rng(seed: int, generation: int) -> np.random.Generator:
    """What is drawn before a generation: it needs neither the generations before it nor a state."""
    return np.random.default_rng([seed, generation, 5])
