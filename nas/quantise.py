"""Post-training quantisation, simulated in JAX: int8 as ONNX Runtime's integer kernels compute it, and narrow weights.

Activations are u8 with one scale and zero point a value; kernels s8, symmetric, one scale an output channel; biases
s32 with the product of the two scales (Jacob et al. 2018, arXiv:1712.05877, sec. 2). Everything here is about *folded*
graphs (`nas.fold.fold`): quantise what is deployed. Of a graph that is mixed (`nas.ops.Graph.mixed`) the ops in int8
are integer, and the others read and make real numbers; of any other graph all are integer. Ops whose weights alone are
narrow (`nas.ops.WEIGHT_BITS`) are float ones with rounded kernels (`narrowed`): s8 or s4, symmetric, one scale an
output channel; their biases stay float32.

`simulate` holds an activation as its u8 numbers in float32. Every step that rounds takes its value from the exact
integer computation and its gradient from the computation without rounding, so `jax.grad` through `simulate` is
quantisation-aware training with a straight-through estimator (Bengio et al. 2013, arXiv:1308.3432), and what it trains
is what is deployed. The part without rounding is dead code, and removed by `jax.jit`, where no gradient is taken.

How exact: sums of products are integers below 2**24, which float32 holds; longer sums are cut into such. The rest
follows the order of operations of ONNX Runtime's x86-64 kernels. Two things keep XLA from changing that order:
`_divide`, since it multiplies by the reciprocal of a broadcast divisor, and a clip between product and sum where the
kernel has no fused multiply-add, since it would make one. Attention is computed in float32 between u8 numbers, by the
runtime too; its sums are ordered otherwise there, so one of its results in a million rounds to the neighbouring number.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import Array, lax

from nas import kernels
from nas.errors import ExportError
from nas.ops import (
    NORM_EPSILON,
    WEIGHT_BITS,
    Act,
    Add,
    AnyOp,
    Concat,
    Conv,
    Dense,
    Graph,
    LinearAttention,
    Mul,
    Norm,
    Pool,
    Shuffle,
    Split,
)
from nas.run import ACTIVATIONS, compute

Arrays = Mapping[str, Any]

_EXACT_TERMS = 2**24 // (255 * 127)  # so many products of a u8 difference and an s8 add up exactly in float32
_LARGEST = np.finfo(np.float32).max
_BIAS_LIMIT = 2.0**30  # of an integer bias: half of an s32, the rest is for the sum it is added to


class Scale(msgspec.Struct, frozen=True, array_like=True):
    """Number q in 0..255 stands for (q - zero_point) * scale."""

    scale: float  # a float32
    zero_point: int

    @classmethod
    def of(cls, low: float, high: float, *, at_most: float = math.inf) -> "Scale":
        """The finest scale that covers [low, high] and 0, in which 255 stands for no more than `at_most`."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = np.float32((high - low) / 255)
        if scale < np.finfo(np.float32).tiny:
            scale = np.float32(1 / 255)  # nothing but zeros was seen
        while scale * np.float32(255) > at_most:
            scale = np.nextafter(scale, np.float32(0))
        return cls(float(scale), int(np.clip(np.rint(-low / float(scale)), 0, 255)))


class Quantisation(msgspec.Struct, frozen=True):
    """The scale of each value of a folded graph; None: the value is not quantised itself (see `sources`)."""

    values: tuple[Scale | None, ...]


def has_integers(graph: Graph, precision: str) -> bool:
    """Whether a file of `graph` in `precision` holds integers: int8 wholly, mixed where `graph` is, if only in weights.

    Such a file comes with a `Quantisation`; where weights alone are narrow, no value of it has a scale.
    """
    return precision == "int8" or (precision == "mixed" and graph.mixed)


def has_narrow(graph: Graph) -> bool:
    """Whether some weights of `graph` alone are narrow."""
    return any(op.precision in WEIGHT_BITS for op in graph.ops)


def integer(graph: Graph) -> list[bool]:
    """For each op, whether it is computed on integers."""
    return [op.precision == "int8" or not graph.mixed for op in graph.ops]


