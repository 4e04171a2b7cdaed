"""`nas.search(...)`: a search from Python, with an evaluation of one's own or with a supernet trained before."""

import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from nas import config
from nas.config import Experiment, nearest
from nas.console import Console
from nas.errors import ConfigError, EvaluateError, NasError
from nas.latency import LatencyModel, Table, device_folder, find_model
from nas.pipeline.costs import Cost, errors_of, exact_costs, least_of, minimised, require_countable
from nas.pipeline.job import Job
from nas.pipeline.problem import Limit, accuracies_of, counted, features_of, latency_on, limits_of, name_of
from nas.pipeline.search import accuracy_digest, journalled, population_told, problem_of, sizes_of
from nas.runfolder import RunFolder
from nas.search import (
    EXECUTORS,
    STRATEGIES,
    Front,
    Progress,
    Setting,
    Trial,
    feasible_only,
    make_strategy,
    read_trials,
)
from nas.search import search as run_search
from nas.search.executor import Count, Evaluate
from nas.search.problem import without_share
from nas.search.strategy import Genotypes
from nas.space import Space, load_space

_HOPELESS = 8  # evaluations that all fail, from the first on: it is the function's fault, not the networks'


def search(
    space: str | Path | Space | Mapping[str, Sequence[Any]] | Experiment,
    *,
    evaluate: Callable[..., float] | str | None = None,
    decode: bool = True,
    images: int = 10_000,
    device: str | None = None,
    precision: str | None = None,
    latency_ms: Limit | None = None,
    objectives: Sequence[str] | None = None,
    limits: Mapping[str, Limit] | None = None,
    costs: Mapping[str, Callable[[Genotypes], ArrayLike]] | None = None,
    features: Callable[[Genotypes], ArrayLike] | None = None,
    strategy: str = "predictor",
    trials: int = 200,
    seed: int = 0,
    population: int | None = None,
    settings: Mapping[str, float | int] | None = None,
    only_feasible: bool = False,
    lag: int = 8,
    initial: Sequence[ArrayLike] | None = None,
    journal: str | Path | None = None,
    executor: str = "inline",
    workers: int = 2,
    address: str = "local",
    timeout_seconds: float = 300.0,
    input_shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    out: str | Path | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    quiet: bool = False,
) -> Front:
    """Searches a space under limits, and returns the front of the error and the costs.

    What the space can reach in every cost is told first, and limits that no network can meet are refused then.

    Examples:
        >>> nas.search("ofa_mobilenet_v3_w12", evaluate=top1, device="note10", latency_ms=20, trials=500)
        >>> nas.search("ofa_mobilenet_v3_w12", evaluate=top1, device="note10", limits={"top1": 0.78})  # the fastest
        >>> nas.search(space, evaluate=top1, device="note10", latency_ms=20, objectives=["top1", "macs"])
        >>> nas.search("runs/quickstart", latency_ms="30%", strategy="nsga2")  # by the supernet trained there
        >>> nas.search({"op1": ["conv", "pool"], "op2": ["conv", "pool"]}, evaluate=top1, costs={"latency_ms": price})
        >>> nas.search(nas.load_experiment("experiments/quickstart.toml"))  # as `nas search`

    Args:
        space: a name of `nas.list_spaces()`, a path or a `nas.Space`; a run folder, whose trained supernet then
            evaluates; a mapping of choices to their values, where no network needs to be built; or an experiment,
            which says all the rest but `out`, the run folder.
        evaluate: gives the top-1 accuracy, 0 to 1, of one network (`nas.Network`; of a mapping: of {choice: value});
            or {"top1": ..., "top1_int8": ...}, where `objectives` or `limits` name both.
            Or "package.module:function"; executor "processes" needs one that can be imported under such a name. An
            exception is that trial's failure. A strategy that evaluates on shares of the images passes `share=` too.
        decode: with False, `evaluate` is given the genotype, uint8 [genes].
        images: that accuracies are counted over: they are kept as numbers of correct images, so that results are equal
            everywhere. 10,000 keeps four digits.
        device: whose table prices `latency_ms`, which every trial then tells; a name of `nas.list_devices()` or a
            path. Of a run folder: that of the run if None.
        precision: of latencies: float32 if None; of a run folder, that of its limit.
        latency_ms: the limit on it, in ms or as "50%" of the reachable range.
        objectives: all that is optimised, by name, as an experiment has it: accuracies to maximise, "top1",
            "top1_int8"; costs to minimise, macs, params, latency_ms, latency_ms@DEVICE and what else experiments may
            name; and those in `costs`. What is not named can still have a limit. If None: top1, unless an accuracy has
            a limit, which then is all that is asked of it; the latency on `device`, and all `costs`, or macs where
            there is neither.
        limits: of objectives, of other costs, of those in `costs`, and of accuracies: {"macs": 3e8, "top1": 0.9} looks
            for costs as low as can be with at most 300 million MACs and a top-1 of at least .9. With tolerance:
            {"latency_ms": {"at_most": 20, "tolerance": "5%"}, "top1": {"at_least": 0.9, "tolerance": 0.01}}.
        costs: of one's own: [n, genes] genotypes to [n] values, exact and quick; every trial tells them.
        features: what else is known of networks without evaluating them, [n, genes] to [n, k], above 0: strategy
            "predictor" learns from their logarithms too. MACs and parameters if None, where networks are built.
        strategy: a name of `nas list strategies`.
        trials: how many networks to evaluate.
        seed: of all randomness.
        population: of the strategy, as far as it has one; its own default if None.
        settings: of the strategy's own, by name.
        only_feasible: ask the strategy for more until enough is within the limits.
        lag: trial k is proposed from the results of trials 0..k-lag; at least the number of workers.
        initial: genotypes to evaluate first; the cheapest network of each cost, and the largest, if None.
        journal: file that keeps the trials; the same call goes on from it after a crash. If None, nothing is kept.
        executor: where to evaluate: a name in `nas.search.EXECUTORS`.
        workers: of the executor.
        address: of a Ray cluster; "local" starts one of its own.
        timeout_seconds: for one evaluation, where the executor can end it.
        input_shape: of images, for a space without a resolution of its own. If None: as the device's table has it.
        classes: likewise.
        out: the run folder, where `space` is an experiment.
        on_trial: called after each trial, in order.
        quiet: print nothing.

    Raises:
        LimitError: no network can meet the limits; it has what the space can reach.
        ConfigError: arguments that do not fit together, or an unknown name, with the nearest known one.
        DeviceError, UnmeasuredBlock: the device is unknown, or has no table of this space.
        JournalError: the journal is damaged, in use, or of another search.
        ExecutorError: the workers cannot do their work.
        EvaluateError: every evaluation fails.
    """
    console = Console(io.StringIO()) if quiet else Console()
    if isinstance(space, Experiment):
        given = (evaluate, device, objectives, limits or None, costs or None, latency_ms)
        if any(argument is not None for argument in given):
            raise ConfigError(
                "an experiment says itself what is searched and how: give `out` at most, and change the rest with "
                '`nas.load_experiment(path, overrides=["search.trials=400"])`.'
            )
        return _of_experiment(space, out, console)
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown strategy {strategy!r}.{nearest(strategy, STRATEGIES, kind='name')}")
    if executor not in EXECUTORS:
        raise ConfigError(f"unknown executor {executor!r}.{nearest(executor, EXECUTORS, kind='name')}")
    for name, number, least in (
        ("trials", trials, 1), ("lag", lag, 1), ("images", images, 1), ("workers", workers, 1), ("seed", seed, 0),
    ):  # fmt: skip
        if not isinstance(number, int | np.integer) or number < least:
            raise ConfigError(f"{name} {number!r}: a whole number from {least} on is needed.")

    own, asked = dict(costs or {}), limits_of(limits, latency_ms)
    with contextlib.ExitStack() as stack:
        if journal is None:
            journal = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "journal.jsonl"
        source = _source(
            space, evaluate, device=device, precision=precision, images=images, decode=decode,
            input_shape=input_shape, classes=classes, console=console,
        )  # fmt: skip
        accuracies, maximised, least = accuracies_of(objectives, asked, source.accuracies)
        if source.weights is not None:  # of a supernet, which counts
            require_countable(source.space, accuracies)
        found, names, minimal = counted(source.space, source.models, objectives, asked, own, source.precision)
        aims = (*errors_of(accuracies, maximised), *minimal)
        for cost in found:
            console.say(f"  {cost}")
        for name, limit in least.items():
            console.say(f"  {name}: {limit}; which networks reach that is known when they are evaluated")
        meaning = [
            source.space.digest,
            source.meaning,
            source.images,
            [[c.name, c.digest, *_limits(c)] for c in found],
            population_told(population),
            *accuracy_digest(accuracies, least, aims, names),
        ]
        digest = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]
        problem = problem_of(
            source.space, found, names, digest=digest, total=source.images, accuracies=accuracies, least=least,
            objectives=aims,
        )  # fmt: skip
        known = None if features is None else features_of(source.space, features)
        if known is None and source.space.positions:
            known = sizes_of(source.space)
        proposed = make_strategy(
            STRATEGIES[strategy], problem, population=population, features=known, settings=settings or {}
        )
        if only_feasible:
            proposed = feasible_only(proposed, problem)
        if initial is None:
            initial = [problem.smallest, *(c.cheapest for c in found)]
            initial += [source.space.largest()] if source.space.positions else []
        arguments = _portable(source.arguments, source.told) if executor == "processes" else source.arguments
        with EXECUTORS[executor](
            source.factory,
            {**arguments, "shares": proposed.shares, "accuracies": accuracies},
            source.weights,
            workers=workers,
            address=address,
            timeout_seconds=timeout_seconds,
        ) as evaluating:
            begun = journalled(Path(journal))
            worst = [problem.reach[name][1] if name in problem.reach else 1.0 for name in aims]
            busy = 1 if executor == "inline" else workers
            progress = Progress(worst, workers=busy, start=begun, costs=aims, least=least)
            console.start(f"search: {strategy}, {trials} trials")
            done = run_search(
                problem,
                proposed,
                evaluating,
                trials=trials,
                lag=lag,
                seed=seed,
                journal_path=journal,
                initial=[source.space.check(g) for g in initial],
                on_trial=_told(console, trials, progress, begun, on_trial),
            )
    if len(done) and all(trial.failure is not None for trial in done):  # of a space that ended before
        raise _hopeless(done[-1])
    finite = {c.name: c.limit for c in found if math.isfinite(c.limit)}
    setting = Setting(source.space, source.device, _models(found), finite, problem.accuracies[0], least)
    front = Front.of(done, aims, setting)
    if least and not len(front) and front.evaluated:
        console.say(repr(front))
    return front


