"""Inference form of a graph: batch normalisation folded into the layer before it."""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from nas.ops import NORM_EPSILON, AnyOp, Conv, Dense, Graph, Norm, weights

Arrays = dict[str, Any]


def fold(graph: Graph, params: Mapping[str, Any], *, xp: Any = np) -> tuple[Graph, Arrays]:
    """`graph` and `params` with every foldable norm gone, values renumbered; what they compute stays the same.

    A norm folds into the conv or dense layer it reads when nothing else reads that layer; any other norm stays.

    Args:
        params: name -> array, as `nas.ops.weights(graph)` lists them; others are left out of the result.
        xp: what computes; `jax.numpy` takes arrays that are traced, and has no float64.

    Returns:
        The folded graph, and float32 arrays as `nas.ops.weights` lists them for it. NumPy's arithmetic is float64.
    """
    readers = graph.consumers()
    out: Arrays = {w.name: xp.asarray(params[w.name], float) for w in weights(graph)}
    ops: list[AnyOp] = []
    number = {0: 0}  # value of `graph` -> value of the folded graph
    for index, op in enumerate(graph.ops):
        source = op.inputs[0]
        before = graph.ops[source - 1] if source else None
        if isinstance(op, Norm) and isinstance(before, Conv | Dense) and len(readers[source]) == 1:
            scale, offset = _affine(op, out)
            kernel, bias = f"{before.name}/kernel", f"{before.name}/bias"
            out[kernel] = out[kernel] * scale  # output channels are the last axis of every kernel, grouped or not
            out[bias] = out.get(bias, 0.0) * scale + offset
            ops[number[source] - 1] = msgspec.structs.replace(ops[number[source] - 1], bias=True)
            number[index + 1] = number[source]
        else:
            ops.append(msgspec.structs.replace(op, inputs=tuple(number[v] for v in op.inputs)))
            number[index + 1] = len(ops)
    folded = Graph(graph.input, tuple(ops))
    return folded, {w.name: out[w.name].astype(np.float32) for w in weights(folded)}


def _affine(op: Norm, params: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """The norm as x * scale + offset, each [channels]."""
    scale = params[f"{op.name}/scale"] / (params[f"{op.name}/var"] + NORM_EPSILON) ** 0.5
    return scale, params[f"{op.name}/offset"] - params[f"{op.name}/mean"] * scale
