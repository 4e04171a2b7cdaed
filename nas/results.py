"""A finished run, read back: its front, its winners, its figures."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

from nas.config import Experiment, load_experiment
from nas.deliver import Winner, load_winner
from nas.errors import NasError, RunError
from nas.fidelity import Fidelity, read_fidelity
from nas.files import read_json
from nas.latency import LatencyModel, load_model
from nas.pipeline.costs import least_of, minimised
from nas.report.folder import run_space
from nas.search import Front, Setting, Trials, read_trials


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run folder holds."""

    path: Path

    @functools.cached_property
    def experiment(self) -> Experiment:
        """The resolved experiment."""
        return load_experiment(self.path / "config.toml")

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return read_json(self.path / "summary.json")

    @functools.cached_property
    def proof(self) -> dict[str, Any]:
        """latency/proof.json."""
        return read_json(self.path / "latency" / "proof.json")

    @functools.cached_property
    def trials(self) -> Trials:
        """Every trial of the search, in order."""
        return read_trials(self.path / "search" / "journal.jsonl")

    @functools.cached_property
    def front(self) -> Front:
        """The trials that no other beats in all objectives: accuracy (validation, inherited weights) and costs."""
        return Front.of(self.trials, minimised(self.experiment), self._setting)

    @functools.cached_property
    def _setting(self) -> Setting | None:
        """What was searched; None, or without a table, where the folder does not have it any more."""
        space = run_space(self.path)
        if space is None:
            return None
        limit = self.experiment.limit
        models: dict[str, LatencyModel] = {}
        with contextlib.suppress(NasError):  # the front can be read without it
            models["latency_ms"] = load_model(self.path / "latency", self.summary["precision"], space)
        limits = {} if limit.at_most is None else {"latency_ms": self.summary["limit_ms"]}
        device, least = Path(self.experiment.device).name, least_of(self.experiment.least)
        return Setting(space, device, models, limits, self.experiment.accuracy, least)

    @functools.cached_property
    def winners(self) -> dict[str, Winner]:
        """The finished networks by name, best of the search first."""
        return {e["name"]: load_winner(self.path / e["folder"]) for e in self.summary["winners"]}

    @property
    def winner(self) -> Winner:
        """The one that the report recommends."""
        return self.winners[self.summary["winner"]["name"]]

    @functools.cached_property
    def fidelity(self) -> Fidelity:
        """Whether the supernet orders networks as training each alone does.

        Raises:
            RunError: `nas fidelity` was not run, or its file is damaged.
        """
        return read_fidelity(self.path / "fidelity" / "fidelity.json")

    def verified(self, name: str) -> dict[str, Any]:
        """verify.json of a winner or baseline."""
        for entry in (*self.summary["winners"], *self.summary["baselines"]):
            if entry["name"] == name:
                return read_json(self.path / entry["folder"] / "verify.json")
        raise RunError(f"{self.path}: no network is called {name!r}; there are {', '.join(self.winners)}.")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.summary['verdict']})"


def load_run(path: str | Path) -> Run:
    """The run in `path`.

    Raises:
        RunError: it is not a finished run.
    """
    path = Path(path)
    if not (path / "summary.json").exists():
        raise RunError(f"{path}: not a finished run (summary.json is missing). Finish it with `nas run`.")
    return Run(path)
