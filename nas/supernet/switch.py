"""How XLA runs one of several branches at the cost of that branch.

Static shapes are what every supernet under XLA stumbles on. `lax.switch` picks a branch by a traced number, and each
branch is sliced statically, so a small subnet really costs less. Differentiated as it stands, though, `switch` keeps
the residuals of all branches (measured: 2-6 times slower, 10 times the memory). Hence a custom VJP whose residuals are
the branch number, the weights and the input, and a tape (`nas.fusion.Tape`): what the branch's convolutions made, in
room for the largest branch. The backward pass switches once more, over the branches' VJPs, which read the tape. Without
one they compute the branch again, a fifth of a step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nas import config
from nas.fusion import Tape
from nas.ops import Block, Precision, Shape, Weight, in_precision, weights
from nas.quantise import narrowed
from nas.run import Noisy, run
from nas.space import Position
from nas.supernet.sharing import unshare, weight_of

Arrays = Mapping[str, Array]
Mode = Literal["train", "calibrate", "infer"]  # what norms use: the batch, the batch and report it, `params`
Chance = tuple[Array, Array]  # what a noisy pass adds to the inputs of a position: raw key, drop-path rate
NO_NOISE = config.Noise()
Step = Callable[[Array, Chance, Arrays, Array], tuple[Array, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Manner:
    """How a pass is computed; static, so each manner is compiled on its own."""

    mode: Mode = "train"
    norm_images: int | None = None  # see nas.run.run
    noise: config.Noise = NO_NOISE
    tapes: bool = False  # see `elastic`
    weights_in: Precision = "float32"  # or narrow: see `nas.quantise.narrowed`

    @property
    def noisy(self) -> bool:
        """Whether anything is dropped."""
        return self.mode == "train" and any((self.noise.dropout, self.noise.drop_path, self.noise.drop_block))


def elastic(position: Position, stored: Mapping[str, Weight], manner: Manner) -> Step:
    """A function (branch number, chance, weights by name below the position, x) -> (y, statistics by name).

    `x` and `y` have the position's widest shapes; channels that a narrower subnet lacks are zero. With `manner.tapes` a
    tape is kept for the backward pass.
    """
    blocks, which = position.computed
    forwards = [_branch(position, block, stored, manner) for block in blocks]
    if len(forwards) == 1:
        return lambda branch, chance, params, x: forwards[0](chance, params, x)

    @jax.custom_vjp
    def step(branch: Array, chance: Chance, params: Arrays, x: Array) -> tuple[Array, dict[str, Array]]:
        return lax.switch(branch, forwards, chance, params, x)

    graphs = [block.graph for block in blocks if block is not None]

    def forward(branch: Array, chance: Chance, params: Arrays, x: Array):
        if not manner.tapes:
            return step(branch, chance, params, x), (branch, chance, params, x, ())

        def record(f, chance: Chance, params: Arrays, x: Array):
            tape = Tape.of(graphs)
            return f(chance, params, x, tape), tape.slots(len(x), x.dtype)

        made, tape = lax.switch(branch, [partial(record, f) for f in forwards], chance, params, x)
        return made, (branch, chance, params, x, tape)

    def backward(saved, cotangents):
        branch, chance, params, x, known = saved

        def pull(f, chance: Chance, params: Arrays, x: Array, known, cotangents):
            tape = Tape.of(graphs, known) if manner.tapes else None
            return jax.vjp(lambda p, x: f(chance, p, x, tape), params, x)[1](cotangents)

        none = np.zeros(branch.shape, jax.dtypes.float0)
        no_chance = (np.zeros(chance[0].shape, jax.dtypes.float0), jnp.zeros_like(chance[1]))
        pulls = [partial(pull, f) for f in forwards]
        return (none, no_chance, *lax.switch(branch, pulls, chance, params, x, known, cotangents))

    step.defvjp(forward, backward)
    if len(blocks) == len(which):
        return step
    return lambda branch, chance, params, x: step(jnp.asarray(which)[branch], chance, params, x)


def _branch(position: Position, block: Block | None, stored: Mapping[str, Weight], manner: Manner):
    """(chance, weights, x) -> (y, statistics) of one branch."""
    calibrates = manner.mode == "calibrate"
    statistics = {n: w.shape for n, w in stored.items() if not w.trained} if calibrates else {}

    def forward(chance: Chance, params: Arrays, x: Array, tape: Tape | None = None) -> tuple[Array, dict[str, Array]]:
        seen: dict[str, Array] = {}
        if block is None:
            y = x
        else:
            scope = _scope(position, block)
            key, drop_path = chance
            noisy = Noisy(manner.noise, jax.random.wrap_key_data(key), drop_path) if manner.noisy else None
            y, moments = run(
                block.graph,
                narrowed(in_precision(block.graph, manner.weights_in), weights_of(position, block, params)),
                x[..., : block.graph.input[-1]],
                batch_stats=manner.mode != "infer",
                norm_images=manner.norm_images,
                noisy=noisy,
                tape=tape,
                gradients=manner.mode == "train",
            )
            seen = {f"{scope}/{n}": unshare(a, statistics[f"{scope}/{n}"]) for n, a in moments.items() if statistics}
        rest = {n: jnp.zeros(shape, jnp.float32) for n, shape in statistics.items() if n not in seen}
        return widen(y, position.output), seen | rest

    return forward


def weights_of(position: Position, block: Block, params: Arrays) -> dict[str, Array]:
    """The arrays of a branch by their names in its graph, out of `params`, by name below the position."""
    scope = _scope(position, block)
    shapes = {w.name: w.shape for w in weights(block.graph)}
    return {n: weight_of(params, f"{scope}/{n}", s) for n, s in shapes.items() if f"{scope}/{n}" in params}


def _scope(position: Position, block: Block) -> str:
    return block.name.removeprefix(position.name + "/")


def widen(y: Array, shape: Shape) -> Array:
    """`y` with zero channels up to `shape`."""
    missing = shape[-1] - y.shape[-1]
    return jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, missing)]) if missing else y
