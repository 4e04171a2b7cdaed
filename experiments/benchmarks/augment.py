"""Question: what does each augmentation cost beside a flip and a shift, and in which form is a policy cheaper?

Run: python experiments/benchmarks/augment.py [--batch 64] [--side 32] [--channels 3] [--json FILE]   about a minute
A policy in the form `image by image` computes only the operations that were drawn, one image after another; `all
operations` computes every one for every image and selects, which is what accelerators get. All rows alternate within
each round, because speeds of a shared machine compare only side by side; times are first quartiles.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nas import kernels
from nas.config import Augment
from nas.train.augment import augment, mix

REFERENCE = "flip + shift"
ROWS = {
    REFERENCE: Augment(flip=True, shift=4),
    "cutout": Augment(cutout=16),
    "mixup": Augment(mixup=0.2),
    "cutmix": Augment(cutmix=1.0),
    "mixup or cutmix": Augment(mixup=0.2, cutmix=1.0),
    "randaugment, 1 operation": Augment(policy="randaugment", operations=1),
    "randaugment, 2 operations": Augment(policy="randaugment"),
    "autoaugment": Augment(policy="autoaugment"),
    "flip + shift + autoaugment + cutout": Augment(flip=True, shift=4, policy="autoaugment", cutout=16),
}
FORMS = {"image by image": True, "all operations": False}


def compiled(
    settings: Augment, on_cpu: bool, images: jax.Array, targets: jax.Array
) -> tuple[Callable[..., Any], float]:
    """`augment` and `mix` as one program, and the seconds XLA took to compile it."""

    def both(key: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        augment_key, mix_key = jax.random.split(key)
        return mix(mix_key, augment(augment_key, images, settings), targets, settings)

    asked, kernels.on_cpu = kernels.on_cpu, lambda: on_cpu
    try:
        lowered = jax.jit(both).lower(jax.random.key(0), images, targets)
    finally:
        kernels.on_cpu = asked
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write everything there as well")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (options.batch, options.side, options.side, options.channels)
    images = jnp.asarray(rng.integers(0, 256, shape) / 255, jnp.float32)
    targets = jax.nn.one_hot(rng.integers(0, 10, options.batch), 10)
    programs = {
        (name, form): compiled(settings, on_cpu, images, targets)
        for name, settings in ROWS.items()
        for form, on_cpu in FORMS.items()
        if settings.policy != "none" or on_cpu
    }
    seconds = np.empty((options.rounds, len(programs)))
    for round_ in range(-1, options.rounds):  # the first round warms up, and is overwritten by the last
        key = jax.random.key(round_ + 1)  # other operations are drawn in every round
        for column, (program, _) in enumerate(programs.values()):
            start = time.perf_counter()
            jax.block_until_ready(program(key, images, targets))
            seconds[round_, column] = time.perf_counter() - start
    ms = dict(zip(programs, 1e3 * np.percentile(seconds, 25, axis=0), strict=True))
    reference = ms[REFERENCE, "image by image"]
    rows = [
        {
            "augmentation": name,
            "form": form if ROWS[name].policy != "none" else "",
            "ms": float(ms[name, form]),
            "ratio": float(ms[name, form] / reference),
            "compile_seconds": compile_seconds,
        }
        for (name, form), (_, compile_seconds) in programs.items()
    ]
    load = os.getloadavg()[0]
    print(f"{jax.devices()[0].device_kind}, images {shape}, {options.rounds} rounds, load {load:.1f}\n")
    print(f"| augmentation | form | ms a batch | / {REFERENCE} | compile s |\n|---|---|---|---|---|")
    for row in rows:
        print("| {augmentation} | {form} | {ms:.2f} | {ratio:.1f} | {compile_seconds:.1f} |".format(**row))
    if options.json:
        found = {"shape": shape, "rounds": options.rounds, "load": load, "jax": jax.__version__, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
