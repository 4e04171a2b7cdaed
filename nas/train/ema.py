"""Exponential moving average of the weights, which is evaluated in place of the weights themselves."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

Tree = TypeVar("Tree")


def update(average: Tree, params: Any, decay: float | Array, step: int | Array) -> Tree:
    """The average after `step` earlier updates and this one, of `params`.

    The decay warms up as in TensorFlow's `ExponentialMovingAverage`, min(decay, (1 + step) / (10 + step)): else the
    first weights, which are random, would weigh until far into the training.
    """
    weight = jnp.maximum(1 - decay, 9 / (10 + step))  # 1 - min(...), without the rounding of 1 - float32(decay)
    return jax.tree.map(lambda a, p: a + weight * (p - a), average, params)
