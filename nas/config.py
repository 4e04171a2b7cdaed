"""Experiment and device files: TOML in, frozen objects out, and errors that name file, line and nearest valid key.

The classes below *are* the schema: `load_experiment` refuses what they do not have.
"""

import difflib
import functools
import math
import numbers
import os
import re
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nas.errors import ConfigError

T = TypeVar("T")


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything read from TOML or JSON: frozen, unknown keys refused."""


class Data(Strict, frozen=True):
    """Which images. `source` is "digits" or a path; relative paths are relative to the experiment file."""

    source: str
    format: str | None = None  # a name in nas.data.FORMATS; None: recognised from the path
    image_size: int | None = None  # side in pixels that images are resized to; None: as they come
    validation: float = 0.2  # share of the training images held out for the search
    test: float = 0.2  # share split off as the test set where the source brings none
    train_images: int | None = None  # use only so many training images (before the validation split)
    test_images: int | None = None  # use only so many test images
    seed: int = 0  # of the splits
    storage: str = "auto"  # of the training images, a name in nas.data.STORAGE; auto: files beyond 2 GiB decoded
    threads: int = 4  # that decode images


class Latency(Strict, frozen=True):
    """How the latency table is measured (see nas/measure)."""

    seconds: float = 25.0  # timing budget per precision, building not counted
    min_rounds: int = 15  # fewest rounds, whatever the budget
    anchors: int = 16  # networks that fix the scale of the table
    holdout: int = 24  # random networks, measured end to end, that the proof is made of
    tolerance: float = 0.01  # half the 95 % interval of a sum of entries and of a network, relative: then it stops
    patience: float = 2.0  # times `seconds`: how long those that are not as narrow are timed at most
    max_drift: float = 0.03  # how far any anchor may have wandered, or have been moved by others: else it is refused
    max_busy: float = 0.9  # share of the CPUs' time that other processes may take, however steady the anchors are


class Optimiser(Strict, frozen=True):
    """An optimiser with its schedule. `learning_rate` is the peak."""

    name: str = "sgd"  # a name in nas.train.optimiser.OPTIMISERS
    learning_rate: float = 0.1
    momentum: float = 0.9  # of sgd, rmsprop and shampoo
    weight_decay: float = 1e-4  # not applied to norms and biases
    schedule: str = "cosine"  # a name in nas.train.optimiser.SCHEDULES
    warmup: float = 0.1  # share of the steps, linear from 0
    drops: tuple[float, ...] = (0.5, 0.75)  # of schedule "step": increasing shares of the steps, above warmup
    drop_factor: float = 0.1
    clip_norm: float | None = 5.0  # global gradient norm


class Augment(Strict, frozen=True):
    """Augmentation of training images, on device, deterministic in (seed, step)."""

    flip: bool = False  # horizontal flip with probability 1/2
    shift: int = 0  # random shift by up to so many pixels, zero padded
    policy: str = "none"  # a name in nas.train.augment.POLICIES
    operations: int = 2  # of randaugment: how many an image goes through
    magnitude: float = 9.0  # of randaugment: 0..10
    cutout: int = 0  # side in pixels of a square that is blanked
    mixup: float = 0.0  # Beta(mixup, mixup) weights of two images; 0: never
    cutmix: float = 0.0  # Beta(cutmix, cutmix) area pasted from another image; 0: never


class Noise(Strict, frozen=True):
    """Regularisation inside the network, in training only. Rates are probabilities of dropping."""

    dropout: float = 0.0  # of the features before the logits
    drop_path: float = 0.0  # of a residual branch, for each image; rises linearly from 0 at the first block
    drop_block: float = 0.0  # of the activations, in squares
    drop_block_size: int = 3  # side of the squares, in pixels


class Distillation(Strict, frozen=True):
    """How subnets learn from the largest network of the same step."""

    divergence: str = "kl"  # a name in nas.train.losses.DIVERGENCES
    temperature: float = 1.0  # of "kl"
    alpha_min: float = -1.0  # of "alpha"
    alpha_max: float = 1.0  # of "alpha"
    clip: float = 5.0  # of "alpha": largest importance weight (p/q)^alpha


Range = tuple[float, float]  # the smallest and the largest value


class VaryOptimiser(Strict, frozen=True):
    """Ranges of keys of `Optimiser`."""

    learning_rate: Range | None = None
    weight_decay: Range | None = None


class VaryDistillation(Strict, frozen=True):
    """Ranges of keys of `Distillation`."""

    temperature: Range | None = None  # of "kl"


class VaryAugment(Strict, frozen=True):
    """Ranges of keys of `Augment`."""

    magnitude: Range | None = None  # of randaugment


class VaryNoise(Strict, frozen=True):
    """Ranges of keys of `Noise`."""

    drop_path: Range | None = None


class Vary(Strict, frozen=True):
    """Which keys of `Train` differ between the members of a population, and in which range: [smallest, largest].

    The first member begins with the values that the experiment has. A range that begins above 0 is drawn from evenly
    in the logarithm, one that begins at 0 evenly.
    """

    label_smoothing: Range | None = None
    distillation: VaryDistillation = VaryDistillation()
    optimiser: VaryOptimiser = VaryOptimiser()
    augment: VaryAugment = VaryAugment()
    noise: VaryNoise = VaryNoise()


class Population(Strict, frozen=True):
    """Population-based training: hyper-parameters are found while the supernet trains (see nas.train.population)."""

    vary: Vary
    members: int = 8  # supernets, trained in turn: `members` times the work of one
    interval: float = 1.0  # epochs between two comparisons of the members
    subnets: int = 8  # random subnets that members are compared by, besides the smallest and the largest
    replaced: float = 0.25  # share of the members, the worst, that go on from as many of the best
    resampled: float = 0.25  # chance that a value is then drawn anew, not multiplied by 0.8 or 1.2

    @property
    def ranges(self) -> dict[str, Range]:
        """The ranges by the dotted keys of `Train` that they are for."""
        return dict(_ranges(self.vary))


PHASES = ("kernel", "depth", "expand", "width")  # train.phases by default, as far as the space has them


class Train(Strict, frozen=True):
    """Supernet training."""

    epochs: float = 30.0
    batch_size: int = 64
    sampler: str = "sandwich"  # a name in nas.train.samplers.SAMPLERS: which subnets a step trains
    random_subnets: int = (
        2  # besides the largest and smallest (sandwich, attentive), the largest (shrinking), or in all
    )
    candidates: int = 3  # of attentive: drawn for each random subnet
    phases: tuple[str, ...] | None = None  # of progressive_shrinking: what is set free when; None: `PHASES`
    distillation: Distillation = Distillation()
    label_smoothing: float = 0.0
    optimiser: Optimiser = Optimiser()
    ema: float = 0.0  # decay of the moving average of the weights that is evaluated; 0: the weights themselves
    augment: Augment = Augment()
    noise: Noise = Noise()
    precision: str = "float32"  # a name in nas.train.precision.PRECISIONS: what convolutions compute in
    rematerialise: bool = False  # compute the forward pass of every block again in the backward pass, to save memory
    accumulate: int = 1  # parts that a batch is computed in, to save memory
    norm_images: int | None = None  # images that norms take their moments over; None: the batch, or the part
    checkpoint_steps: int = 100
    processes: int = 1  # that share every batch, on Ray; 1: without Ray, on all devices of this machine
    process_gpus: int = 0  # of each process; 0: CPU, and each takes its share of the node's cores
    address: str = "local"  # of the Ray cluster that the processes run on; "local" starts one of its own
    calibration_images: int = 512  # training images that batch-norm statistics are measured on, for every subnet
    eval_batch_size: int = 128
    tensorboard: bool = False  # write the metrics as TensorBoard events too, to supernet/events
    profile_steps: int = 0  # trace so many steps by jax.profiler, to supernet/profile
    population: Population | None = None  # train several, and find hyper-parameters meanwhile; None: one, as written


# Keys of Train that change no more than the last bits of what comes out.
NEUTRAL = ("processes", "process_gpus", "address", "tensorboard", "profile_steps")


def deciding(train: Train) -> dict[str, Any]:
    """What decides the outcome of a training, by key, for digests. A population that is not asked for is no part of
    it: what was made before there were populations still matches."""
    without = {*NEUTRAL, *(["population"] if train.population is None else [])}
    return {key: value for key, value in msgspec.to_builtins(train).items() if key not in without}


class Search(Strict, frozen=True):
    """The search proper. The outcome depends on these values and the seed alone, not on timing or worker count."""

    strategy: str = "predictor"  # a name in nas.search.STRATEGIES
    trials: int = 200
    population: int | None = None  # of the strategy, as far as it has one; None: its own default
    settings: dict[str, float | int] = {}  # of the strategy's own, by name: keyword arguments of its function
    proxy: str = "none"  # a name in nas.pipeline.search.PROXIES: what `predictor` learns from before any evaluation
    feasible_only: bool = False  # ask for more until enough is within the limits, not walk from what is not
    lag: int = 8  # trial k is proposed from the results of trials 0..k-lag
    executor: str = "ray"  # a name in nas.search.EXECUTORS
    workers: int = 2
    address: str = "local"  # of the Ray cluster; "local" starts one of its own
    timeout_seconds: float = 300.0  # for one evaluation
    cache: str = "run"  # of counts by content: in the run folder, "off", or a folder that several runs share
    tensorboard: bool = False  # write the trials as TensorBoard events too, to search/events
    tracker: str | None = None  # a name in nas.search.CALLBACKS that is told the trials too: "mlflow" or "wandb"


# Exact costs that may be objectives or have limits. `latency_ms@DEVICE` is the latency on a further device, by the
# table in its folder; `latency_ms` alone is that on the experiment's own. `memory_bytes` is the peak of activations,
# `size_bytes` the ONNX file's.
COSTS = ("latency_ms", "macs", "memory_bytes", "params", "size_bytes", "latency_ms@DEVICE")

# What others call them, or have beside them.
_CALLED_HERE = {
    "flops": "`macs`, multiply-accumulates, are half of the FLOPs",
    "mult_adds": "they are `macs` here",
    "parameters": "they are `params` here",
    "latency": "it is `latency_ms` here, in milliseconds",
    "size": "`size_bytes` is that of the ONNX file",
    "memory": "`memory_bytes` is the peak of activations",
    "accuracy": "it is `top1` here",
    "energy_mj": "energy is measured on files (`nas footprint`), and not searched for",
}


# what may be counted, as journal and tables call it, and the precision that it is counted in
ACCURACIES: dict[str, typing.Literal["float32", "int8"]] = {"top1": "float32", "top1_int8": "int8"}

_COUNTED = {None: "top1"} | {precision: name for name, precision in ACCURACIES.items()}  # by top1's `precision`


class Limit(Strict, frozen=True):
    """What a cost may be. `at_most` is in the cost's unit, or "50%" of the space's reachable range."""

    at_most: float | str | None = None
    tolerance: float | str | None = None  # beyond the limit: in its unit, or "5%" of it; reported as such
    precision: str | None = None
    """Of latencies: which of the device's tables; float32 if it has that, else its first. Of `size_bytes` and
    `memory_bytes`: float32 or int8; that of `latency_ms` if it is one of them, else float32. Of top1: what networks are
    computed in when their answers are counted, float32 or int8; float32 if None."""
    at_least: float | str | None = None  # of top1 in place of `at_most`: 0.9 or "90%"; known only after an evaluation


class Objective(Limit, frozen=True, kw_only=True):
    """What is optimised."""

    name: str  # "top1", or what `COSTS` says


class Finish(Strict, frozen=True):
    """What winners and baselines alike go through: fine-tuning, distilled from the supernet's largest network."""

    winners: int = 3
    epochs: float = 10.0
    batch_size: int = 64
    distill_weight: float = 0.5  # of the teacher's soft labels; the rest goes to the true labels
    temperature: float = 2.0
    optimiser: Optimiser = Optimiser(learning_rate=0.02)
    calibration_images: int = 256  # training images that int8 ranges are taken from


