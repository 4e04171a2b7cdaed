"""Reading a run folder: its files as frozen objects. Unknown keys are ignored, so that files may grow."""

import dataclasses
import json
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from nas.architecture import Architecture, load_architecture
from nas.config import Experiment, convert, load_toml
from nas.errors import ConfigError, RunError, SpaceError
from nas.fidelity import Fidelity, read_fidelity
from nas.files import damaged, read_as
from nas.search import Trials, read_trials
from nas.space import Space, load_space

T = TypeVar("T")
Row = dict[str, int | float | None]
Metrics = list[Row]  # one row a logged step


class SpaceFacts(msgspec.Struct, frozen=True):
    """environment.json: which space."""

    name: str
    digest: str
    networks: float
    choices: int


class DataFacts(msgspec.Struct, frozen=True):
    """environment.json: which images."""

    source: str
    digest: str
    train: int
    val: int
    test: int
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]


class DeviceFacts(msgspec.Struct, frozen=True):
    """environment.json: which device, see nas.config.Device."""

    name: str
    device: str
    runtime: str
    hardware: str = "host"
    threads: int = 1
    batch: int = 1
    frequency_policy: str = ""
    notes: str = ""
    source: str = ""
    licence: str = ""


class Environment(msgspec.Struct, frozen=True):
    """environment.json: what one must know to repeat the run."""

    nas: str
    python: str
    versions: dict[str, str | None]  # None: not installed
    hardware: str
    platform: str
    seed: int
    space: SpaceFacts
    data: DataFacts
    device: DeviceFacts
    tables: dict[str, str]  # precision -> digest
    runtime: str = ""  # with its version
    started: str = ""
    git_commit: str | None = None


class Pair(msgspec.Struct, frozen=True):
    """One held-out network."""

    predicted_ms: float
    measured_ms: float


class Learning(msgspec.Struct, frozen=True):
    """What the proof of a learned model says besides (nas.latency.proof.Learning)."""

    measured: int
    held_out: bool
    coverage: float
    similar: str
    similar_mape: float
    similar_within_10: float
    similar_tau: float | None
    left_out_mape: float
    left_out_similar_mape: float


class Agreement(msgspec.Struct, frozen=True):
    """How well a table predicts networks that it was not made from (nas.latency.Proof, less what is not shown)."""

    networks: int
    mape: float
    within_5: float
    within_10: float
    kendall_tau: float | None
    tau_low: float | None
    tau_high: float | None
    repeat_mape: float | None = None
    rows: tuple[Pair, ...] = ()
    learned: Learning | None = None
    doubt: str = ""


class Proof(msgspec.Struct, frozen=True):
    """latency/proof.json."""

    precisions: dict[str, Agreement]


class Outcome(msgspec.Struct, frozen=True):
    """What one file of a network does on the device."""

    accuracy: float  # on the test set, in the runtime
    latency_ms: float | None  # median, as it came; None: the device is not at hand
    # measured, at the speed that the machine had for its table, busy moments left out; None: the device is not at hand
    comparable_ms: float | None
    predicted_ms: float
    size_bytes: int
    file: str  # relative to the run folder
    passed: bool
    predicted_low_ms: float | None = None  # the 80 % interval of the prediction, where it is known
    predicted_high_ms: float | None = None
    machine_level: float | None = 1.0  # 1.1: measured while the machine was 10 % slower than for its table

    @property
    def told_ms(self) -> float:
        """The latency that is told: measured, or where nothing was, predicted."""
        return self.predicted_ms if self.comparable_ms is None else self.comparable_ms

    @property
    def how(self) -> str:
        """Where `told_ms` comes from, in a word."""
        return "predicted" if self.comparable_ms is None else "measured"


class Candidate(Outcome, frozen=True, kw_only=True):
    """A winner or baseline; what it inherits is of its file in the precision that was searched for."""

    name: str
    folder: str  # relative to the run folder
    role: Literal["winner", "smallest", "largest", "handmade"]
    validation_accuracy: float | None
    macs: int
    params: int
    float32: Outcome | None = None
    int8: Outcome | None = None


class Refusal(msgspec.Struct, frozen=True):
    """A file that did not pass and is not delivered."""

    name: str
    precision: str
    reason: str


class Further(msgspec.Struct, frozen=True):
    """A cost beside latency that was an objective or had a limit; in its unit."""

    name: str
    value: float  # of the answer, as the search counted it
    limit: float | None
    tolerated: float | None  # what still counts as within the limit
    reachable: tuple[float, float]