def sources(graph: Graph) -> list[int | None]:
    """For each value of a folded graph, the value whose scale it has: its own number, or another's, or None.

    Not quantised are logits, what only a ReLU reads, since runtimes fuse the two, and what no integer op makes or
    reads. Values that are only moved or selected (split, shuffle, maximum) keep the scale of what they were made from.
    """
    out: list[int | None] = []
    readers, whole = graph.consumers(), integer(graph)
    for number in range(len(graph.ops) + 1):
        op = graph.ops[number - 1] if number else None
        made, read = whole[number - 1] if number else not graph.mixed, [whole[r] for r in readers[number]]
        read_by = [graph.ops[r] for r in readers[number]]
        fused = isinstance(op, Conv | Dense | Add) and len(read_by) == 1 and _rectifies(read_by[0]) and made == read[0]
        if fused or (isinstance(op, Dense) and not read_by) or not (made or any(read)):
            out.append(None)
        elif made and (isinstance(op, Split | Shuffle) or (isinstance(op, Pool) and op.reduce == "max")):
            out.append(out[op.inputs[0]])
        else:
            out.append(number)
    return out


def placeholder(graph: Graph, *, distinct: bool = False) -> Quantisation:
    """Plausible scales without any data, for measuring latency: activations within [-4, 4], after ReLU [0, 4].

    With `distinct` each value's scale is its own, as calibration makes them: a file then has as many constants.
    """

    def range_of(v: int) -> tuple[float, float]:
        end = 4.0 + v / 1024 * distinct
        return (0.0 if _rectifies(graph.ops[v - 1] if v else None) else -end, end)

    return _quantisation(graph, range_of)


def check(graph: Graph, quantisation: Quantisation) -> None:
    """Nothing, if `quantisation` belongs to the folded `graph`.

    Raises:
        ExportError: it does not.
    """
    wanted = sources(graph)
    got = quantisation.values
    fits = len(got) == len(wanted) and all(
        (scale is None) == (source is None) and (source is None or scale == got[source])
        for scale, source in zip(got, wanted, strict=True)
    )
    if not fits:
        raise ExportError(
            f"the quantisation has {len(got)} values, and which of them have a scale does not fit this graph of "
            f"{len(wanted)}. Calibrate the folded form of the very graph that is exported."
        )
    for op, scale in zip(graph.ops, got[1:], strict=True):
        if not _rectifies(op) or scale is None:
            continue
        if scale.zero_point or np.float32(scale.scale) * np.float32(255) > _limit(op):
            raise ExportError(
                f"the scale of a {op.function} is {scale}, which covers more than [0, {_limit(op)}]; "
                f"calibrate the graph again."
            )


def calibrate(graph: Graph, params: Arrays, images: np.ndarray, *, batch_size: int = 64) -> Quantisation:
    """Scales from the ranges that float activations take on training `images` [n, height, width, channels].

    A range is from the smallest to the largest value seen. Percentiles were measured and are not worth a setting: over
    three networks on digits the error of the logits was 2.6-3.0 % of their deviation with the whole range, 2.4-3.2 %
    with the percentile 99.999 of a batch, 3.6-4.0 % with 99.99, and 11-13 % with 99.9.

    Raises:
        ExportError: there are no images, or an activation is not finite.
    """
    if not len(images):
        raise ExportError("calibration got no images; give it some hundred of the training images.")

    params = narrowed(graph, params)
    ranges = jax.jit(lambda batch: observe(graph, params, batch)[1])

    # The last batch reaches back to be as large as the others: nothing is compiled twice, and a range is the same.
    starts = [max(0, min(i, len(images) - batch_size)) for i in range(0, len(images), batch_size)]
    seen = np.stack([ranges(images[i : i + batch_size]) for i in starts])  # [batches, values, 2]
    if not np.isfinite(seen).all():
        raise ExportError("an activation is not finite on the calibration images; the network cannot be quantised.")
    low, high = seen[..., 0].min(0), seen[..., 1].max(0)
    return _quantisation(graph, lambda v: (float(low[v]), float(high[v])))