class Verify(Strict, frozen=True):
    """The proof that each file does what the network does."""

    seconds: float = 10.0  # timing budget for all files together
    parity_images: int = 64  # test images compared value by value
    int8_loss: float = 0.05  # top-1 that int8 may lose against float32 (0.05: 5 points) before it is refused


class Fidelity(Strict, frozen=True):
    """`nas fidelity`: whether the supernet orders networks as training each of them alone does."""

    networks: int = 12  # trained alone; those of fewer are among those of more
    seeds: int = 1  # trainings of each
    epochs: float | None = None  # of training alone; None: as the supernet (train.epochs)


class Experiment(Strict, frozen=True, kw_only=True):
    """One experiment file, resolved."""

    name: str
    question: str = ""
    seed: int = 0
    space: str  # a name in search_spaces/, or a path
    device: str = "host_onnxruntime"  # a name in latency_models/, or a path to a folder with device.toml
    data: Data
    objectives: tuple[Objective, ...]
    limits: dict[str, float | int | str | Limit] = {}
    """Of what is no objective: of costs (`COSTS`) `at_most`, of accuracies (`ACCURACIES`) `at_least`, or all."""
    latency: Latency = Latency()
    train: Train = Train()
    search: Search = Search()
    finish: Finish = Finish()
    verify: Verify = Verify()
    fidelity: Fidelity = Fidelity()

    @property
    def limit(self) -> Limit:
        """What is asked of latency."""
        return self.asked.get("latency_ms", Limit())

    @property
    def accuracies(self) -> tuple[str, ...]:
        """What the search counts of every network, that of float32 first."""
        return tuple(name for name in ACCURACIES if name in {*self.maximised, *self.least})

    @property
    def maximised(self) -> tuple[str, ...]:
        """The accuracies that are objectives."""
        return tuple(accuracy_of(o.name, o) for o in self.objectives if o.name in ACCURACIES)

    @property
    def least(self) -> dict[str, Limit]:
        """The limits on accuracies, by their names."""
        asked = [(o.name, o) for o in self.objectives] + [(name, as_limit(name, v)) for name, v in self.limits.items()]
        return {accuracy_of(name, o): o for name, o in asked if name in ACCURACIES and o.at_least is not None}

    @property
    def counted(self) -> typing.Literal["float32", "int8"]:
        """The precision in which the search counts right answers: of subnets as trained, or as their int8 files. Where
        it counts both, that of the first."""
        return "int8" if self.accuracies == ("top1_int8",) else "float32"

    @property
    def accuracy(self) -> str:
        """What the search counts first."""
        return self.accuracies[0]

    @property
    def asked(self) -> dict[str, Limit]:
        """What is asked of each cost: of the objectives but accuracies, then of what only has a limit."""
        limits = {n: as_limit(n, limit) for n, limit in self.limits.items() if n not in ACCURACIES}
        return {o.name: o for o in self.objectives if o.name not in ACCURACIES} | limits


