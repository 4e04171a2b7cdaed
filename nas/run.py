"""The JAX back-end: computes what a graph says. Images and activations are [batch, height, width, channels]."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nas import kernels
from nas.ops import (
    NORM_EPSILON,
    Act,
    Add,
    AnyOp,
    Concat,
    Conv,
    Dense,
    Graph,
    Mul,
    Norm,
    Pool,
    Shuffle,
    Split,
)

Arrays = Mapping[str, Any]  # of JAX or NumPy

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "hard_swish": jax.nn.hard_swish,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "swish": jax.nn.swish,
    "sigmoid": jax.nn.sigmoid,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def run(graph: Graph, params: Arrays, x: Any, *, batch_stats: bool = False) -> tuple[Array, dict[str, Array]]:
    """What `graph` makes of `x` [n, *graph.input], and the batch-norm statistics it saw.

    Args:
        params: name -> array, as `nas.ops.weights(graph)` lists them; `mean` and `var` only without `batch_stats`.
        batch_stats: normalise by the moments of this batch (as in training) and return them; otherwise by
            `params`, and return nothing.
    """
    values = [x]
    moments: dict[str, Array] = {}
    for op in graph.ops:
        if isinstance(op, Norm):
            y, seen = _norm(op, params, values[op.inputs[0]], batch_stats)
            moments |= seen
        else:
            y = compute(op, params, [values[v] for v in op.inputs])
        values.append(y)
    return values[-1], moments


def compute(op: AnyOp, params: Arrays, inputs: list[Array]) -> Array:
    """One op other than a norm."""
    x = inputs[0]
    match op:
        case Conv():
            y = kernels.conv(x, params[f"{op.name}/kernel"], stride=op.stride, groups=op.groups)
            return y + params[f"{op.name}/bias"] if op.bias else y
        case Dense():
            y = x.reshape(x.shape[0], -1) @ params[f"{op.name}/kernel"]
            return y + params[f"{op.name}/bias"] if op.bias else y
        case Act():
            return ACTIVATIONS[op.function](x)
        case Pool():
            return pool(x, op)
        case Add():
            return x + inputs[1]
        case Mul():
            return x * inputs[1]
        case Concat():
            return jnp.concatenate(inputs, -1)
        case Split():
            return x[..., op.start : op.start + op.shape[-1]]
        case Shuffle():
            return kernels.shuffle(x, op.groups)
        case _:
            raise TypeError(f"the JAX back-end has no op {type(op).__name__}")


def pool(x: Array, op: Pool) -> Array:
    """Mean or maximum over windows, SAME; padding does not count in a mean."""
    if op.window == 0:
        return (jnp.mean if op.reduce == "mean" else jnp.max)(x, axis=(1, 2), keepdims=True)
    window, stride = (1, op.window, op.window, 1), (1, op.stride, op.stride, 1)
    if op.reduce == "max":
        return lax.reduce_window(x, -jnp.inf, lax.max, window, stride, "SAME")
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    sums, counts = (lax.reduce_window(v, 0.0, lax.add, window, stride, "SAME") for v in (x, ones))
    return sums / counts


def _norm(op: Norm, params: Arrays, x: Array, batch_stats: bool) -> tuple[Array, dict[str, Array]]:
    if batch_stats:
        mean, var = kernels.batch_moments(x)
        seen = {f"{op.name}/mean": mean, f"{op.name}/var": var}
    else:
        mean, var, seen = params[f"{op.name}/mean"], params[f"{op.name}/var"], {}
    scale = params[f"{op.name}/scale"] * lax.rsqrt(var + NORM_EPSILON)
    return (x * scale + (params[f"{op.name}/offset"] - mean * scale)).astype(x.dtype), seen
