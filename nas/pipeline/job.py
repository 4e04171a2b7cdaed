"""What the stages of one run share, each part made when it is first needed."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nas.config import Device, Experiment
from nas.console import Console
from nas.data import Dataset, load_data
from nas.errors import LimitError, RunError
from nas.export import RUNTIMES
from nas.files import read_json
from nas.latency import Table, load_device
from nas.runfolder import RunFolder
from nas.space import Space, load_space

if TYPE_CHECKING:  # importing JAX takes seconds that stages without it need not spend
    from nas.supernet import Supernet


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
        """The device that latency is measured on."""
        return load_device(self.experiment.device)

    @functools.cached_property
    def runtime(self) -> Any:
        """The device's runtime."""
        return RUNTIMES[self.device.runtime]()

    @functools.cached_property
    def supernet(self) -> "Supernet":
        """The supernet of the space."""
        from nas.supernet import Supernet

        return Supernet(self.space)

    @functools.cached_property
    def tables(self) -> dict[str, Table]:
        """The measured latency table of each precision."""
        self.folder.require("measure")
        then = read_json(self.path / "environment.json")
        for what, digest in (("space", self.space.digest), ("data", self.data.digest)):
            if then[what]["digest"] != digest:
                raise RunError(
                    f"{self.path}: the {what} has changed since this run began (hash {then[what]['digest'][:12]}, now "
                    f"{digest[:12]}). Bring it back as it was (space.toml in the run folder is the space's copy), or "
                    f"start a new run with --out."
                )
        return {p: Table.load(self.path / "latency", p) for p in self.device.precision}

    @property
    def precision(self) -> str:
        """The precision whose latency the search limits."""
        return self.experiment.limit.precision

    @functools.cached_property
    def limit(self) -> "Limit":
        """The latency limit in milliseconds.

        Raises:
            LimitError: no network of the space can meet it.
        """
        fastest_ms, _, slowest_ms, _ = self.tables[self.precision].reachable(self.space)
        asked = self.experiment.limit.at_most
        if asked is None:
            limit_ms = slowest_ms
        elif isinstance(asked, str):
            limit_ms = fastest_ms + float(asked.rstrip("% ")) / 100 * (slowest_ms - fastest_ms)
        else:
            limit_ms = float(asked)
        if limit_ms < fastest_ms:
            raise LimitError(
                f"the limit is {limit_ms:g} ms, but the fastest network of space {self.space.name!r} takes "
                f"{fastest_ms:.4g} ms on {self.experiment.device} in {self.precision} (the slowest {slowest_ms:.4g} "
                f"ms). Set `at_most` of objective latency_ms between these, or choose another space or smaller images."
            )
        return Limit(limit_ms, "none" if asked is None else str(asked), fastest_ms, slowest_ms)

    def supernet_params(self) -> dict[str, Any]:
        """The trained weights of the supernet.

        Raises:
            CheckpointError: they are damaged.
        """
        import jax

        from nas.train import Checkpoints, optimiser
        from nas.train.loop import steps_of

        self.folder.require("train")
        settings = self.experiment.train
        steps = steps_of(self.data.train, settings.epochs, settings.batch_size)
        params = self.supernet.init(self.experiment.seed)
        transform = optimiser.build(settings.optimiser, steps)
        like = {"params": params, "optimiser": jax.eval_shape(transform.init, params)}
        with Checkpoints(self.path / "supernet" / "checkpoints") as checkpoints:
            return checkpoints.restore(steps, like)["params"]

    def handmade(self) -> np.ndarray:
        """The genotype of the hand-made network: uniform choices, nearest to the limit from below.

        Every layer is the space's MBConv (its first block where there is none), every other option takes its smallest,
        middle or largest value in all layers alike; of these networks the slowest within the limit is taken, or the
        fastest where none is within it.
        """
        names = sorted({c.name.rpartition("/")[2] for c in self.space.choices})
        rows = []
        for levels in np.ndindex(*(3,) * len(names)):
            picks = {n: functools.partial(_pick, name=n, level=k) for n, k in zip(names, levels, strict=True)}
            rows.append(self.space.uniform(**picks))
        candidates = np.unique(np.stack(rows), axis=0)
        latency_ms = self.tables[self.precision].price(self.space, candidates)
        within = latency_ms <= self.limit.ms
        order = np.lexsort((np.where(within, -latency_ms, latency_ms), ~within))
        return candidates[order[0]]


@dataclasses.dataclass(frozen=True)
class Limit:
    """The latency limit, and what the space can reach, in milliseconds."""

    ms: float
    asked: str
    fastest_ms: float
    slowest_ms: float


def _pick(values: tuple[Any, ...], *, name: str, level: int) -> Any:
    """The smallest (0), middle (1) or largest (2) of an option's values; of blocks always the same one."""
    if name == "block":
        return "mbconv" if "mbconv" in values else values[0]
    ordered = values if isinstance(values[0], str) else sorted(values)
    return ordered[(len(ordered) - 1) * level // 2]