def observe(graph: Graph, params: Arrays, x: Array) -> tuple[Array, Array]:
    """What the float network makes of `x`, and the ends of each value's range [values, 2]; `graph` is folded."""
    values = _activations(graph, params, x)
    return values[-1], jnp.stack([jnp.stack([v.min(), v.max()]) for v in values])


def fake_quantise(graph: Graph, params: Arrays, ranges: Array, x: Array) -> Array:
    """What the int8 network makes of `x`, by `ranges` [values, 2] as `observe` gives them: `simulate` in real numbers.

    Everything but `graph`, which is not mixed, may be traced, so that one program serves many networks. Weights and
    values are rounded as in `simulate`, sums and functions are computed in float32 between them: a value that comes
    near the middle between two numbers may be rounded to the other one.
    """
    scales = [None if v is None else _scale(ranges[v]) for v in sources(graph)]

    def held(y: Array, scale: tuple[Array, Array] | None) -> Array:
        if scale is None:
            return y
        unit, zero_point = scale
        return (jnp.clip(jnp.round(y / unit) + zero_point, 0, 255) - zero_point) * unit

    values = [held(x, scales[0])]
    for op, scale in zip(graph.ops, scales[1:], strict=True):
        inputs = [values[v] for v in op.inputs]
        if isinstance(op, Conv | Dense):
            read = scales[op.inputs[0]]
            assert read is not None  # only logits, and what a ReLU reads, have none
            kernel, bias, unit = integer_weights(op, params, read[0])
            whole = {f"{op.name}/kernel": kernel * unit, f"{op.name}/bias": bias * (read[0] * unit)}
            y = compute(op, whole, inputs)
        else:
            y = _float(op, params, inputs)
        values.append(held(y, scale))
    return values[-1]


def simulate(graph: Graph, params: Arrays, quantisation: Quantisation, images: Array) -> Array:
    """What the int8 network makes of images [n, height, width, channels]: logits [n, classes], or [n, h, w, c].

    Differentiable in `params` and `images`. Under `jax.jit` make `graph` and `quantisation` static; both are hashable.

    Raises:
        ExportError: `quantisation` is of another graph.
    """
    check(graph, quantisation)
    params = narrowed(graph, params)
    held = _held(graph, quantisation)
    first, last = held[0], held[-1]
    values = [images if first is None else _quantise(images, first)]
    with jax.default_matmul_precision("highest"):  # sums in bfloat16 or TF32 would not be exact
        for op, scale, whole in zip(graph.ops, held[1:], integer(graph), strict=True):
            inputs = [values[v] for v in op.inputs]
            if whole:
                read = [s for v in op.inputs if (s := held[v]) is not None]  # all have one: `check` saw that
                values.append(_step(op, params, inputs, read, scale))
                continue
            real = [x if (s := held[v]) is None else _dequantise(x, s) for x, v in zip(inputs, op.inputs, strict=True)]
            y = _float(op, params, real)
            values.append(y if scale is None else _quantise(y, scale))
    return values[-1] if last is None else _dequantise(values[-1], last)


def narrowed(graph: Graph, params: Arrays) -> Arrays:
    """`params` with narrow kernels (`nas.ops.WEIGHT_BITS`) rounded to what their file's integers stand for.

    The product of a whole number and its scale, rounded once to float32, in the file as here. The integers are the same
    whether norms are folded or not, since a channel's scale grows with its weights, so that norms can be trained and
    measured with them; but for a weight in the middle between two, which another last bit may round otherwise.
    """
    rounded = {}
    for op in graph.ops:
        if isinstance(op, Conv | Dense) and op.precision in WEIGHT_BITS:
            kernel, unit = narrow_weights(op, params)
            rounded[f"{op.name}/kernel"] = kernel * unit
    return {**params, **rounded}


