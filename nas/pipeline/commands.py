"""What `nas search` does: limits as they are written on the line, and experiments that no file has."""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from nas import config
from nas.config import Experiment
from nas.errors import ConfigError
from nas.pipeline import load_experiment, run_experiment
from nas.pipeline.direct import search
from nas.search import Front


def parsed(limits: Sequence[str]) -> dict[str, float | str]:
    """`["20", "macs=3e8"]` as `{"latency_ms": 20.0, "macs": 3e8}`.

    Raises:
        ConfigError: one is neither a number nor a share, or its cost is unknown.
    """
    found: dict[str, float | str] = {}
    for item in limits:
        name, _, text = item.rpartition("=")
        try:
            found[name or "latency_ms"] = text if text.endswith("%") else float(text)
        except ValueError as e:
            raise ConfigError(f"--limit {item}: expected [COST=]VALUE, such as 20, 50% or macs=3e8.") from e
    config.check_costs(found)
    return found


def limited(experiment: Experiment, limits: Mapping[str, float | str]) -> Experiment:
    """The experiment with these limits in place of its own on the same costs and accuracies.

    Raises:
        ConfigError: a tolerance of the experiment does not go with a new limit.
    """

    def changed(name: str, was: config.Limit, limit: float | str) -> Any:
        key = "at_least" if name in config.ACCURACIES else "at_most"
        now = msgspec.structs.replace(was, **{key: limit})
        config.check_limit(name, now)
        return now

    named = {config.accuracy_of(o.name, o): o for o in experiment.objectives}
    objectives = tuple(changed(o.name, o, limits[n]) if n in limits else o for n, o in named.items())
    others = dict(experiment.limits)
    known = {config.accuracy_of(key, config.as_limit(key, was)): key for key, was in others.items()}
    for name, limit in limits.items():
        if name not in named:
            key = known.get(name, name)
            was = others.get(key)
            others[key] = changed(key, was, limit) if isinstance(was, config.Limit) else limit
    return msgspec.structs.replace(experiment, objectives=objectives, limits=others)


def experiment_of(
    space: str,
    data: str,
    *,
    device: str | None,
    strategy: str | None,
    trials: int | None,
    limits: Mapping[str, float | str],
    overrides: Sequence[str] = (),
) -> Experiment:
    """The experiment that a space, a device and images make, all else as it comes."""
    name = "-".join(Path(part).stem for part in (space, device) if part)
    chosen = {"strategy": strategy, "trials": trials}
    accurate = {name: limit for name, limit in limits.items() if name in config.ACCURACIES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experiment.toml"
        content = {
            "name": name,
            "space": os.path.abspath(space) if space.endswith(".toml") else space,
            **({} if device is None else {"device": os.path.abspath(device) if os.sep in device else device}),
            "data": {"source": data if data == "digits" else os.path.abspath(data)},
            # as `nas.search` has it: a limit on accuracy is all that is asked of it
            "objectives": [*([] if accurate else [{"name": "top1"}]), {"name": "latency_ms"}],
            "limits": accurate,
            "search": {key: value for key, value in chosen.items() if value is not None},
        }
        path.write_text(tomli_w.dumps(content), encoding="utf-8")
        return limited(load_experiment(path, overrides=overrides), limits)


def search_experiment(
    experiment: Experiment, out: Path, *, stages: Sequence[str] = ("search",), redo: str | None = None
) -> None:
    """The search of an experiment, and with more `stages` what comes before it."""
    run_experiment(experiment, out, stages=stages, redo=redo)


def search_by(
    evaluate: str,
    space: str,
    out: Path,
    *,
    device: str | None,
    strategy: str | None,
    trials: int | None,
    limits: Mapping[str, float | str],
    address: str | None = None,
) -> Front:
    """A search by a function "module:function", of the current folder too; leaves its journal and front in `out`.

    It is evaluated here, or on the Ray cluster at `address`.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    given = {"device": device, "strategy": strategy, "trials": trials, "address": address}
    given["executor"] = None if address is None else "ray"
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    front = search(space, evaluate=evaluate, limits=limits, journal=out / "journal.jsonl", **chosen)
    front.write_csv(out / "front.csv")
    if len(front):
        front.plot().save(out / "front.svg")
    return front
