"""Subnets as their int8 files compute them, one compiled program for all of them.

A position is an int8 network of its own: it rounds what it reads to numbers of the range that this had on calibration
images. The position before has rounded it by the same range, so nothing is rounded twice; and since what goes from one
position to the next is real numbers, a float position may stand beside an int8 one. What a runtime fuses across two
positions (a block that begins with a norm or a ReLU) is rounded between them here.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from nas.fold import fold
from nas.ops import Block, Precision, in_precision
from nas.quantise import fake_quantise, narrowed, observe
from nas.space import Position
from nas.supernet.switch import Arrays, weights_of, widen

RANGES = "ranges"  # [values, 2]: stands among the arrays of a position, as its statistics do

Made = tuple[Array, dict[str, Array]]


def observed(position: Position, weights_in: Precision) -> Callable[[Array, Arrays, Array], Made]:
    """(branch number, weights and statistics by name below the position, x) -> (y, ranges), activations in float32."""
    rows = 1 + max(len(block.graph.ops) for block in position.branches if block is not None)

    def of(block: Block, params: Arrays, x: Array) -> Made:
        graph, arrays = fold(block.graph, weights_of(position, block, params), xp=jnp)
        y, ranges = observe(graph, narrowed(in_precision(graph, weights_in), arrays), x)
        return y, {RANGES: jnp.pad(ranges, [(0, rows - len(ranges)), (0, 0)])}

    return _switched(position, of, {RANGES: jnp.zeros((rows, 2))})


def integer(position: Position) -> Callable[[Array, Arrays, Array], Made]:
    """(branch number, weights, statistics and ranges by name below the position, x) -> (y, nothing)."""

    def of(block: Block, params: Arrays, x: Array) -> Made:
        graph, arrays = fold(block.graph, weights_of(position, block, params), xp=jnp)
        return fake_quantise(graph, arrays, params[RANGES], x), {}

    return _switched(position, of, {})


def _switched(
    position: Position, of: Callable[[Block, Arrays, Array], Made], nothing: dict[str, Array]
) -> Callable[[Array, Arrays, Array], Made]:
    """`of` the branch that is taken; a skipped position gives `nothing` beside its input."""

    def forward(block: Block | None) -> Callable[[Arrays, Array], Made]:
        def run(params: Arrays, x: Array) -> Made:
            y, seen = (x, nothing) if block is None else of(block, params, x[..., : block.graph.input[-1]])
            return widen(y, position.output), seen

        return run

    blocks, which = position.computed
    forwards = [forward(block) for block in blocks]
    return lambda branch, params, x: lax.switch(jnp.asarray(which)[branch], forwards, params, x)