def narrow_weights(op: Conv | Dense, params: Arrays) -> tuple[Any, Any]:
    """Kernel of an op with narrow weights as whole numbers in float32, in its shape, and its scale [channels].

    The numbers are within -127..127 in 8 bits and -7..7 in 4, the channel's largest weight at an end. NumPy and JAX as
    in `integer_weights`. Scales of least squared error were tried and gain nothing: 30 subnets of `digits_joint` (10
    epochs) with both stages in 4 bits had 7.0 of 288 images less right than in float32, and 7.1 with these; .7 once the
    moments of norms are measured with the narrow weights.
    """
    kernel = params[f"{op.name}/kernel"]
    xp, divide, whole, fixed = _arithmetic(kernel)
    most = np.float32(2 ** (WEIGHT_BITS[op.precision] - 1) - 1)
    unit = divide(xp.abs(kernel).max(tuple(range(kernel.ndim - 1))), most)
    unit = fixed(xp.where(unit > 0, unit, np.float32(1)))
    return whole(divide(kernel, unit)), unit


def integer_weights(op: Conv | Dense, params: Arrays, scale: Any) -> tuple[Any, Any, Any]:
    """Kernel and bias as whole numbers in float32, in the shapes of the float ones, and the kernel's scale [channels].

    The kernel is within -127..127. Its scale is that of the channel's largest weight, unless the bias in units of
    `scale` (the input's) times that would not fit into an s32: then the weights hardly matter, and get a coarser one.
    NumPy arrays give NumPy arrays, equal to the last bit to what JAX arrays give.
    """
    kernel = params[f"{op.name}/kernel"]
    bias = params[f"{op.name}/bias"] if op.bias else np.zeros(kernel.shape[-1:], np.float32)
    xp, divide, whole, fixed = _arithmetic(kernel, bias)
    largest = xp.abs(kernel).max(tuple(range(kernel.ndim - 1)))
    unit = xp.maximum(divide(largest, np.float32(127)), divide(xp.abs(bias), xp.float32(scale * _BIAS_LIMIT)))
    unit = fixed(xp.where(unit > 0, unit, np.float32(1)))
    return whole(divide(kernel, unit)), whole(divide(bias, xp.float32(scale) * unit)), unit


# rules


def _arithmetic(*arrays: Any) -> tuple[Any, ...]:
    """What computes with such arrays, divides them, rounds them, and takes a result as given where gradients pass."""
    in_numpy = all(isinstance(array, np.ndarray) for array in arrays)
    return (np, np.divide, np.rint, lambda x: x) if in_numpy else (jnp, _divide, _round, lax.stop_gradient)


def _quantisation(graph: Graph, range_of: Callable[[int], tuple[float, float]]) -> Quantisation:
    """Scales that cover the (low, high) that `range_of` gives for a value."""

    def scale(v: int) -> Scale:
        return Scale.of(*range_of(v), at_most=_limit(graph.ops[v - 1]) if v else math.inf)

    return Quantisation(tuple(None if v is None else scale(v) for v in sources(graph)))


def _scale(ends: Array) -> tuple[Array, Array]:
    """Scale and zero point that cover a range [2], as `Scale.of` has them, of what may be traced."""
    low, high = jnp.minimum(ends[0], 0), jnp.maximum(ends[1], 0)
    scale = (high - low) / 255
    scale = jnp.where(scale < np.finfo(np.float32).tiny, 1 / 255, scale)
    return scale, jnp.clip(jnp.round(-low / scale), 0, 255)


def _rectifies(op: AnyOp | None) -> TypeGuard[Act]:
    """Whether `op` is a ReLU or ReLU6, whose clipping is left to that of the u8."""
    return isinstance(op, Act) and op.function in ("relu", "relu6")


def _limit(op: AnyOp) -> float:
    """What 255 may at most stand for."""
    return 6.0 if isinstance(op, Act) and op.function == "relu6" else math.inf


def _held(graph: Graph, quantisation: Quantisation) -> list[Scale | None]:
    """The scale in which `simulate` holds each value: before a fused ReLU that of the ReLU."""
    readers, whole = graph.consumers(), integer(graph)
    return [
        quantisation.values[readers[v][0] + 1] if scale is None and readers[v] and v and whole[v - 1] else scale
        for v, scale in enumerate(quantisation.values)
    ]


