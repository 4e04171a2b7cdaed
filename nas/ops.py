"""What a network is made of: a short closed list of ops, graphs of them, and the recorder that blocks write to.

Everything here is plain data: hashable, JSON both ways, no framework. Back-ends walk it: `nas.run` (JAX),
`nas.cost` (MACs, parameters), `nas.quantise` (fake quantisation), `nas.export` (one file per runtime).

Shapes are without batch: (height, width, channels), or (features,) after a `dense`.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Literal

import msgspec

Shape = tuple[int, ...]
Activation = Literal["relu", "relu6", "hard_swish", "hard_sigmoid", "swish", "sigmoid", "gelu"]

NORM_EPSILON = 1e-5


class Op(msgspec.Struct, frozen=True, tag_field="op", omit_defaults=True):
    """One operation. `inputs` are value numbers: 0 is the graph's input, i+1 the output of op i."""

    inputs: tuple[int, ...]
    shape: Shape  # of the output


class Conv(Op, frozen=True, tag="conv", omit_defaults=True):
    """2-D convolution, SAME padding (at stride 2 asymmetric, as XLA and TensorFlow have it)."""

    name: str
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    bias: bool = False


class Dense(Op, frozen=True, tag="dense", omit_defaults=True):
    """Matrix product over all features of the input, which is flattened first."""

    name: str
    bias: bool = True


class Norm(Op, frozen=True, tag="norm", omit_defaults=True):
    """Batch normalisation over all but the channels, epsilon `NORM_EPSILON`."""

    name: str


class Act(Op, frozen=True, tag="act", omit_defaults=True):
    """Pointwise activation. hard_swish is x * relu6(x + 3) / 6, hard_sigmoid is relu6(x + 3) / 6."""

    function: Activation


class Pool(Op, frozen=True, tag="pool", omit_defaults=True):
    """Pooling, SAME padding (averages do not count it); window 0 pools the whole image to 1x1."""

    reduce: Literal["mean", "max"] = "mean"
    window: int = 0
    stride: int = 1


class Add(Op, frozen=True, tag="add", omit_defaults=True):
    """Sum of two values of one shape."""


class Mul(Op, frozen=True, tag="mul", omit_defaults=True):
    """Product of two values; the second may be 1x1 in height and width."""


class Concat(Op, frozen=True, tag="concat", omit_defaults=True):
    """Channels of all inputs, one after the other."""


class Split(Op, frozen=True, tag="split", omit_defaults=True):
    """Channels [start, start + shape[-1]) of the input."""

    start: int


class Shuffle(Op, frozen=True, tag="shuffle", omit_defaults=True):
    """Channel shuffle: channel g*n + i goes to i*groups + g (Zhang et al. 2017, arXiv:1707.01083, sec. 3.1)."""

    groups: int


AnyOp = Conv | Dense | Norm | Act | Pool | Add | Mul | Concat | Split | Shuffle


class Graph(msgspec.Struct, frozen=True):
    """Ops in the order they run. The output is the last op's; without ops, the input."""

    input: Shape
    ops: tuple[AnyOp, ...] = ()

    @property
    def shape(self) -> Shape:
        """Of the output."""
        return self.ops[-1].shape if self.ops else self.input

    def shape_of(self, value: int) -> Shape:
        """Shape of value number `value`."""
        return self.ops[value - 1].shape if value else self.input

    def consumers(self) -> list[list[int]]:
        """For each value, the indices of the ops that read it."""
        out: list[list[int]] = [[] for _ in range(len(self.ops) + 1)]
        for index, op in enumerate(self.ops):
            for value in op.inputs:
                out[value].append(index)
        return out

    @property
    def key(self) -> str:
        """Hash of input shape and ops: two blocks with one key cost the same on every device."""
        return _key(self)


@functools.lru_cache(maxsize=65536)
def _key(graph: Graph) -> str:
    return hashlib.sha256(msgspec.json.encode(graph)).hexdigest()[:16]


class Block(msgspec.Struct, frozen=True):
    """A graph with a name that scopes its weights, and what it is in words."""

    name: str  # "stage1/layer2/mbconv"
    label: str  # "mbconv expand=6 kernel=3"
    graph: Graph


class Network(msgspec.Struct, frozen=True):
    """A chain of blocks, from image to logits."""

    blocks: tuple[Block, ...]

    @property
    def input(self) -> Shape:
        """(height, width, channels) of the images."""
        return self.blocks[0].graph.input

    @property
    def classes(self) -> int:
        """Length of the logits."""
        return self.blocks[-1].graph.shape[-1]

    @property
    def key(self) -> str:
        """Hash of everything that decides what the network computes, names of weights included."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]

    def flat(self) -> Graph:
        """The same as one graph, weights named in full."""
        return flatten(self.blocks)

    def __repr__(self) -> str:
        inner = ", ".join(b.label for b in self.blocks)
        return f"Network({'x'.join(map(str, self.input))} -> {self.classes}: {inner})"


def flatten(blocks: tuple[Block, ...]) -> Graph:
    """A chain of blocks as one graph; weight names are prefixed by the block's."""
    ops: list[AnyOp] = []
    value = 0  # number of the chain's value that the current block reads
    for block in blocks:
        base = len(ops)
        for op in block.graph.ops:
            inputs = tuple(base + v if v else value for v in op.inputs)
            named = {"name": f"{block.name}/{op.name}"} if isinstance(op, Conv | Dense | Norm) else {}
            ops.append(msgspec.structs.replace(op, inputs=inputs, **named))
        value = len(ops)
    return Graph(blocks[0].graph.input, tuple(ops))