def _limits(cost: Cost) -> list[float | None]:
    """The limit of a cost, and what its tolerance lets pass, if it has one."""
    if not math.isfinite(cost.limit):
        return [None]
    return [cost.limit, cost.tolerated] if cost.tolerated > cost.limit else [cost.limit]


@dataclasses.dataclass(frozen=True)
class _Source:
    """What is searched, and what evaluates it."""

    space: Space
    factory: str  # of the evaluator
    arguments: dict[str, Any]
    weights: Mapping[str, NDArray[Any]] | None
    meaning: Any  # what evaluations depend on, for the journal
    images: int
    device: str | None
    precision: str  # of latencies
    models: dict[str, LatencyModel]  # {"latency_ms": ...}, or none
    _: dataclasses.KW_ONLY
    told: Any = None  # the space in JSON, as `_made` makes it again
    accuracies: tuple[str, ...] = ("top1",)  # that are counted where nothing else is asked for


def _source(
    what: str | Path | Space | Mapping[str, Sequence[Any]],
    evaluate: Callable[..., float] | str | None,
    *,
    device: str | None,
    precision: str | None,
    images: int,
    decode: bool,
    input_shape: tuple[int, int, int] | None,
    classes: int | None,
    console: Console,
) -> _Source:
    if isinstance(what, str | Path) and (Path(what) / "config.toml").is_file():
        if evaluate is not None:
            raise ConfigError(
                f"{what} is a run folder, whose supernet evaluates: leave `evaluate` out, or give a space."
            )
        return _of_run(Path(what), device, precision, console)
    precision = precision or "float32"
    if isinstance(what, Mapping):
        if not what:
            raise ConfigError('the space has no choices: give {"name": [value, value], ...}.')
        for choice, values in what.items():
            if not isinstance(values, Sequence | np.ndarray):
                raise ConfigError(f"choice {choice!r} is {values!r}: a list of values is needed, even of a single one.")
        space = Space.of_choices(what)
    elif isinstance(what, Space):
        space = what
    else:
        space = _loaded(str(what), device, precision, input_shape, classes)
    if evaluate is None:
        raise ConfigError(
            f"what evaluates the networks of {space.name!r}? Give `evaluate=`, a function from a network to its top-1 "
            f"(0 to 1); or, as `space`, the run folder of an experiment whose supernet is trained, or the experiment."
        )
    if isinstance(evaluate, str):
        _imported(evaluate)  # a mistake in the name is told before anything is written
    elif not callable(evaluate):
        raise ConfigError(f"evaluate is {evaluate!r}: a function, or 'package.module:function', is needed.")
    console.say(
        f"space: {space}" if space.positions else f"space: {len(space.choices)} choices, {space.count():,} ways"
    )
    precision = "mixed" if space.mixed else precision
    models = latency_on(space, device, precision)
    arguments = {"space": space, "evaluate": evaluate, "decode": decode, "images": images}
    told: dict[str, Any] = {"choices": {c.name: c.values for c in space.choices}}
    if space.positions:
        known_as = what.name if isinstance(what, Space) else str(what)
        told = {"name": known_as, "input_shape": space.input, "classes": space.classes}
    name = None if device is None else _device_name(device)
    return _Source(
        space,
        "nas.pipeline.direct:evaluator",
        arguments,
        None,
        [name_of(evaluate), decode],
        images,
        name,
        precision,
        models,
        told=told,
    )


