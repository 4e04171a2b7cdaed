"""Question: what does each optimiser reach with the same supernet, and at what price?

Run: python experiments/ablations/optimisers.py [--only sgd shampoo] [--rate shampoo=0.1] [--epochs 20] [--json FILE]

The same supernet is trained once with each: the same space, data, first weights, epochs and batches. Columns: top-1 on
the validation images, batch norm recalibrated for each network, of the smallest network, of random ones (mean; the same
in every row), and of the largest; and the seconds of training, compiling included. Differences below the resolution
that is printed (two standard errors of one top-1 at 90 % on that many images) are noise. Learning rates decide such a
comparison: those below are only the best within a factor of about three, for 180 steps of one small network on 8x8
digits, so search them alike (`--rate`) before you conclude anything.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nas import config
from nas.data import Dataset, load_data
from nas.errors import CheckpointError, NasError
from nas.evaluate import SubnetEvaluator
from nas.files import write_json
from nas.space import load_space
from nas.supernet import Supernet
from nas.train import train_supernet

RECIPES = {  # learning rate, weight decay
    "adadelta": (10.0, 5e-4),
    "adagrad": (0.5, 5e-4),
    "adam": (0.03, 1e-5),
    "adamw": (0.03, 0.01),
    "lamb": (0.03, 0.01),
    "lion": (0.01, 0.01),
    "rmsprop": (0.03, 1e-5),
    "sgd": (0.2, 5e-4),
    "shampoo": (0.2, 5e-4),
}


def outcome(
    supernet: Supernet, data: Dataset, settings: config.Train, genotypes: np.ndarray, seed: int
) -> dict[str, Any]:
    """Top-1 in percent of `genotypes` (the smallest, random ones, the largest) after training, and its seconds.

    None for a training that diverged.
    """
    start = time.perf_counter()
    try:
        params = jax.block_until_ready(train_supernet(supernet, data, settings, seed=seed))
    except CheckpointError:
        params = None
    out: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
    names = ("top1_smallest", "top1_random", "top1_largest")
    if params is None:
        return dict.fromkeys(names) | out
    score = SubnetEvaluator(
        supernet, params, data, calibration_images=settings.calibration_images, batch_size=settings.eval_batch_size
    )
    top1 = 100 * np.asarray(score(genotypes)) / score.total
    return dict(zip(names, (top1[0], top1[1:-1].mean(), top1[-1]), strict=True)) | out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(RECIPES), default=sorted(RECIPES))
    parser.add_argument("--rate", action="append", default=[], metavar="NAME=VALUE", help="another learning rate")
    parser.add_argument("--decay", action="append", default=[], metavar="NAME=VALUE", help="another weight decay")
    parser.add_argument("--space", default="digits_mixed", help="a name of `nas list spaces`, or a path")
    parser.add_argument("--data", default="digits", help='"digits", or a path')
    parser.add_argument("--image-size", type=int, help="side in pixels; 16 for digits, else as they come")
    parser.add_argument("--train-images", type=int, help="use only so many")
    parser.add_argument("--epochs", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--subnets", type=int, default=20, help="random networks that are scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write everything there as well")
    options = parser.parse_args()
    try:
        rates, decays = (numbers(parser, given) for given in (options.rate, options.decay))
        size = options.image_size or (16 if options.data == "digits" else None)
        data = load_data(config.Data(options.data, image_size=size, train_images=options.train_images))
        space = load_space(options.space, input_shape=data.image_shape, classes=data.classes)
    except NasError as e:
        parser.error(str(e))
    supernet = Supernet(space)
    drawn = space.sample(np.random.default_rng([options.seed, 3]), options.subnets)
    genotypes = np.concatenate([space.smallest()[None], drawn, space.largest()[None]])
    resolution = 200 * (0.9 * 0.1 / len(data.val)) ** 0.5
    print(
        f"{data}\n{space}\n{options.epochs:g} epochs, batches of {options.batch}; resolution {resolution:.1f} points\n"
    )
    print(f"| optimiser | learning rate | weight decay | smallest % | mean of {options.subnets} % | largest % | s |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name in options.only:
        rate, decay = RECIPES[name]
        settings = config.Train(
            epochs=options.epochs,
            batch_size=options.batch,
            optimiser=config.Optimiser(
                name=name, learning_rate=rates.get(name, rate), weight_decay=decays.get(name, decay)
            ),
        )
        row = {
            "optimiser": name,
            "learning_rate": settings.optimiser.learning_rate,
            "weight_decay": settings.optimiser.weight_decay,
            **outcome(supernet, data, settings, genotypes, options.seed),
        }
        rows.append(row)
        top1 = [row[key] for key in ("top1_smallest", "top1_random", "top1_largest")]
        shown = " | ".join("diverged" if v is None else f"{v:.2f}" for v in top1)
        print(
            f"| {name} | {row['learning_rate']:g} | {row['weight_decay']:g} | {shown} | {row['seconds']} |", flush=True
        )
    if options.json:
        found = {
            "space": space.name,
            "data": data.digest,
            "validation_images": len(data.val),
            "epochs": options.epochs,
            "batch_size": options.batch,
            "subnets": options.subnets,
            "seed": options.seed,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "rows": rows,
        }
        write_json(options.json, found)


def numbers(parser: argparse.ArgumentParser, given: list[str]) -> dict[str, float]:
    """`["sgd=0.1"]` as `{"sgd": 0.1}`."""
    out = {}
    for item in given:
        name, _, value = item.partition("=")
        try:
            out[name] = float(value)
        except ValueError:
            parser.error(f"{item}: expected NAME=VALUE, for example sgd=0.1")
        if name not in RECIPES:
            parser.error(f"{item}: unknown optimiser `{name}`.{config.nearest(name, RECIPES, kind='optimiser')}")
    return out


if __name__ == "__main__":
    main()
