"""Augmentation of training images on the device, deterministic in the key: `augment` for images, `mix` for pairs.

Images are [n, height, width, channels] in 0..1, before mean and standard deviation are taken out; every image draws
its own parameters. Settings are Python values: a function that is compiled once serves every key.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from nas import config
from nas.errors import ConfigError
from nas.train.augment.mix import mix
from nas.train.augment.operations import OPERATIONS
from nas.train.augment.placement import cutout, flip, shift
from nas.train.augment.policies import POLICIES

__all__ = ["OPERATIONS", "POLICIES", "augment", "cutout", "flip", "mix", "shift"]

MID_GREY = 0.5


def augment(key: Array, images: Array, settings: config.Augment, *, fill: ArrayLike = MID_GREY) -> Array:
    """Flip, shift, policy and cutout, in this order, each image its own; what `settings` leave out costs nothing.

    Args:
        key: a JAX key; equal keys give equal images.
        images: float [n, height, width, channels] in 0..1. A policy rounds them to 256 levels and needs 1 or 3
            channels.
        settings: `mixup` and `cutmix` of them are `mix`'s.
        fill: scalar or [channels] in 0..1: what cutout blanks with and what a policy's rotations, shears and
            translations uncover. The data's mean makes it zero after normalisation, as in the papers (DeVries & Taylor
            2017, arXiv:1708.04552, sec. 3.2). A shift uncovers 0.

    Returns:
        Images of the same shape and type.

    Raises:
        ConfigError: an unknown policy.
        DataError: a policy for images of neither 1 nor 3 channels.
    """
    if settings.policy not in POLICIES:
        hint = config.nearest(settings.policy, POLICIES, kind="policy")
        raise ConfigError(f"unknown augmentation policy `{settings.policy}`.{hint}")
    flip_key, shift_key, policy_key, cutout_key = jax.random.split(key, 4)
    colour = jnp.broadcast_to(jnp.asarray(fill, jnp.float32), images.shape[-1:])
    if settings.flip:
        images = flip(flip_key, images)
    if settings.shift:
        images = shift(shift_key, images, settings.shift)
    images = POLICIES[settings.policy](policy_key, images, settings, colour)
    if settings.cutout:
        images = cutout(cutout_key, images, settings.cutout, colour)
    return images