def _activations(graph: Graph, params: Arrays, x: Array) -> list[Array]:
    """Every value of the float network."""
    values = [x]
    for op in graph.ops:
        values.append(_float(op, params, [values[v] for v in op.inputs]))
    return values


def _float(op: AnyOp, params: Arrays, inputs: list[Array]) -> Array:
    return _norm(op, params, inputs[0]) if isinstance(op, Norm) else compute(op, params, inputs)


# steps: numbers in, numbers out


def _step(op: AnyOp, params: Arrays, inputs: list[Array], scales: Sequence[Scale], y: Scale | None) -> Array:
    """One op on u8 numbers that stand for reals by `scales`; the result by `y`, or real if that is None."""
    q, x = inputs[0], scales[0]
    match op:
        case Conv() | Dense():
            kernel, bias, unit = integer_weights(op, params, x.scale)
            total = _accumulate(op, q - x.zero_point, kernel) + bias
            unit = np.float32(x.scale) * unit
            return total * unit if y is None else _requantise(total, _divide(unit, y.scale), y)
        case Split() | Shuffle() | Pool(reduce="max"):
            return compute(op, params, inputs)
    assert y is not None
    match op:
        case Act():
            return _look_up(op.function, q, x, y)
        case Concat():
            parts = [_look_up("identity", q, x, y) for q, x in zip(inputs, scales, strict=True)]
            return jnp.concatenate(parts, -1)
        case Add():
            return _add(q, inputs[1], x, scales[1], y)
        case Mul():
            return _mul(q, inputs[1], x, scales[1], y)
        case Pool(window=0):
            count = math.prod(q.shape[1:3])
            total = q.sum((1, 2), keepdims=True) - count * x.zero_point
            return _requantise(total, np.float32(x.scale) / (np.float32(y.scale) * np.float32(count)), y)
        case Pool():
            return _mean(op, _dequantise(q, x), y)
        case Norm():
            return _quantise(_norm(op, params, _dequantise(q, x)), y)
        case LinearAttention():
            return _quantise(compute(op, params, [_dequantise(q, x)]), y)