def as_limit(name: str, limit: float | int | str | Limit) -> Limit:
    """As `limits` has it, where a value alone stands for the limit."""
    if isinstance(limit, Limit):
        return limit
    return Limit(at_least=limit) if name in ACCURACIES else Limit(limit)


def accuracy_of(name: str, asked: Limit) -> str:
    """What is counted, by name and precision."""
    return _COUNTED.get(asked.precision, name) if name == "top1" else name


def share_of(value: float | str) -> float:
    """An accuracy from 0 to 1: as it is, or "90%"."""
    return float(value.rstrip("% ")) / 100 if isinstance(value, str) else float(value)


class Device(Strict, frozen=True):
    """latency_models/<name>/device.toml: what one must know to trust a number."""

    device: str  # in words
    runtime: str  # a name in nas.export.RUNTIMES; of hardware that is not the host, any
    runtime_version: str = ""  # that its tables were measured with
    hardware: str = "host"  # "host": the machine that the run is on; else in words, and tables lie in its folder
    threads: int = 1
    batch: int = 1
    precision: tuple[str, ...] = ("float32",)
    frequency_policy: str = "as found"
    notes: str = ""
    source: str = ""  # of the tables in its folder: the command that measured them, or who published them
    licence: str = ""  # of those tables
    date: str = ""  # when they were measured, ISO 8601

    @property
    def at_hand(self) -> bool:
        """Whether it is the machine that the run is on, so that things can be measured on it."""
        return self.hardware == "host"


