"""The JAX back-end: computes what a graph says. Images and activations are [batch, height, width, channels]."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nas import config, fusion, kernels, noise
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


@dataclasses.dataclass(frozen=True)
class Noisy:
    """What a pass in training drops at random."""

    rates: config.Noise
    key: Array
    drop_path: Any  # the rate of this graph, which may be traced: deeper blocks drop more


def run(
    graph: Graph,
    params: Arrays,
    x: Any,
    *,
    batch_stats: bool = False,
    norm_images: int | None = None,
    noisy: Noisy | None = None,
    tape: fusion.Tape | None = None,
    gradients: bool = True,
) -> tuple[Array, dict[str, Array]]:
    """What `graph` makes of `x` [n, *graph.input], and the batch-norm statistics it saw.

    Args:
        params: name -> array, as `nas.ops.weights(graph)` lists them; `mean` and `var` only without `batch_stats`.
            Convolutions compute in the type of their kernels and of `x`, norms and `dense` in float32.
        batch_stats: normalise by the moments of this batch (as in training) and return them; otherwise by
            `params`, and return nothing.
        norm_images: take those moments over so many images at a time ("ghost" batch norm, Hoffer et al. 2017,
            arXiv:1705.08741, sec. 4.1); n must be a multiple of it. None: over all n.
        noisy: dropout, drop-path and DropBlock; None: none.
        tape: keeps the results of convolutions, or knows them from an earlier pass over the same; for `batch_stats`
            without `norm_images`.
        gradients: whether any will be taken. They may be either way; but without, the moments that `batch_stats` asks
            for are had from less than what gradients need, so that all would be computed again.
    """
    if norm_images is not None and norm_images >= x.shape[0]:
        norm_images = None
    plan = fusion.plan(graph)
    kernels_of = (array for name, array in params.items() if name.endswith("/kernel"))
    if norm_images is not None or len(x) == 0 or not kernels.fuses(x, *kernels_of):
        plan = fusion.Plan(plan.normed)
    left = plan.inner if len(x) >= fusion.CHAIN_IMAGES else frozenset()  # convolutions, to what comes after them
    if not batch_stats:
        left, closing = left | plan.last, plan.closing
    elif gradients or tape is not None:
        left, closing = frozenset(), frozenset()
    else:  # the moments of a 1x1 convolution do not need it
        left, closing = (left & plan.expansions) | plan.widenings, plan.widened
    if noisy is not None:
        left, closing = left - plan.last, frozenset()
    ends = plan.ends & closing
    convolved = plan.fused if tape is None else plan.normed
    values: list[Any] = [x]
    moments: dict[str, Array] = {}
    shortcut: Any = None
    for index, op in enumerate(graph.ops):
        inputs: list[Any] = [values[v] for v in op.inputs]
        if noisy is not None:
            inputs = _dropped(op, inputs, noisy, index)
        if isinstance(op, Norm):
            lazy = index in plan.lazy or index in closing
            y, seen = _norm(op, params, inputs[0], batch_stats, norm_images, lazy=lazy)
            moments |= seen
        elif isinstance(op, Act) and (index in plan.lazy or index in closing):
            y = dataclasses.replace(inputs[0], activation=op.function)
        elif isinstance(op, Conv) and index in convolved:
            kernel, fused = params[f"{op.name}/kernel"], index in plan.fused
            if index in left:
                y = fusion.link(inputs[0], kernel, op, measures=batch_stats)
            else:
                y = fusion.conv(inputs[0], kernel, op, fused=fused, measures=batch_stats, tape=tape)
        elif isinstance(op, Add) and index in closing:
            y, shortcut = inputs if isinstance(inputs[0], fusion.Normed) else reversed(inputs)
        else:
            y = compute(op, params, inputs)
        if index in ends and isinstance(y, fusion.Normed):
            y = fusion.close(y, shortcut)
            shortcut = None
        values.append(y)
    y = values[-1]
    if noisy is not None and noisy.rates.drop_block and y.ndim == 4:
        y = noise.drop_block(
            jax.random.fold_in(noisy.key, len(graph.ops)), y, noisy.rates.drop_block, noisy.rates.drop_block_size
        )
    return y, moments


def _dropped(op: AnyOp, inputs: list[Array], noisy: Noisy, index: int) -> list[Array]:
    """The inputs of an op after noise: a residual branch (the second term of a sum), or the features of a `dense`."""
    key = jax.random.fold_in(noisy.key, index)
    if isinstance(op, Add) and noisy.rates.drop_path:
        return [inputs[0], noise.drop_path(key, inputs[1], noisy.drop_path)]
    if isinstance(op, Dense) and noisy.rates.dropout:
        return [noise.dropout(key, inputs[0], noisy.rates.dropout)]
    return inputs


def compute(op: AnyOp, params: Arrays, inputs: list[Array]) -> Array:
    """One op other than a norm."""
    x = inputs[0]
    match op:
        case Conv():
            y = kernels.conv(x, params[f"{op.name}/kernel"], stride=op.stride, groups=op.groups)
            return y + params[f"{op.name}/bias"].astype(y.dtype) if op.bias else y
        case Dense():
            kernel = params[f"{op.name}/kernel"]
            y = x.reshape(x.shape[0], -1).astype(kernel.dtype) @ kernel
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
        case LinearAttention():
            return linear_attention(x, op.dim)
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


def linear_attention(qkv: Array, dim: int) -> Array:
    """What `nas.ops.LinearAttention` says, of `qkv` [n, h, w, heads * 3 * dim]: [n, h, w, heads * dim].

    Computed in float32 (or wider), whatever the type of `qkv`: sums over all pixels leave the range of float16.
    """
    n, height, width, channels = qkv.shape
    wide = qkv.astype(jnp.promote_types(qkv.dtype, jnp.float32))
    pixels = wide.reshape(n, height * width, channels // (3 * dim), 3, dim)
    q, k, v = pixels.transpose(3, 0, 2, 1, 4)  # each [n, heads, pixels, dim], as matmuls want it
    q, k = jax.nn.relu(q), jax.nn.relu(k)
    weight = q @ k.sum(2)[..., None]
    y = q @ (k.swapaxes(2, 3) @ v) / (weight + ATTENTION_EPSILON)
    return y.swapaxes(1, 2).reshape(n, height, width, -1).astype(qkv.dtype)


def _norm(
    op: Norm,
    params: Arrays,
    x: Array | fusion.Convolved,
    batch_stats: bool,
    norm_images: int | None,
    *,
    lazy: bool,
) -> tuple[Array | fusion.Normed, dict[str, Array]]:
    seen = {}
    if not batch_stats:
        mean, var = params[f"{op.name}/mean"], params[f"{op.name}/var"]
    elif isinstance(x, fusion.Convolved):
        mean, var = x.moments
        seen = {f"{op.name}/mean": mean, f"{op.name}/var": var}
    elif norm_images is None:
        mean, var = kernels.batch_moments(x)
        seen = {f"{op.name}/mean": mean, f"{op.name}/var": var}
    else:
        groups = x.reshape(-1, norm_images, *x.shape[1:])
        means, variances = jax.vmap(kernels.batch_moments)(groups)  # [groups, channels]
        seen = {f"{op.name}/mean": means.mean(0), f"{op.name}/var": variances.mean(0)}
        each = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
        mean, var = (jnp.repeat(a, norm_images, axis=0).reshape(each) for a in (means, variances))
        scale = params[f"{op.name}/scale"] * lax.rsqrt(var + NORM_EPSILON)
        return (x * scale + (params[f"{op.name}/offset"] - mean * scale)).astype(x.dtype), seen
    scale, offset = params[f"{op.name}/scale"] * lax.rsqrt(var + NORM_EPSILON), params[f"{op.name}/offset"]
    if lazy:
        values = x.values if isinstance(x, fusion.Convolved) else x.reshape(len(x), -1)
        return fusion.Normed(values, op.shape, mean, scale, offset), seen
    return kernels.normalise(x.array if isinstance(x, fusion.Convolved) else x, mean, scale, offset), seen
