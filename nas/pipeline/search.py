"""Stage 3: the search."""

import dataclasses
import functools
import hashlib
import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from nas import config, cost, kernels
from nas.data import load_data
from nas.evaluate import SubnetEvaluator
from nas.evaluate.proxies import additive, naswot
from nas.evaluate.subnets import Counted
from nas.files import read_as, write_json
from nas.measure import hardware
from nas.pipeline.costs import (
    Cost,
    beyond,
    cost_names,
    exact_costs,
    handmade,
    least_of,
    minimised,
    require_countable,
    within,
)
from nas.pipeline.job import Job
from nas.pipeline.measure import version
from nas.search import (
    EXECUTORS,
    STRATEGIES,
    Cache,
    Front,
    Problem,
    Progress,
    Setting,
    Strategy,
    Trial,
    Trials,
    feasible_only,
    following,
    make_strategy,
)
from nas.search import search as run_search
from nas.search.accuracy import Least
from nas.search.accuracy import told as told_limits
from nas.search.executor import Evaluate
from nas.search.problem import images_of
from nas.space import Space, load_space
from nas.space.space import Genotypes
from nas.supernet import Supernet

PROXIES = ("none", "naswot")

_PROXIED, _PROXY_IMAGES = 64, 32  # random networks that the proxy is computed of, and images of each


def search(job: Job) -> None:
    """Writes search/: journal.jsonl, front.csv; of several costs also front.<cost>.csv, of the error and each."""
    settings = job.experiment.search
    job.folder.require("train")
    job.limit  # noqa: B018  told before the workers start
    job.console.start(f"search: {settings.strategy}, {settings.trials} trials on {settings.executor}")
    start = journalled(job.path / "search" / "journal.jsonl")
    workers = 1 if settings.executor == "inline" else settings.workers
    objectives, least = minimised(job.experiment), least_of(job.experiment.least)
    progress = Progress(_reference(job), workers=workers, start=start, costs=objectives, least=least)

    def told(trial: Trial) -> None:
        progress.add(trial)
        tell(trial)
        if trial.trial >= start:
            job.console.progress(trial.trial + 1, settings.trials, progress.values())

    names, folder = followers(settings), job.path / "search"
    with following(names, folder=folder, start=start, name=job.experiment.name) as tell:
        trials = run(job, told)
    setting = Setting(job.space, accuracy=job.experiment.accuracy, least=least)
    front = Front.of(trials, objectives, setting)
    front.write_csv(job.path / "search" / "front.csv")
    names = cost_names(job.experiment)
    for name in names if len(names) > 1 else ():
        Front.of(trials, ("error", name), setting).write_csv(
            job.path / "search" / f"front.{name.replace('/', '_')}.csv"
        )
    nearest = None if len(front) else front.nearest
    winner = front.best() if nearest is None else nearest
    word = "best" if job.experiment.maximised else "cheapest"
    best = (
        f"{word} within {job.limit.ms:.4g} ms" if len(front) else f"NONE reaches {told_limits(least)}, the nearest has"
    )
    in_int8 = ", int8" * (job.experiment.counted == "int8")
    further = "".join(f", {name} {share:.1%}" for name, share in winner.shares.items())
    job.console.say(
        f"  {len(trials)} trials, {len(front)} on the front; {best}: top-1 {winner.top1:.1%}{further} (validation, "
        f"inherited weights{in_int8}) at {winner.latency_ms:.4g} ms"
    )
    for exceeded in beyond(exact_costs(job), np.array(winner.genotype, np.uint8)):
        job.console.say(f"  its {exceeded}")


def followers(settings: config.Search) -> list[str]:
    """The names in CALLBACKS of what the search is followed in besides the console."""
    return ["tensorboard"] * settings.tensorboard + ([] if settings.tracker is None else [settings.tracker])


def journalled(path: Path) -> int:
    """How many trials an earlier process left in the journal; 0 where it cannot be read: who opens it tells why."""
    try:
        return max(0, path.read_bytes().count(b"\n") - 1)
    except OSError:
        return 0


def _reference(job: Job) -> list[float]:
    """The worst value of each objective, errors first: the limit, or the most that any network of the space has."""
    worst = {c.name: c.tolerated if np.isfinite(c.tolerated) else c.most for c in exact_costs(job)}
    return [worst.get(name, 1.0) for name in minimised(job.experiment)]


