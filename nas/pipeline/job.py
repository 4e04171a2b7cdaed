"""What the stages of one run share, each part made when it is first needed."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from nas import cost
from nas.config import Device, Experiment, Train, with_values
from nas.console import Console
from nas.data import Dataset, load_data
from nas.errors import LimitError, RunError
from nas.export import RUNTIMES, Runtime
from nas.files import read_as
from nas.latency import LatencyModel, load_device, load_model, precisions_of, preferred
from nas.measure import runtime_class
from nas.runfolder import RunFolder
from nas.space import Space, load_space

if TYPE_CHECKING:  # importing JAX takes seconds that stages without it need not spend
    from nas.supernet import Supernet


class _Digest(msgspec.Struct):
    digest: str


class _Environment(msgspec.Struct):
    """What later stages hold environment.json to."""

    space: _Digest
    data: _Digest
    tables: dict[str, str]
    device: dict[str, Any]


@dataclasses.dataclass(eq=False)
class Job:
    """One experiment in one run folder."""

    experiment: Experiment
    folder: RunFolder
    console: Console

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @functools.cached_property
    def data(self) -> Dataset:
        """The images, split."""
        data = load_data(self.experiment.data)
        self.console.say(f"data: {data}")
        return data

    @functools.cached_property
    def space(self) -> Space:
        """The search space over these images."""
        space = load_space(self.experiment.space, input_shape=self.data.image_shape, classes=self.data.classes)
        self.console.say(f"space: {space}")
        return space

    @functools.cached_property
    def device(self) -> Device:
        """The device whose latency counts.

        Raises:
            DeviceError: it, its runtime or one of its precisions is unknown.
        """
        device = load_device(self.experiment.device)
        runtime_class(_written_for(device))
        return device

    @functools.cached_property
    def runtime(self) -> Runtime:
        """What files are written for and checked in."""
        return runtime_class(_written_for(self.device))()

    @property
    def runtime_name(self) -> str:
        """The name of `runtime`: the device's; of a device that is not at hand and has an unknown one, ONNX Runtime."""
        return _written_for(self.device).runtime

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that networks of the space have latencies in on the device."""
        return precisions_of(self.device, self.space)

    @property
    def files(self) -> tuple[str, ...]:
        """Precisions of the files: those of the tables that the runtime has, or float32 where it has none of them."""
        return tuple(p for p in self.tables if p in self.runtime.precisions) or ("float32",)

    @property
    def file(self) -> str:
        """The precision of the file that the answer is of: that of the search where the runtime has it."""
        return self.precision if self.precision in self.files else preferred(self.files)

    def table_of(self, file: str) -> LatencyModel:
        """What predicts a file of that precision: the table of it, or that of the search where there is none."""
        return self.tables.get(file, self.tables[self.precision])

    @functools.cached_property
    def supernet(self) -> "Supernet":
        """The supernet of the space."""
        from nas.supernet import Supernet

        return Supernet(self.space)

    @functools.cached_property
    def tables(self) -> dict[str, LatencyModel]:
        """The latency table, or learned model, of each precision that has one."""
        self.folder.require("measure")
        then = read_as(self.path / "environment.json", _Environment, stage="measure")
        tables = {p: load_model(self.path / "latency", p, self.space) for p in then.tables}
        now = {"space": self.space.digest, "data": self.data.digest}
        before = {"space": then.space.digest, "data": then.data.digest}
        now |= {f"{p} latency table": table.digest for p, table in tables.items()}
        before |= {f"{p} latency table": then.tables.get(p, "none") for p in tables}
        for what, digest in now.items():
            if before[what] != digest:
                raise RunError(
                    f"{self.path}: the {what} has changed since this run began (hash {before[what][:12]}, now "
                    f"{digest[:12]}). Bring it back as it was (space.toml in the run folder is the space's copy), or "
                    f"start a new run with --out."
                )
        device = msgspec.json.decode(msgspec.json.encode(self.device))  # tuples as lists, as in the file
        changed = [k for k, v in device.items() if then.device.get(k, v) != v]
        if changed:
            raise RunError(
                f"{self.path}: device {self.experiment.device} has changed since its table was measured "
                f"({', '.join(changed)}). Bring device.toml back as it was, measure again with "
                f"`nas run EXPERIMENT --redo measure`, or start a new run with --out."
            )
        return together(tables)

    @property
    def precision(self) -> str:
        """The precision whose latency the search limits: the objective's; where it names none, float32 or the first."""
        asked = self.experiment.limit.precision
        return preferred(self.tables) if asked is None else asked

    @functools.cached_property
    def limit(self) -> "LatencyLimit":
        """The latency limit in milliseconds.

        Raises:
            LimitError: no network of the space can meet it.
        """
        return limit_on(self.tables[self.precision], self.space, self.experiment)

    def say_limit(self) -> None:
        """Tells the limit, or that it is impossible."""
        limit = self.limit
        reachable = f"{limit.fastest_ms:.4g} to {limit.slowest_ms:.4g} ms"
        beyond = f", up to {limit.tolerated_ms:.4g} ms tolerated" if limit.tolerated_ms > limit.ms else ""
        self.console.say(f"limit: {limit.ms:.4g} ms{beyond} (reachable: {reachable}{_also(limit.caveat)})")

    @property
    def trained_as(self) -> Train:
        """The settings that the supernet was trained with; of a population, those that its best member ended with.

        Raises:
            RunError: supernet/population.json is damaged.
        """
        train = self.experiment.train
        if train.population is None:
            return train
        from nas.train.lineage import Lineage

        line = Lineage.read(self.path / "supernet" / "population.json").winning_line()
        return with_values(train, {**line[-1].values, "population": None})

    def supernet_params(self) -> dict[str, Any]:
        """The trained weights of the supernet.

        Raises:
            CheckpointError: they are damaged, or of another space.
        """
        from nas.train import Checkpoints, steps_of
        from nas.train.supernet import identity, state_like, trained

        self.folder.require("train")
        settings = self.experiment.train
        steps = steps_of(self.data.train, settings.epochs, settings.batch_size)
        like = state_like(self.supernet, self.data, settings, seed=self.experiment.seed)
        of = identity(self.supernet, settings)
        with Checkpoints(self.path / "supernet" / "checkpoints", of) as checkpoints:
            return dict(trained(checkpoints.restore(steps, like)))

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """The genotypes of the fewest and the most MACs, of the networks that the device can run."""
        unsupported = self.tables[self.precision].unsupported
        costs = self.space.costs(lambda g: float("inf") if g.key in unsupported else cost.macs(g))
        return self.space.extreme(costs, largest=False)[0], self.space.extreme(costs, largest=True)[0]


