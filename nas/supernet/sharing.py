"""The one rule by which subnets share weights.

The supernet stores, under each name, the largest shape that any network asks for. A network reads the centre of the
kernel window and the leading channels of it (Cai et al. 2020, arXiv:1908.09791, sec. 3.3). Where the space asks for it,
a smaller window is the larger one's centre times a learned matrix, as there: `depthwise/kernel_to_5` [25, 25] makes the
5x5 window, shared by all channels, and `depthwise/kernel_to_3` makes the 3x3 window of that.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from nas.ops import Block, Shape, Weight, weights


def scoped(block: Block) -> list[Weight]:
    """The weights of a block under their full names."""
    return [Weight(f"{block.name}/{w.name}", w.role, w.shape, w.fan_in) for w in weights(block.graph)]


def store_shapes(blocks: Iterable[Block], *, kernel_transform: bool = False) -> dict[str, Weight]:
    """For each name, the weight with the largest shape that any of `blocks` asks for; and the transforms, if any."""
    out: dict[str, Weight] = {}
    windows: dict[str, set[int]] = {}
    for block in blocks:
        for w in scoped(block):
            known = out.get(w.name, w)
            shape = tuple(max(a, b) for a, b in zip(known.shape, w.shape, strict=True))
            out[w.name] = Weight(w.name, w.role, shape, max(known.fan_in, w.fan_in))
            if len(w.shape) == 4:
                windows.setdefault(w.name, set()).add(w.shape[0])
    if kernel_transform:
        for name, sizes in windows.items():
            for size in sizes - {max(sizes)}:
                matrix = Weight(f"{name}_to_{size}", "transform", (size**2, size**2), size**2)
                out[matrix.name] = matrix
    return out


def share(stored: Any, shape: Shape) -> Any:
    """The part of the array `stored` that a subnet with a weight of `shape` reads."""
    if stored.shape == shape:
        return stored
    window = len(shape) == 4  # a convolution kernel: two axes of space, then channels
    pairs = enumerate(zip(stored.shape, shape, strict=True))
    starts = [(big - small) // 2 if window and axis < 2 else 0 for axis, (big, small) in pairs]
    return stored[tuple(slice(a, a + size) for a, size in zip(starts, shape, strict=True))]


def unshare(part: Array, shape: Shape) -> Array:
    """`part` back in its place in an array of `shape`, zero elsewhere."""
    if part.shape == shape:
        return part
    window = len(shape) == 4
    pads = []
    for axis, (big, small) in enumerate(zip(shape, part.shape, strict=True)):
        before = (big - small) // 2 if window and axis < 2 else 0
        pads.append((before, big - small - before))
    return jnp.pad(part, pads)


def weight_of(params: Mapping[str, Any], name: str, shape: Shape) -> Any:
    """The weight `name` of a subnet that wants it in `shape`: shared, and transformed where `params` has matrices."""
    array = params[name]
    if len(shape) == 4:
        array = array[:, :, : shape[2], : shape[3]]
        for size in range(array.shape[0] - 1, shape[0] - 1, -1):
            matrix = params.get(f"{name}_to_{size}")
            if matrix is not None:
                window = share(array, (size, size, *shape[2:]))
                array = (matrix @ window.reshape(size**2, -1)).reshape(window.shape)
    return share(array, shape)


def read(params: Mapping[str, Any], blocks: Iterable[Block]) -> dict[str, Any]:
    """The weights of `blocks`, sliced out of the supernet's `params`. Names that `params` lacks are left out."""
    return {w.name: weight_of(params, w.name, w.shape) for b in blocks for w in scoped(b) if w.name in params}
