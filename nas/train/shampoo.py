"""Shampoo: a matrix on each side of the gradient that evens out its scale in every direction.

Gupta et al. 2018, arXiv:1802.09568, algorithm 1, with what Anil et al. 2020, arXiv:2002.09018, add to train networks:
roots that are renewed every few steps, sides that are too large left as they are, and the length of the step grafted
from another optimiser (Agarwal et al. 2020, arXiv:2002.11803), here from SGD: a learning rate and schedule that suit
SGD suit Shampoo.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

Factors = dict[str, Array]  # of one parameter: "rows" and "columns" [side, side], or "entries" [size]

_product = functools.partial(jnp.matmul, precision="highest")  # accelerators drop digits that small eigenvalues need


class ShampooState(NamedTuple):
    """Arrays only. Each tree has the structure of the parameters, with `Factors` for leaves."""

    count: Array  # int32: updates so far
    statistics: Any  # moving averages of G G' ("rows"), G' G ("columns") or G * G ("entries")
    roots: Any  # inverse roots of the statistics, as of the last renewal


def scale_by_shampoo(
    *, every: int = 10, largest_side: int = 1024, decay: float = 0.999, epsilon: float = 1e-6
) -> optax.GradientTransformation:
    """Turns a gradient G into L^(-1/4) G R^(-1/4), of the length that G has.

    Every array of two or more axes is a matrix [product of the others, last axis]: a convolution kernel
    [kh, kw, cin, cout] is [kh * kw * cin, cout]. A side longer than `largest_side` gets no factor (nor does a side of
    1, which has no direction), and the other then has exponent -1/2. What has no factor at all, vectors above all, is
    divided by the root of its mean squares entry by entry, as in Adagrad.

    The first `every` - 1 steps are those of SGD: the statistics of fewer gradients say nothing about most directions,
    which the inverse root would blow up. Statistics are float32 and decay, where Gupta et al. sum; their scale cancels
    in the grafting.

    Args:
        every: steps between two renewals of the roots, the costly part: an `eigh` for each factor.
        largest_side: longest side that gets a factor. Memory is 2 * side^2, and time for a root side^3: 5, 27 and
            180 ms on a CPU core for sides of 256, 512 and 1,024.
        decay: of the statistics' moving averages.
        epsilon: added to the eigenvalues, as a share of the largest.
    """

    def init(params: Any) -> ShampooState:
        identities = jax.tree.map(lambda p: _identities(p, largest_side), params)
        return ShampooState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, identities), identities)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ShampooState]:
        del params
        count = state.count + 1
        statistics = jax.tree.map(lambda g, s: _averaged(g, s, decay), updates, state.statistics)

        def renewed() -> Any:
            return jax.tree.map(lambda _, s: _inverse_roots(s, epsilon), updates, statistics)

        roots = lax.cond(count % every == 0, renewed, lambda: state.roots)
        return jax.tree.map(_preconditioned, updates, roots), ShampooState(count, statistics, roots)

    return optax.GradientTransformation(init, update)


def _identities(p: Array, largest_side: int) -> Factors:
    """The factors of `p` that leave a gradient as it is."""
    sides = {"rows": math.prod(p.shape[:-1]), "columns": p.shape[-1]} if p.ndim > 1 else {}
    factors = {name: jnp.eye(side, dtype=jnp.float32) for name, side in sides.items() if 1 < side <= largest_side}
    return factors or {"entries": jnp.ones(p.size, jnp.float32)}


def _matrix(g: Array) -> Array:
    """`g` [..., columns] as float32 [rows, columns]; a scalar as [1, 1]."""
    return g.astype(jnp.float32).reshape(-1, g.shape[-1] if g.ndim else 1)


def _averaged(g: Array, statistics: Factors, decay: float) -> Factors:
    m = _matrix(g)
    products = {
        "rows": lambda: _product(m, m.T),
        "columns": lambda: _product(m.T, m),
        "entries": lambda: m.ravel() ** 2,
    }
    return {name: decay * old + (1 - decay) * products[name]() for name, old in statistics.items()}


def _inverse_roots(statistics: Factors, epsilon: float) -> Factors:
    """Each factor to the power -1 / (2 * number of factors), after division by its largest eigenvalue."""
    power = -1 / (2 * len(statistics))

    def root(values: Array) -> Array:
        largest = values.max()
        # Rounding makes the smallest eigenvalues negative; a parameter that no gradient has reached has all 0.
        return (jnp.maximum(values, 0) / jnp.where(largest > 0, largest, 1) + epsilon) ** power

    def inverse_root(factor: Array) -> Array:
        if factor.ndim == 1:
            return root(factor)
        values, vectors = jnp.linalg.eigh(factor)
        return _product(vectors * root(values), vectors.T)

    return {name: inverse_root(factor) for name, factor in statistics.items()}


def _preconditioned(g: Array, roots: Factors) -> Array:
    """`g` times its roots, with the length of `g`."""
    m = d = _matrix(g)
    if "rows" in roots:
        d = _product(roots["rows"], d)
    if "columns" in roots:
        d = _product(d, roots["columns"])
    if "entries" in roots:
        d = d * roots["entries"].reshape(d.shape)
    length = jnp.linalg.norm(d)
    grafted = d * (jnp.linalg.norm(m) / jnp.where(length > 0, length, 1))
    return grafted.reshape(g.shape).astype(g.dtype)
