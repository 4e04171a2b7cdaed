"""Question: how much faster than `lax` are the forms in nas/kernels.py on this CPU, and what do they cost to compile?

Run: python experiments/benchmarks/kernels.py [--batch 64] [--rounds 5]    about two minutes
     python experiments/benchmarks/kernels.py --supernet    depthwise alone, C++ against XLA, shapes of a supernet
Each row is forward + both gradients of one convolution (--forward: forward alone): in C++ where `nas.native` has it,
in the forms that are written out for XLA, and by `lax`. The forms alternate within each round, because speeds of a
shared machine compare only side by side; times are medians.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from unittest import mock

import jax
import numpy as np
from jax import lax

from nas import kernels, native

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


SUPERNET = [  # 32-pixel images, by stage: width times expansion
    (side, c, c, k, s, c)
    for side, channels in ((32, (48, 96)), (16, (96, 144)), (8, (160, 240)), (4, (320, 480)))
    for c, k, s in itertools.product(channels, (3, 5, 7), (1, 2))
]


def compiled(function: Callable, forward: bool, *arguments: np.ndarray) -> tuple[Callable, float, int]:
    """`function` with its gradients, or alone; the seconds XLA took to compile it, and how many HLO instructions."""

    def run(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        if forward:
            return (function(x, w),)
        out, pull = jax.vjp(function, x, w)
        return out, *pull(g)

    lowered = jax.jit(run).lower(*arguments)
    instructions = lowered.as_text(dialect="hlo").count(" = ")
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start, instructions


def measure(programs: list[Callable], arguments: list[np.ndarray], rounds: int) -> list[float]:
    """Median milliseconds of each program, alternating."""
    seconds = np.empty((rounds, len(programs)))
    for round_ in range(-1, rounds):  # the first round warms up, and is overwritten by the last
        for i, program in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[round_, i] = time.perf_counter() - start
    return (1e3 * np.median(seconds, axis=0)).tolist()


def forms(s: int, groups: int) -> dict[str, Callable]:
    """The ways to convolve with stride `s`."""

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return kernels.conv(x, w, stride=s, groups=groups)

    def xla(x: jax.Array, w: jax.Array) -> jax.Array:
        with mock.patch.object(native, "available", return_value=False):
            return ours(x, w)

    def theirs(x: jax.Array, w: jax.Array) -> jax.Array:
        spec = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (s, s), "SAME", dimension_numbers=spec, feature_group_count=groups)

    return {"c++": lambda x, w: native.depthwise(x, w, s), "xla": xla, "lax": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forward", action="store_true", help="Without the gradients.")
    parser.add_argument("--supernet", action="store_true", help="Depthwise convolutions of a supernet, without lax.")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"C++ kernels: {native.status()}; load {os.getloadavg()[0]:.2f}; milliseconds\n")
    print("| side | Cin | Cout | k | s | groups | c++ | xla | lax | xla / c++ | lax / xla | compile s | HLO |")
    print("|---|" + "---|" * 12)
    for side, cin, cout, k, s, groups in SUPERNET if options.supernet else CASES:
        shapes = (
            (options.batch, side, side, cin),
            (k, k, cin // groups, cout),
            (options.batch, -(-side // s), -(-side // s), cout),
        )
        arguments = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
        chosen = forms(s, groups)
        if not (native.available() and groups == cin == cout and groups > 1):
            del chosen["c++"]
        if options.supernet:
            del chosen["lax"]
        programs = {name: compiled(function, options.forward, *arguments) for name, function in chosen.items()}
        times = measure([program for program, _, _ in programs.values()], arguments, options.rounds)
        ms = dict(zip(programs, times, strict=True))

        def ratio(a: str, b: str, ms: dict[str, float] = ms) -> str:
            return f"{ms[a] / ms[b]:.1f}" if a in ms and b in ms else "-"

        shown = [f"{ms[name]:.2f}" if name in ms else "-" for name in ("c++", "xla", "lax")]
        seconds = " / ".join(f"{seconds:.2f}" for _, seconds, _ in programs.values())
        sizes = " / ".join(str(size) for _, _, size in programs.values())
        cells = [side, cin, cout, k, s, groups, *shown, ratio("xla", "c++"), ratio("lax", "xla"), seconds, sizes]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