def _accumulate(op: Conv | Dense, q: Array, kernel: Array) -> Array:
    """The exact sums of products of whole numbers, rounded once to float32."""

    def product(q: Array, kernel: Array) -> Array:
        if isinstance(op, Dense):
            return q @ kernel
        return kernels.conv(q, kernel, stride=op.stride, groups=op.groups)

    q = q.reshape(q.shape[0], -1) if isinstance(op, Dense) else q
    window = math.prod(kernel.shape[:-2])
    depth, step = kernel.shape[-2], max(1, _EXACT_TERMS // window)
    whole = product(q, kernel)
    if depth <= step:
        return whole
    groups = op.groups if isinstance(op, Conv) else 1
    grouped = q.reshape(*q.shape[:-1], groups, depth)
    total = jnp.int32(0)
    for start in range(0, depth, step):
        part = grouped[..., start : start + step].reshape(*q.shape[:-1], -1)
        total = total + product(part, kernel[..., start : start + step, :]).astype(jnp.int32)
    return _straight_through(total.astype(jnp.float32), whole)


def _requantise(total: Array, multiplier: Any, y: Scale) -> Array:
    """MlasRequantizeOutput: clip, round half to even, then add the zero point."""
    return _round(jnp.clip(total * multiplier, -y.zero_point, 255 - y.zero_point)) + y.zero_point


def _quantise(real: Array, y: Scale) -> Array:
    """MlasQuantizeLinear."""
    return _requantise(_divide(real, y.scale), 1.0, y)


def _dequantise(q: Array, x: Scale) -> Array:
    return (q - x.zero_point) * np.float32(x.scale)


def _look_up(function: str, q: Array, x: Scale, y: Scale) -> Array:
    """A pointwise function of a u8 is a table of 256, made here as ONNX Runtime makes or computes it."""
    real = (np.arange(256) - x.zero_point).astype(np.float32) * np.float32(x.scale)
    quotient = _POINTWISE[function](real).astype(np.float32) / np.float32(y.scale)
    table = np.rint(np.clip(quotient, -y.zero_point, 255 - y.zero_point)) + y.zero_point
    smooth = _dequantise(q, x) if function == "identity" else ACTIVATIONS[function](_dequantise(q, x))
    exact = q if (table == np.arange(256)).all() else jnp.asarray(table, jnp.float32)[q.astype(jnp.uint8)]
    return _straight_through(exact, jnp.clip(smooth / np.float32(y.scale) + y.zero_point, 0, 255))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _add(a: Array, b: Array, sa: Scale, sb: Scale, y: Scale) -> Array:
    """MlasQLinearAdd for AVX2: fused multiply-adds, which XLA makes of this as well; zero points in one constant.

    Compiled by itself, since it would not otherwise be fused where the caller is not.
    """
    ra, rb = np.float32(sa.scale) / np.float32(y.scale), np.float32(sb.scale) / np.float32(y.scale)
    zero_points = float(ra) * sa.zero_point + float(rb * np.float32(sb.zero_point))  # float64: a fused multiply-add
    fixed = np.float32(y.zero_point) - np.float32(zero_points)
    return _round(jnp.clip((fixed + b * rb) + a * ra, 0, 255))


def _mul(a: Array, b: Array, sa: Scale, sb: Scale, y: Scale) -> Array:
    """MlasQLinearMul: no fused multiply-add, and the zero point is added before rounding."""
    ratio = np.float32(sa.scale) * np.float32(sb.scale) / np.float32(y.scale)
    product = jnp.clip((a - sa.zero_point) * (b - sb.zero_point) * ratio, -1 - y.zero_point, 256 - y.zero_point)
    return _round(jnp.clip(product + y.zero_point, 0, 255))


def _mean(op: Pool, real: Array, y: Scale) -> Array:
    """QLinearAveragePool: a window's reals are added one after the other, the zero point before rounding."""
    (height, width, _), s = op.shape, op.stride
    pads = [(0, 0), *(kernels.same_padding(size, op.window, s) for size in real.shape[1:3]), (0, 0)]

    def taps(padded: Any) -> list[Any]:
        rows, columns = (height - 1) * s + 1, (width - 1) * s + 1
        offsets = itertools.product(range(op.window), repeat=2)
        return [padded[:, i : i + rows : s, j : j + columns : s] for i, j in offsets]

    total = functools.reduce(operator.add, taps(jnp.pad(jnp.maximum(real, -_LARGEST), pads)))
    count = sum(taps(np.pad(np.ones((1, *real.shape[1:3], 1), np.float32), pads)))
    mean = lax.optimization_barrier(_divide(total, count))  # or XLA divides once, by the product of the divisors
    return _round(jnp.clip(_divide(mean, y.scale) + y.zero_point, 0, 255))


def _norm(op: Norm, params: Arrays, x: Array) -> Array:
    scale = params[f"{op.name}/scale"] / jnp.sqrt(params[f"{op.name}/var"] + NORM_EPSILON)
    return x * scale + (params[f"{op.name}/offset"] - params[f"{op.name}/mean"] * scale)


def _divide(x: Array, y: Any) -> Array:
    """IEEE division of float32. XLA multiplies by the reciprocal where it sees that `y` is constant or broadcast."""
    return x / lax.optimization_barrier(jnp.broadcast_to(jnp.asarray(y, jnp.float32), x.shape))


@jax.custom_jvp
def _straight_through(exact: Array, smooth: Array) -> Array:
    """The value of `exact`, the gradient of `smooth`."""
    return exact


@_straight_through.defjvp
def _(primals, tangents):
    return primals[0], tangents[1]


def _round(x: Array) -> Array:
    """To whole numbers, half to even; the gradient passes as if it were not there."""
    return _straight_through(jnp.round(x), x)


def _hard_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.clip(x * np.float32(1 / 6) + np.float32(0.5), 0, 1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


_POINTWISE = {  # in the form ONNX Runtime computes them, which in the last bit differs from the JAX back-end's
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": lambda x: x * _hard_sigmoid(x),
    "sigmoid": _sigmoid,
    "swish": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}