def _loaded(
    name: str, device: str | None, precision: str, shape: tuple[int, int, int] | None, classes: int | None
) -> Space:
    """A named space, for the images and classes that the device's table of it was made for where none are given."""
    given: dict[str, Any] = {k: v for k, v in (("input_shape", shape), ("classes", classes)) if v is not None}
    known: dict[str, Any] = {}
    if device is not None:
        with contextlib.suppress(NasError):  # no such table: `find_model` says what is missing
            table = Table.load(device_folder(device) / Path(name).stem, precision)
            known = {"input_shape": table.input, "classes": table.classes} if table.input else {}
    return load_space(name, **(known | given))


def _of_run(path: Path, device: str | None, precision: str | None, console: Console) -> _Source:
    """The trained supernet of a run folder. Its own journal is not touched."""
    experiment = config.load_experiment(path / "config.toml")
    with RunFolder(path, experiment) as folder:
        job = Job(experiment, folder, console)
        space, precision = job.space, precision or job.precision
        model = job.tables[precision] if device is None else find_model(device, precision, space)[0]
        weights = {name: np.asarray(a) for name, a in job.supernet_params().items()}
        images = len(job.data.val.labels)
    counted = [experiment.counted] if experiment.counted != "float32" else []
    return _Source(
        space,
        "nas.pipeline.search:evaluator",
        {"experiment": msgspec.to_builtins(experiment)},
        weights,
        [job.data.digest, experiment.seed, config.deciding(experiment.train), *counted],
        images,
        _device_name(device or experiment.device),
        precision,
        {"latency_ms": model},
        accuracies=experiment.accuracies,
    )


