"""Batch norms and activations that are computed where the next convolution reads them.

On CPU a convolution is hardly dearer than reading what it reads: a pass over memory for the moments, another one to
normalise and a third to read are most of a network's time. `plan` says which ops of a graph the C++ kernels take
together (`nas.native.fused`): a depthwise or 1x1 convolution, with the norm and activation before it, and with the
moments of its result. What lies between two of them is then never written to memory.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from nas import kernels, native
from nas.ops import Act, Activation, Conv, Graph, Norm, Shape


@dataclasses.dataclass(frozen=True)
class Plan:
    """Ops of a graph by their index."""

    normed: tuple[int, ...] = ()  # convolutions that are read by a norm alone
    fused: frozenset[int] = frozenset()  # those of them that C++ takes together with what is before them
    lazy: frozenset[int] = frozenset()  # norms and activations that are left to the fused convolution that reads them
    inner: frozenset[int] = frozenset()  # fused convolutions that are left to a later one: those of a bottleneck


@dataclasses.dataclass
class Tape:
    """Results of the convolutions of a graph that norms read, so that the backward pass need not compute them again.

    Different graphs write to tapes of one structure: slot i has room for the largest result of any i-th convolution.
    """

    rooms: tuple[int, ...]  # values of an image
    widths: tuple[int, ...]  # channels
    known: Sequence[tuple[Array, Array]] | None = None  # what an earlier pass kept; None: this one keeps
    kept: list[tuple[Array, Array]] = dataclasses.field(default_factory=list)  # values [n, room], moments [2, width]

    @classmethod
    def of(cls, graphs: Iterable[Graph], known: Sequence[tuple[Array, Array]] | None = None) -> "Tape":
        """A tape that any of `graphs` can use."""
        shapes = [[graph.ops[index].shape for index in plan(graph).normed] for graph in graphs]
        slots = [[s for s in slot if s is not None] for slot in itertools.zip_longest(*shapes)]
        return cls(
            tuple(max(map(math.prod, slot)) for slot in slots), tuple(max(s[-1] for s in slot) for slot in slots), known
        )

    def slots(self, images: int, dtype: DTypeLike) -> tuple[tuple[Array, Array], ...]:
        """What was kept, and room that nobody needed."""
        rest = zip(self.rooms[len(self.kept) :], self.widths[len(self.kept) :], strict=True)
        blanks = [(kernels.blank((images, room), dtype), jnp.zeros((2, width))) for room, width in rest]
        return (*self.kept, *blanks)


@dataclasses.dataclass(frozen=True)
class Convolved:
    """What a convolution made: values [n, room], which begin with `shape`, and their moments [2, channels]."""

    values: "Array | Link"
    shape: Shape
    moments: Array

    @property
    def array(self) -> Array:
        """[n, *shape]."""
        return _image(self.values, self.shape)


@dataclasses.dataclass(frozen=True)
class Normed:
    """(values - mean) * scale + offset, then the activation, if any: not computed yet."""

    values: "Array | Link"  # as in `Convolved`
    shape: Shape
    mean: Array
    scale: Array
    offset: Array
    activation: Activation | None = None


@dataclasses.dataclass(frozen=True)
class Link:
    """A convolution that is not computed yet: a later one takes it along."""

    x: Array | Normed
    kernel: Array
    op: Conv


@functools.lru_cache(maxsize=65536)
def plan(graph: Graph) -> Plan:
    """What of `graph` can be computed together."""
    readers = graph.consumers()

    def only_reader(index: int) -> int | None:
        found = readers[index + 1]
        return found[0] if len(found) == 1 else None

    def is_normed(index: int, op: object) -> bool:
        reader = only_reader(index)
        return isinstance(op, Conv) and not op.bias and reader is not None and isinstance(graph.ops[reader], Norm)

    def fusible(op: Conv) -> bool:
        return op.groups == 1 or op.groups == graph.shape_of(op.inputs[0])[-1] == op.shape[-1]

    def pointwise(index: int) -> bool:
        op = graph.ops[index]
        return op.kernel == op.stride == op.groups == 1

    def depthwise(index: int) -> bool:
        return graph.ops[index].groups > 1

    normed = tuple(index for index, op in enumerate(graph.ops) if is_normed(index, op))
    fused = frozenset(index for index in normed if fusible(graph.ops[index]))
    lazy: set[int] = set()
    for index, op in enumerate(graph.ops):
        if not isinstance(op, Norm) or (reader := only_reader(index)) is None:
            continue
        follower = graph.ops[reader]
        if reader in fused:
            lazy.add(index)
        elif isinstance(follower, Act) and follower.function in native.ACTIVATIONS and only_reader(reader) in fused:
            lazy |= {index, reader}

    def follower(index: int) -> int | None:
        """The fused convolution that reads this one through a norm and an activation that are left to it."""
        reader = only_reader(index)
        while reader in lazy:
            reader = only_reader(reader)
        return reader if reader in fused else None

    def joins(index: int) -> bool:
        after = follower(index)
        fits = math.prod(graph.ops[index].shape) <= CHAIN_VALUES
        return fits and pointwise(index) and after is not None and depthwise(after)

    expands = {index for index in fused if joins(index)}
    middles = {follower(index) for index in expands}
    projected = {i for i in middles if (after := follower(i)) is not None and pointwise(after)}
    return Plan(normed, fused, frozenset(lazy), frozenset(expands | projected))


# Bottlenecks are taken together where there are images for all cores, and where one fits into a core's cache.
CHAIN_IMAGES = 16
CHAIN_VALUES = 2**17


def conv(
    x: Array | Normed, kernel: Array, op: Conv, *, fused: bool, measures: bool = True, tape: Tape | None = None
) -> Convolved:
    """The convolution `op` of `x`: [n, height, width, channels], or what is to be computed on the way.

    `measures`: whether its moments are asked for; without, they are 0.
    """
    slot = None if tape is None else len(tape.kept)
    known = None if tape is None or tape.known is None else tape.known[slot]
    room = math.prod(op.shape) if tape is None else tape.rooms[slot]
    if fused:
        values, moments = _fused(x, kernel, op, measures, room, known)
    else:
        values, moments = _plain(x, kernel, op, room, known)
    if tape is not None:
        missing = tape.widths[slot] - op.shape[-1]
        tape.kept.append((values, jnp.pad(moments, [(0, 0), (0, missing)])))
    return Convolved(values, op.shape, moments)


def _fused(
    x: Array | Normed, kernel: Array, op: Conv, measures: bool, room: int, known: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    if isinstance(x, Normed) and isinstance(x.values, Link):
        return _chained(Link(x, kernel, op)), jnp.zeros((2, op.shape[-1]))
    values, affine, how = _call(Link(x, kernel, op), measures, room)
    if known is None:
        return native.fused(values, kernel, *affine, how)
    y, moments = known
    return native.recalled(y, moments[:, : op.shape[-1]], values, kernel, *affine, how)


def _call(link: Link, measures: bool, room: int) -> tuple[Any, native.Affine, native.Fused]:
    """What `native.fused` is called with beside the kernel: values, or the link that makes them; affine map; how."""
    x = link.x
    if isinstance(x, Normed):
        values, shape = x.values, x.shape
        affine, number = (x.mean, x.scale, x.offset), native.ACTIVATIONS.index(x.activation or "none")
    else:
        values, shape, number = x.reshape(len(x), -1), x.shape[1:], None
        affine = (jnp.zeros(shape[-1], jnp.float32),) * 3
    return values, affine, native.Fused(shape[:2], link.op.stride, number, measures, room)


def _chained(last: Link) -> Array:
    """The result of the last convolution of a bottleneck."""
    affines, kernels_of, hows = [], [], []
    values: Any = last
    while isinstance(values, Link):
        link = values
        values, affine, how = _call(link, False, math.prod(link.op.shape))
        affines.insert(0, affine), kernels_of.insert(0, link.kernel), hows.insert(0, how)
    return native.bottleneck(values, tuple(affines), tuple(kernels_of), tuple(hows))


def _plain(x: Array, kernel: Array, op: Conv, room: int, known: tuple[Array, Array] | None) -> tuple[Array, Array]:
    if known is None:
        y = kernels.conv(x, kernel, stride=op.stride, groups=op.groups)
        values = y.reshape(len(y), -1)
        moments = jnp.stack(kernels.batch_moments(y))
        return jnp.pad(values, [(0, 0), (0, room - values.shape[1])]), moments
    values, moments = known
    y = kernels.recalled_conv(_image(values, op.shape), x, kernel, op.stride, op.groups)
    moments = jnp.stack(kernels.recalled_moments(moments[:, : op.shape[-1]], y))
    return y.reshape(len(y), -1), moments


def _image(values: Array, shape: Shape) -> Array:
    return values[:, : math.prod(shape)].reshape(-1, *shape)