def _ranges(vary: Any, key: str = "") -> typing.Iterator[tuple[str, Range]]:
    for field in vary.__struct_fields__:
        below, inner = f"{key}{field}", getattr(vary, field)
        if isinstance(inner, msgspec.Struct):
            yield from _ranges(inner, f"{below}.")
        elif inner is not None:
            yield below, inner


S = TypeVar("S", bound=msgspec.Struct)


def value_of(settings: msgspec.Struct, key: str) -> Any:
    """The value at a dotted key: "optimiser.learning_rate"."""
    return functools.reduce(getattr, key.split("."), settings)


def with_values(settings: S, values: typing.Mapping[str, Any]) -> S:
    """`settings` with other values at dotted keys. Nothing is checked: values may be arrays that JAX traces."""
    for key, value in values.items():
        field, _, below = key.partition(".")
        inner = with_values(getattr(settings, field), {below: value}) if below else value
        settings = msgspec.structs.replace(settings, **{field: inner})
    return settings


def load_toml(path: Path, *, what: str) -> tuple[dict[str, Any], str]:
    """The parsed file and its text.

    Raises:
        ConfigError: the file is missing, unreadable or not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        beside = [] if path.exists() else [p.name for p in path.parent.glob("*.toml")]
        close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.5)
        hint = f" Did you mean {path.parent / close[0]}?" if close else ""
        raise ConfigError(f"{path}: cannot read this {what}: {e}. Check the path.{hint}") from e
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path}: not valid TOML: {e}. Correct that line.") from e


def convert(raw: dict[str, Any], cls: type[T], *, path: Path | str, text: str) -> T:
    """`raw` as a `cls`; what does not fit is reported with its line in `text`."""
    try:
        return msgspec.convert(raw, cls, strict=True)
    except msgspec.ValidationError as e:
        message, _, where = str(e).partition(" - at `$")
        keys = re.findall(r"[A-Za-z_]\w*|(?<=\[)\d+", where.rstrip("`"))
        hint = ""
        if unknown := re.search(r"unknown field `(.+?)`", message):
            keys.append(unknown[1])
            message = f"unknown key `{'.'.join(keys)}`"
            hint = nearest(unknown[1], _fields_at(cls, keys[:-1]), kind="key")
        elif missing := re.search(r"missing required field `(.+?)`", message):
            message = f"`{'.'.join([*keys, missing[1]])}` is missing"
            hint = nearest("", _fields_at(cls, keys), kind="key")
        elif message == "Expected `array`, got `object`":
            message, hint = f"`{'.'.join(keys)}` is one table", f" Each of several is written [[{'.'.join(keys)}]]."
        elif keys:
            message = f"`{'.'.join(keys)}`: {message}"
        raise ConfigError(f"{path}, line {line_of(text, keys)}: {message}.{hint}") from e


def nearest(word: str, known: typing.Iterable[str], *, kind: str) -> str:
    """A sentence that names the nearest of `known`, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    lead = f" Did you mean `{close[0]}`?" if close else ""
    return f"{lead} Valid {kind}s: {', '.join(known)}."


