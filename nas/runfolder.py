"""A run's folder: one writer at a time, one configuration, and a record of which stages are done."""

import json
import os
import shutil
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from nas.config import NEUTRAL, PHASES, Data, Experiment
from nas.errors import NasError, RunError
from nas.files import cannot_write, read_as, write_json, write_text

STAGES = ("measure", "train", "search", "finish", "export", "verify", "report")

# What each stage leaves, for starting over. A stage that rewrites its own files needs nothing removed.
_LEAVES = {
    "measure": ("latency", "environment.json", "space.toml"),
    "train": ("supernet", "fidelity", "evaluations"),
    "search": ("search",),
    "finish": ("winners", "baselines"),
    "report": ("summary.json", "report.html"),
}
# The keys that decide what a stage makes; they may change until it has begun. Names of data, space and device are not
# among them, since their contents are compared; nor is what changes how a search runs, but not what it finds.
_DECIDES = {
    "measure": ("seed", "data.", "latency."),
    "train": ("train.",),
    "search": ("objectives", "limits.", "search."),
    "finish": ("finish.",),
}
_FREE = (
    *("data.source", "data.threads", *(f"train.{key}" for key in NEUTRAL)),
    *("search.executor", "search.workers", "search.address", "search.timeout_seconds"),
    *("search.cache", "search.tensorboard", "search.tracker"),
)

# Defaults that an older version of nas wrote out, where leaving the key out now means the same.
_WRITTEN_OUT = {"train.phases": list(PHASES)}

_DEFAULT = Experiment(name="", space="", data=Data(source=""), objectives=())


class _Stage(msgspec.Struct):
    done: bool
    seconds: float


