"""What a graph costs on paper: MACs, parameters, peak activation bytes."""

import functools
import math

from nas.ops import AnyOp, Conv, Dense, Graph, LinearAttention, weights


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
def peak_activation_bytes(graph: Graph, *, bytes_per_element: int = 4) -> int:
    """Largest sum of live values while the ops run in order, input and output included, nothing done in place."""
    last_use = [max(users, default=len(graph.ops)) for users in graph.consumers()]
    peak = 0
    for index in range(len(graph.ops)):
        live = [v for v in range(index + 2) if last_use[v] >= index]
        peak = max(peak, sum(math.prod(graph.shape_of(v)) for v in live))
    return peak * bytes_per_element
