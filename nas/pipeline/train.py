"""Stage 2: the supernet."""

from nas.pipeline.job import Job
from nas.train import train_supernet


def train(job: Job) -> None:
    """Writes supernet/ (Orbax checkpoints, metrics.jsonl)."""
    job.limit  # noqa: B018  an impossible limit is an error before training, not after
    settings = job.experiment.train
    job.console.start(f"train: supernet of {job.space.name}, {settings.epochs:g} epochs (compiling first)")
    train_supernet(
        job.supernet,
        job.data,
        settings,
        seed=job.experiment.seed,
        folder=job.path / "supernet",
        progress=lambda done, total, values: job.console.progress(done, total, _shown(values)),
    )


def _shown(values: dict[str, float]) -> dict[str, float]:
    names = ("top1_largest", "top1_smallest", "top1_random", "images/s", "waiting")
    return {name: values[name] for name in names if name in values}