def line_of(text: str, keys: list[str]) -> int:
    """The line (from 1) where the value under `keys` stands, inline tables included, or the nearest enclosing one."""
    best, best_depth = 1, 0
    table: list[str] = []
    counts: dict[str, int] = {}
    inline: list[int] = []  # lines of inline tables below the best match that have the last key
    for number, line in enumerate(text.splitlines(), start=1):
        path = None
        if header := re.match(r"\s*\[(\[)?\s*([\w.\-\"]+)\s*\]", line):
            table = header[2].replace('"', "").split(".")
            if header[1]:
                counts[header[2]] = counts.get(header[2], -1) + 1
                table = [*table, str(counts[header[2]])]
            path = table
        elif match := re.match(r"\s*([\w\-\"]+(?:\.[\w\-]+)*)\s*=", line):
            path = [*table, *match[1].replace('"', "").split(".")]
        if path is not None:
            depth = _shared(path, keys)
            if depth == len(path) and depth > best_depth:
                best, best_depth, inline = number, depth, []
        if best_depth and best_depth < len(keys) and re.search(rf"[{{,]\s*{re.escape(keys[-1])}\s*=", line):
            inline.append(number)
    if best_depth < len(keys) and inline:
        index = next((int(k) for k in keys[best_depth:] if k.isdigit()), 0)
        return inline[min(index, len(inline) - 1)]
    return best


def _shared(a: list[str], b: list[str]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _fields_at(cls: Any, keys: list[str]) -> list[str]:
    """Field names of the struct that `keys` lead to from `cls`."""
    for key in keys:
        if not key.isdigit() and (structs := _structs(cls)):
            cls = typing.get_type_hints(structs[0]).get(key)
    cls = next((c for c in _structs(cls)), None)
    return list(cls.__struct_fields__) if cls else []


def _structs(hint: Any) -> list[Any]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return [hint]
    return [s for arg in typing.get_args(hint) for s in _structs(arg)]


def overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: tables merge, all else replaces."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = overlay(out[key], value) if both else value
    return out


def load_experiment(
    path: str | Path,
    *,
    smoke: bool = False,
    overrides: typing.Sequence[str] = (),
    known: typing.Mapping[str, typing.Collection[str]] | None = None,
) -> Experiment:
    """The experiment at `path`.

    Args:
        path: a TOML file. `[smoke]` in it is laid over the rest when `smoke` is true.
        overrides: `"search.trials=20"` and the like; values are TOML.
        known: valid names by key ("search.strategy"), where they are to be checked; `nas.pipeline.KNOWN` has them all.

    Raises:
        ConfigError: with file and line, or the override, and the nearest valid key or name.
    """
    path = Path(path)
    raw, text = load_toml(path, what="experiment")
    small = raw.pop("smoke", None)
    if small is not None and not isinstance(small, dict):
        raise ConfigError(f"{path}, line {line_of(text, ['smoke'])}: `smoke` is {small!r}: a table [smoke] is needed.")
    if smoke and not small:
        raise ConfigError(f"{path}: it has no [smoke] table to lay over it. Write one, or run without --smoke.")

    def made(raw: dict[str, Any]) -> Experiment:
        experiment = convert(raw, Experiment, path=path, text=text)
        check(experiment, path=path, text=text, known=known or {})
        return experiment

    made(overlay(raw, small or {}))  # the overlay is checked even when it is not used
    if smoke:
        raw = overlay(raw, small or {})
    experiment, message = made(raw), ""
    blamed: dict[str, str] = {}  # by what is wrong, the override that it came with
    for item in overrides:  # one may be right only with a later one
        raw = overlay(raw, _nested(item))
        try:
            experiment, message = made(raw), ""
        except ConfigError as e:
            message = str(e).partition(": ")[2]
            blamed.setdefault(message, item)
    if message:
        raise ConfigError(f"--set {blamed[message]}: {message}")
    # Paths in the file are relative to it; paths on the command line to where the command is given.
    overridden = {item.partition("=")[0].strip() for item in overrides}

    def located(key: str, value: str, is_path: bool) -> str:
        if not is_path:
            return value
        base = Path.cwd() if key in overridden else path.parent
        return str((base / Path(value).expanduser()).resolve())

    def looks_like_a_path(value: str) -> bool:
        return "/" in value or os.sep in value or value.endswith(".toml") or value.startswith("~")

    cache = located("search.cache", experiment.search.cache, experiment.search.cache not in ("run", "off"))
    source = located("data.source", experiment.data.source, experiment.data.source != "digits")
    return msgspec.structs.replace(
        experiment,
        data=msgspec.structs.replace(experiment.data, source=source),
        search=msgspec.structs.replace(experiment.search, cache=cache),
        space=located("space", experiment.space, looks_like_a_path(experiment.space)),
        device=located("device", experiment.device, looks_like_a_path(experiment.device)),
    )


def _nested(item: str) -> dict[str, Any]:
    """The table that one `KEY=VALUE` stands for."""
    key, equals, value = item.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"--set {item}: expected KEY=VALUE, for example `--set search.trials=20`.")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        parsed = {"value": value}  # a bare word is a string
    if len(parsed) > 1:
        raise ConfigError(f"--set {item!r}: one value is expected. Give every KEY=VALUE its own --set.")
    nested: Any = parsed["value"]
    for part in reversed(parts):
        nested = {part: nested}
    return nested


