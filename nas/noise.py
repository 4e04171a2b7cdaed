"""Noise inside the network: what training drops at random.

Rates are probabilities of dropping, at least 0 and below 1, as Python numbers or traced scalars. A rate of 0 is the
identity to the bit, and no work at all as a Python number. Expectations are preserved: what is kept is scaled up.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from nas.errors import ConfigError

Rate = float | Array


def drop_path(key: Array, residual: Array, rate: Rate) -> Array:
    """The residual branch of some images set to 0 as a whole (stochastic depth; Huang et al. 2016, arXiv:1603.09382).

    Scaled in training, not in inference, so that a network runs unchanged.

    Args:
        key: a JAX key.
        residual: [n, ...], what is to be added to the shortcut.
        rate: of images.

    Raises:
        ConfigError: a Python rate outside [0, 1).
    """
    if _nothing(rate):
        return residual
    shape = (len(residual), *(1 for _ in residual.shape[1:]))
    return _kept(residual, jax.random.uniform(key, shape) >= rate, 1 - jnp.float32(rate))


def dropout(key: Array, x: Array, rate: Rate) -> Array:
    """Single activations set to 0 (Srivastava et al. 2014, jmlr.org/papers/v15/srivastava14a.html).

    Raises:
        ConfigError: a Python rate outside [0, 1).
    """
    if _nothing(rate):
        return x
    return _kept(x, jax.random.uniform(key, x.shape) >= rate, 1 - jnp.float32(rate))


def drop_block(key: Array, x: Array, rate: Rate, size: int) -> Array:
    """Squares of activations set to 0, in each channel its own (Ghiasi et al. 2018, arXiv:1810.12890, alg. 1).

    Seeds are drawn only where a whole square fits, as often as makes `rate` the share that is dropped where squares do
    not overlap (eq. 1); what is kept is scaled by the share that this batch keeps.

    Args:
        key: a JAX key.
        x: [n, height, width, channels].
        rate: of activations.
        size: side of the squares in pixels; smaller images are dropped as a whole.

    Raises:
        ConfigError: a Python rate outside [0, 1), or a size below 1.
    """
    if size < 1:
        raise ConfigError(f"drop_block_size is {size}: the side of a square is at least 1 pixel.")
    if _nothing(rate):
        return x
    n, height, width, channels = x.shape
    tall, wide = min(size, height), min(size, width)
    rows, columns = height - tall + 1, width - wide + 1  # where the upper left corner of a square may lie
    gamma = rate * (height * width) / (tall * wide * rows * columns)
    seeds = jax.random.uniform(key, (n, rows, columns, channels)) < gamma
    dropped = _spread(_spread(seeds, 1, tall), 2, wide)
    # Counting what is dropped makes the share exactly 1 where nothing is; the floor is for batches of which all is.
    share = jnp.maximum(1 - dropped.mean(dtype=jnp.float32), 1 / x.size)
    return _kept(x, ~dropped, share)


def _nothing(rate: Rate) -> bool:
    """Whether `rate` is a Python number that says so."""
    if isinstance(rate, Array):
        return False
    if not 0 <= rate < 1:
        raise ConfigError(f"a drop rate is a probability of at least 0 and below 1, not {rate}: correct it.")
    return rate == 0


def _kept(x: Array, keep: Array, share: Array) -> Array:
    """`x` / share where kept, else 0. The division is in float32: a share rounded to bfloat16 would bias the mean."""
    return jnp.where(keep, x / share, 0).astype(x.dtype)


def _spread(seeds: Array, axis: int, size: int) -> Array:
    """Each True of `seeds` repeated over `size` places of `axis`, which grows by `size` - 1: max-pooling, padded."""
    window, padding = [1] * seeds.ndim, [(0, 0)] * seeds.ndim
    window[axis], padding[axis] = size, (size - 1, size - 1)
    return lax.reduce_window(seeds, False, lax.bitwise_or, window, [1] * seeds.ndim, padding)
