"""Writes networks as ONNX: one walk over the ops, no converter, nothing for a simplifier to find.

Images and activations are NCHW with a symbolic batch size. Int8 models carry QuantizeLinear/DequantizeLinear pairs
around every op (QDQ), weights as s8 and biases as s32 initialisers behind a DequantizeLinear. Each op reads
dequantised values and its result is quantised again, also where numbers are only moved: runtimes look for that shape.
In models of mixed precision only ops in int8 are such.
Attention is one op in this sense: what happens inside it stays in float.

Where weights alone are narrow (`nas.ops.WEIGHT_BITS`) kernels are whole numbers behind a Cast and a Mul by their scale,
which ONNX Runtime computes once, when it loads the file: what runs is the float network. Not behind a DequantizeLinear,
which is computed anew at every call, and keeps convolutions out of the blocked layout that needs constant weights.
Measured with 1.31 on a Zen 5 core, interleaved, four networks of 12 to 18 convolutions with 32 to 192 channels, in int8
and int4, against float32: latency .99 to 1.01 with Cast and Mul, 2.5 to 5.3 with DequantizeLinear. Files are alike: 2.2
and 1.1 of 8.3 MB in the largest network, whose process grew by 41 and 40 MB to run it, by 35 in float32, by 22 and 17
with DequantizeLinear.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nas import kernels, quantise
from nas.errors import DeviceError, ExportError
from nas.fold import fold
from nas.ops import (
    ATTENTION_EPSILON,
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
    Shape,
    Shuffle,
    Split,
)
from nas.quantise import Quantisation, Scale

OPSET, IR_VERSION = 20, 9  # the first opset with Gelu; an IR that runtimes of 2024 read
INT4_OPSET, INT4_IR_VERSION = 21, 10  # the first with numbers of 4 bits, and only for files that have some
INPUT = "images"

_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "hard_swish": ("HardSwish", {}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "sigmoid": ("Sigmoid", {}),
    "gelu": ("Gelu", {"approximate": "none"}),
}


def to_onnx(
    graph: Graph,
    params: Mapping[str, np.ndarray],
    quantisation: Quantisation | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Any:
    """An `onnx.ModelProto` of an unfolded graph; its input is `images`, its output `logits` (`output` if not a vector).

    Args:
        params: name -> array, as `nas.ops.weights(graph)` lists them.
        quantisation: of the folded graph; the model is int8 then, or of mixed precision, if the graph is. Without, it
            is float32 whatever ops say.
        metadata: written into the model's properties.

    Raises:
        ExportError: `quantisation` is of another graph.
        DeviceError: onnx is not installed.
    """
    onnx = _library()
    folded, arrays = fold(graph, params)
    if quantisation is not None:
        quantise.check(folded, quantisation)
    writer = _Writer(onnx, folded, arrays, quantisation)
    output = "logits" if len(folded.shape) == 1 else "output"
    writer.write(output)
    body = onnx.helper.make_graph(
        writer.nodes,
        "network",
        [_value(onnx, INPUT, folded.input)],
        [_value(onnx, output, folded.shape)],
        writer.initialisers,
    )
    int4 = any(i.data_type == onnx.TensorProto.INT4 for i in writer.initialisers)
    opset = onnx.helper.make_opsetid("", INT4_OPSET if int4 else OPSET)
    version = INT4_IR_VERSION if int4 else IR_VERSION
    model = onnx.helper.make_model(body, opset_imports=[opset], ir_version=version, producer_name="nas")
    for key, value in sorted((metadata or {}).items()):
        model.metadata_props.add(key=key, value=value)
    return model


def to_bytes(model: Any) -> bytes:
    """The file of an `onnx.ModelProto`, checked."""
    check(model)
    return model.SerializeToString(deterministic=True)


def load(path: Path) -> Any:
    """The `onnx.ModelProto` in a file.

    Raises:
        ExportError: it is not one.
    """
    try:
        return _library().load(path)
    except Exception as e:  # protobuf's own exceptions
        raise ExportError(f"{path}: not an ONNX file: {e}. Export it again.") from e


def check(model: Any) -> None:
    """ONNX's own full check, shape inference included.

    Raises:
        ExportError: the model does not pass.
    """
    onnx = _library()
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise ExportError(
            f"onnx.checker refuses the model: {e}. This is a fault of the exporter; please report it."
        ) from e


def _pads(size: Shape, kernel: int, stride: int) -> list[int]:
    """SAME padding of an image (height, width, ...) as ONNX has it: top, left, bottom, right."""
    before, after = zip(*(kernels.same_padding(s, kernel, stride) for s in size[:2]), strict=True)
    return [*before, *after]


class _Writer:
    """Nodes and initialisers of one graph."""

    def __init__(self, onnx: Any, graph: Graph, params: Mapping[str, np.ndarray], quantisation: Quantisation | None):
        self.onnx, self.graph, self.params = onnx, graph, params
        self.scales: Sequence[Scale | None] = quantisation.values if quantisation else [None] * (len(graph.ops) + 1)
        self.integer = quantise.integer(graph) if quantisation else [False] * len(graph.ops)
        self.narrow = quantisation is not None  # weights are, where ops say so
        self.nodes: list[Any] = []
        self.initialisers: list[Any] = []
        self.constants: set[str] = set()

    def write(self, output: str) -> None:
        """Everything; the last value is named `output`."""
        values = [self.quantised(INPUT, self.scales[0], INPUT)]
        for number, op in enumerate(self.graph.ops, 1):
            scale = self.scales[op.inputs[0]] if self.integer[number - 1] else None
            y = self.op(op, self.name(number), [values[v] for v in op.inputs], op.inputs[0], scale)
            values.append(self.quantised(y, self.scales[number], self.name(number)))
        if len(values) > 1 and self.nodes[-1].output[0] == values[-1]:
            self.nodes[-1].output[0] = output  # nothing reads the last value
        else:
            self.node("Identity", output, [values[-1]])

    @functools.cached_property
    def names(self) -> list[str]:
        """A readable name for each op: its own, or its kind and number in the scope it was recorded in."""
        out, scope = [], ""
        for number, op in enumerate(self.graph.ops, 1):
            if isinstance(op, Conv | Dense | Norm):
                out.append(op.name)
                scope = op.name.rpartition("/")[0]
            else:
                kind = op.function if isinstance(op, Act) else op.__struct_config__.tag
                out.append(f"{scope}/{kind}_{number}".removeprefix("/"))
        return out

    def name(self, number: int) -> str:
        """Of the op that makes value `number`."""
        return self.names[number - 1]

    def node(self, kind: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds a node with one output of the node's name; returns it."""
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Any) -> str:
        """Adds an initialiser, once; returns its name."""
        if name not in self.constants:
            self.constants.add(name)
            self.initialisers.append(self.onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def quantised(self, x: str, scale: Scale | None, name: str) -> str:
        """`x` through u8 and back."""
        if scale is None:
            return x
        key = f"{scale.scale!r}_{scale.zero_point}"  # values that share a scale share its initialisers
        pair = (
            self.constant(f"scale_{key}", np.float32(scale.scale)),
            self.constant(f"zero_point_{key}", np.uint8(scale.zero_point)),
        )
        y = self.node("QuantizeLinear", f"{name}/quantised", [x, *pair])
        return self.node("DequantizeLinear", f"{name}/dequantised", [y, *pair])

    def weights(self, op: Conv | Dense, scale: Scale | None) -> list[str]:
        """Kernel, output channels first, and bias: names of floats, dequantised ones where the input has a `scale`."""
        if scale is None:
            kernel, bias = self.params[f"{op.name}/kernel"], self.params.get(f"{op.name}/bias")
            narrow = self.narrow and op.precision in WEIGHT_BITS
            out = [self.widened(op) if narrow else self.constant(f"{op.name}/kernel", self.layout(op, kernel))]
            return out if bias is None else [*out, self.constant(f"{op.name}/bias", bias)]
        kernel, bias, unit = quantise.integer_weights(op, self.params, scale.scale)
        out = [self.stored(f"{op.name}/kernel", self.layout(op, kernel).astype(np.int8), unit)]
        return [*out, self.stored(f"{op.name}/bias", bias.astype(np.int32), unit * np.float32(scale.scale))]

    def stored(self, name: str, whole: np.ndarray, scale: np.ndarray) -> str:
        """Whole numbers as an initialiser behind a DequantizeLinear with one scale for each entry of the first axis."""
        inputs = [
            self.constant(f"{name}/quantised", whole),
            self.constant(f"{name}/scale", scale),
            self.constant(f"{name}/zero_point", np.zeros(scale.shape, whole.dtype)),
        ]
        return self.node("DequantizeLinear", name, inputs, axis=0)

    def widened(self, op: Conv | Dense) -> str:
        """A narrow kernel: whole numbers as an initialiser, made real by their scales, one an output channel."""
        kernel, unit = quantise.narrow_weights(op, self.params)
        name, whole = f"{op.name}/kernel", self.layout(op, kernel).astype(np.int8)
        if WEIGHT_BITS[op.precision] == 4:
            self.initialisers.append(self.int4(f"{name}/narrow", whole))
        else:
            self.constant(f"{name}/narrow", whole)
        scale = self.constant(f"{name}/scale", unit.reshape(-1, *[1] * (whole.ndim - 1)))
        real = self.node("Cast", f"{name}/real", [f"{name}/narrow"], to=self.onnx.TensorProto.FLOAT)
        return self.node("Mul", name, [real, scale])

    def int4(self, name: str, whole: np.ndarray) -> Any:
        """An initialiser of numbers within -8..7: two to a byte, the first in its lower half."""
        halves = np.append(whole.ravel(), np.zeros(whole.size % 2, np.int8)).astype(np.uint8) & 15
        packed = halves[::2] | halves[1::2] << 4
        return self.onnx.helper.make_tensor(name, self.onnx.TensorProto.INT4, whole.shape, packed.tobytes(), raw=True)

    def layout(self, op: Conv | Dense, kernel: np.ndarray) -> np.ndarray:
        """HWIO as OIHW; a dense kernel as [out, in] with `in` counted in the order of NCHW."""
        if isinstance(op, Conv):
            return np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        shape = self.graph.shape_of(op.inputs[0])
        if len(shape) == 3:
            kernel = kernel.reshape(*shape, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
        return np.ascontiguousarray(kernel.T)

    def op(self, op: AnyOp, name: str, inputs: list[str], read: int, scale: Scale | None) -> str:
        """The nodes of one op; returns the name of its real-valued result.

        Args:
            read: number of the first value that it reads.
            scale: of that value, if the op is on integers.
        """
        x, size = inputs[0], self.graph.shape_of(read)
        match op:
            case Conv():
                return self.node(
                    "Conv",
                    name,
                    [x, *self.weights(op, scale)],
                    group=op.groups,
                    kernel_shape=[op.kernel] * 2,
                    strides=[op.stride] * 2,
                    pads=_pads(size, op.kernel, op.stride),
                )
            case Dense():
                if len(size) > 1:
                    x = self.quantised(self.node("Flatten", f"{name}/flat", [x]), scale, f"{name}/flat")
                return self.node("Gemm", name, [x, *self.weights(op, scale)], transB=1)
            case Norm():
                rows = [self.constant(f"{name}/{r}", self.params[f"{name}/{r}"]) for r in _NORM_ROLES]
                return self.node("BatchNormalization", name, [x, *rows], epsilon=NORM_EPSILON)
            case Act(function="swish"):
                return self.node("Mul", name, [x, self.node("Sigmoid", f"{name}/sigmoid", [x])])
            case Act(function="relu6"):
                ends = [self.constant(f"clip_{v}", np.float32(v)) for v in (0, 6)]
                return self.node("Clip", name, [x, *ends])
            case Act():
                kind, attributes = _ACTIVATIONS[op.function]
                return self.node(kind, name, [x], **attributes)
            case Pool(window=0, reduce="mean"):
                return self.node("GlobalAveragePool", name, [x])
            case Pool():
                window = list(size[:2]) if op.window == 0 else [op.window] * 2
                pads = [0] * 4 if op.window == 0 else _pads(size, op.window, op.stride)
                place: dict[str, Any] = {"kernel_shape": window, "strides": [op.stride] * 2, "pads": pads}
                if op.reduce == "max":
                    return self.node("MaxPool", name, [x], **place)
                return self.node("AveragePool", name, [x], count_include_pad=0, **place)
            case Add() | Mul():
                return self.node(type(op).__name__, name, inputs)
            case Concat():
                return self.node("Concat", name, inputs, axis=1)
            case Split():
                ends = (op.start, op.start + op.shape[-1])
                bounds = [self.constant(f"channel_{v}", np.array([v], np.int64)) for v in (*ends, 1)]
                return self.node("Slice", name, [x, *bounds])
            case Shuffle():
                height, width, channels = op.shape
                apart = (0, op.groups, channels // op.groups, height, width)  # 0: as it comes, the batch
                for kind, part, extra in (
                    ("Reshape", "apart", [apart]),
                    ("Transpose", "turned", []),
                    ("Reshape", "", [(0, channels, height, width)]),
                ):
                    shape = [self.constant("shape_" + "x".join(map(str, s)), np.array(s, np.int64)) for s in extra]
                    step = f"{name}/{part}" if part else name
                    more = {} if shape else {"perm": [0, 2, 1, 3, 4]}
                    x = self.node(kind, step, [x, *shape], **more)
                    x = self.quantised(x, scale, step) if part else x
                return x
            case LinearAttention():
                return self.attention(op, name, x)

    def attention(self, op: LinearAttention, name: str, x: str) -> str:
        """ReLU linear attention as products of matrices [features, pixels], the layout in which NCHW holds each head.

        Only the keys are turned, since the first product sums over pixels.
        """
        height, width, channels = op.shape

        def node(kind: str, part: str, inputs: Sequence[str], **attributes: Any) -> str:
            return self.node(kind, f"{name}/{part}", inputs, **attributes)

        def shape(*sizes: int) -> str:  # 0: as it comes, the batch
            return self.constant("shape_" + "x".join(map(str, sizes)), np.array(sizes, np.int64))

        heads = node("Reshape", "heads", [x, shape(0, channels // op.dim, 3 * op.dim, height * width)])
        parts = [f"{name}/{part}" for part in ("queries", "keys", "values")]
        self.nodes.append(
            self.onnx.helper.make_node("Split", [heads], parts, name=f"{name}/split", axis=2, num_outputs=3)
        )
        queries, keys = (node("Relu", f"{part}/relu", [f"{name}/{part}"]) for part in ("queries", "keys"))
        last = self.constant("axis_3", np.array([3], np.int64))
        turned = node("Transpose", "keys/turned", [keys], perm=[0, 1, 3, 2])
        context = node("MatMul", "context", [parts[2], turned])  # [values, keys]
        total = node("ReduceSum", "keys/total", [keys, last], keepdims=1)
        total = node("Reshape", "keys/total/row", [total, shape(0, channels // op.dim, 1, op.dim)])
        epsilon = self.constant("attention_epsilon", np.float32(ATTENTION_EPSILON))
        weight = node("Add", "weight/positive", [node("MatMul", "weight", [total, queries]), epsilon])
        mean = node("Div", "mean", [node("MatMul", "weighted", [context, queries]), weight])
        return self.node("Reshape", name, [mean, shape(0, channels, height, width)])


_NORM_ROLES = ("scale", "offset", "mean", "var")


def _value(onnx: Any, name: str, shape: Shape) -> Any:
    """Description of an input or output of the model."""
    sizes = (shape[2], *shape[:2]) if len(shape) == 3 else shape
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *sizes])


def _library() -> Any:
    try:
        import onnx
    except ImportError as e:
        raise DeviceError("onnx is not installed; networks cannot be written as ONNX: pip install onnx") from e
    return onnx
