"""Question: from a bad learning rate, does population-based training reach what the good one reaches?

Run: python experiments/ablations/population.py [--written 0.001] [--good 0.1] [--seeds 0 1 2] [--json FILE]

For each seed the same supernet (space, data, first weights, batches) is trained by the written learning rate, by the
good one, and as a population whose first member begins with the written one and the others anywhere in --range; and by
`members` learning rates, those that the population begins with, each kept to the end (random search, of the same
price), of which the best on the validation images is taken. Columns: top-1 on the *test* images, which no choice is
made by, of the smallest network, of random ones that the population is not compared by (mean), and of the largest,
batch norm recalibrated for each; and the seconds of training, compiling included (one compiled step serves all rows but
the population's).
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nas import config
from nas.data import Dataset, load_data
from nas.errors import Diverged, NasError
from nas.evaluate import SubnetEvaluator
from nas.files import write_json
from nas.space import Space, load_space
from nas.supernet import Supernet
from nas.train import fit, train_population
from nas.train.lineage import Lineage
from nas.train.population import generation_rng, truncation
from nas.train.step import Step
from nas.train.supernet import make_step, trained

RATE = "optimiser.learning_rate"


class Bench:
    """What all trainings of one seed share."""

    def __init__(self, data: Dataset, space: Space, settings: config.Train, *, seed: int, subnets: int):
        assert settings.population is not None
        self.supernet, self.data, self.settings, self.seed = Supernet(space), data, settings, seed
        self.step: Step = make_step(self.supernet, data, settings, seed=seed)
        self.compared = self._networks(space, [seed, 6], settings.population.subnets)
        self.tested = self._networks(space, [seed, 7], subnets)
        self._evaluators: dict[str, SubnetEvaluator] = {}

    @staticmethod
    def _networks(space: Space, seed: list[int], count: int) -> np.ndarray:
        drawn = space.sample(np.random.default_rng(seed), count)
        return np.concatenate([space.smallest()[None], drawn, space.largest()[None]])

    def _evaluator(self, params: Any, *, test: bool) -> SubnetEvaluator:
        name = "test" if test else "validation"
        if name not in self._evaluators:
            data = dataclasses.replace(self.data, val=self.data.test) if test else self.data
            self._evaluators[name] = SubnetEvaluator(self.supernet, params, data)
        return self._evaluators[name].with_params(params)

    def score(self, params: Any) -> list[int]:
        """Validation images that the compared networks classify correctly."""
        return self._evaluator(params, test=False)(self.compared)

    def alone(self, rate: float) -> Any:
        """The weights after training with one learning rate; None if that diverged."""
        state = self.step.init(self.supernet.init(self.seed), {RATE: rate})
        train = self.data.train
        try:
            state = fit(
                self.step,
                state,
                train,
                steps=self.step.steps,
                batch_size=self.settings.batch_size,
                seed=self.seed,
            )
        except Diverged:
            return None
        return trained(state)

    def together(self) -> tuple[Any, list[float]]:
        """The weights of the population's best member, and the learning rates of the line that led to it."""
        with tempfile.TemporaryDirectory() as folder:
            params = train_population(
                self.supernet,
                self.data,
                self.settings,
                seed=self.seed,
                folder=Path(folder),
                score=self.score,
                images=len(self.data.val),
            )
            line = Lineage.read(Path(folder) / "population.json").winning_line()
        return params, [member.values[RATE] for member in line]

    def drawn(self) -> list[float]:
        """The learning rates that the population begins with."""
        asked = self.settings.population
        assert asked is not None
        written = self.settings.optimiser.learning_rate
        evolution = truncation(
            [asked.ranges[RATE]], [written], members=asked.members, replaced=asked.replaced, resampled=asked.resampled
        )
        return evolution.init(generation_rng(self.seed, 0)).values[:, 0].tolist()

    def row(self, name: str, rates: list[float], params: Any, seconds: float) -> dict[str, Any]:
        """What weights reach on the test images, in percent."""
        row = {"recipe": name, "seed": self.seed, "learning_rates": rates, "seconds": round(seconds, 1)}
        if params is None:
            return row | dict.fromkeys(("smallest", "random", "largest", "mean"))
        top1 = 100 * np.asarray(self._evaluator(params, test=True)(self.tested)) / len(self.data.test)
        return row | {"smallest": top1[0], "random": top1[1:-1].mean(), "largest": top1[-1], "mean": top1.mean()}


def rows_of(bench: Bench, good: float) -> Any:
    """Every recipe's row, as it is made."""

    def timed(make: Any, *arguments: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        made = jax.block_until_ready(make(*arguments))
        return made, time.perf_counter() - began

    for name, rate in (("written", bench.settings.optimiser.learning_rate), ("good", good)):
        params, seconds = timed(bench.alone, rate)
        yield bench.row(name, [rate], params, seconds)
    (params, line), seconds = timed(bench.together)
    yield bench.row("population", line, params, seconds)
    began, tried = time.perf_counter(), []
    for rate in bench.drawn():
        params = bench.alone(rate)
        tried.append((-1 if params is None else sum(bench.score(params)), rate, params))
    _, rate, params = max(tried, key=lambda one: one[0])
    yield bench.row("random search", [rate], params, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--written", type=float, default=0.001, help="the learning rate in the experiment file")
    parser.add_argument("--good", type=float, default=0.1, help="the one of experiments/quickstart.toml")
    parser.add_argument("--range", type=float, nargs=2, default=(1e-4, 10.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--interval", type=float, default=1.0, help="epochs")
    parser.add_argument("--space", default="digits_mixed", help="a name of `nas list spaces`, or a path")
    parser.add_argument("--data", default="digits", help='"digits", or a path')
    parser.add_argument("--image-size", type=int, help="side in pixels; 16 for digits, else as they come")
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--subnets", type=int, default=20, help="random networks that are tested")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="write everything there as well")
    options = parser.parse_args()
    try:
        size = options.image_size or (16 if options.data == "digits" else None)
        data = load_data(config.Data(options.data, image_size=size))
        space = load_space(options.space, input_shape=data.image_shape, classes=data.classes)
    except NasError as e:
        parser.error(str(e))
    settings = config.Train(
        epochs=options.epochs,
        checkpoint_steps=10**6,
        optimiser=config.Optimiser(learning_rate=options.written, weight_decay=5e-4),
        augment=config.Augment(shift=1),
        population=config.Population(
            members=options.members,
            interval=options.interval,
            vary=config.Vary(optimiser=config.VaryOptimiser(learning_rate=tuple(options.range))),
        ),
    )
    print(f"{data}\n{space}\n{options.epochs:g} epochs, {options.members} members, {options.interval:g} an interval\n")
    print("| recipe | seed | learning rate | smallest % | random % | largest % | mean % | s |")
    print("|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    about = {
        "space": space.name,
        "data": data.digest,
        "test_images": len(data.test),
        "epochs": options.epochs,
        "members": options.members,
        "interval": options.interval,
        "range": options.range,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    for seed in options.seeds:
        for row in rows_of(Bench(data, space, settings, seed=seed, subnets=options.subnets), options.good):
            rows.append(row)
            rates = " ".join(f"{rate:.3g}" for rate in row["learning_rates"])
            top1 = [row[key] for key in ("smallest", "random", "largest", "mean")]
            shown = " | ".join("diverged" if v is None else f"{v:.2f}" for v in top1)
            print(f"| {row['recipe']} | {seed} | {rates} | {shown} | {row['seconds']} |", flush=True)
            if options.json:
                write_json(options.json, about | {"rows": rows})


if __name__ == "__main__":
    main()