def run(job: Job, on_trial: Callable[[Trial], None] | None = None) -> Trials:
    """The trials of the search: made now, or read back from the journal where they are all there."""
    settings = job.experiment.search
    problem = make_problem(job)
    strategy = strategy_of(job, problem)
    weights = {name: np.asarray(a) for name, a in job.supernet_params().items()}
    executor = EXECUTORS[settings.executor](
        "nas.pipeline.search:evaluator",
        {"experiment": msgspec.to_builtins(job.experiment), "shares": strategy.shares},
        weights,
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
        initial=[smallest, handmade(job), largest],
        cache=_cache(job, weights),
        on_trial=on_trial,
    )


def _cache(job: Job, weights: Mapping[str, NDArray[Any]]) -> Cache | None:
    """The counts that are known of these weights, whatever search, limits or device they were made for.

    As this program computes them on this machine, that is: by another version, on another CPU or with other kernels the
    last bits of logits are others, and now and then one decides an answer. Workers elsewhere are taken to be like this
    machine.
    """
    import jax

    experiment = job.experiment
    if experiment.search.cache == "off":
        return None
    digest = hashlib.sha256()
    for name, array in sorted(weights.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    train = experiment.train
    meaning = [job.space.digest, job.data.digest, digest.hexdigest(), train.calibration_images, train.eval_batch_size]
    counted = [config.ACCURACIES[name] for name in experiment.accuracies]
    meaning += [] if counted == ["float32"] else counted
    folder = job.path / "evaluations" if experiment.search.cache == "run" else experiment.search.cache
    meaning += [jax.__version__, version("nas"), hardware(), *kernels.computed_by()]
    return Cache(folder, json.dumps(meaning))


def strategy_of(job: Job, problem: Problem) -> Strategy:
    """As the experiment has it.

    Raises:
        ConfigError: its settings do not go together, or not with the problem.
    """
    settings = job.experiment.search
    strategy = make_strategy(
        STRATEGIES[settings.strategy],
        problem,
        population=settings.population,
        features=_features(job),
        settings=settings.settings,
    )
    return feasible_only(strategy, problem) if settings.feasible_only else strategy


def sizes_of(space: Space) -> Callable[[Genotypes], NDArray[np.float64]]:
    """MACs and parameters [n, 2] of genotypes."""
    costs = [space.costs(cost.macs), space.costs(cost.parameters)]
    return lambda genotypes: np.stack([space.price(genotypes, each) for each in costs], axis=1)


def _features(job: Job) -> Callable[[Genotypes], NDArray[np.float64]]:
    """MACs, parameters and, where one was asked for, the proxy [n, 2 or 3] of genotypes; positive."""
    sizes = sizes_of(job.space)
    if job.experiment.search.proxy == "none":
        return sizes

    @functools.cache
    def proxy() -> Callable[[Genotypes], NDArray[np.float64]]:
        return additive(job.space, *_proxied(job))  # when it is first asked for: it takes seconds

    # features are taken logarithms of
    return lambda genotypes: np.column_stack([sizes(genotypes), np.exp(proxy()(genotypes))])


def _proxied(job: Job) -> tuple[Genotypes, NDArray[np.float64]]:
    """Random genotypes [n, genes] and their scores [n], computed once: search/proxy.json.

    Kept, since the last bits of a score may differ where a search is continued on another machine.
    """
    path = job.path / "search" / "proxy.json"
    if not path.exists():
        genotypes = job.space.sample(np.random.default_rng([job.experiment.seed, 3]), _PROXIED)
        params = job.supernet.init(job.experiment.seed)
        rows = np.random.default_rng([job.experiment.seed, 4]).permutation(len(job.data.train))[:_PROXY_IMAGES]
        scores, sides = np.zeros(len(genotypes)), job.space.resolution_of(genotypes)
        for side in np.unique(sides).tolist():
            height, width, _ = job.space.at(side).input
            images = job.data.normalise(job.data.train.images[rows], (height, width))
            scores[sides == side] = naswot(job.supernet, params, images)(genotypes[sides == side])
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"genotypes": genotypes.tolist(), "scores": scores.tolist()})
    known = read_as(path, _Proxied, stage="search")
    return np.array(known.genotypes, np.uint8), np.array(known.scores)


class _Proxied(msgspec.Struct):
    """proxy.json."""

    genotypes: list[list[int]]
    scores: list[float]


