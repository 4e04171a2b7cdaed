"""Stage 3: the search."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from nas import config, cost
from nas.data import load_data
from nas.evaluate import SubnetEvaluator
from nas.pipeline.job import Job
from nas.search import EXECUTORS, KNOWING, STRATEGIES, Front, Problem, Trial, Trials
from nas.search import search as run_search
from nas.space import load_space
from nas.supernet import Supernet


def search(job: Job) -> None:
    """Writes search/ (journal.jsonl, front.csv)."""
    settings = job.experiment.search
    best: list[Trial] = []

    def told(trial: Trial) -> None:
        best[:] = [min([*best, trial], key=lambda t: (t.correct is None, t.error))]
        values = {"best top-1": best[0].top1, "at ms": best[0].latency_ms}
        job.console.progress(trial.trial + 1, settings.trials, values)

    job.folder.require("train")
    job.limit  # noqa: B018  told before the workers start
    job.console.start(f"search: {settings.strategy}, {settings.trials} trials on {settings.executor}")
    trials = run(job, told)
    front = Front.of(trials)
    front.write_csv(job.path / "search" / "front.csv")
    winner = front.best(latency_ms=job.limit.ms)
    job.console.say(
        f"  {len(trials)} trials, {len(front)} on the front; best within {job.limit.ms:.4g} ms: top-1 "
        f"{winner.top1:.1%} (validation, inherited weights) at {winner.latency_ms:.4g} ms"
    )


def run(job: Job, on_trial: Callable[[Trial], None] | None = None) -> Trials:
    """The trials of the search: made now, or read back from the journal where they are all there."""
    settings = job.experiment.search
    problem = make_problem(job)
    known = {"problem": problem, "features": _features(job)} if settings.strategy in KNOWING else {}
    strategy = STRATEGIES[settings.strategy](problem.sizes, population=settings.population, **known)
    executor = EXECUTORS[settings.executor](
        "nas.pipeline.search:evaluator",
        {"experiment": msgspec.to_builtins(job.experiment)},
        {name: np.asarray(a) for name, a in job.supernet_params().items()},
        workers=settings.workers,
        address=settings.address,
        timeout_seconds=settings.timeout_seconds,
    )
    (job.path / "search").mkdir(exist_ok=True)
    smallest, largest = job.ends()
    return run_search(
        problem,
        strategy,
        executor,
        trials=settings.trials,
        lag=settings.lag,
        seed=job.experiment.seed,
        journal_path=job.path / "search" / "journal.jsonl",
        initial=[smallest, job.handmade(), largest],
        on_trial=on_trial,
    )


def _features(job: Job) -> Callable[[NDArray[np.uint8]], NDArray[np.float64]]:
    """MACs and parameters [n, 2] of genotypes."""
    space = job.space
    costs = [space.costs(cost.macs), space.costs(cost.parameters)]
    return lambda genotypes: np.stack([space.price(genotypes, each) for each in costs], axis=1)


def make_problem(job: Job) -> Problem:
    """The space under the latency limit, as the search sees it."""
    space, table, limit = job.space, job.tables[job.precision], job.limit
    _, smallest, _, _ = table.reachable(space)
    experiment = job.experiment
    meaning = [
        space.digest,
        job.data.digest,
        table.digest,
        limit.ms,
        experiment.seed,
        {k: v for k, v in msgspec.to_builtins(experiment.train).items() if k not in config.NEUTRAL},
        experiment.search.strategy,
        experiment.search.population,
    ]
    return Problem(
        sizes=space.sizes,
        canonical=space.canonical,
        cheap=lambda genotypes: table.price(space, genotypes)[:, None],
        feasible=lambda genotypes: table.price(space, genotypes) <= limit.ms,
        smallest=smallest,
        digest=hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16],
        total=len(job.data.val.labels),
    )


def evaluator(*, weights: Mapping[str, Any], experiment: dict[str, Any]) -> SubnetEvaluator:
    """Builds the evaluator inside a worker, from the experiment and the supernet's weights."""
    import jax

    settings = msgspec.convert(experiment, config.Experiment)
    data = load_data(settings.data)
    space = load_space(settings.space, input_shape=data.image_shape, classes=data.classes)
    return SubnetEvaluator(
        Supernet(space),
        {name: jax.device_put(a) for name, a in weights.items()},
        data,
        calibration_images=settings.train.calibration_images,
        batch_size=settings.train.eval_batch_size,
    )
