"""Bilinear resizing, the same for NumPy on the host and JAX on a device."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray


@functools.lru_cache(maxsize=64)
def resize_matrix(source: int, target: int) -> NDArray[np.float32]:
    """Weights [target, source] of linear interpolation along one axis, pixel centres at halves.

    Where it shrinks, the triangle is widened by the ratio, so that every pixel counts (as in Pillow and JAX).
    """
    ratio = source / target
    centres = (np.arange(target) + 0.5) * ratio - 0.5
    distance = np.abs(np.arange(source)[None] - centres[:, None]) / max(ratio, 1.0)
    weights = np.maximum(0.0, 1.0 - distance)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resize(images: Any, size: tuple[int, ...]) -> Any:
    """Float images [..., height, width, channels] at `size` (height, width); themselves where they have it."""
    height, width = images.shape[-3:-1]
    if (height, width) == tuple(size):
        return images
    xp = images.__array_namespace__()
    rows, columns = resize_matrix(height, size[0]), resize_matrix(width, size[1])
    return xp.einsum("hH,...HWc,wW->...hwc", rows, images, columns)
