"""Question: how much faster than `lax` are the forms in nas/kernels.py on this CPU, and what do they cost to compile?

Run: python experiments/benchmarks/kernels.py [--batch 64] [--rounds 5]    about two minutes
Each row is forward + both gradients of one convolution. The two forms alternate within each round, because speeds of a
shared machine compare only side by side; times are first quartiles.
"""

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np
from jax import lax

from nas import kernels

CASES = [  # side, Cin, Cout, kernel, stride, groups
    *((side, c, c, k, s, c) for side, c in ((16, 48), (8, 96), (4, 192)) for k in (3, 5, 7) for s in (1, 2)),
    (16, 16, 16, 3, 1, 16),
    (16, 96, 96, 3, 2, 96),
    (32, 48, 48, 3, 1, 48),
    (32, 48, 48, 3, 2, 48),
    (16, 48, 96, 1, 1, 1),
    (16, 48, 96, 1, 2, 1),
    (32, 3, 16, 3, 1, 1),
    (32, 3, 32, 3, 2, 1),
    (16, 1, 24, 3, 1, 1),
    (16, 24, 96, 3, 1, 1),
    (16, 24, 96, 3, 2, 1),
    (8, 96, 96, 1, 1, 4),
    (8, 96, 96, 3, 1, 4),
]


def compiled(function: Callable, *arguments: np.ndarray) -> tuple[Callable, float, int]:
    """Forward + backward of `function`, the seconds XLA took to compile it and the HLO instructions it compiled."""

    def run(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(function, x, w)
        return out, *pull(g)

    lowered = jax.jit(run).lower(*arguments)
    instructions = lowered.as_text(dialect="hlo").count(" = ")
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start, instructions


def measure(programs: list[Callable], arguments: list[np.ndarray], rounds: int) -> list[float]:
    """First-quartile milliseconds of each program, alternating."""
    seconds = np.empty((rounds, len(programs)))
    for round_ in range(-1, rounds):  # the first round warms up, and is overwritten by the last
        for i, program in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[round_, i] = time.perf_counter() - start
    return (1e3 * np.percentile(seconds, 25, axis=0)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| side | Cin | Cout | k | s | groups | ours ms | lax ms | lax / ours | compile s | lax | HLO | lax |")
    print("|---|" + "---|" * 12)
    for side, cin, cout, k, s, groups in CASES:
        shapes = (
            (options.batch, side, side, cin),
            (k, k, cin // groups, cout),
            (options.batch, -(-side // s), -(-side // s), cout),
        )
        arguments = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

        def ours(x: jax.Array, w: jax.Array, s: int = s, groups: int = groups) -> jax.Array:
            return kernels.conv(x, w, stride=s, groups=groups)

        def theirs(x: jax.Array, w: jax.Array, s: int = s, groups: int = groups) -> jax.Array:
            spec = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(x, w, (s, s), "SAME", dimension_numbers=spec, feature_group_count=groups)

        (a, a_seconds, a_size), (b, b_seconds, b_size) = compiled(ours, *arguments), compiled(theirs, *arguments)
        a_ms, b_ms = measure([a, b], arguments, options.rounds)
        print(
            f"| {side} | {cin} | {cout} | {k} | {s} | {groups} | {a_ms:.2f} | {b_ms:.2f} | {b_ms / a_ms:.1f} |"
            f" {a_seconds:.2f} | {b_seconds:.2f} | {a_size} | {b_size} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
