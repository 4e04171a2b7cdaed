"""Number formats that convolutions compute in, over float32 master weights, and loss scaling for float16.

The parameters stay float32; the step casts what it computes with, inside the loss, so that gradients arrive in float32
(Micikevicius et al. 2018, arXiv:1710.03740, sec. 3.1). In outline:

    def loss(params, ...):
        y = apply(compute_params(params, dtype), images.astype(dtype))    # logits are float32
        return scaled(cross_entropy(y, labels), state)

    gradients = unscale(jax.grad(loss)(params, ...), state)
    finite = all_finite(gradients)
    params, optimiser_state = keep_if(finite, (new_params, new_optimiser_state), (params, optimiser_state))
    state = adjust(state, finite)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from nas import config
from nas.errors import ConfigError

Tree = TypeVar("Tree")
ScaleState = dict[str, Array]  # scale: float32, a power of two; good_steps: int32, finite steps since it last changed

INITIAL_SCALE = 2.0**15
SMALLEST_SCALE, LARGEST_SCALE = 1.0, 2.0**24
GROWTH_STEPS = 2000  # finite steps after which the scale is doubled


@dataclasses.dataclass(frozen=True)
class Precision:
    """What convolutions compute in, and whether its gradients underflow unless the loss is scaled."""

    dtype: Any
    scaled: bool


PRECISIONS: dict[str, Precision] = {
    "float32": Precision(jnp.float32, scaled=False),
    "bfloat16": Precision(jnp.bfloat16, scaled=False),  # has float32's range
    "float16": Precision(jnp.float16, scaled=True),
}


def named(name: str) -> Precision:
    """The precision `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"unknown precision `{name}`.{config.nearest(name, PRECISIONS, kind='precision')}")
    return PRECISIONS[name]


def compute_params(params: Mapping[str, Array], dtype: Any) -> dict[str, Array]:
    """`params`, kernels and biases of convolutions in `dtype`. Norms and dense layers, the logits, stay float32.

    The bias of a convolution goes with its kernel: a float32 bias would turn the activations after it to float32.
    """
    convolutions = {_scope(name) for name, p in params.items() if name.endswith("/kernel") and p.ndim == 4}
    return {name: p.astype(dtype) if _scope(name) in convolutions else p for name, p in params.items()}


def _scope(name: str) -> str:
    return name.rpartition("/")[0]


def initial_scale() -> ScaleState:
    """The state of dynamic loss scaling before the first step."""
    return {"scale": jnp.float32(INITIAL_SCALE), "good_steps": jnp.int32(0)}


def scaled(loss: Array, state: ScaleState) -> Array:
    """`loss` in float32 times the scale, which lifts small gradients into float16's range (sec. 3.2)."""
    return loss.astype(jnp.float32) * state["scale"]


def unscale(gradients: Tree, state: ScaleState) -> Tree:
    """Gradients of a scaled loss, in float32 and divided by the scale. To be done before clipping and decay."""
    return jax.tree.map(lambda g: g.astype(jnp.float32) / state["scale"], gradients)


def all_finite(tree: Any) -> Array:
    """Whether no array of `tree` has an infinity or NaN: bool []."""
    return jnp.all(jnp.asarray([jnp.isfinite(a).all() for a in jax.tree.leaves(tree)], bool))


def adjust(state: ScaleState, finite: Array) -> ScaleState:
    """The state after a step: half the scale after an overflow, twice after `GROWTH_STEPS` finite steps in a row."""
    good = state["good_steps"] + 1
    grown = good == GROWTH_STEPS
    scale = jnp.where(finite, jnp.where(grown, state["scale"] * 2, state["scale"]), state["scale"] / 2)
    return {
        "scale": jnp.clip(scale, SMALLEST_SCALE, LARGEST_SCALE),
        "good_steps": jnp.where(finite & ~grown, good, 0),
    }


def skipped(state: ScaleState, finite: Array) -> Array:
    """Whether a step under this scale is passed over and may go well with half of it: bool [].

    An overflow at the smallest scale is none that a smaller one could cure.
    """
    return ~finite & (state["scale"] > SMALLEST_SCALE)


def keep_if(finite: Array, new: Tree, old: Tree) -> Tree:
    """`new` after a finite step; otherwise `old`, to the bit: a step that overflowed is skipped."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