def _portable(arguments: Mapping[str, Any], told: Any) -> dict[str, Any]:
    """The arguments of an evaluator as JSON has them, for workers that are programs of their own; `told` is the space.

    Raises:
        ConfigError: the function, or the space, is nothing that another process can find.
    """
    if "space" not in arguments:
        return dict(arguments)
    space, evaluate = arguments["space"], arguments["evaluate"]
    if not isinstance(evaluate, str):
        name = f"{getattr(evaluate, '__module__', '')}:{name_of(evaluate)}"
        with contextlib.suppress(ConfigError):
            evaluate = name if name.partition(":")[0] != "__main__" and _imported(name) is evaluate else evaluate
        if not isinstance(evaluate, str):
            raise ConfigError(
                f'executor "processes" evaluates in programs of their own, which cannot import {name!r}. Put the '
                f"function in a module file, outside of other functions, and give evaluate='module:function'; or take "
                f'executor "ray", to which functions are sent, or "inline".'
            )
    try:
        told = json.loads(json.dumps(told))
        made = _made(told)
        same = made.choices == space.choices and made.digest == space.digest
    except (TypeError, NasError):
        same = False
    if not same:
        what = "by its name or path" if space.positions else "with numbers, text or lists of them as values"
        raise ConfigError(
            f'executor "processes" evaluates in programs of their own, which cannot make space {space.name!r} anew. '
            f'Give it {what}; or take executor "ray" or "inline".'
        )
    return {**arguments, "space": told, "evaluate": evaluate}