_RANGES = {
    "seed": (0, None),
    "data.seed": (0, None),
    "data.image_size": (4, 4096),
    "data.train_images": (1, None),
    "data.test_images": (1, None),
    "data.threads": (1, 256),
    "latency.seconds": (0.0, None),
    "latency.min_rounds": (2, None),
    "latency.anchors": (1, None),
    "latency.holdout": (2, None),
    "latency.tolerance": (0.0, None),
    "latency.patience": (1.0, None),
    "latency.max_drift": (0.0, None),
    "latency.max_busy": (0.0, None),
    "train.epochs": (0.0, None),
    "train.batch_size": (2, None),
    "train.random_subnets": (0, None),
    "train.label_smoothing": (0.0, 0.999),
    "train.candidates": (1, None),
    "train.ema": (0.0, 0.999999),
    "train.accumulate": (1, None),
    "train.norm_images": (2, None),
    "train.distillation.temperature": (1e-3, None),
    "train.distillation.clip": (1.0, None),
    "train.noise.dropout": (0.0, 0.95),
    "train.noise.drop_path": (0.0, 0.95),
    "train.noise.drop_block": (0.0, 0.95),
    "train.noise.drop_block_size": (1, None),
    "train.optimiser.momentum": (0.0, 0.9999),
    "train.optimiser.warmup": (0.0, 1.0),
    "train.optimiser.drop_factor": (0.0, 1.0),
    "train.augment.operations": (0, None),
    "train.augment.magnitude": (0.0, 10.0),
    "train.augment.cutout": (0, None),
    "train.augment.mixup": (0.0, None),
    "train.augment.cutmix": (0.0, None),
    "train.checkpoint_steps": (1, None),
    "train.processes": (1, None),
    "train.process_gpus": (0, None),
    "train.calibration_images": (2, None),
    "train.eval_batch_size": (1, None),
    "train.profile_steps": (0, None),
    "train.population.members": (2, None),
    "train.population.interval": (0.0, None),
    "train.population.subnets": (0, None),
    "train.population.replaced": (0.0, 0.5),
    "train.population.resampled": (0.0, 1.0),
    "train.optimiser.learning_rate": (0.0, None),
    "train.optimiser.weight_decay": (0.0, None),
    "train.optimiser.clip_norm": (0.0, None),
    "train.augment.shift": (0, None),
    "search.trials": (1, None),
    "search.population": (2, None),
    "search.lag": (1, None),
    "search.workers": (1, None),
    "search.timeout_seconds": (0.001, None),
    "finish.winners": (1, None),
    "finish.epochs": (0.0, None),
    "finish.batch_size": (2, None),
    "finish.distill_weight": (0.0, 1.0),
    "finish.temperature": (1e-3, None),
    "finish.calibration_images": (1, None),
    "finish.optimiser.learning_rate": (0.0, None),
    "finish.optimiser.momentum": (0.0, 0.9999),
    "finish.optimiser.drop_factor": (0.0, 1.0),
    "finish.optimiser.weight_decay": (0.0, None),
    "finish.optimiser.warmup": (0.0, 1.0),
    "finish.optimiser.clip_norm": (0.0, None),
    "verify.seconds": (0.0, None),
    "verify.parity_images": (1, None),
    "verify.int8_loss": (0.0, 1.0),
    "fidelity.networks": (2, None),
    "fidelity.seeds": (1, None),
    "fidelity.epochs": (0.0, None),
}


def check(
    experiment: Experiment, *, path: Path | str, text: str, known: typing.Mapping[str, typing.Collection[str]]
) -> None:
    """What types cannot say: ranges, and names that must be known."""

    def fail(key: str, message: str) -> typing.NoReturn:
        raise ConfigError(f"{path}, line {line_of(text, key.split('.'))}: `{key}` {message}")

    if not re.fullmatch(r"[\w\-.]+", experiment.name):
        fail("name", f"is {experiment.name!r}: letters, digits, '-', '_' and '.' only, since it names the run folder.")
    values = dict(_leaves(experiment))
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            fail(key, f"is {value}: a finite number is needed.")
        if isinstance(value, str) and "\0" in value:
            fail(key, "has a NUL character in it.")
    for key in ("data.validation", "data.test"):
        if not 0 < values[key] < 1:
            fail(key, f"is {values[key]}: a share between 0 and 1 is needed.")
    for key, (low, high) in _RANGES.items():
        value = values.get(key)  # none of a table that is left out
        if value is not None and not ((low is None or value >= low) and (high is None or value <= high)):
            bound = f"at least {low}" + (f" and at most {high}" if high is not None else "")
            fail(key, f"is {value}: {bound} is needed.")
    for key, names in known.items():
        if values[key] is not None and values[key] not in names:
            fail(key, f"is {values[key]!r}, which is not known.{nearest(values[key], names, kind='name')}")
    _check_objectives(experiment.objectives, path, text)
    _check_limits(experiment, path, text)
    if wrong := _wrong_population(experiment.train):
        fail(*wrong)


