"""Writes networks as TensorFlow Lite flatbuffers for LiteRT: one walk over the ops, no converter.

Images and activations keep the layout of `nas.run`, [batch, height, width, channels]; SAME padding is the format's own.
The batch size is free: the file says 1, and a resized input resizes everything. A ReLU that alone reads a convolution,
a dense layer or a sum is part of that op, as in files of TensorFlow's converter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nas.errors import DeviceError
from nas.fold import fold
from nas.ops import (
    ATTENTION_EPSILON,
    NORM_EPSILON,
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

INPUT = "images"
_IDENTIFIER = b"TFL3"
_VERSION = 3  # of the schema
_FUSED = {"relu": "RELU", "relu6": "RELU6"}
_ACTIVATIONS = {
    "relu": "RELU",
    "relu6": "RELU6",
    "hard_swish": "HARD_SWISH",
    "sigmoid": "LOGISTIC",
    "gelu": "GELU",  # the exact one, unless its options say otherwise
}


def to_bytes(graph: Graph, params: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """The float32 file of an unfolded graph; its input is `images`, its output `logits` (`output` if not a vector).

    Args:
        params: name -> array, as `nas.ops.weights(graph)` lists them.
        metadata: written as the model's metadata, each value a buffer of UTF-8.

    Raises:
        DeviceError: ai-edge-litert, which has the format's schema, is not installed.
    """
    schema, flatbuffers = _libraries()
    folded, arrays = fold(graph, params)
    writer = _Writer(schema, folded, arrays)
    writer.write()
    model = schema.ModelT(
        version=_VERSION,
        description="nas",
        operatorCodes=writer.codes,
        subgraphs=[writer.subgraph()],
        buffers=writer.buffers,
        metadata=[
            schema.MetadataT(name=key, buffer=writer.buffer(np.frombuffer(value.encode(), np.uint8)))
            for key, value in sorted((metadata or {}).items())
        ],
    )
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output())


class _Writer:
    """Tensors, operators and buffers of one graph. A tensor is known by its index."""

    def __init__(self, schema: Any, graph: Graph, params: Mapping[str, np.ndarray]):
        self.schema, self.graph, self.params = schema, graph, params
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: list[Any] = []
        self.buffers: list[Any] = [schema.BufferT()]  # the first one stands for "no data"
        self.constants: dict[tuple[str, bytes, Shape], int] = {}
        self.code_of: dict[int, int] = {}
        self.ends: tuple[int, int] = (0, 0)

    def write(self) -> None:
        """Everything."""
        fused = _fused(self.graph)
        values = [self.value(INPUT, self.graph.input)]
        for number, op in enumerate(self.graph.ops, 1):
            if number - 1 in fused.values():
                values.append(values[op.inputs[0]])  # computed by what it reads
                continue
            reader = self.graph.ops[fused[number - 1]] if number - 1 in fused else None
            clip = _FUSED[reader.function] if isinstance(reader, Act) else "NONE"
            values.append(self.op(op, f"value_{number}", [values[v] for v in op.inputs], clip))
        if values[-1] == values[0]:
            values.append(self.reshape(values[0], "copy", self.graph.shape))
        self.tensors[values[-1]].name = "logits" if len(self.graph.shape) == 1 else "output"
        self.ends = values[0], values[-1]

    def subgraph(self) -> Any:
        """The only one of the model."""
        return self.schema.SubGraphT(
            name="main",
            tensors=self.tensors,
            inputs=[self.ends[0]],
            outputs=[self.ends[1]],
            operators=self.operators,
        )

    def buffer(self, data: np.ndarray) -> int:
        """Adds a buffer; returns its index."""
        self.buffers.append(self.schema.BufferT(data=np.frombuffer(data.tobytes(), np.uint8)))
        return len(self.buffers) - 1

    def tensor(self, **fields: Any) -> int:
        """Adds a tensor; returns its index."""
        self.tensors.append(self.schema.TensorT(**fields))
        return len(self.tensors) - 1

    def value(self, name: str, shape: Shape) -> int:
        """Adds the tensor of an activation; `shape` is without batch."""
        return self.tensor(
            name=name, type=self.schema.TensorType.FLOAT32, shape=[1, *shape], shapeSignature=[-1, *shape]
        )

    def constant(self, data: Any, dtype: type = np.float32) -> int:
        """The tensor that holds `data`; equal constants are one."""
        array = np.ascontiguousarray(data, dtype)
        key = (np.dtype(dtype).str, array.tobytes(), array.shape)
        if key not in self.constants:
            kind = {np.float32: "FLOAT32", np.int32: "INT32"}[dtype]
            self.constants[key] = self.tensor(
                name=f"constant_{len(self.constants)}",
                type=getattr(self.schema.TensorType, kind),
                shape=list(array.shape),
                buffer=self.buffer(array),
            )
        return self.constants[key]

    def node(self, kind: str, name: str, inputs: Sequence[int], shape: Shape, options: Any = None) -> int:
        """Adds an operator with one output, of `shape` without batch; returns the output's index."""
        code = getattr(self.schema.BuiltinOperator, kind)
        if code not in self.code_of:
            self.code_of[code] = len(self.codes)
            # Old readers know the first field only, which is a byte.
            old = min(code, self.schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
            self.codes.append(self.schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=old, version=1))
        y = self.value(name, shape)
        operator = self.schema.OperatorT(opcodeIndex=self.code_of[code], inputs=list(inputs), outputs=[y])
        if options is not None:
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
            operator.builtinOptions = options
        self.operators.append(operator)
        return y

    def op(self, op: AnyOp, name: str, inputs: list[int], clip: str) -> int:
        """The operators of one op and of the clip that follows it; returns its result."""
        schema, x, shape = self.schema, inputs[0], op.shape
        clipped = {"fusedActivationFunction": getattr(schema.ActivationFunctionType, clip)}
        size = self.graph.shape_of(op.inputs[0])
        match op:
            case Conv():
                return self.conv(op, name, x, clipped)
            case Dense():
                kernel = self.constant(self.params[f"{op.name}/kernel"].T)
                return self.node(
                    "FULLY_CONNECTED", name, [x, kernel, self.bias(op)], shape, schema.FullyConnectedOptionsT(**clipped)
                )
            case Norm():
                scale, offset, mean, var = (self.params[f"{op.name}/{r}"] for r in ("scale", "offset", "mean", "var"))
                factor = scale / np.sqrt(var + np.float32(NORM_EPSILON))
                y = self.node("MUL", f"{name}/scaled", [x, self.constant(factor)], shape, schema.MulOptionsT())
                return self.node("ADD", name, [y, self.constant(offset - mean * factor)], shape, schema.AddOptionsT())
            case Act(function="swish"):
                gate = self.node("LOGISTIC", f"{name}/sigmoid", [x], shape)
                return self.node("MUL", name, [x, gate], shape, schema.MulOptionsT())
            case Act(function="hard_sigmoid"):
                relu6 = schema.AddOptionsT(fusedActivationFunction=schema.ActivationFunctionType.RELU6)
                y = self.node("ADD", f"{name}/relu6", [x, self.constant(3.0)], shape, relu6)
                return self.node("MUL", name, [y, self.constant(1 / 6)], shape, schema.MulOptionsT())
            case Act():
                options = {"hard_swish": schema.HardSwishOptionsT, "gelu": schema.GeluOptionsT}.get(op.function)
                return self.node(_ACTIVATIONS[op.function], name, [x], shape, options() if options else None)
            case Pool(window=0):
                kind = "MEAN" if op.reduce == "mean" else "REDUCE_MAX"
                return self.node(kind, name, [x, self.constant([1, 2], np.int32)], shape, schema.ReducerOptionsT(True))
            case Pool():
                kind = "AVERAGE_POOL_2D" if op.reduce == "mean" else "MAX_POOL_2D"
                place = {
                    "filterHeight": op.window,
                    "filterWidth": op.window,
                    "strideH": op.stride,
                    "strideW": op.stride,
                }
                return self.node(kind, name, [x], shape, schema.Pool2DOptionsT(padding=schema.Padding.SAME, **place))
            case Add():
                return self.node("ADD", name, inputs, shape, schema.AddOptionsT(**clipped))
            case Mul():
                return self.node("MUL", name, inputs, shape, schema.MulOptionsT())
            case Concat():
                return self.node("CONCATENATION", name, inputs, shape, schema.ConcatenationOptionsT(axis=len(shape)))
            case Split():
                return self.slice(x, name, size, op.start, shape[-1])
            case Shuffle():
                apart = (*shape[:-1], op.groups, shape[-1] // op.groups)
                turned = (*apart[:-2], apart[-1], apart[-2])
                x = self.reshape(x, f"{name}/apart", apart)
                order = [*range(len(apart) - 1), len(apart), len(apart) - 1]
                return self.reshape(self.transpose(x, f"{name}/turned", turned, order), name, shape)
            case LinearAttention():
                return self.attention(op, name, x)

    def conv(self, op: Conv, name: str, x: int, clipped: Mapping[str, int]) -> int:
        """A convolution, depthwise where every channel is a group; other groups are told by the kernel's shape."""
        schema, kernel = self.schema, self.params[f"{op.name}/kernel"]  # [h, w, in / groups, out]
        place = {"padding": schema.Padding.SAME, "strideH": op.stride, "strideW": op.stride, **clipped}
        channels = self.graph.shape_of(op.inputs[0])[-1]
        if op.groups == channels and op.groups > 1:
            weights = self.constant(kernel.reshape(1, op.kernel, op.kernel, -1))
            options = schema.DepthwiseConv2DOptionsT(depthMultiplier=op.shape[-1] // channels, **place)
            return self.node("DEPTHWISE_CONV_2D", name, [x, weights, self.bias(op)], op.shape, options)
        weights = self.constant(kernel.transpose(3, 0, 1, 2))
        return self.node("CONV_2D", name, [x, weights, self.bias(op)], op.shape, schema.Conv2DOptionsT(**place))

    def bias(self, op: Conv | Dense) -> int:
        """Of a layer; zeros where it has none, since not every kernel can do without."""
        return self.constant(self.params[f"{op.name}/bias"] if op.bias else np.zeros(op.shape[-1:]))

    def reshape(self, x: int, name: str, shape: Shape) -> int:
        """`x` in another shape, without batch."""
        options = self.schema.ReshapeOptionsT(newShape=[-1, *shape])
        return self.node("RESHAPE", name, [x, self.constant([-1, *shape], np.int32)], shape, options)

    def transpose(self, x: int, name: str, shape: Shape, order: Sequence[int]) -> int:
        """`x` with its axes, batch included, in another order; `shape` is what comes out."""
        return self.node("TRANSPOSE", name, [x, self.constant(order, np.int32)], shape, self.schema.TransposeOptionsT())

    def slice(self, x: int, name: str, shape: Shape, start: int, size: int) -> int:
        """Entries [start, start + size) of the last axis of `x`, which has `shape`."""
        begin = self.constant([*[0] * len(shape), start], np.int32)
        sizes = self.constant([-1, *shape[:-1], size], np.int32)
        return self.node("SLICE", name, [x, begin, sizes], (*shape[:-1], size), self.schema.SliceOptionsT())

    def attention(self, op: LinearAttention, name: str, x: int) -> int:
        """ReLU linear attention as batched products of matrices [pixels, features], a matrix for each head."""
        schema, (height, width, channels), dim = self.schema, op.shape, op.dim
        heads, pixels = channels // dim, height * width

        def part(index: int, kind: str) -> int:
            shape = (heads, pixels, 3 * dim)
            return self.slice(turned, f"{name}/{kind}", shape, index * dim, dim)

        def product(kind: str, a: int, b: int, shape: Shape, **turns: bool) -> int:
            return self.node("BATCH_MATMUL", f"{name}/{kind}", [a, b], shape, schema.BatchMatMulOptionsT(**turns))

        apart = self.reshape(x, f"{name}/heads", (pixels, heads, 3 * dim))
        turned = self.transpose(apart, f"{name}/heads/turned", (heads, pixels, 3 * dim), [0, 2, 1, 3])
        queries, keys = (
            self.node("RELU", f"{name}/{kind}/relu", [part(index, kind)], (heads, pixels, dim))
            for index, kind in enumerate(("queries", "keys"))
        )
        context = product("context", keys, part(2, "values"), (heads, dim, dim), adjX=True)
        pixel_axis = self.constant([2], np.int32)
        total = self.node(
            "SUM", f"{name}/keys/total", [keys, pixel_axis], (heads, 1, dim), schema.ReducerOptionsT(True)
        )
        weight = product("weight", queries, total, (heads, pixels, 1), adjY=True)
        positive = [weight, self.constant(ATTENTION_EPSILON)]
        weight = self.node("ADD", f"{name}/weight/positive", positive, (heads, pixels, 1), schema.AddOptionsT())
        weighted = product("weighted", queries, context, (heads, pixels, dim))
        mean = self.node("DIV", f"{name}/mean", [weighted, weight], (heads, pixels, dim), schema.DivOptionsT())
        back = self.transpose(mean, f"{name}/mean/turned", (pixels, heads, dim), [0, 2, 1, 3])
        return self.reshape(back, name, op.shape)


def _fused(graph: Graph) -> dict[int, int]:
    """Index of a convolution, dense layer or sum -> that of the ReLU or ReLU6 that alone reads it."""
    out = {}
    for index, readers in enumerate(graph.consumers()[1:]):
        reader = graph.ops[readers[0]] if len(readers) == 1 else None
        if isinstance(graph.ops[index], Conv | Dense | Add) and isinstance(reader, Act) and reader.function in _FUSED:
            out[index] = readers[0]
    return out


def _libraries() -> tuple[Any, Any]:
    """The format's schema, and what it is written with."""
    try:
        import flatbuffers
        from ai_edge_litert import schema_py_generated
    except ImportError as e:
        raise DeviceError(
            "ai-edge-litert is not installed; networks cannot be written as .tflite: pip install ai-edge-litert"
        ) from e
    return schema_py_generated, flatbuffers
