"""What a network is made of: a short closed list of ops, graphs of them, and the recorder that blocks write to.

Everything here is plain data: hashable, JSON both ways, no framework. Back-ends walk it: `nas.run` (JAX),
`nas.cost` (MACs, parameters), `nas.quantise` (fake quantisation), `nas.export` (one file per runtime).

Shapes are without batch: (height, width, channels), or (features,) after a `dense`.
"""

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

Shape = tuple[int, ...]
Held = Literal["float32", "int8"]  # what values are in
Quantised = Literal["int8", "int8_weights", "int4_weights"]  # what ops may be in, beside float32
Precision = Literal["float32", Quantised]
Activation = Literal["relu", "relu6", "hard_swish", "hard_sigmoid", "swish", "sigmoid", "gelu"]

# What ops may be in where files are of mixed precision. A mere number is of weights and activations, as in the names of
# whole files; `_weights` says that weights alone are so narrow.
PRECISIONS: dict[Precision, str] = {
    "float32": "weights and activations in float32",
    "int8": "weights and activations in 8 bits, computed on integers",
    "int8_weights": "weights stored in 8 bits, one scale an output channel; activations and arithmetic in float32",
    "int4_weights": "weights stored in 4 bits, two to a byte, one scale an output channel; the rest in float32",
}
WEIGHT_BITS: dict[Precision, int] = {"int8_weights": 8, "int4_weights": 4}  # of those that narrow weights alone

NORM_EPSILON = 1e-5
ATTENTION_EPSILON = 1e-6


class _Computed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    precision: Precision = "float32"  # in a file of mixed precision; files of one precision have it throughout


class Op(_Computed, frozen=True, tag_field="op", omit_defaults=True):
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


class LinearAttention(Op, frozen=True, tag="linear_attention", omit_defaults=True):
    """ReLU linear attention of every pixel to all pixels, head by head (Cai et al. 2023, arXiv:2205.14756, sec. 3.1).

    The input's channels are, for each head, its queries q, keys k and values v, `dim` each; the output has `dim` for
    each head. With q and k after a ReLU, pixel i gets sum_j (q_i . k_j) v_j / (sum_j q_i . k_j + ATTENTION_EPSILON),
    which is q_i . (sum_j k_j v_j) over q_i . (sum_j k_j): linear in the number of pixels. Where all of q_i or all keys
    are 0 the result is 0. (The authors' code adds 1e-15, with which gradients of nearly vanishing queries explode.)
    """

    dim: int


AnyOp = Conv | Dense | Norm | Act | Pool | Add | Mul | Concat | Split | Shuffle | LinearAttention


class Graph(msgspec.Struct, frozen=True):
    """Ops in the order they run. The output is the last op's; without ops, the input."""

    input: Shape
    ops: tuple[AnyOp, ...] = ()
    reads: Held | msgspec.UnsetType = msgspec.UNSET  # what the input is held in, where not as all other values

    @property
    def precision(self) -> Precision:
        """Of the first op, and so of all ops of a block."""
        return self.ops[0].precision if self.ops else "float32"

    @property
    def activations(self) -> Held:
        """What the values of a block are held in."""
        return activations(self.precision)

    @property
    def source(self) -> Held:
        """What the input is held in by what makes it."""
        return self.activations if self.reads is msgspec.UNSET else self.reads

    @property
    def mixed(self) -> bool:
        """Whether some op is in another precision than float32, and a file therefore of mixed precision."""
        return any(op.precision != "float32" for op in self.ops)

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


def activations(precision: Precision) -> Held:
    """What ops in `precision` make, and what they read. Narrow weights alone leave it float32."""
    return "int8" if precision == "int8" else "float32"


def in_precision(graph: Graph, precision: Precision, source: Precision | None = None) -> Graph:
    """`graph` with all ops in that precision, after ops in `source`, or in the same. float32 is as it was recorded.

    What precedes a block is told only where its values are held in something else, and so have to be converted.
    """
    ops = tuple(msgspec.structs.replace(op, precision=precision) for op in graph.ops)
    held = activations(precision if source is None else source)
    return Graph(graph.input, ops, msgspec.UNSET if held == activations(precision) else held)


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


def in_float32(network: Network) -> Network:
    """`network` with all ops in float32, as they were recorded."""
    blocks = network.blocks
    return Network(tuple(msgspec.structs.replace(b, graph=in_precision(b.graph, "float32")) for b in blocks))


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


