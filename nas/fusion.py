"""Batch norms and activations that are computed where the next convolution reads them.

On CPU a convolution is hardly dearer than reading what it reads: a pass over memory for the moments, another one to
normalise and a third to read are most of a network's time. `plan` says which ops of a graph the C++ kernels take
together (`nas.native.fused`): a convolution of one group or of one for each channel, with the norm and activation
before it, and with the moments of its result. What lies between two of them is then never written to memory.
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
from nas.ops import Act, Activation, Add, Conv, Graph, Norm, Shape

# Bottlenecks are taken together where there are images for all cores, and where one fits into a core's cache.
CHAIN_IMAGES = 16
CHAIN_VALUES = 2**17  # that the first convolution makes of an image
WIDENING = 2  # times its inputs, at least, a 1x1 convolution makes for its moments to be had from their covariance


@dataclasses.dataclass(frozen=True)
class Plan:
    """Ops of a graph by their index."""

    normed: tuple[int, ...] = ()  # convolutions that are read by a norm alone
    fused: frozenset[int] = frozenset()  # those of them that C++ takes together with what is before them
    lazy: frozenset[int] = frozenset()  # norms and activations that are left to the fused convolution that reads them
    inner: frozenset[int] = frozenset()  # fused convolutions that are left to a later one: those of a bottleneck
    expansions: frozenset[int] = frozenset()  # the first of each bottleneck
    # Where the moments are known beforehand, a fused convolution can also take along what comes after it:
    last: frozenset[int] = frozenset()  # those that do, as nothing fused comes after
    closing: frozenset[int] = frozenset()  # the norms, activations and sums that they take along
    ends: frozenset[int] = frozenset()  # the last op of each such group
    widenings: frozenset[int] = frozenset()  # those that make many channels: moments are cheaper had without them
    widened: frozenset[int] = frozenset()  # what closes those


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
        blanks = [
            (kernels.blank((images, room), dtype), jnp.zeros((2, width), jnp.promote_types(dtype, jnp.float32)))
            for room, width in rest
        ]
        return (*self.kept, *blanks)


@dataclasses.dataclass(frozen=True)
class Convolved:
    """What a convolution made: values [n, room], which begin with `shape`, and their moments [2, channels]."""

    values: Any  # an array; or a `Link`, if the convolution was left to a later one
    shape: Shape
    moments: Any = None  # an array, unless nobody asked

    @property
    def array(self) -> Array:
        """[n, *shape]."""
        return _image(self.values, self.shape)


@dataclasses.dataclass(frozen=True)
class Normed:
    """(values - mean) * scale + offset, then the activation, if any: not computed yet."""

    values: Any  # as in `Convolved`
    shape: Shape
    mean: Array
    scale: Array
    offset: Array
    activation: Activation | None = None


@dataclasses.dataclass(frozen=True)
class Link:
    """A convolution that is not computed yet: a later one takes it along."""

    x: Any  # an array or `Normed`
    kernel: Any
    op: Conv


@functools.lru_cache(maxsize=65536)
def plan(graph: Graph) -> Plan:
    """What of `graph` can be computed together."""
    readers = graph.consumers()

    def reader(index: int) -> int:
        """The only op that reads op `index`; -1 if there are more of them, or none."""
        found = readers[index + 1]
        return found[0] if len(found) == 1 else -1

    def reads(index: int, kind: type) -> bool:
        return index >= 0 and isinstance(graph.ops[index], kind)

    convs = {index: op for index, op in enumerate(graph.ops) if isinstance(op, Conv)}
    normed = tuple(index for index, op in convs.items() if not op.bias and reads(reader(index), Norm))

    def channels_of(index: int) -> int:
        """That convolution `index` reads."""
        return graph.shape_of(convs[index].inputs[0])[-1]

    def fusible(index: int) -> bool:
        op = convs[index]
        return op.groups == 1 or op.groups == channels_of(index) == op.shape[-1]

    fused = {index: convs[index] for index in normed if fusible(index)}
    lazy: set[int] = set()
    for index, op in enumerate(graph.ops):
        after = reader(index)
        if not isinstance(op, Norm) or after < 0:
            continue
        act = graph.ops[after]
        if after in fused:
            lazy.add(index)
        elif isinstance(act, Act) and act.function in native.ACTIVATIONS and reader(after) in fused:
            lazy |= {index, after}

    def follower(index: int) -> int:
        """The fused convolution that reads this one through a norm and an activation that are left to it; or -1."""
        after = reader(index)
        while after in lazy:
            after = reader(after)
        return after if after in fused else -1

    def pointwise(index: int) -> bool:
        return index in fused and fused[index].kernel == fused[index].stride == fused[index].groups == 1

    def depthwise(index: int) -> bool:
        return index in fused and fused[index].groups > 1

    expansions: set[int] = set()
    inner: set[int] = set()
    taken: set[int] = set()  # by bottlenecks, their ends included: one does not begin where another ends
    for index in sorted(fused):
        second = follower(index)
        fits = math.prod(fused[index].shape) <= CHAIN_VALUES
        if index in taken or not (pointwise(index) and depthwise(second) and fits):
            continue
        expansions.add(index)
        taken |= {index, second}
        if pointwise(third := follower(second)):
            inner.add(second)
            taken.add(third)

    last = {index for index in fused if reader(index) not in lazy}
    widenings = {
        index for index in last if pointwise(index) and WIDENING * channels_of(index) <= fused[index].shape[-1]
    }
    closing = {reader(index) for index in last}
    ends: set[int] = set()
    widened: set[int] = set()
    for index in sorted(last):
        norm = reader(index)
        after = reader(norm)
        op = graph.ops[after] if after >= 0 else None
        known = isinstance(op, Act) and op.function in native.ACTIVATIONS
        free = isinstance(op, Add) and after not in ends  # not taken along by the other term
        ends.add(end := after if known or free else norm)
        if index in widenings:
            widened |= {norm, end}
    return Plan(
        normed=normed,
        fused=frozenset(fused),
        lazy=frozenset(lazy),
        inner=frozenset(inner | expansions),
        expansions=frozenset(expansions),
        last=frozenset(last),
        closing=frozenset(closing | ends),
        ends=frozenset(ends),
        widenings=frozenset(widenings),
        widened=frozenset(widened),
    )


def conv(x: Any, kernel: Any, op: Conv, *, fused: bool, measures: bool = True, tape: Tape | None = None) -> Convolved:
    """The convolution `op` of `x`: [n, height, width, channels], or `Normed`, which is computed on the way.

    `measures`: whether its moments are asked for; without, they are 0.
    """
    slot = 0 if tape is None else len(tape.kept)
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


def link(x: Any, kernel: Any, op: Conv, *, measures: bool) -> Convolved:
    """The convolution `op` of `x` (as of `conv`) left to a later one; its moments do not need it."""
    here = Link(x, kernel, op)
    if not measures:
        return Convolved(here, op.shape)
    values, affine, how = _call(here, measures=True, room=math.prod(op.shape))
    return Convolved(here, op.shape, native.pointwise_moments(values, kernel, *affine, how))


def _fused(
    x: Any, kernel: Any, op: Conv, measures: bool, room: int, known: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    if isinstance(x, Normed) and isinstance(x.values, Link):
        return _chained(Link(x, kernel, op), measures)
    values, affine, how = _call(Link(x, kernel, op), measures=measures, room=room)
    if known is None:
        return native.fused(values, kernel, *affine, how)
    y, moments = known
    return native.recalled(y, moments[:, : op.shape[-1]], values, kernel, *affine, how)


def _call(link: Link, *, measures: bool, room: int) -> tuple[Any, native.Affine, native.Fused]:
    """What `native.fused` is called with beside the kernel: values, or the link that makes them; affine map; how."""
    x = link.x
    if isinstance(x, Normed):
        values, shape = x.values, x.shape
        number = native.ACTIVATIONS.index(x.activation or "none")
        affine = _affine(x)
    else:
        values, shape, number = x.reshape(len(x), -1), x.shape[1:], None
        zeros = jnp.zeros(shape[-1], jnp.float32)
        affine = zeros, zeros, zeros
    return values, affine, native.Fused((shape[0], shape[1]), link.op.stride, number, measures, room)


def _affine(x: Normed) -> native.Affine:
    channels = x.shape[-1:]
    mean, scale, offset = (jnp.broadcast_to(jnp.asarray(a, jnp.float32), channels) for a in (x.mean, x.scale, x.offset))
    return mean, scale, offset


def _chained(last: Link, measures: bool) -> tuple[Array, Array]:
    """The result of the last convolution of a bottleneck, and its moments."""
    values, affines, kernels_of, hows = _in_turn(last, measures)
    made: Any = native.chain(values, affines, kernels_of, None, None, native.Links(hows))
    return made


def close(x: Normed, shortcut: Any) -> Array:
    """The norm, with the convolutions that are left to it: [n, *x.shape]; plus `shortcut`, if there is one."""
    values, affines, kernels_of, hows = _in_turn(x.values, measures=False)
    links = native.Links(hows, native.ACTIVATIONS.index(x.activation or "none"))
    flat = None if shortcut is None else shortcut.reshape(len(shortcut), -1)
    made: Any = native.chain(values, affines, kernels_of, _affine(x), flat, links)
    return _image(made[0], x.shape)


def _in_turn(last: Link, measures: bool) -> tuple[Array, Any, Any, Any]:
    """The values that the first of a row of links reads; and of each its affine map, kernel, and how it is computed."""
    values, calls = last, []
    while isinstance(values, Link):
        each = values
        values, affine, how = _call(each, measures=measures and each is last, room=math.prod(each.op.shape))
        calls.insert(0, (affine, each.kernel, how))
    affines, kernels_of, hows = zip(*calls, strict=True)
    return values, affines, kernels_of, hows


def _plain(x: Array, kernel: Array, op: Conv, room: int, known: tuple[Array, Array] | None) -> tuple[Array, Array]:
    if known is None:
        y = kernels.conv(x, kernel, stride=op.stride, groups=op.groups)
        values = y.reshape(len(y), -1)
        moments = jnp.stack(kernels.batch_moments(y))
        return jnp.pad(values, [(0, 0), (0, room - values.shape[1])]), moments
    values, moments = known
    y: Any = kernels.recalled_conv(_image(values, op.shape), x, kernel, op.stride, op.groups)
    moments = jnp.stack(kernels.recalled_moments(moments[:, : op.shape[-1]], y))
    return y.reshape(len(y), -1), moments


def _image(values: Array, shape: Shape) -> Array:
    return values[:, : math.prod(shape)].reshape(-1, *shape)