class Least(msgspec.Struct, frozen=True):
    """A limit on accuracy, in shares."""

    name: str  # "top1" or "top1_int8"
    asked: float
    tolerated: float
    reached: bool  # by a trial of the search
    nearest: float | None  # the trial that missed by the least, or the best; None: all failed
    answer: float | None  # test accuracy of the answer's file in that precision, if there is one


class Summary(msgspec.Struct, frozen=True):
    """summary.json: the answer."""

    name: str
    question: str
    precision: str  # whose latency was searched for
    limit_ms: float
    limit: str  # as asked: "50%", "0.2" or "none"
    reachable_ms: tuple[float, float]
    winner: Candidate
    winners: tuple[Candidate, ...]
    baselines: tuple[Candidate, ...]
    beats_handmade: bool | None
    verdict: str
    refused: tuple[Refusal, ...]
    trials: int
    seconds: dict[str, float]  # of each stage
    reachable_caveat: str = ""  # what `reachable_ms` is, where it is not exact
    file_precision: str = ""  # of the answer's file, where no runtime at hand has `precision`
    tolerated_ms: float = 0.0  # what still counts as within the limit
    further: tuple[Further, ...] = ()
    objectives: tuple[str, ...] = ("error", "latency_ms")  # as costs
    least: tuple[Least, ...] = ()

    @property
    def file(self) -> str:
        """The precision of the answer's file."""
        return self.file_precision or self.precision


class Spread(msgspec.Struct, frozen=True):
    """Measured latency in milliseconds; None where the device is not at hand."""

    median: float | None
    p10: float | None
    p90: float | None
    predicted: float | None = None


class Check(msgspec.Struct, frozen=True):
    """verify.json: the proof that one file does what the network does."""

    passed: bool
    full_check: bool | None = None
    max_abs_diff: float | None = None
    max_rel_diff: float | None = None
    top1_agreement: float | None = None
    accuracy: float | None = None
    jax_accuracy: float | None = None
    latency_ms: Spread | None = None
    size_bytes: int | None = None
    reason: str | None = None


class BlockTime(msgspec.Struct, frozen=True):
    """blocks.json: predicted latency of one block; the last one, `once`, is what comes once a network."""

    name: str
    label: str
    latency_ms: float


class Trained(msgspec.Struct, frozen=True):
    """One member of one generation of a population (nas.train.lineage.Member)."""

    generation: int
    member: int
    interval: int
    source: int
    parent: int
    values: dict[str, float]
    correct: tuple[int, ...] | None


class Population(msgspec.Struct, frozen=True):
    """supernet/population.json: supernets trained beside each other, in the order of their generations."""

    images: int
    winner: int
    members: tuple[Trained, ...]

    @property
    def line(self) -> tuple[Trained, ...]:
        """The winner and those whose weights it has, the first generation first."""
        of = {(m.generation, m.member): m for m in self.members}
        line = [of[self.members[-1].generation, self.winner]]
        while line[0].source >= 0:
            line.insert(0, of[line[0].source, line[0].parent])
        return tuple(line)

    def top1(self, member: Trained) -> float | None:
        """Of all compared subnets together; None if the member diverged."""
        return None if member.correct is None else sum(member.correct) / (len(member.correct) * self.images)


