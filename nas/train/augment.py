"""Augmentation on device: images float [n, height, width, channels] in, the same out, deterministic in the key."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from nas import config


def augment(key: Array, images: Array, settings: config.Augment) -> Array:
    """Random flips and shifts, each image its own."""
    flip_key, shift_key = jax.random.split(key)
    n, height, width, channels = images.shape
    if settings.flip:
        flipped = jax.random.bernoulli(flip_key, 0.5, (n, 1, 1, 1))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    if settings.shift:
        s = settings.shift
        padded = jnp.pad(images, [(0, 0), (s, s), (s, s), (0, 0)])
        offsets = jax.random.randint(shift_key, (n, 2), 0, 2 * s + 1)

        def crop(image: Array, offset: Array) -> Array:
            return lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

        images = jax.vmap(crop)(padded, offsets)
    return images