class RunFolder:
    """Opened by `with`, which takes the lock. Everything in it is written atomically, so it may be cut off anywhere."""

    def __init__(self, path: Path, experiment: Experiment, *, redo: str | None = None):
        """With `redo`, what decides that stage and those after it may differ, since they are about to be done anew."""
        self.path = path
        self.experiment = experiment
        self._kept = STAGES if redo is None else STAGES[: STAGES.index(redo)]
        self._lock: Any = None

    def __enter__(self) -> "RunFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")
        except OSError as e:
            raise cannot_write(self.path, e) from e
        if not _locked(self._lock):
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise RunError(
                f"{self.path}: another run (process {holder}) is using this folder. Wait for it, stop it, or choose "
                f"another folder with --out."
            )
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        try:
            self._claim()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.close()  # which releases it

    def _claim(self) -> None:
        """Writes config.toml, unless the one that is there asks for something else and something was made of it."""
        path = self.path / "config.toml"
        mine = resolved(self.experiment)
        others = sorted(p.name for p in self.path.iterdir() if p.name not in _MARKS)
        if not path.exists() and others:
            raise RunError(
                f"{self.path}: not a run folder: it has {others[0]!r} and no config.toml. Choose an empty or new "
                f"folder with --out."
            )
        if path.exists() and others:
            try:
                theirs = _flat(tomllib.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError) as e:
                raise RunError(f"{path}: damaged: {e}. Write it anew, or use another folder with --out.") from e
            wanted = _flat(tomllib.loads(mine))
            wanted, theirs = _plain(wanted), _plain(theirs)
            begun = {stage: _DECIDES[stage] for stage in self._kept if stage in _DECIDES and self._begun(stage)}
            decided = tuple(k for keys in begun.values() for k in keys)
            keys = [k for k in {**wanted, **theirs} if k.startswith(decided) and k not in _FREE]
            keys = [k for k in keys if wanted.get(k) != theirs.get(k)]
            # An older version of nas did not know some keys: they had their defaults.
            defaults = _flat(tomllib.loads(resolved(_DEFAULT)))
            keys = [k for k in keys if k in theirs or wanted[k] != defaults.get(k)]
            keys = [k for k in keys if k in wanted or theirs[k] != _WRITTEN_OUT.get(k)]
            changed = [f"`{k}` is {wanted.get(k)!r}, was {theirs.get(k)!r}" for k in keys]
            if changed:
                first = next(stage for stage, decide in begun.items() if any(k.startswith(decide) for k in keys))
                raise RunError(
                    f"{self.path}: this folder belongs to another configuration. What differs now: "
                    f"{'; '.join(changed[:5])}. Use --out for a new folder; or `nas run EXPERIMENT --redo {first}`, "
                    f"which does that stage and all after it anew here."
                )
        if not path.exists() or path.read_bytes() != mine.encode():
            write_text(path, mine)

    def _begun(self, stage: str) -> bool:
        return any((self.path / leaves).exists() for leaves in _LEAVES.get(stage, ()))

    # stages

    def done(self, stage: str) -> bool:
        """True if the stage has been finished."""
        stages = self._stages()
        return stage in stages and stages[stage].done

    def seconds(self) -> dict[str, float]:
        """Seconds spent on each stage, attempts that were interrupted included (not those that were killed)."""
        stages = self._stages()
        return {name: round(stages[name].seconds, 2) for name in STAGES if name in stages}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, and marks it done if it ends well.

        Raises:
            RunError: the system refused to read or write (a full disk, a missing permission).
        """
        began = time.perf_counter()
        ended_well = False
        try:
            yield
            ended_well = True
        except OSError as e:
            raise cannot_write(Path(e.filename or self.path), e) from e
        finally:
            try:
                stages = self._stages()
                before = stages[name].seconds if name in stages else 0.0
                self._mark({**stages, name: _Stage(ended_well, before + time.perf_counter() - began)})
            except NasError:
                if ended_well:  # otherwise the first error says more
                    raise

    def redo(self, stage: str) -> None:
        """Forgets `stage` and all after it, and removes what they left."""
        first = STAGES.index(stage)
        try:
            kept = self._stages()
        except RunError:  # damaged: what comes before is taken as done
            kept = {name: _Stage(True, 0.0) for name in STAGES[:first]}
        self._mark({name: made for name, made in kept.items() if STAGES.index(name) < first})
        for name in STAGES[first:]:
            for leaves in _LEAVES.get(name, ()):
                path = self.path / leaves
                try:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                except OSError as e:
                    raise cannot_write(path, e) from e

    def require(self, *stages: str) -> None:
        """Raises:
        RunError: one of `stages` is not done yet.
        """
        for stage in stages:
            if not self.done(stage):
                raise RunError(
                    f"{self.path}: stage `{stage}` has not been done in this folder. Run `nas {stage}` with the same "
                    f"experiment first, or `nas run` for all stages."
                )

    def _stages(self) -> dict[str, _Stage]:
        path = self.path / "stages.json"
        stages = read_as(path, dict[str, _Stage], stage="STAGE") if path.exists() else {}
        return {name: made for name, made in stages.items() if name in STAGES}

    def _mark(self, stages: dict[str, _Stage]) -> None:
        write_json(self.path / "stages.json", msgspec.to_builtins(stages))


_MARKS = (".lock", "config.toml", ".config.toml.part", ".stages.json.part", ".DS_Store")


def _locked(file: Any) -> bool:
    """Whether the lock on an open file could be had. Where the system has no such locks (Windows), it always can."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _plain(flat: dict[str, Any]) -> dict[str, Any]:
    """The same, without what older versions of nas wrote out where leaving it out now means the same: an objective's
    precision of float32, and a population of 32, but for `predictor`, whose own is another."""
    objectives = [
        {k: v for k, v in o.items() if (k, v) != ("precision", "float32")} for o in flat.get("objectives", ())
    ]
    flat = {**flat, **({"objectives": objectives} if objectives else {})}
    if flat.get("search.population") == 32 and flat.get("search.strategy") != "predictor":
        del flat["search.population"]
    return flat


def resolved(experiment: Experiment) -> str:
    """The experiment as TOML, every default written out (TOML has no null: what is not set is left out)."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return [clean(v) for v in value] if isinstance(value, list | tuple) else value

    return tomli_w.dumps(clean(json.loads(msgspec.json.encode(experiment))))
