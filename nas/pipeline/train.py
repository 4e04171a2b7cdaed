"""Stage 2: the supernet."""

import shlex
from collections.abc import Mapping

from nas.pipeline.job import Job
from nas.train import train_on_ray, train_supernet


def train(job: Job) -> None:
    """Writes supernet/: Orbax checkpoints, metrics.jsonl; on request TensorBoard events and a profile."""
    job.limit  # noqa: B018  an impossible limit is an error before training, not after
    settings = job.experiment.train
    folder = job.path / "supernet"
    job.console.start(f"train: supernet of {job.space.name}, {settings.epochs:g} epochs (compiling first)")
    if settings.tensorboard:
        job.console.say(f"  live: tensorboard --logdir {shlex.quote(str(folder))}")

    def progress(done: int, total: int, values: dict[str, float]) -> None:
        job.console.progress(done, total, _shown(values))

    seed = job.experiment.seed
    if settings.processes == 1:
        train_supernet(job.supernet, job.data, settings, seed=seed, folder=folder, progress=progress)
    else:
        data, space = job.experiment.data, job.experiment.space
        digests = job.space.digest, job.data.digest
        train_on_ray(data, space, settings, seed=seed, folder=folder, digests=digests, progress=progress)
    if settings.profile_steps and (folder / "profile").is_dir():
        job.console.say(f"  profile: {folder / 'profile'} (for ui.perfetto.dev, or for TensorBoard with xprof)")


def _shown(values: Mapping[str, float]) -> dict[str, str]:
    """Speed, and loss and top-1 of the largest, random and smallest subnets of the last step, as trained."""
    kinds = [kind for kind in ("largest", "random", "smallest") if f"loss_{kind}" in values]
    seen = [f"{kind} {values[f'loss_{kind}']:.3f}/{values[f'top1_{kind}']:.1%}" for kind in kinds]
    speed = f"{values['images/s']:.0f}"
    return {"images/s": speed, "waiting": f"{values['waiting']:.0%}", "loss/top-1": "  ".join(seen)}
