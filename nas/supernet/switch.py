"""How XLA runs one of several branches at the cost of that branch.

Static shapes are what every supernet under XLA stumbles on. `lax.switch` picks a branch by a traced number, and each
branch is sliced statically, so a small subnet really costs less. Differentiated as it stands, though, `switch` keeps
the residuals of all branches (measured: 2-6 times slower, 10 times the memory). Hence a custom VJP whose residuals are
only the branch number, the weights and the input; the backward pass switches once more, over the branches' VJPs.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nas.ops import Block, Shape, Weight, weights
from nas.run import run
from nas.space import Position
from nas.supernet.sharing import share, unshare

Arrays = Mapping[str, Array]
Mode = Literal["train", "calibrate", "infer"]  # what norms use: the batch, the batch and report it, `params`
Step = Callable[[Array, Arrays, Array], tuple[Array, dict[str, Array]]]


def elastic(position: Position, stored: Mapping[str, Weight], mode: Mode) -> Step:
    """A function (branch number, weights by name below the position, x) -> (y, statistics by name).

    `x` and `y` have the position's widest shapes; channels that a narrower subnet lacks are zero.
    """
    forwards = [_branch(position, block, stored, mode) for block in position.branches]
    if len(forwards) == 1:
        return lambda branch, params, x: forwards[0](params, x)

    @jax.custom_vjp
    def step(branch: Array, params: Arrays, x: Array) -> tuple[Array, dict[str, Array]]:
        return lax.switch(branch, forwards, params, x)

    def forward(branch: Array, params: Arrays, x: Array):
        return step(branch, params, x), (branch, params, x)

    def backward(saved, cotangents):
        branch, params, x = saved

        def pull(f, params: Arrays, x: Array, cotangents):
            return jax.vjp(f, params, x)[1](cotangents)

        pulls = [lambda *a, f=f: pull(f, *a) for f in forwards]
        return (np.zeros(branch.shape, jax.dtypes.float0), *lax.switch(branch, pulls, params, x, cotangents))

    step.defvjp(forward, backward)
    return step


def _branch(position: Position, block: Block | None, stored: Mapping[str, Weight], mode: Mode):
    """(weights, x) -> (y, statistics) of one branch."""
    statistics = {n: w.shape for n, w in stored.items() if not w.trained} if mode == "calibrate" else {}

    def forward(params: Arrays, x: Array) -> tuple[Array, dict[str, Array]]:
        seen: dict[str, Array] = {}
        if block is None:
            y = x
        else:
            scope = block.name.removeprefix(position.name + "/")
            names = {w.name: w.shape for w in weights(block.graph)}
            mine = {n: share(params[f"{scope}/{n}"], s) for n, s in names.items() if f"{scope}/{n}" in params}
            y, moments = run(block.graph, mine, x[..., : block.graph.input[-1]], batch_stats=mode != "infer")
            seen = {f"{scope}/{n}": unshare(a, statistics[f"{scope}/{n}"]) for n, a in moments.items() if statistics}
        rest = {n: jnp.zeros(shape, jnp.float32) for n, shape in statistics.items() if n not in seen}
        return _widen(y, position.output), seen | rest

    return forward


def _widen(y: Array, shape: Shape) -> Array:
    """`y` with zero channels up to `shape`."""
    missing = shape[-1] - y.shape[-1]
    return jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, missing)]) if missing else y
