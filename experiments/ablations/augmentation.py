"""One supernet, trained once with each kind of augmentation and noise: what each reaches, and what it costs.

    python experiments/ablations/augmentation.py                               # all of them, on 16x16 digits
    python experiments/ablations/augmentation.py --data PATH --flip --space small_mixed --only base cutmix
    python experiments/ablations/augmentation.py --only none base autoaugment --seeds 0 1 2 --json augmentation.json

`base` is a shift of an eighth of the image's side, and with --flip a flip (digits must not be mirrored); all but `none`
build on it. Top-1 is on validation images, by the supernet's weights, with batch-norm statistics measured anew for each
network: the smallest, the mean of random ones (the same for every row), the largest; then averaged over the seeds.
Seconds are of one training, compiling included. What regularises costs accuracy while a training is short: compare at
the number of epochs that you mean to train for.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nas import config
from nas.data import Dataset, load_data
from nas.errors import NasError
from nas.evaluate import SubnetEvaluator
from nas.space import load_space
from nas.supernet import Supernet
from nas.train import train_supernet


def recipes(side: int, *, flip: bool) -> dict[str, dict[str, Any]]:
    """Name -> the settings of `config.Train` that it is made of, for images of `side` pixels."""
    base = {"flip": flip, "shift": side // 8}

    def augment(**more: Any) -> dict[str, Any]:
        return {"augment": config.Augment(**base, **more)}

    def noise(**rates: Any) -> dict[str, Any]:
        return augment() | {"noise": config.Noise(**rates)}

    return {
        "none": {},
        "base": augment(),
        "cutout": augment(cutout=side // 2),
        "randaugment": augment(policy="randaugment", magnitude=5.0),
        "autoaugment": augment(policy="autoaugment"),
        "autoaugment_cutout": augment(policy="autoaugment", cutout=side // 2),
        "mixup": augment(mixup=0.2),
        "cutmix": augment(cutmix=1.0),
        "mixup_or_cutmix": augment(mixup=0.2, cutmix=1.0),
        "dropout": noise(dropout=0.2),
        "drop_path": noise(drop_path=0.2),
        "drop_block": noise(drop_block=0.1),
    }


def outcome(
    supernet: Supernet, data: Dataset, settings: config.Train, genotypes: np.ndarray, seed: int
) -> dict[str, float]:
    """Top-1 in percent of `genotypes` (the smallest, random ones, the largest) after training, and its seconds."""
    start = time.perf_counter()
    params = jax.block_until_ready(train_supernet(supernet, data, settings, seed=seed))
    seconds = time.perf_counter() - start
    score = SubnetEvaluator(
        supernet, params, data, calibration_images=settings.calibration_images, batch_size=settings.eval_batch_size
    )
    top1 = 100 * np.asarray(score(genotypes)) / score.total
    return {
        "top1_smallest": float(top1[0]),
        "top1_random": float(top1[1:-1].mean()),
        "top1_largest": float(top1[-1]),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(recipes(32, flip=True))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--flip", action="store_true", help="mirror images too: right for most photographs")
    parser.add_argument("--space", default="digits_mixed", help="a name of `nas list spaces`, or a path")
    parser.add_argument("--data", default="digits", help='"digits", or a path')
    parser.add_argument("--image-size", type=int, help="side in pixels; 16 for digits, else as they come")
    parser.add_argument("--train-images", type=int, help="use only so many")
    parser.add_argument("--epochs", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--subnets", type=int, default=20, help="random networks that are scored")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="write everything there as well")
    options = parser.parse_args()
    try:
        size = options.image_size or (16 if options.data == "digits" else None)
        data = load_data(config.Data(options.data, image_size=size, train_images=options.train_images))
        space = load_space(options.space, input_shape=data.image_shape, classes=data.classes)
    except NasError as e:
        parser.error(str(e))
    supernet = Supernet(space)
    drawn = space.sample(np.random.default_rng([min(options.seeds), 3]), options.subnets)
    genotypes = np.concatenate([space.smallest()[None], drawn, space.largest()[None]])
    seeds = " ".join(map(str, options.seeds))
    print(f"{data}\n{space}\n{options.epochs:g} epochs of batches of {options.batch}, seeds {seeds}\n")
    print(f"| augmentation | smallest % | mean of {options.subnets} % | largest % | s |")
    print("|---|---|---|---|---|")
    found = {
        "space": space.name,
        "data": data.digest,
        "validation_images": len(data.val.labels),
        "flip": options.flip,
        "epochs": options.epochs,
        "batch_size": options.batch,
        "learning_rate": options.learning_rate,
        "subnets": options.subnets,
        "seeds": options.seeds,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": (rows := []),
    }
    for name in options.only:
        settings = config.Train(
            epochs=options.epochs,
            batch_size=options.batch,
            optimiser=config.Optimiser(learning_rate=options.learning_rate, weight_decay=5e-4),
            **recipes(min(data.image_shape[:2]), flip=options.flip)[name],
        )
        runs = [outcome(supernet, data, settings, genotypes, seed) for seed in options.seeds]
        mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        rows.append({"augmentation": name, **mean, "runs": runs})
        top1 = " | ".join(f"{mean[key]:.2f}" for key in ("top1_smallest", "top1_random", "top1_largest"))
        print(f"| {name} | {top1} | {mean['seconds']:.1f} |", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
