"""Question: which sampler and which divergence train the better supernet, and at what price?

Run: python experiments/ablations/samplers.py [--epochs 6] [--samplers sandwich single_path] [--divergences kl alpha]
     [--seeds 3] [--json samplers.json]

The same supernet is trained once for each sampler, divergence and seed: the same space, data, first weights, epochs and
optimiser. A sampler that never distils has one row, whatever the divergences. Columns: top-1 on the validation images,
batch norm recalibrated for each network, of the smallest network, of random ones (mean; the same networks in every
row), and of the largest; how many networks a step trains on average, since samplers differ in that; and the seconds of
training, compiling included. With several seeds, means, and the standard deviation over seeds of the random networks.
Differences below `resolution` (two standard errors of one top-1 at 90 % on that many images) are noise.
"""

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path

import jax
import msgspec
import numpy as np

from nas import config
from nas.data import Dataset, load_data
from nas.evaluate import SubnetEvaluator
from nas.files import write_json
from nas.space import Space, load_space
from nas.supernet import Supernet
from nas.train import train_supernet
from nas.train.loop import steps_of
from nas.train.losses import DIVERGENCES
from nas.train.samplers import SAMPLERS, Sampler, sampler


@dataclasses.dataclass(frozen=True)
class Row:
    """One training. Top-1 in percent."""

    sampler: str
    divergence: str  # "-" where nothing is distilled
    seed: int
    networks_a_step: float
    top1_smallest: float
    top1_random: float
    top1_largest: float
    seconds: float


def draws(draw: Sampler, steps: int) -> tuple[float, bool]:
    """Mean number of networks in a step, and whether any step distils. Losses are all 0: they decide neither."""
    all_ = [draw(step, np.random.default_rng(step), lambda g: np.zeros(len(g))) for step in range(steps)]
    return float(np.mean([len(d.genotypes) for d in all_])), any(d.distil for d in all_)


def train(space: Space, data: Dataset, settings: config.Train, *, seed: int, networks: int) -> list[float]:
    """Top-1 of the smallest network, of `networks` random ones (mean) and of the largest; seconds of training."""
    supernet = Supernet(space)
    start = time.perf_counter()
    params = jax.block_until_ready(train_supernet(supernet, data, settings, seed=seed))
    seconds = time.perf_counter() - start
    evaluate = SubnetEvaluator(supernet, params, data, settings.calibration_images, settings.eval_batch_size)
    random = space.sample(np.random.default_rng(0), networks)
    correct = np.array(evaluate(np.stack([space.smallest(), space.largest(), *random])))
    top1 = 100 * correct / evaluate.total
    return [float(x) for x in (top1[0], top1[2:].mean(), top1[1], seconds)]


def table(rows: list[Row]) -> None:
    """One printed line for each sampler and divergence, the mean over seeds."""
    print("| sampler | divergence | smallest % | random % | largest % | networks a step | seconds |")
    print("|---|---|---|---|---|---|---|")
    for name, divergence in dict.fromkeys((r.sampler, r.divergence) for r in rows):
        mine = [r for r in rows if (r.sampler, r.divergence) == (name, divergence)]
        keys = ("top1_smallest", "top1_random", "top1_largest", "networks_a_step", "seconds")
        low, middle, high, nets, seconds = (np.mean([getattr(r, key) for r in mine]) for key in keys)
        spread = f" ± {np.std([r.top1_random for r in mine], ddof=1):.2f}" if len(mine) > 1 else ""
        print(f"| {name} | {divergence} | {low:.2f} | {middle:.2f}{spread} | {high:.2f} | {nets:.1f} | {seconds:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="digits_mixed", help="a name of `nas list spaces`, or a path")
    parser.add_argument("--data", default="digits", help="as `data.source` of an experiment")
    parser.add_argument("--image-size", type=int, default=16, help="pixels; 0: as the images come")
    parser.add_argument("--samplers", nargs="+", choices=sorted(SAMPLERS), default=sorted(SAMPLERS), metavar="NAME")
    parser.add_argument("--divergences", nargs="+", choices=sorted(DIVERGENCES), default=["kl"], metavar="NAME")
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--random-subnets", type=int, default=config.Train().random_subnets)
    parser.add_argument("--networks", type=int, default=20, help="random networks that are evaluated")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each row")
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()

    data = load_data(config.Data(source=options.data, image_size=options.image_size or None))
    space = load_space(options.space, input_shape=data.image_shape, classes=data.classes)
    base = config.Train(
        epochs=options.epochs,
        random_subnets=options.random_subnets,
        optimiser=config.Optimiser(learning_rate=options.learning_rate, weight_decay=5e-4),
        augment=config.Augment(shift=1),
    )
    steps = steps_of(data.train, base.epochs, base.batch_size)
    resolution = 200 * (0.9 * 0.1 / len(data.val)) ** 0.5
    print(f"{data}\n{space}\n{steps} steps of {base.batch_size} images; resolution {resolution:.1f} points\n")

    rows: list[Row] = []
    for name in options.samplers:
        settings = msgspec.structs.replace(base, sampler=name)
        networks_a_step, distils = draws(sampler(settings, space, steps=steps), steps)
        for divergence in options.divergences if distils else ["-"]:
            if distils:
                distillation = config.Distillation(divergence=divergence)
                settings = msgspec.structs.replace(settings, distillation=distillation)
            for seed in range(options.seeds):
                figures = train(space, data, settings, seed=seed, networks=options.networks)
                rows.append(Row(name, divergence, seed, networks_a_step, *figures))
                print(json.dumps(dataclasses.asdict(rows[-1])), flush=True)
    print()
    table(rows)
    if options.json:
        arguments = {key: value for key, value in vars(options).items() if key != "json"}
        machine = {"machine": platform.machine(), "jax": jax.__version__, "backend": jax.default_backend()}
        result = {"arguments": arguments, "steps": steps, "resolution_points": resolution, **machine}
        write_json(options.json, {**result, "rows": [dataclasses.asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