def make_problem(job: Job) -> Problem:
    """The space under the limits, as the search sees it."""
    require_countable(job.space, job.experiment.accuracies)
    space, costs, names = job.space, exact_costs(job), cost_names(job.experiment)
    experiment = job.experiment
    meaning = [
        space.digest,
        job.data.digest,
        [[c.name, c.digest, c.tolerated if np.isfinite(c.tolerated) else None] for c in costs],
        experiment.seed,
        config.deciding(experiment.train),
        experiment.search.strategy,
        population_told(experiment.search.population),
        *([experiment.search.proxy] if experiment.search.proxy != "none" else []),
        *([experiment.counted] if experiment.counted != "float32" else []),
        *accuracy_digest(experiment.accuracies, least_of(experiment.least), minimised(experiment), names),
    ]
    digest = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]
    return problem_of(
        space,
        costs,
        names,
        digest=digest,
        total=len(job.data.val.labels),
        accuracies=experiment.accuracies,
        least=least_of(experiment.least),
        objectives=minimised(experiment),
    )


def population_told(population: int | None) -> int:
    """As journals have always had it in the digest of their problem; what it is, the strategy's identity says."""
    return 32 if population is None else population


def accuracy_digest(
    accuracies: Sequence[str], least: Mapping[str, Least], objectives: Sequence[str], names: Sequence[str]
) -> list[Any]:
    """What tells searches apart by their accuracies; nothing where one is counted, and all costs are objectives."""
    limits = [[name, limit.tolerated] for name, limit in sorted(least.items())]
    usual = len(accuracies) == 1 and not least and tuple(objectives) == ("error", *names)
    return [] if usual else [list(accuracies), limits, list(objectives)]


def problem_of(
    space: Space,
    costs: Sequence[Cost],
    names: tuple[str, ...],
    *,
    digest: str,
    total: int,
    accuracies: tuple[str, ...] = ("top1",),
    least: Mapping[str, Least] = types.MappingProxyType({}),
    objectives: tuple[str, ...] | None = None,
) -> Problem:
    """The space under the limits of `costs`, of which the first, `names`, are told of trials; and of `least`.

    `objectives` are what is minimised of errors and `names`, all if None.
    """
    told = costs[: len(names)]

    def cheap(genotypes: Genotypes) -> NDArray[np.float64]:
        return np.stack([c.price(genotypes) for c in told], axis=1) if told else np.zeros((len(genotypes), 0))

    def feasible(genotypes: Genotypes) -> NDArray[np.bool_]:
        out = np.ones(len(genotypes), bool)
        for c in costs:  # without a limit: every device can run it
            out &= c.bound(genotypes) <= min(c.tolerated, np.finfo(float).max)
        return out

    return Problem(
        sizes=space.sizes,
        canonical=space.canonical,
        cheap=cheap,
        feasible=feasible,
        smallest=within(space, costs) if costs else space.canonical(np.zeros((1, len(space.sizes)), np.uint8))[0],
        digest=digest,
        total=total,
        cheap_names=names,
        accuracies=accuracies,
        least=least,
        minimised=objectives,
        reach={c.name: (c.least, min(c.tolerated, c.most)) for c in told},
    )


def evaluator(
    *,
    weights: Mapping[str, Any],
    experiment: dict[str, Any],
    shares: Sequence[float] = (1.0,),
    accuracies: Sequence[str] = (),
) -> Evaluate:
    """Builds the evaluator inside a worker, from the experiment and the supernet's weights; it counts `accuracies`,
    those of the experiment if none are given.

    With several `shares` of the validation images, a last gene says which: the first so many of them, in the random
    order that they have.
    """
    import jax

    settings = msgspec.convert(experiment, config.Experiment)
    data = load_data(settings.data)
    space = load_space(settings.space, input_shape=data.image_shape, classes=data.classes)
    supernet, params = Supernet(space), {name: jax.device_put(a) for name, a in weights.items()}
    precisions: list[Counted] = [config.ACCURACIES[name] for name in accuracies or settings.accuracies]

    def on(images: int) -> Evaluate:
        part = data if images == len(data.val) else dataclasses.replace(data, val=data.val.take(np.arange(images)))
        evaluate = SubnetEvaluator(
            supernet,
            params,
            part,
            calibration_images=settings.train.calibration_images,
            batch_size=settings.train.eval_batch_size,
            precision="mixed" if space.mixed else precisions[0],
            also=tuple(precisions[1:]),
        )
        return evaluate.counts if evaluate.also else evaluate

    if len(shares) == 1:
        return on(len(data.val))
    evaluators = [on(images_of(share, len(data.val))) for share in shares]
    return lambda genotypes: [evaluators[g[-1]](g[None, :-1])[0] for g in genotypes]
