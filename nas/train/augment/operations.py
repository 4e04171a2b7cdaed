"""The image operations that policies are made of, on one image: those of Pillow, level for level.

An operation takes whole grey levels 0..255, float32 [height, width, channels] with 1 or 3 channels, and one number, and
gives the same. Pixels whose source lies outside the image are `UNCOVERED`. Sampling is nearest-neighbour, as in the
papers. `tests/train/test_augment.py` compares each with Pillow.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

UNCOVERED = -1.0

Operation = Callable[[Array, Array], Array]


def identity(image: Array, _: ArrayLike) -> Array:
    """The image as it is."""
    return image


def shear_x(image: Array, slope: ArrayLike) -> Array:
    """Row y is moved left by `slope` * y pixels."""
    return _affine(image, (1, slope, 0), (0, 1, 0))


def shear_y(image: Array, slope: ArrayLike) -> Array:
    """Column x is moved up by `slope` * x pixels."""
    return _affine(image, (1, 0, 0), (slope, 1, 0))


def translate_x(image: Array, share: ArrayLike) -> Array:
    """Moved left by a share of the width."""
    return _affine(image, (1, 0, share * image.shape[1]), (0, 1, 0))


def translate_y(image: Array, share: ArrayLike) -> Array:
    """Moved up by a share of the height."""
    return _affine(image, (1, 0, 0), (0, 1, share * image.shape[0]))


def rotate(image: Array, degrees: ArrayLike) -> Array:
    """Rotated about its centre, counter-clockwise."""
    angle = jnp.asarray(degrees) * (-math.pi / 180)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = image.shape[1] / 2, image.shape[0] / 2
    return _affine(image, (cos, sin, x - cos * x - sin * y), (-sin, cos, y + sin * x - cos * y))


def auto_contrast(image: Array, _: ArrayLike) -> Array:
    """Each channel stretched so that its darkest level is 0 and its brightest 255."""
    low, high = image.min((0, 1)), image.max((0, 1))
    stretched = jnp.floor((image - low) * 255 / jnp.maximum(high - low, 1))
    return jnp.where(high > low, stretched, image)


def equalize(image: Array, _: ArrayLike) -> Array:
    """Each channel's levels spread so that equal ranges hold equally many pixels."""
    levels = image.reshape(-1, image.shape[2]).astype(jnp.int32)
    histogram = jnp.zeros((256, image.shape[2]), jnp.int32).at[levels, jnp.arange(image.shape[2])].add(1)
    below = jnp.cumsum(histogram, 0) - histogram  # pixels darker than each level
    step = jnp.take_along_axis(below, levels.max(0, keepdims=True), 0) // 255
    spread = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
    out = jnp.take_along_axis(jnp.where(step > 0, spread, jnp.arange(256)[:, None]), levels, 0)
    return out.reshape(image.shape).astype(image.dtype)


def invert(image: Array, _: ArrayLike) -> Array:
    """The negative."""
    return 255 - image


def solarize(image: Array, threshold: ArrayLike) -> Array:
    """Levels from `threshold` on inverted."""
    return jnp.where(image < threshold, image, 255 - image)


def posterize(image: Array, bits: ArrayLike) -> Array:
    """Only the `bits` highest bits of each level kept."""
    dropped = 8 - jnp.asarray(bits).astype(jnp.int32)
    return ((image.astype(jnp.int32) >> dropped) << dropped).astype(image.dtype)


def color(image: Array, factor: ArrayLike) -> Array:
    """Saturation: 0 is grey, 1 the image itself."""
    return _blend(_luma(image), image, factor)


def contrast(image: Array, factor: ArrayLike) -> Array:
    """Distance from the mean luma: 0 is uniform grey, 1 the image itself."""
    return _blend(jnp.floor(_luma(image).mean() + 0.5), image, factor)


def brightness(image: Array, factor: ArrayLike) -> Array:
    """0 is black, 1 the image itself."""
    return _blend(jnp.zeros((), image.dtype), image, factor)


def sharpness(image: Array, factor: ArrayLike) -> Array:
    """Distance from a smoothed image, whose border is not smoothed: 0 is smooth, 1 the image itself."""
    rows = image[:-2] + image[1:-1] + image[2:]
    box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    inner = jnp.floor((box + 4 * image[1:-1, 1:-1]) / 13 + 0.5)
    return _blend(image.at[1:-1, 1:-1].set(inner), image, factor)


OPERATIONS: dict[str, Operation] = {
    "identity": identity,
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "rotate": rotate,
    "solarize": solarize,
    "color": color,
    "posterize": posterize,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "invert": invert,
}


def _affine(
    image: Array, to_x: tuple[ArrayLike, ArrayLike, ArrayLike], to_y: tuple[ArrayLike, ArrayLike, ArrayLike]
) -> Array:
    """Pixel (x, y) of the result is read at (a x + b y + c) of `to_x` = (a, b, c), and so of `to_y`.

    In 16.16 fixed point from pixel centre to pixel centre, as Pillow reckons, so that ties fall alike.
    """
    height, width, channels = image.shape
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)

    def fixed(value: ArrayLike) -> Array:
        return jnp.floor(jnp.asarray(value, jnp.float32) * 65536 + 0.5).astype(jnp.int32)

    def source(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> Array:
        return (fixed(a) * columns + fixed(b) * rows + fixed(c + (a + b) / 2)) >> 16

    x, y = source(*to_x), source(*to_y)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixels = image.reshape(-1, channels).at[jnp.where(inside, y * width + x, 0)].get(mode="promise_in_bounds")
    return jnp.where(inside[:, :, None], pixels, UNCOVERED)


def _luma(image: Array) -> Array:
    """[height, width, 1]: ITU-R 601 luma, in Pillow's integers."""
    if image.shape[2] == 1:
        return image
    red, green, blue = (image[:, :, i : i + 1] for i in range(3))
    return jnp.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)


def _blend(start: Array, end: Array, factor: ArrayLike) -> Array:
    """From `start` (factor 0) through `end` (factor 1) and beyond, cut off at 0 and 255."""
    return jnp.clip(jnp.floor(start + factor * (end - start)), 0, 255)
