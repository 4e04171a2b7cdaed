"""Stage 4: the winners, and the baselines they are compared with, fine-tuned alike."""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nas.architecture import (
    Architecture,
    Input,
    Origin,
    load_architecture,
    load_float32_params,
    load_params,
    save_float32_params,
    save_params,
    schema_of,
)
from nas.compress import finetune
from nas.errors import NasError
from nas.evaluate import Standalone, SubnetEvaluator
from nas.files import damaged, read_as, write_json
from nas.ops import in_float32
from nas.pipeline.costs import handmade, least_of, minimised
from nas.pipeline.job import Job
from nas.pipeline.search import run as run_search
from nas.quantise import has_integers, has_narrow
from nas.search import Front, Setting, Trial

BASELINES = ("smallest", "largest", "handmade")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A network to be finished, and where it will lie."""

    name: str
    role: str  # "winner" or one of BASELINES
    genotype: np.ndarray

    def folder(self, run: Path) -> Path:
        """Its folder in a run."""
        return run / ("winners" if self.role == "winner" else "baselines") / self.name


def finish(job: Job) -> None:
    """Writes winners/<name>/ and baselines/<name>/: architecture.json, params/, training/, validation.json."""
    job.folder.require("search")
    settings = job.experiment.finish
    chosen = choose(job)
    evaluator = SubnetEvaluator(
        job.supernet,
        job.supernet_params(),
        job.data,
        calibration_images=job.experiment.train.calibration_images,
        batch_size=job.experiment.train.eval_batch_size,
    )
    largest = job.space.largest()
    teacher = job.space.decode(largest)
    # slices of NumPy arrays: in JAX each would be a compilation
    shared = {n: np.asarray(a) for n, a in (dict(evaluator.params) | evaluator.statistics(largest)).items()}
    teacher_params = job.supernet.slice(shared, teacher)
    for number, candidate in enumerate(chosen, start=1):
        folder = candidate.folder(job.path)
        if (folder / "validation.json").exists():
            continue
        network = job.space.decode(candidate.genotype)
        job.console.start(f"finish: {candidate.name} ({number} of {len(chosen)}), {settings.epochs:g} epochs")
        params = finetune(
            network,
            job.supernet.slice(shared, network),
            teacher,
            teacher_params,
            job.data,
            settings,
            job.experiment.train.augment,
            seed=job.experiment.seed,
            folder=folder / "training",
            progress=job.console.progress,
        )
        alone = Standalone(network, job.data, batch_size=job.experiment.train.eval_batch_size)
        params = alone.calibrate(params, images=job.experiment.train.calibration_images)
        correct = alone.correct(params, job.data.val)
        save_params(folder / "params", params)
        if has_narrow(network.flat()):  # a float32 file has other weights, so the moments of its norms are others
            exact = Standalone(in_float32(network), job.data, batch_size=job.experiment.train.eval_batch_size)
            exact_params = exact.calibrate(params, images=job.experiment.train.calibration_images)
            save_float32_params(folder / "params", exact_params)
        architecture(job, candidate).save(folder / "architecture.json")
        write_json(folder / "validation.json", {"correct": correct, "total": len(job.data.val.labels)})  # last: done
        job.console.say(f"  validation top-1 {correct / len(job.data.val.labels):.1%}")


def choose(job: Job) -> list[Candidate]:
    """The winners, from the front under the limits, then the baselines.

    winner_1 is the most accurate trial within the limits; where no accuracy is an objective, the cheapest. The others
    are spread evenly, by latency, over the rest of the front of error and latency: of faster ones, or where no accuracy
    is an objective, of more accurate ones. If no trial reaches a limit on accuracy, the nearest is the only winner.
    """
    trials, setting = run_search(job), Setting(job.space, least=least_of(job.experiment.least))
    front = Front.of(trials, minimised(job.experiment), setting)
    best = front.best() if len(front) or front.nearest is None else front.nearest
    of = "latency_ms" if job.experiment.maximised else "error"
    better: list[Trial] = [
        t for t in Front.of(trials, ("error", "latency_ms"), setting) if t.costs[of] < best.costs[of]
    ]
    picked = [best]
    if others := min(job.experiment.finish.winners - 1, len(better)):
        goals = np.linspace(better[-1].latency_ms, better[0].latency_ms, others)
        for goal in goals:
            rest = [t for t in better if t not in picked]
            picked.append(min(rest, key=lambda t: abs(t.latency_ms - goal)))
    winners = [
        Candidate(f"winner_{i}", "winner", np.array(t.genotype, np.uint8)) for i, t in enumerate(picked, start=1)
    ]
    hand = dict(zip(BASELINES, (*job.ends(), handmade(job)), strict=True))
    return winners + [Candidate(name, name, hand[name]) for name in BASELINES]


def architecture(job: Job, candidate: Candidate) -> Architecture:
    """The architecture.json of a candidate."""
    data, network = job.data, job.space.decode(candidate.genotype)
    height, width, channels = network.input
    return Architecture(
        schema=schema_of(network),
        name=f"{job.experiment.name}/{candidate.name}",
        network=network,
        input=Input((height, width, channels), tuple(map(float, data.mean)), tuple(map(float, data.std))),
        classes=tuple(data.class_names),
        space=Origin(job.space.name, job.space.digest),
        genotype=tuple(candidate.genotype.tolist()),
        choices=job.space.describe(candidate.genotype),
    )


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished network, as its folder has it."""

    name: str
    role: str
    folder: Path
    architecture: Architecture
    params: dict[str, Any]
    validation_accuracy: float
    float32_params: dict[str, Any] | None = None  # where narrow weights have moments of norms that others do not

    def params_of(self, precision: str) -> dict[str, Any]:
        """The arrays of its file in `precision`."""
        if self.float32_params is None or has_integers(self.architecture.network.flat(), precision):
            return self.params
        return self.float32_params


class _Validation(msgspec.Struct):
    """validation.json."""

    correct: int
    total: int


def finished(run: Path) -> list[Finished]:
    """All winners of a run, then its baselines.

    Raises:
        NasError: one of their files is missing or damaged.
    """
    winners = sorted((run / "winners").glob("winner_*"), key=lambda p: int(p.name.rpartition("_")[2]))
    if not winners:
        raise damaged(run / "winners", "no winner is there", stage="finish")
    out = []
    for folder in (*winners, *(run / "baselines" / name for name in BASELINES)):
        counted = read_as(folder / "validation.json", _Validation, stage="finish")
        try:
            made = load_architecture(folder)
            params = load_params(folder / "params", made.network)
            plain = load_float32_params(folder / "params", made.network)
        except NasError as e:
            raise damaged(folder, str(e), stage="finish") from e
        role = "winner" if folder in winners else folder.name
        out.append(Finished(folder.name, role, folder, made, params, counted.correct / counted.total, plain))
    return out
