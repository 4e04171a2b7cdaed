"""Beside the stages: networks trained alone, to see whether the supernet orders them as that does (nas.fidelity)."""

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from nas import config
from nas.console import Console
from nas.errors import CheckpointError, RunError
from nas.evaluate import Standalone, SubnetEvaluator
from nas.fidelity import Fidelity, draw, judge, table
from nas.files import write_json
from nas.ops import in_float32
from nas.pipeline.job import Job
from nas.report import write_report
from nas.space.space import Genotypes
from nas.supernet import Supernet
from nas.train import Progress, train_supernet

T = TypeVar("T")


class Recipe(config.Strict, frozen=True):
    """fidelity/recipe.json: what all trainings in the folder have in common."""

    seed: int
    space: str  # digest
    data: str  # digest
    train: config.Train


class Alone(config.Strict, frozen=True):
    """result.json: what became of one training."""

    genotype: tuple[int, ...]
    images: int  # of validation
    right: bytes  # a bit for each image: whether it is classified correctly
    seconds: float

    @classmethod
    def of(cls, genotype: NDArray[np.uint8], right: NDArray[np.bool_], seconds: float) -> "Alone":
        """From `right` [images]."""
        return cls(tuple(genotype.tolist()), len(right), np.packbits(right).tobytes(), round(seconds, 1))

    def unpacked(self) -> NDArray[np.bool_]:
        """`right` [images]."""
        return np.unpackbits(np.frombuffer(self.right, np.uint8), count=self.images).astype(bool)


@dataclasses.dataclass(frozen=True)
class Training:
    """One network from one seed, and where its result lies."""

    network: int  # from 1, in the order of `draw`
    seed: int  # from 0
    genotype: NDArray[np.uint8]
    folder: Path


def fidelity(job: Job) -> Fidelity:
    """Writes fidelity/ (recipe.json, supernet.json, <network>/seed_<seed>/, fidelity.json), and says the result."""
    job.folder.require("train")
    job.tables  # noqa: B018  data and space must be those of the supernet
    settings, train = job.experiment.fidelity, job.trained_as
    recipe = Recipe(job.experiment.seed, job.space.digest, job.data.digest, as_alone(train, settings.epochs))
    folder = job.path / "fidelity"
    claim(folder, recipe)
    genotypes = draw(job.space, settings.networks, seed=job.experiment.seed)
    plan = [
        Training(n, s, g, folder / f"{n:02d}" / f"seed_{s}")
        for n, g in enumerate(genotypes, start=1)
        for s in range(settings.seeds)
    ]
    seeds = f", each from {settings.seeds} seeds" if settings.seeds > 1 else ""
    other = "" if recipe.train.epochs == train.epochs else f" (the supernet was trained for {train.epochs:g})"
    job.console.say(f"fidelity: {len(genotypes)} networks alone{seeds}, {recipe.train.epochs:g} epochs{other}")
    supernet = score(job, genotypes)
    done = each(plan, functools.partial(train_alone, job, recipe), job.console)
    found = judge(
        job.space,
        genotypes,
        supernet,
        np.stack([r.unpacked() for r in done]).reshape(len(genotypes), settings.seeds, -1),
        epochs=recipe.train.epochs,
        supernet_epochs=train.epochs,
        seed=job.experiment.seed,
    )
    write_json(folder / "fidelity.json", msgspec.to_builtins(found))
    for line in table(found):
        job.console.say(line)
    if job.folder.done("report"):
        job.console.say(f"Report: {write_report(job.path)}")
    return found


def as_alone(train: config.Train, epochs: float | None) -> config.Train:
    """The settings of the supernet's training for one network alone: nothing to sample, no teacher, all else equal."""
    epochs = train.epochs if epochs is None else epochs
    neutral = {key: getattr(config.Train(), key) for key in config.NEUTRAL}
    return msgspec.structs.replace(train, sampler="single_path", random_subnets=1, epochs=epochs, **neutral)


def claim(folder: Path, recipe: Recipe) -> None:
    """Writes recipe.json, unless one is there.

    Raises:
        RunError: the one that is there is another.
    """
    path = folder / "recipe.json"
    if not path.exists():
        write_json(path, msgspec.to_builtins(recipe))
        return
    before = _read(path, Recipe)
    fields = [(f, recipe, before) for f in ("seed", "space", "data")]
    fields += [(f, recipe.train, before.train) for f in config.Train.__struct_fields__]
    changed = [
        f"`{f}` is {getattr(a, f)!r}, was {getattr(b, f)!r}" for f, a, b in fields if getattr(a, f) != getattr(b, f)
    ]
    if changed:
        raise RunError(
            f"{folder}: the networks in it are trained by another recipe. What differs now: {'; '.join(changed[:5])}. "
            f"Ask for the same (--epochs) to go on with them, or move that folder away to train all anew."
        )


