"""What a graph costs on paper: MACs, parameters, peak activation bytes."""

import functools
import math

import msgspec

from nas.ops import Act, Add, AnyOp, Conv, Dense, Graph, Held, LinearAttention, Norm, Split, activations, weights

_HELD_BYTES: dict[Held, int] = {"float32": 4, "int8": 1}  # of one element


@functools.lru_cache(maxsize=65536)
def macs(graph: Graph) -> int:
    """Multiply-accumulates of all ops, see `op_macs`."""
    return sum(op_macs(graph, op) for op in graph.ops)


def op_macs(graph: Graph, op: AnyOp) -> int:
    """Multiply-accumulates of one op of `graph`: convolution, dense layer or attention, biases not counted.

    Attention has two products, of `dim` by `dim` for each pixel and head, and the sum of the weights beside each.
    """
    if isinstance(op, Conv):
        return math.prod(op.shape) * op.kernel**2 * graph.shape_of(op.inputs[0])[-1] // op.groups
    if isinstance(op, Dense):
        return math.prod(graph.shape_of(op.inputs[0])) * op.shape[-1]
    if isinstance(op, LinearAttention):
        return 2 * math.prod(op.shape) * (op.dim + 1)
    return 0


@functools.lru_cache(maxsize=65536)
def parameters(graph: Graph) -> int:
    """Trained parameters: kernels, biases, norm scales and offsets."""
    return sum(math.prod(w.shape) for w in weights(graph) if w.trained)


@functools.lru_cache(maxsize=65536)
def working_bytes(graph: Graph, *, count_input: bool) -> int:
    """Largest sum of live values while the ops of a block run, as `peak_activation_bytes` has them.

    The largest of all blocks of a chain, and the chain's input beside it, is that of the whole network, wherever no
    block begins with what its predecessor's last op does at once (a norm, or a ReLU, that alone reads the input).

    Args:
        count_input: the block's input, while it is still read. Of the first block it is the chain's input.
    """
    return max(_live(_with_conversions(graph), count_input=count_input), default=0)


@functools.lru_cache(maxsize=65536)
def peak_activation_bytes(graph: Graph) -> int:
    """Largest sum of live values while the ops run in order, for one image, as a runtime plans memory for inference.

    A value takes four bytes an element, or one where an int8 op makes it. Where an op of the other kind reads it there
    are two copies while it is converted, and then those that are still read. The input is float32 and stays, since
    whoever runs the network owns it. A norm folded into the layer that it reads, and a ReLU that alone reads a layer or
    a sum, have no value of their own; nothing else is done in place. What kernels need for themselves (im2col of large
    dense convolutions) is not counted.
    """
    beside = max(_live(_with_conversions(graph), count_input=False), default=0)
    return _HELD_BYTES["float32"] * math.prod(graph.input) + beside


def _with_conversions(graph: Graph) -> Graph:
    """`graph` with a copy, which is a `Split` of all channels, of each value that ops of another precision read."""
    held = _held(graph)
    ops: list[AnyOp] = []
    number, copies = [0], dict[int, int]()
    for op, wanted in zip(graph.ops, held[1:], strict=True):
        for v in op.inputs:
            if held[v] != wanted and v not in copies:
                ops.append(Split((number[v],), graph.shape_of(v), 0, precision=wanted))
                copies[v] = len(ops)
        inputs = tuple(number[v] if held[v] == wanted else copies[v] for v in op.inputs)
        ops.append(msgspec.structs.replace(op, inputs=inputs))
        number.append(len(ops))
    return Graph(graph.input, tuple(ops), graph.reads)


def _held(graph: Graph) -> list[Held]:
    """What each value is made in."""
    return [graph.source, *(activations(op.precision) for op in graph.ops)]


def _live(graph: Graph, *, count_input: bool) -> list[int]:
    """Bytes that live while each op runs."""
    readers = graph.consumers()
    holder = list(range(len(graph.ops) + 1))  # the value in whose memory each value lies
    for index, op in enumerate(graph.ops):
        source = op.inputs[0]
        before = graph.ops[source - 1] if source else None
        within = isinstance(op, Norm) or (isinstance(op, Act) and op.function in ("relu", "relu6"))
        while within and isinstance(before, Norm) and holder[before.inputs[0]] == holder[source]:
            before = graph.ops[before.inputs[0] - 1]
        layers = (Conv, Dense) if isinstance(op, Norm) else (Conv, Dense, Add)
        if within and isinstance(before, layers) and len(readers[source]) == 1:
            holder[index + 1] = holder[source]
    last_use = [0] * len(holder)
    for value, users in enumerate(readers):
        last_use[holder[value]] = max(last_use[holder[value]], *users, len(graph.ops) if not users else 0)
    sizes = [_HELD_BYTES[of] * math.prod(graph.shape_of(v)) for v, of in enumerate(_held(graph))]
    live = [{v for v in holder[: index + 2] if last_use[v] >= index} for index in range(len(graph.ops))]
    return [sum(sizes[v] for v in values if v or count_input) for values in live]