def output_shape(op: AnyOp, inputs: Sequence[Shape]) -> Shape:
    """The shape that `op` gives for `inputs`, one shape for each value that it reads.

    Of `op.shape` only its last number is read, and only where the op itself decides it: the features of a `Conv` or
    `Dense`, the channels that a `Split` takes.

    Raises:
        ValueError: the op does not fit its inputs, or one of its numbers makes no sense.
    """
    kind = type(op).__name__.lower()
    wanted = 2 if isinstance(op, Add | Mul) else max(len(inputs), 1) if isinstance(op, Concat) else 1
    if len(inputs) != wanted:
        raise ValueError(f"{kind}: it reads {wanted} value{'s' if wanted > 1 else ''}, not {len(inputs)}")
    x = inputs[0]
    if isinstance(op, Conv | Pool) and len(x) != 3:
        raise ValueError(f"{kind}: an image (height, width, channels) is needed, not shape {x}")
    match op:
        case Conv():
            what = f"conv {op.name!r}"
            features = _whole(f"{what}: features", op.shape[-1] if op.shape else None)
            kernel, stride, groups = (
                _whole(f"{what}: {name}", getattr(op, name)) for name in ("kernel", "stride", "groups")
            )
            if kernel % 2 == 0:
                raise ValueError(f"{what}: kernel {kernel} is even; windows are centred, so it must be odd")
            if x[-1] % groups or features % groups:
                raise ValueError(f"{what}: {x[-1]} -> {features} channels do not divide into {groups} groups")
            return -(-x[0] // stride), -(-x[1] // stride), features
        case Dense():
            return (_whole(f"dense {op.name!r}: features", op.shape[-1] if op.shape else None),)
        case Norm():
            return x
        case Act():
            if op.function not in Activation.__args__:
                raise ValueError(f"unknown activation {op.function!r}; known: {', '.join(Activation.__args__)}")
            return x
        case Pool():
            window, stride = _whole("pool: window", op.window, least=0), _whole("pool: stride", op.stride)
            return (-(-x[0] // stride), -(-x[1] // stride), x[-1]) if window else (1, 1, x[-1])
        case Add():
            if inputs[1] != x:
                raise ValueError(f"add: shapes {x} and {inputs[1]} differ")
            return x
        case Mul():
            if inputs[1] not in (x, (1, 1, x[-1])):
                raise ValueError(f"mul: shape {inputs[1]} does not fit {x}")
            return x
        case Concat():
            if different := [shape for shape in inputs if shape[:-1] != x[:-1]]:
                raise ValueError(f"concat: shapes {x} and {different[0]} differ in more than channels")
            return *x[:-1], sum(shape[-1] for shape in inputs)
        case Split():
            start, size = op.start, op.shape[-1] if op.shape else 0
            if not 0 <= start < start + size <= x[-1]:
                raise ValueError(f"split: [{start}, {start + size}) is not within {x[-1]} channels")
            return *x[:-1], size
        case Shuffle():
            if x[-1] % _whole("shuffle: groups", op.groups):
                raise ValueError(f"shuffle: {x[-1]} channels do not divide into {op.groups} groups")
            return x
        case LinearAttention():
            if len(x) != 3 or x[-1] % (3 * _whole("linear_attention: dim", op.dim)):
                raise ValueError(
                    f"linear_attention: {x[-1]} channels are not queries, keys and values of heads of {op.dim}"
                )
            return *x[:-1], x[-1] // 3


def _whole(what: str, value: int | None, *, least: int = 1) -> int:
    """`value`, if it is a whole number from `least` on; True is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} is {value!r}: a whole number from {least} on is needed")
    return value


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
    """Records ops with their shapes resolved. Blocks are functions `(net, x, **options) -> Value` that call it.

    Every method raises ValueError, in words, where the op does not fit what it reads (see `output_shape`).
    """

    def __init__(self, input_shape: Shape):
        self.input = Value(0, input_shape)
        self._ops: list[AnyOp] = []
        self._scope = ""

    def graph(self) -> Graph:
        """What was recorded."""
        return Graph(self.input.shape, tuple(self._ops))

    def under(self, scope: str) -> "Recorder":
        """Records to the same graph, weights named below `scope`: so a block is made of other blocks."""
        inner = copy.copy(self)  # the list of ops is shared
        inner._scope = f"{self._scope}{scope}/"
        return inner

    def _record(self, op: AnyOp, *inputs: Value) -> Value:
        """Adds `op`, reading `inputs`; its shape follows from theirs (see `output_shape`)."""
        shape = output_shape(op, [value.shape for value in inputs])
        self._ops.append(msgspec.structs.replace(op, inputs=tuple(value.number for value in inputs), shape=shape))
        return Value(len(self._ops), shape)

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
        """Convolution to `features` channels; `kernel` is odd."""
        name = self._scope + name
        return self._record(Conv((), (features,), name, kernel=kernel, stride=stride, groups=groups, bias=bias), x)

    def dense(self, x: Value, name: str, features: int, *, bias: bool = True) -> Value:
        """Matrix product over everything in `x`."""
        return self._record(Dense((), (features,), self._scope + name, bias=bias), x)

    def norm(self, x: Value, name: str) -> Value:
        """Batch normalisation."""
        return self._record(Norm((), (), self._scope + name), x)

    def act(self, x: Value, function: Activation) -> Value:
        """Activation by name."""
        return self._record(Act((), (), function), x)

    def pool(self, x: Value, reduce: Literal["mean", "max"] = "mean", *, window: int = 0, stride: int = 1) -> Value:
        """Pooling; window 0 is global, to 1x1."""
        return self._record(Pool((), (), reduce, window, stride), x)

    def add(self, a: Value, b: Value) -> Value:
        """Elementwise sum."""
        return self._record(Add((), ()), a, b)

    def mul(self, a: Value, b: Value) -> Value:
        """Elementwise product; `b` may be 1x1."""
        return self._record(Mul((), ()), a, b)

    def concat(self, *values: Value) -> Value:
        """Channels one after the other."""
        return self._record(Concat((), ()), *values)

    def split(self, x: Value, start: int, stop: int) -> Value:
        """Channels [start, stop)."""
        return self._record(Split((), (stop - start,), start), x)

    def shuffle(self, x: Value, groups: int) -> Value:
        """Channel shuffle."""
        return self._record(Shuffle((), (), groups), x)

    def linear_attention(self, x: Value, dim: int) -> Value:
        """ReLU linear attention with heads of `dim`; `x` has heads * 3 * dim channels, the result heads * dim."""
        return self._record(LinearAttention((), (), dim), x)
