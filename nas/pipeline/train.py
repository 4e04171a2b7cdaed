"""Stage 2: the supernet."""

import shlex
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nas.evaluate import SubnetEvaluator
from nas.pipeline.job import Job
from nas.train import Generation, Progress, train_on_ray, train_population, train_supernet


def train(job: Job) -> None:
    """Writes supernet/: Orbax checkpoints, metrics.jsonl, population.json where several were trained; on request
    TensorBoard events and a profile."""
    job.limit  # noqa: B018  an impossible limit is an error before training, not after
    settings = job.experiment.train
    folder = job.path / "supernet"
    several = "" if settings.population is None else f", {settings.population.members} of them"
    job.console.start(f"train: supernet of {job.space.name}{several}, {settings.epochs:g} epochs (compiling first)")
    if settings.tensorboard:
        job.console.say(f"  live: tensorboard --logdir {shlex.quote(str(folder))}")

    def progress(done: int, total: int, values: dict[str, float]) -> None:
        job.console.progress(done, total, _shown(values))

    seed = job.experiment.seed
    if settings.population is not None:
        _population(job, progress)
    elif settings.processes == 1:
        train_supernet(job.supernet, job.data, settings, seed=seed, folder=folder, progress=progress)
    else:
        data, space = job.experiment.data, job.experiment.space
        digests = job.space.digest, job.data.digest
        train_on_ray(data, space, settings, seed=seed, folder=folder, digests=digests, progress=progress)
    if settings.profile_steps and (folder / "profile").is_dir():
        job.console.say(f"  profile: {folder / 'profile'} (for ui.perfetto.dev, or for TensorBoard with xprof)")


def _population(job: Job, progress: Progress) -> None:
    """Trains several supernets, compared by their validation accuracy, and says how each generation did."""
    settings, images = job.experiment.train, len(job.data.val)

    def told(generation: Generation) -> None:
        job.console.say(_told(generation, images))

    train_population(
        job.supernet,
        job.data,
        settings,
        seed=job.experiment.seed,
        folder=job.path / "supernet",
        score=scorer(job),
        images=images,
        progress=progress,
        told=told,
    )


def scorer(job: Job) -> Callable[[Mapping[str, Any]], list[int]]:
    """Validation images that the smallest, random and the largest subnet classify correctly with given weights, their
    batch-norm statistics measured anew. The random ones are the same for all weights."""
    settings, space = job.experiment.train, job.space
    assert settings.population is not None
    drawn = space.sample(np.random.default_rng([job.experiment.seed, 6]), settings.population.subnets)
    genotypes = np.concatenate([space.smallest()[None], drawn, space.largest()[None]])
    evaluator: list[SubnetEvaluator] = []  # made with the first weights; the others share what it compiles

    def score(params: Mapping[str, Any]) -> list[int]:
        if not evaluator:
            evaluator.append(
                SubnetEvaluator(
                    job.supernet,
                    params,
                    job.data,
                    calibration_images=settings.calibration_images,
                    batch_size=settings.eval_batch_size,
                )
            )
        return evaluator[0].with_params(params)(genotypes)

    return score


def _told(generation: Generation, images: int) -> str:
    """One line on how a generation did: its best member, what that was trained with, and how many diverged."""
    scores, head = generation.scores, f"  interval {generation.interval + 1} of {generation.intervals}"
    diverged = int(np.isnan(scores).sum())
    if diverged == len(scores):
        return f"{head}: all {diverged} members diverged; again with other values"
    best = generation.members[int(np.nanargmax(scores))]
    assert best.correct is not None
    top1 = sum(best.correct) / (len(best.correct) * images)
    values = ", ".join(f"{key} {value:.4g}" for key, value in best.values.items())
    lost = f"; {diverged} of {len(scores)} diverged" if diverged else ""
    return (
        f"{head}: best is member {best.member + 1}, top-1 {top1:.1%} over {len(best.correct)} subnets ({values}){lost}"
    )


def _shown(values: Mapping[str, float]) -> dict[str, str]:
    """Speed, and loss and top-1 of the largest, random and smallest subnets of the last step, as trained."""
    kinds = [kind for kind in ("largest", "random", "smallest") if f"loss_{kind}" in values]
    seen = [f"{kind} {values[f'loss_{kind}']:.3f}/{values[f'top1_{kind}']:.1%}" for kind in kinds]
    speed = f"{values['images/s']:.0f}"
    where = {}
    if "member" in values:
        where = {"interval": f"{values['interval']:.0f}/{values['intervals']:.0f}", "member": f"{values['member']:.0f}"}
    return {**where, "images/s": speed, "waiting": f"{values['waiting']:.0%}", "loss/top-1": "  ".join(seen)}