def _written_for(device: Device) -> Device:
    """What files are written for: a device whose runtime nobody can run here is searched for, and not run."""
    if device.at_hand or device.runtime in RUNTIMES:
        return device
    return msgspec.structs.replace(device, runtime="onnxruntime", precision=("float32",))


def together(tables: dict[str, LatencyModel]) -> dict[str, LatencyModel]:
    """Latency models of one device's precisions, by precision: a block that one of them cannot run counts so in all.

    A winner is delivered in every precision, so it must run in every one.
    """
    unsupported = {key: why for table in tables.values() for key, why in table.unsupported.items()}
    return {p: t.without(unsupported) for p, t in tables.items()}


@dataclasses.dataclass(frozen=True)
class LatencyLimit:
    """The latency limit, and what the space can reach, in milliseconds."""

    ms: float
    asked: str
    fastest_ms: float
    slowest_ms: float
    caveat: str = ""  # what these are, where they are not latencies and exact
    tolerated_ms: float = 0.0  # what still counts as within the limit, not below it


def in_unit(asked: float | int | str, least: float, most: float) -> float:
    """A limit in its cost's unit: as it is, or "50%" of the way from the least to the most that can be reached."""
    if isinstance(asked, str):
        return least + float(asked.rstrip("% ")) / 100 * (most - least)
    return float(asked)


def tolerated(limit: float, tolerance: float | str | None) -> float:
    """What still counts as within `limit`: `tolerance` is in its unit, or "5%" of it."""
    if isinstance(tolerance, str):
        return limit * (1 + float(tolerance.rstrip("% ")) / 100)
    return limit + (tolerance or 0.0)


def limit_on(model: LatencyModel, space: Space, experiment: Experiment) -> LatencyLimit:
    """The latency limit of an experiment in milliseconds, by what predicts its device.

    Raises:
        LimitError: no network of the space can meet it.
    """
    fastest_ms, _, slowest_ms, _ = model.reachable(space)
    asked = experiment.limit.at_most
    limit_ms = slowest_ms if asked is None else in_unit(asked, fastest_ms, slowest_ms)
    tolerated_ms = tolerated(limit_ms, experiment.limit.tolerance)
    if tolerated_ms < fastest_ms:
        beyond = f" ({tolerated_ms:g} ms with its tolerance)" if tolerated_ms > limit_ms else ""
        raise LimitError(
            f"the limit is {limit_ms:g} ms{beyond}, but the fastest network of space {space.name!r} takes "
            f"{fastest_ms:.4g} ms on {experiment.device} in {model.precision} (the slowest {slowest_ms:.4g} "
            f"ms{_also(model.caveat)}). Set `at_most` of latency_ms between these, or choose another "
            f"space or smaller images."
        )
    told = "none" if asked is None else str(asked)
    return LatencyLimit(limit_ms, told, fastest_ms, slowest_ms, model.caveat, tolerated_ms)


def _also(caveat: str) -> str:
    return f"; {caveat}" if caveat else ""