def _made(told: Mapping[str, Any]) -> Space:
    """A space from how workers are told of it."""
    if "choices" in told:
        return Space.of_choices(told["choices"])
    return load_space(told["name"], input_shape=tuple(told["input_shape"]), classes=told["classes"])


def evaluator(
    *,
    space: Space | Mapping[str, Any],
    evaluate: Callable[..., float] | str,
    decode: bool,
    images: int,
    shares: Sequence[float] = (1.0,),
    accuracies: Sequence[str] = ("top1",),
) -> Evaluate:
    """Counts as the engine wants them, of a function that gives shares; built inside a worker."""
    function = _imported(evaluate) if isinstance(evaluate, str) else evaluate
    space = space if isinstance(space, Space) else _made(space)

    def share(name: str, value: Any) -> float:
        top1 = float(value)
        if not 0 <= top1 <= 1:
            of = "" if len(accuracies) == 1 else f" as {name}"
            raise ValueError(
                f"evaluate gave {top1:g}{of}: a top-1 accuracy from 0 to 1 is needed, not percent, no loss"
            )
        return top1

    def count(genotypes: Genotypes) -> list[Count]:
        out = []
        for wide in genotypes:
            genotype, part = without_share(wide, shares, images)
            given = genotype if not decode else space.decode(genotype) if space.positions else space.describe(genotype)
            found = function(given) if len(shares) == 1 else function(given, share=shares[wide[-1]])
            shown: Mapping[str, Any] = found if isinstance(found, Mapping) else dict.fromkeys(accuracies[:1], found)
            if missing := [name for name in accuracies if name not in shown]:
                raise ValueError(
                    f"evaluate gave no {missing[0]}: return a dictionary of all that is asked for, "
                    f"{{{', '.join(f'{name!r}: ...' for name in accuracies)}}}"
                )
            counts = tuple(round(share(name, shown[name]) * part) for name in accuracies)
            out.append(counts[0] if len(counts) == 1 else counts)
        return out

    return count


def _imported(name: str) -> Callable[..., float]:
    module, _, function = name.partition(":")
    try:
        found: Callable[..., float] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"No function {name!r}: {e}. Expected 'package.module:function'.") from e
    if not callable(found):
        raise ConfigError(f"No function {name!r}: it is {found!r}. Expected 'package.module:function'.")
    return found


def _told(
    console: Console, total: int, progress: Progress, begun: int, further: Callable[[Trial], None] | None
) -> Callable[[Trial], None]:
    """What is done after each trial: progress, from the first that is not merely read from the journal on, and giving
    up where nothing works."""
    failed = 0

    def told(trial: Trial) -> None:
        nonlocal failed
        failed += trial.failure is not None
        if failed == trial.trial + 1 and failed in (_HOPELESS, total):
            raise _hopeless(trial)
        progress.add(trial)
        if trial.trial >= begun:
            console.progress(trial.trial + 1, total, progress.values())
        if further is not None:
            further(trial)

    return told


def _hopeless(last: Trial) -> EvaluateError:
    return EvaluateError(
        f"All of the first {last.trial + 1} evaluations failed, the last one with: {last.failure}. Correct `evaluate` "
        f"(try it on one network), and start with a new journal, or with another --out: failures are kept in it."
    )


def _of_experiment(experiment: Experiment, out: str | Path | None, console: Console) -> Front:
    """The search stage of an experiment, and its front."""
    from nas.pipeline import run_experiment

    path = run_experiment(experiment, out, stages=("search",), console=console)
    trials = read_trials(path / "search" / "journal.jsonl")
    with RunFolder(path, experiment) as folder:
        job = Job(experiment, folder, Console(io.StringIO()))
        found = exact_costs(job)
        finite = {c.name: c.limit for c in found if math.isfinite(c.limit)}
        least, device = least_of(experiment.least), _device_name(experiment.device)
        setting = Setting(job.space, device, _models(found), finite, experiment.accuracy, least)
    return Front.of(trials, minimised(experiment), setting)


def _models(found: Sequence[Cost]) -> dict[str, LatencyModel]:
    """What predicts each latency."""
    return {c.name: c.model for c in found if c.model is not None}


def _device_name(device: str) -> str:
    """A path's last part, as costs have it."""
    return Path(device).parent.name if device.endswith(".toml") else Path(device).name
