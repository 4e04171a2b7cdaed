"""Stage 3: the search."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from nas import config, cost
from nas.data import load_data
from nas.evaluate import SubnetEvaluator
from nas.pipeline.costs import cost_names, exact_costs, within
from nas.pipeline.job import Job
from nas.search import EXECUTORS, STRATEGIES, Front, Problem, Trial, Trials, feasible_only, make_strategy
from nas.search import search as run_search
from nas.search.executor import Evaluate
from nas.search.problem import images_of
from nas.space import load_space
from nas.space.space import Genotypes
from nas.supernet import Supernet


def search(job: Job) -> None:
    """Writes search/: journal.jsonl, front.csv; of several costs also front.<cost>.csv, of the error and each."""
    settings = job.experiment.search
    best: list[Trial] = []

    def told(trial: Trial) -> None:
        best[:] = [min([*best, trial], key=lambda t: (t.correct is None, -t.total, t.error))]
        values = {"best top-1": best[0].top1, "at ms": best[0].latency_ms}
        job.console.progress(trial.trial + 1, settings.trials, values)

    job.folder.require("train")
    job.limit  # noqa: B018  told before the workers start
    job.console.start(f"search: {settings.strategy}, {settings.trials} trials on {settings.executor}")
    trials = run(job, told)
    front = Front.of(trials)
    front.write_csv(job.path / "search" / "front.csv")
    names = cost_names(job.experiment)
    for name in names if len(names) > 1 else ():
        Front.of(trials, ("error", name)).write_csv(job.path / "search" / f"front.{name.replace('/', '_')}.csv")
    winner = front.best(latency_ms=job.limit.ms)
    job.console.say(
        f"  {len(trials)} trials, {len(front)} on the front; best within {job.limit.ms:.4g} ms: top-1 "
        f"{winner.top1:.1%} (validation, inherited weights) at {winner.latency_ms:.4g} ms"
    )


def run(job: Job, on_trial: Callable[[Trial], None] | None = None) -> Trials:
    """The trials of the search: made now, or read back from the journal where they are all there."""
    settings = job.experiment.search
    problem = make_problem(job)
    factory = STRATEGIES[settings.strategy]
    strategy = make_strategy(
        factory, problem, population=settings.population, features=_features(job), settings=settings.settings
    )
    if settings.feasible_only:
        strategy = feasible_only(strategy, problem)
    executor = EXECUTORS[settings.executor](
        "nas.pipeline.search:evaluator",
        {"experiment": msgspec.to_builtins(job.experiment), "shares": strategy.shares},
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
    """The space under the limits, as the search sees it."""
    space, costs, names = job.space, exact_costs(job), cost_names(job.experiment)
    experiment = job.experiment
    meaning = [
        space.digest,
        job.data.digest,
        [[c.name, c.digest, c.limit if np.isfinite(c.limit) else None] for c in costs],
        experiment.seed,
        config.deciding(experiment.train),
        experiment.search.strategy,
        experiment.search.population,
    ]
    objectives = costs[: len(names)]

    def cheap(genotypes: Genotypes) -> NDArray[np.float64]:
        return np.stack([c.price(genotypes) for c in objectives], axis=1)

    def feasible(genotypes: Genotypes) -> NDArray[np.bool_]:
        out = np.ones(len(genotypes), bool)
        for c in costs:  # without a limit: every device can run it
            out &= c.bound(genotypes) <= min(c.limit, np.finfo(float).max)
        return out

    return Problem(
        sizes=space.sizes,
        canonical=space.canonical,
        cheap=cheap,
        feasible=feasible,
        smallest=within(space, costs),
        digest=hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16],
        total=len(job.data.val.labels),
        cheap_names=names,
    )


def evaluator(*, weights: Mapping[str, Any], experiment: dict[str, Any], shares: Sequence[float] = (1.0,)) -> Evaluate:
    """Builds the evaluator inside a worker, from the experiment and the supernet's weights.

    With several `shares` of the validation images, a last gene says which: the first so many of them, in the random
    order that they have.
    """
    import jax

    settings = msgspec.convert(experiment, config.Experiment)
    data = load_data(settings.data)
    space = load_space(settings.space, input_shape=data.image_shape, classes=data.classes)
    supernet, params = Supernet(space), {name: jax.device_put(a) for name, a in weights.items()}

    def on(images: int) -> SubnetEvaluator:
        part = data if images == len(data.val) else dataclasses.replace(data, val=data.val.take(np.arange(images)))
        return SubnetEvaluator(
            supernet,
            params,
            part,
            calibration_images=settings.train.calibration_images,
            batch_size=settings.train.eval_batch_size,
        )

    if len(shares) == 1:
        return on(len(data.val))
    evaluators = [on(images_of(share, len(data.val))) for share in shares]
    return lambda genotypes: [evaluators[g[-1]](g[None, :-1])[0] for g in genotypes]
