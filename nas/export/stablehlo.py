"""Networks as StableHLO, through `jax.export`: a folded graph with its weights inside, batch size free.

What `nas.run` computes, without what it does for training on CPU alone: the C++ kernels, which no other program has.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export, lax

from nas import kernels
from nas.fold import fold
from nas.ops import NORM_EPSILON, AnyOp, Conv, Graph, Norm
from nas.run import compute

_TYPES = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}


def to_exported(
    graph: Graph,
    params: Mapping[str, np.ndarray],
    *,
    precision: str = "float32",
    platform: str = "cpu",
    batch: int | None = None,
    written_out: bool = False,
) -> export.Exported:
    """The unfolded `graph` as a function of float32 images [batch, height, width, channels]; its result is float32.

    Args:
        params: name -> array, as `nas.ops.weights(graph)` lists them.
        precision: of weights and activations. float32 is float32 everywhere, without TF32 on GPUs; attention, and on
            accelerators the sums of products, are in float32 whatever the precision.
        platform: cpu, cuda, rocm or tpu: what may run it.
        batch: a fixed batch size; None: any.
        written_out: on CPU, convolutions as matmuls and shifted slices, which XLA's compiler needs there to be quick
            (`nas.kernels`); otherwise each is one op of StableHLO.
    """
    folded, arrays = fold(graph, params)
    kind = _TYPES[precision]
    weights = {name: jnp.asarray(array, kind) for name, array in arrays.items()}

    def network(images: Array) -> Array:
        values = [images.astype(kind)]
        with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
            for op in folded.ops:
                values.append(_op(op, weights, [values[v] for v in op.inputs], written_out))
        return values[-1].astype(jnp.float32)

    (size,) = export.symbolic_shape("batch") if batch is None else (batch,)
    images = jax.ShapeDtypeStruct((size, *graph.input), jnp.float32)
    with _without_tracebacks():
        return export.export(jax.jit(network), platforms=[platform])(images)


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keeps the lines of Python that lead here out of the program, so that equal networks give equal bytes."""
    before = jax.config.read("jax_traceback_in_locations_limit")
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def _op(op: AnyOp, weights: Mapping[str, Any], inputs: list[Array], written_out: bool) -> Array:
    x = inputs[0]
    if isinstance(op, Norm):
        scale, offset, mean, var = (weights[f"{op.name}/{role}"] for role in ("scale", "offset", "mean", "var"))
        return (x - mean) * (scale * lax.rsqrt(var + NORM_EPSILON)) + offset
    if not isinstance(op, Conv):
        return compute(op, weights, inputs)
    kernel = weights[f"{op.name}/kernel"]
    if written_out:
        y = kernels.conv(x, kernel, stride=op.stride, groups=op.groups, portable=True)
    else:
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x, kernel, [op.stride] * 2, "SAME", dimension_numbers=numbers, feature_group_count=op.groups
        )
    return y + weights[f"{op.name}/bias"] if op.bias else y
