"""What a graph costs on paper: MACs, parameters, peak activation bytes."""

import functools
import math

from nas.ops import Conv, Dense, Graph, LinearAttention, weights


@functools.lru_cache(maxsize=65536)
def macs(graph: Graph) -> int:
    """Multiply-accumulates of convolutions, dense layers and attention, biases not counted.

    Attention has two products, of `dim` by `dim` for each pixel and head, and the sum of the weights beside each.
    """
    total = 0
    for op in graph.ops:
        if isinstance(op, Conv):
            total += math.prod(op.shape) * op.kernel**2 * graph.shape_of(op.inputs[0])[-1] // op.groups
        elif isinstance(op, Dense):
            total += math.prod(graph.shape_of(op.inputs[0])) * op.shape[-1]
        elif isinstance(op, LinearAttention):
            total += 2 * math.prod(op.shape) * (op.dim + 1)
    return total


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
