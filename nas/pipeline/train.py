"""Stage 2: the supernet."""

from nas.pipeline.job import Job
from nas.train import train_on_ray, train_supernet


def train(job: Job) -> None:
    """Writes supernet/ (Orbax checkpoints, metrics.jsonl)."""
    job.limit  # noqa: B018  an impossible limit is an error before training, not after
    settings = job.experiment.train
    job.console.start(f"train: supernet of {job.space.name}, {settings.epochs:g} epochs (compiling first)")
    folder, seed = job.path / "supernet", job.experiment.seed

    def progress(done: int, total: int, values: dict[str, float]) -> None:
        job.console.progress(done, total, _shown(values))

    if settings.processes == 1:
        train_supernet(job.supernet, job.data, settings, seed=seed, folder=folder, progress=progress)
        return
    data, space = job.experiment.data, job.experiment.space
    digests = job.space.digest, job.data.digest
    train_on_ray(data, space, settings, seed=seed, folder=folder, digests=digests, progress=progress)


def _shown(values: dict[str, float]) -> dict[str, float]:
    names = ("top1_largest", "top1_smallest", "top1_random", "images/s", "waiting")
    return {name: values[name] for name in names if name in values}
