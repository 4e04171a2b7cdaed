"""What every recipe has: mirrored, shifted and blanked images. Images are [n, height, width, channels]."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike


def flip(key: Array, images: Array) -> Array:
    """Each image mirrored left to right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def shift(key: Array, images: Array, pixels: int) -> Array:
    """A random crop, of the images' own size, from each image with `pixels` zeros around it.

    He et al. 2015, arXiv:1512.03385, sec. 4.2, with `pixels` = 4 for images of 32x32.
    """
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)

    def crop(image: Array, corner: Array) -> Array:
        return lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def cutout(key: Array, images: Array, side: int, fill: ArrayLike) -> Array:
    """A square of `side` pixels of each image replaced by `fill`, a scalar or [channels].

    Its centre is uniform over the pixels, so that part of it may lie outside: DeVries & Taylor 2017, arXiv:1708.04552,
    sec. 3.2, found that this matters.
    """
    blank = square(key, len(images), images.shape[1:3], side, side)
    return jnp.where(blank[..., None], jnp.asarray(fill, images.dtype), images)


def square(key: Array, n: int, size: tuple[int, ...], height: ArrayLike, width: ArrayLike) -> Array:
    """bool [n, *size]: the inside of `n` boxes of `height` x `width` pixels, centred anywhere, clipped at the edges."""
    row_key, column_key = jax.random.split(key)

    def inside(key: Array, pixels: int, side: ArrayLike) -> Array:
        start = jax.random.randint(key, (n, 1), 0, pixels) - jnp.asarray(side) // 2
        offset = jnp.arange(pixels) - start
        return (offset >= 0) & (offset < side)

    return inside(row_key, size[0], height)[:, :, None] & inside(column_key, size[1], width)[:, None, :]