def _wrong_population(train: Train) -> tuple[str, str] | None:
    """The key of `train.population` that cannot be, and why."""
    if train.population is None:
        return None
    ranges, inside = train.population.ranges, "train.population"
    if not ranges:
        return (
            f"{inside}.vary",
            "names nothing that varies. Give a range, for example optimiser.learning_rate = [0.01, 1.0].",
        )
    for key, (low, high) in ranges.items():
        least, most = _RANGES[f"train.{key}"]
        most = math.inf if most is None else most
        if not (least <= low < high <= most) or high == math.inf:
            limits = f"at least {least}" + (f" and at most {most}" if most < math.inf else "")
            return (
                f"{inside}.vary.{key}",
                f"is [{low}, {high}]: the smallest and then the largest value, {limits}, are needed.",
            )
        if not low <= value_of(train, key) <= high:
            return (
                f"{inside}.vary.{key}",
                f"is [{low}, {high}], but train.{key} is {value_of(train, key)}, with which the first member begins. "
                f"Set that within the range, or widen the range.",
            )
    if "augment.magnitude" in ranges and train.augment.policy != "randaugment":
        return f"{inside}.vary.augment", 'varies a magnitude, which is of train.augment.policy = "randaugment" alone.'
    if "distillation.temperature" in ranges and train.distillation.divergence != "kl":
        return f"{inside}.vary.distillation", 'varies a temperature, which is of the divergence "kl" alone.'
    if train.processes > 1:
        return inside, f"trains on the devices of this machine, but train.processes is {train.processes}. Set it to 1."
    if train.profile_steps:
        return inside, "cannot be traced: set train.profile_steps to 0, or trace a training without population."
    return None


def check_latency(settings: Latency) -> None:
    """Nothing, if every number is in its range.

    Raises:
        ConfigError: one is not.
    """
    for name in Latency.__struct_fields__:
        low, high = _RANGES.get(f"latency.{name}", (None, None))
        value = getattr(settings, name)
        if (low is not None and value < low) or (high is not None and value > high):
            raise ConfigError(f"latency.{name} is {value}: at least {low} is needed.")


def _check_objectives(objectives: typing.Sequence[Objective], path: Path | str, text: str) -> None:
    def fail(index: int, key: str, message: str) -> typing.NoReturn:
        raise ConfigError(f"{path}, line {line_of(text, ['objectives', str(index), key])}: {message}")

    for index, objective in enumerate(objectives):
        if objective.name not in ACCURACIES and (wrong := _wrong_cost(objective.name, kind="objective")):
            fail(index, "name", wrong)
        if wrong := _wrong_limit(objective.name, objective):
            fail(index, wrong[0], wrong[1])
    names = [accuracy_of(o.name, o) for o in objectives]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"{path}, line {line_of(text, ['objectives'])}: `objectives` names {names}: at least one is needed, and "
            f"each at most once (top1 once in each precision)."
        )


def _check_limits(experiment: Experiment, path: Path | str, text: str) -> None:
    objectives = {accuracy_of(o.name, o) for o in experiment.objectives}
    for name, limit in experiment.limits.items():
        asked, key = as_limit(name, limit), ""
        bound = "at_least" if name in ACCURACIES else "at_most"
        wrong = "" if name in ACCURACIES else _wrong_cost(name, kind="cost")
        if accuracy_of(name, asked) in objectives:
            wrong = f"`{accuracy_of(name, asked)}` is an objective: give it `{bound}` there."
        elif getattr(asked, bound) is None and not (name in ACCURACIES and asked.at_most is not None):
            wrong = wrong or f"`limits.{name}` has no {bound}: give it one, or make it an objective."
        elif not wrong and (found := _wrong_limit(name, asked)):
            key, wrong = found[0] if isinstance(limit, Limit) else "", f"`limits.{name}`: {found[1]}"
        if wrong:
            keys = ["limits", name, key] if key else ["limits", name]
            raise ConfigError(f"{path}, line {line_of(text, keys)}: {wrong}")
    named = [accuracy_of(name, as_limit(name, limit)) for name, limit in experiment.limits.items()]
    if twice := [name for name in named if named.count(name) > 1]:
        raise ConfigError(f"{path}, line {line_of(text, ['limits'])}: `limits` has {twice[0]} twice: leave one out.")
    for missing, needed in (
        (not experiment.accuracies, 'top1, for example { name = "top1" } or limits = { top1 = 0.9 }'),
        ("latency_ms" not in experiment.asked, 'latency_ms, for example { name = "latency_ms", at_most = "50%" }'),
    ):
        if missing:
            raise ConfigError(
                f"{path}, line {line_of(text, ['objectives'])}: neither an objective nor a limit is {needed}: every "
                f"experiment needs it as one or the other."
            )


def check_costs(limits: typing.Mapping[str, float | int | str | Limit | None]) -> None:
    """Nothing, if every name is that of a cost (`COSTS`) or an accuracy (`ACCURACIES`), and its limit, unless None,
    has the right form.

    Raises:
        ConfigError: one does not.
    """
    for name, limit in limits.items():
        if name not in ACCURACIES and (wrong := _wrong_cost(name, kind="cost")):
            raise ConfigError(wrong)
        if limit is not None:
            check_limit(name, limit)