def score(job: Job, genotypes: Genotypes) -> list[int]:
    """Validation images that each network [n] classifies correctly with the supernet's weights, as the search counts.

    Counts are kept in fidelity/supernet.json, by the genotype's bytes.
    """
    path = job.path / "fidelity" / "supernet.json"
    known = _read(path, dict[str, int]) if path.exists() else {}
    keys = [g.tobytes().hex() for g in genotypes]
    missing = [(key, g) for key, g in zip(keys, genotypes, strict=True) if key not in known]
    if missing:
        job.console.start(f"  with the supernet's weights: {len(missing)} networks (compiling first)")
        evaluate = SubnetEvaluator(
            job.supernet,
            job.supernet_params(),
            job.data,
            calibration_images=job.experiment.train.calibration_images,
            batch_size=job.experiment.train.eval_batch_size,
        )
        for number, (key, genotype) in enumerate(missing, start=1):
            known[key] = evaluate(genotype[None])[0]
            write_json(path, known)
            job.console.progress(number, len(missing))
    return [known[key] for key in keys]


def each(
    plan: Sequence[Training], train: Callable[[Training, Progress], NDArray[np.bool_]], console: Console
) -> list[Alone]:
    """The result of every training: read where it is there, else made by `train`, which gives `right` [images].

    Raises:
        RunError: a result is damaged, or of another network.
    """
    found = {t.folder: _result(t) for t in plan}
    missing = [t for t in plan if found[t.folder] is None]
    if missing:
        console.start(f"  alone: {len(missing)} trainings, {len(plan) - len(missing)} done already")
    for index, training in enumerate(missing):
        began = time.perf_counter()

        def progress(done: int, total: int, values: dict[str, float], index: int = index) -> None:
            told = {"training": f"{index + 1}/{len(missing)}", "top-1": values.get("top1_largest", float("nan"))}
            console.progress(index * total + done, len(missing) * total, told)

        right = train(training, progress)
        result = Alone.of(training.genotype, right, time.perf_counter() - began)
        write_json(training.folder / "result.json", msgspec.to_builtins(result))  # last: done
        shutil.rmtree(training.folder / "checkpoints", ignore_errors=True)
        found[training.folder] = result
        console.say(
            f"  network {training.network}, seed {training.seed}: validation top-1 {right.mean():.1%} "
            f"in {result.seconds:.0f} s"
        )
    return [r for t in plan if (r := found[t.folder]) is not None]


def train_alone(job: Job, recipe: Recipe, training: Training, progress: Progress) -> NDArray[np.bool_]:
    """Whether a network that was trained alone classifies each validation image correctly, [images].

    It is trained as a supernet of itself: by the code that trained the supernet, but from weights of its own shapes.
    """
    space, seeds = job.space.only(training.genotype), (job.experiment.seed, training.network, training.seed)
    try:
        params = train_supernet(
            Supernet(space),
            job.data,
            recipe.train,
            seed=int(np.random.SeedSequence(seeds).generate_state(1)[0] >> 1),  # int32 is what JAX takes
            folder=training.folder,
            progress=progress,
        )
    except CheckpointError as e:
        raise CheckpointError(
            f"{training.folder}: network {training.network} alone, as the supernet was trained: {e} Here: remove that "
            f"folder to train this network anew, or ask for fewer than {training.network} networks; others are kept."
        ) from e
    network = Standalone(in_float32(space.decode(())), job.data, batch_size=recipe.train.eval_batch_size)
    params = network.calibrate(params, images=recipe.train.calibration_images)
    return network.logits(params, job.data.val).argmax(-1) == job.data.val.labels


def _result(training: Training) -> Alone | None:
    path = training.folder / "result.json"
    if not path.exists():
        return None
    result = _read(path, Alone)
    if result.genotype != tuple(training.genotype.tolist()):
        raise _unusable(path, "it is of another network")
    if len(result.right) != -(-result.images // 8):
        raise _unusable(path, f"{len(result.right)} bytes are not a bit for each of {result.images} images")
    return result


def _read(path: Path, form: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=form)
    except (OSError, ValueError) as e:
        raise _unusable(path, str(e)) from e


def _unusable(path: Path, why: str) -> RunError:
    return RunError(f"{path}: cannot be used: {why}. Remove it and run `nas fidelity` again, which makes it anew.")