@dataclasses.dataclass(frozen=True)
class Member:
    """A winner or baseline with the files of its folder."""

    facts: Candidate
    files: dict[str, Outcome]  # of each precision, the one that was searched for first
    architecture: Architecture
    checks: dict[str, Check]
    blocks: dict[str, tuple[BlockTime, ...]]
    training: Metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the report needs of a run."""

    folder: Path
    experiment: Experiment
    environment: Environment
    summary: Summary
    proof: Proof
    training: Metrics  # of the supernet
    trials: Trials
    winners: tuple[Member, ...]
    baselines: tuple[Member, ...]
    space: Space | None  # None: it has changed since, or is elsewhere
    fidelity: Fidelity | None = None  # None: `nas fidelity` was not run
    population: Population | None = None  # None: one supernet was trained

    @property
    def limit_ms(self) -> float | None:
        """The limit, if one was asked for."""
        return None if self.summary.limit == "none" else self.summary.limit_ms

    @property
    def whole(self) -> Trials:
        """The trials on all images: those on fewer, which some strategies begin with, do not compare with them."""
        most = max((t.total for t in self.trials), default=0)
        return Trials(t for t in self.trials if t.total == most)

    @property
    def networks_tried(self) -> int:
        """Different ones: a network may have been tried on fewer images and again on more."""
        return len({t.genotype for t in self.trials})

    @property
    def winner(self) -> Member:
        """The answer."""
        return next(m for m in self.winners if m.facts.name == self.summary.winner.name)

    @property
    def members(self) -> tuple[Member, ...]:
        """Winners, then baselines."""
        return (*self.winners, *self.baselines)


def read_run(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        RunError: a file is missing or damaged.
    """
    summary = _load(folder / "summary.json", Summary)
    if summary.winner.name not in [w.name for w in summary.winners]:
        raise _damaged(folder / "summary.json", f"its winner `{summary.winner.name}` is not among its winners")
    environment = _load(folder / "environment.json", Environment)
    config = _required(folder / "config.toml")
    raw, text = load_toml(config, what="resolved experiment")
    experiment = convert(raw, Experiment, path=config, text=text)
    order = folder / "fidelity" / "fidelity.json"
    population = folder / "supernet" / "population.json"
    return Run(
        folder=folder,
        experiment=experiment,
        environment=environment,
        summary=summary,
        proof=_load(folder / "latency" / "proof.json", Proof),
        training=_metrics(folder / "supernet" / "metrics.jsonl"),
        trials=read_trials(_required(folder / "search" / "journal.jsonl")),
        winners=tuple(_member(folder, c, summary) for c in summary.winners),
        baselines=tuple(_member(folder, c, summary) for c in summary.baselines),
        space=_space(folder, experiment, environment),
        fidelity=read_fidelity(order) if order.exists() else None,
        population=_load(population, Population) if population.exists() else None,
    )


def _member(run: Path, facts: Candidate, summary: Summary) -> Member:
    folder = run / facts.folder
    architecture = load_architecture(_required(folder / "architecture.json"))
    blocks = _load(folder / "blocks.json", dict[str, tuple[BlockTime, ...]])
    names = [*(b.name for b in architecture.network.blocks), "once"]
    if summary.precision not in blocks or any([b.name for b in times] != names for times in blocks.values()):
        raise _damaged(folder / "blocks.json", "its blocks are not those of architecture.json")
    others = {"float32": facts.float32, "int8": facts.int8}
    return Member(
        facts=facts,
        files={summary.file: facts} | {p: outcome for p, outcome in others.items() if outcome is not None},
        architecture=architecture,
        checks=_load(folder / "verify.json", dict[str, Check]),
        blocks=blocks,
        training=_metrics(folder / "training" / "metrics.jsonl"),
    )


def run_space(folder: Path) -> Space | None:
    """The space that was searched in the run `folder`; None where it has changed since, or is elsewhere."""
    return _space(folder, _experiment(folder), _load(folder / "environment.json", Environment))


def _experiment(folder: Path) -> Experiment:
    path = _required(folder / "config.toml")
    raw, text = load_toml(path, what="resolved experiment")
    return convert(raw, Experiment, path=path, text=text)


def _space(folder: Path, experiment: Experiment, environment: Environment) -> Space | None:
    """The very space that was searched: the run's own copy (space.toml), or the one that the experiment names."""
    data = environment.data
    for name in (str(folder / "space.toml"), experiment.space):
        try:
            space = load_space(name, input_shape=data.image_shape, classes=len(data.classes))
        except (ConfigError, SpaceError):
            continue
        if space.digest == environment.space.digest:
            return space
    return None


# Which stage makes a file, for the advice to make it again.
_MADE_BY = {
    "environment.json": "measure",
    "population.json": "train",
    "proof.json": "measure",
    "architecture.json": "finish",
    "blocks.json": "export",
    "verify.json": "verify",
    "summary.json": "report",
}


def _load(path: Path, cls: type[T]) -> T:
    return read_as(path, cls, stage=_MADE_BY.get(path.name))


def _metrics(path: Path) -> Metrics:
    """The rows; none if nothing was trained."""
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return [msgspec.convert(row, Row) for row in rows]  # JSON of Python, which knows NaN
    except (OSError, ValueError) as e:
        raise _damaged(path, str(e)) from e


def _required(path: Path) -> Path:
    if not path.is_file():
        raise _damaged(path, "there is no such file; perhaps this run is not finished: `nas run` goes on with it")
    return path


def _damaged(path: Path, why: str) -> RunError:
    trained = "train" if path.parent.name == "supernet" else "finish"
    return damaged(path, why, stage=trained if path.name == "metrics.jsonl" else _MADE_BY.get(path.name))