def check_limit(name: str, limit: float | int | str | Limit, *, positive: bool = True) -> None:
    """Nothing, if a limit of the cost or accuracy `name` has the right form.

    Raises:
        ConfigError: it has not.
    """
    if found := _wrong_limit(name, as_limit(name, limit), positive=positive):
        raise ConfigError(f"limit of {name}: {found[1]}")


def _wrong_cost(name: str, *, kind: str) -> str:
    """What is wrong with the name of a cost; empty if nothing is."""
    if name in COSTS[:-1] or (name.startswith("latency_ms@") and len(name) > len("latency_ms@")):
        return ""
    known = (*COSTS, *ACCURACIES) if kind == "cost" else (*ACCURACIES, *COSTS)
    close = difflib.get_close_matches(name.lower(), _CALLED_HERE, n=1, cutoff=0.7)
    if close and not difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        return f"unknown {kind} `{name}`: {_CALLED_HERE[close[0]]}. Valid {kind}s: {', '.join(known)}."
    return f"unknown {kind} `{name}`.{nearest(name, known, kind=kind)}"


def _wrong_limit(name: str, asked: Limit, *, positive: bool = True) -> tuple[str, str] | None:
    """Which key of what is asked of the cost or accuracy `name` is wrong, and what is needed; None if none is."""
    if name in ACCURACIES:
        return _wrong_least(name, asked)
    if asked.at_least is not None:
        return "at_least", f"{name} has an at_least, but costs are made small: give it an at_most."
    what = "milliseconds" if name.startswith("latency_ms") else name
    unit = "ms" if what == "milliseconds" else what
    for key, value, share in (("at_most", asked.at_most, "50%"), ("tolerance", asked.tolerance, "5%")):
        if isinstance(value, str):
            if not re.fullmatch(r"\d+(\.\d+)?\s*%", value):
                return key, f'{key} is {value!r}: a number ({unit}) or a share like "{share}" is needed.'
        elif value is not None:
            number = math.isfinite(value) if isinstance(value, numbers.Real) else False
            if not number or (positive and (value < 0 or (value == 0 and key == "at_most"))):
                return key, f"{key} is {value}: a {'positive' if positive else 'finite'} number of {what} is needed."
    if asked.tolerance is not None and asked.at_most is None:
        return "tolerance", "tolerance is that of a limit: give it an at_most."
    if asked.precision not in (None, "float32", "int8") and not name.startswith("latency_ms"):
        return "precision", f"precision is {asked.precision!r}: of {name} there is float32 and int8."
    return None


def _wrong_least(name: str, asked: Limit) -> tuple[str, str] | None:
    """As `_wrong_limit`, of an accuracy."""
    if asked.at_most is not None:
        return "at_most", f"{name} has an at_most, but accuracy is made high: give it an at_least."
    for key, value, example in (("at_least", asked.at_least, "90%"), ("tolerance", asked.tolerance, "1%")):
        if not isinstance(value, float | int | str | None):
            return key, f'{key} is {value!r}: a share from 0 to 1, or one like "{example}", is needed.'
        if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?\s*%", value):
            return key, f'{key} is {value!r}: a share from 0 to 1, or one like "{example}", is needed.'
        number = None if value is None or isinstance(value, bool) else share_of(value)
        if value is not None and (number is None or not (0 <= number <= 1) or (number == 0 and key == "at_least")):
            hint = f' (in percent: "{value:g}%")' if isinstance(value, float | int) and 1 < value <= 100 else ""
            return key, f'{key} is {value}: no accuracy is that; a share above 0, up to 1 or "100%", is needed{hint}.'
    if asked.tolerance is not None:
        if asked.at_least is None:
            return "tolerance", "tolerance is that of a limit: give it an at_least."
        least = share_of(asked.at_least)
        if tolerated_least(least, asked.tolerance) <= 0:
            return "tolerance", f"tolerance is {asked.tolerance}: it leaves nothing of an at_least of {asked.at_least}."
    if name == "top1" and asked.precision not in _COUNTED:
        return "precision", f"precision is {asked.precision!r}: of top1 there is float32 and int8."
    if name != "top1" and asked.precision not in (None, "int8"):
        return "precision", f"precision is {asked.precision!r}, but {name} is that of int8: leave it out."
    return None


def tolerated_least(least: float, tolerance: float | str | None) -> float:
    """What still counts as having reached `least`: `tolerance` below it, or "1%" of it."""
    if isinstance(tolerance, str):
        return least * (1 - share_of(tolerance))
    return least - (tolerance or 0.0)


def _leaves(value: Any, key: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Every value below a struct, by dotted key; sequences are left out."""
    for field in value.__struct_fields__:
        below, inner = f"{key}{field}", getattr(value, field)
        if isinstance(inner, msgspec.Struct):
            yield from _leaves(inner, f"{below}.")
        elif not isinstance(inner, tuple):
            yield below, inner
