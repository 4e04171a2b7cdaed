"""What a sampler is: a pure function that names the subnets a step of supernet training computes gradients of."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nas import config
from nas.errors import ConfigError
from nas.space import Space

Genotypes = NDArray[np.uint8]  # [n, genes]

Score = Callable[[Genotypes], NDArray[np.float64]]
"""Genotypes [n, genes] -> the loss [n] of each on this step's batch, with the weights as they are; no backward pass."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """The subnets of one step. Their gradients are added up, and the weights are updated once."""

    genotypes: Genotypes  # [k, genes], canonical; k may differ from step to step
    distil: bool  # the first learns from the labels and teaches the others; if false, all learn from the labels


Sampler = Callable[[int, np.random.Generator, Score], Draw]
"""(step from 0, the generator of this step, score) -> the subnets of this step.

The contract of every sampler (`tests/train/test_samplers.py` holds each one to it): a draw depends on these three
alone, so that a training that was cut off repeats what it would have drawn. `score` costs forward passes: a sampler
that does not need it does not call it, and one that does calls it once a step, with everything it wants to know.
"""


class Factory(Protocol):
    """Makes the sampler of one training of `steps` steps; work that all steps share is done here, once."""

    def __call__(self, space: Space, settings: config.Train, *, steps: int) -> Sampler: ...


def ends(space: Space) -> Genotypes:
    """The largest and the smallest network of `space` by MACs, [2, genes]."""
    return np.stack([space.largest(), space.smallest()])


def at_least(least: int, *, key: str, value: int, sampler: str) -> None:
    """Checks a number of the configuration.

    Raises:
        ConfigError: `value` is below `least`.
    """
    if value < least:
        raise ConfigError(f"train.{key} is {value}; sampler `{sampler}` needs {least} or more. Raise train.{key}.")