@dataclasses.dataclass(frozen=True)
class Weight:
    """One array a graph needs. `role` is kernel, bias, scale, offset, mean or var; the last two are not trained."""

    name: str
    role: str
    shape: Shape
    fan_in: int = 1

    @property
    def trained(self) -> bool:
        """False for batch-norm statistics."""
        return self.role not in ("mean", "var")


def weights(graph: Graph) -> Iterator[Weight]:
    """Every array that `graph` needs, in the order of its ops."""
    for op in graph.ops:
        match op:
            case Conv():
                fan_in = op.kernel**2 * graph.shape_of(op.inputs[0])[-1] // op.groups
                shape = (op.kernel, op.kernel, fan_in // op.kernel**2, op.shape[-1])
                yield Weight(f"{op.name}/kernel", "kernel", shape, fan_in)
                if op.bias:
                    yield Weight(f"{op.name}/bias", "bias", op.shape[-1:])
            case Dense():
                fan_in = 1
                for size in graph.shape_of(op.inputs[0]):
                    fan_in *= size
                yield Weight(f"{op.name}/kernel", "kernel", (fan_in, op.shape[-1]), fan_in)
                if op.bias:
                    yield Weight(f"{op.name}/bias", "bias", op.shape[-1:])
            case Norm():
                for role in ("scale", "offset", "mean", "var"):
                    yield Weight(f"{op.name}/{role}", role, op.shape[-1:])


@dataclasses.dataclass(frozen=True)
class Value:
    """A handle to an op's output while recording."""

    number: int
    shape: Shape

    @property
    def channels(self) -> int:
        """Size of the last axis."""
        return self.shape[-1]


class Recorder:
    """Records ops with their shapes resolved. Blocks are functions `(net, x, **options) -> Value` that call it."""

    def __init__(self, input_shape: Shape):
        self.input = Value(0, input_shape)
        self._ops: list[AnyOp] = []

    def graph(self) -> Graph:
        """What was recorded."""
        return Graph(self.input.shape, tuple(self._ops))

    def _record(self, op: AnyOp) -> Value:
        self._ops.append(op)
        return Value(len(self._ops), op.shape)

    def conv(
        self,
        x: Value,
        name: str,
        features: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> Value:
        """Convolution to `features` channels."""
        if x.channels % groups or features % groups:
            raise ValueError(f"conv {name!r}: {x.channels} -> {features} channels do not divide into {groups} groups")
        height, width = (-(-size // stride) for size in x.shape[:2])
        shape = (height, width, features)
        return self._record(Conv((x.number,), shape, name, kernel=kernel, stride=stride, groups=groups, bias=bias))

    def dense(self, x: Value, name: str, features: int, *, bias: bool = True) -> Value:
        """Matrix product over everything in `x`."""
        return self._record(Dense((x.number,), (features,), name, bias=bias))

    def norm(self, x: Value, name: str) -> Value:
        """Batch normalisation."""
        return self._record(Norm((x.number,), x.shape, name))

    def act(self, x: Value, function: Activation) -> Value:
        """Activation by name."""
        if function not in Activation.__args__:
            raise ValueError(f"unknown activation {function!r}; known: {', '.join(Activation.__args__)}")
        return self._record(Act((x.number,), x.shape, function))

    def pool(self, x: Value, reduce: Literal["mean", "max"] = "mean", *, window: int = 0, stride: int = 1) -> Value:
        """Pooling; window 0 is global, to 1x1."""
        size = tuple(-(-s // stride) if window else 1 for s in x.shape[:2])
        return self._record(Pool((x.number,), (*size, x.channels), reduce, window, stride))

    def add(self, a: Value, b: Value) -> Value:
        """Elementwise sum."""
        if a.shape != b.shape:
            raise ValueError(f"add: shapes {a.shape} and {b.shape} differ")
        return self._record(Add((a.number, b.number), a.shape))

    def mul(self, a: Value, b: Value) -> Value:
        """Elementwise product; `b` may be 1x1."""
        if b.shape not in (a.shape, (1, 1, a.channels)):
            raise ValueError(f"mul: shape {b.shape} does not fit {a.shape}")
        return self._record(Mul((a.number, b.number), a.shape))

    def concat(self, *values: Value) -> Value:
        """Channels one after the other."""
        shape = (*values[0].shape[:-1], sum(v.channels for v in values))
        return self._record(Concat(tuple(v.number for v in values), shape))

    def split(self, x: Value, start: int, stop: int) -> Value:
        """Channels [start, stop)."""
        if not 0 <= start < stop <= x.channels:
            raise ValueError(f"split: [{start}, {stop}) is not within {x.channels} channels")
        return self._record(Split((x.number,), (*x.shape[:-1], stop - start), start))

    def shuffle(self, x: Value, groups: int) -> Value:
        """Channel shuffle."""
        if x.channels % groups:
            raise ValueError(f"shuffle: {x.channels} channels do not divide into {groups} groups")
        return self._record(Shuffle((x.number,), x.shape, groups))
