"""The one rule by which subnets share weights.

The supernet stores, under each name, the largest shape that any network asks for. A network reads the centre of the
kernel window and the leading channels of it (Cai et al. 2020, arXiv:1908.09791, sec. 3.3).
"""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
from jax import Array

from nas.ops import Block, Shape, Weight, weights


def scoped(block: Block) -> list[Weight]:
    """The weights of a block under their full names."""
    return [Weight(f"{block.name}/{w.name}", w.role, w.shape, w.fan_in) for w in weights(block.graph)]


def store_shapes(blocks: Iterable[Block]) -> dict[str, Weight]:
    """For each name, the weight with the largest shape that any of `blocks` asks for."""
    out: dict[str, Weight] = {}
    for block in blocks:
        for w in scoped(block):
            known = out.get(w.name, w)
            shape = tuple(max(a, b) for a, b in zip(known.shape, w.shape, strict=True))
            out[w.name] = Weight(w.name, w.role, shape, max(known.fan_in, w.fan_in))
    return out


def share(stored: Array, shape: Shape) -> Array:
    """The part of `stored` that a subnet with a weight of `shape` reads."""
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


def read(params: Mapping[str, Array], blocks: Iterable[Block]) -> dict[str, Array]:
    """The weights of `blocks`, sliced out of the supernet's `params`. Names that `params` lacks are left out."""
    return {w.name: share(params[w.name], w.shape) for b in blocks for w in scoped(b) if w.name in params}
