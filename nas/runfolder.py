"""A run's folder: one writer at a time, one configuration, and a record of which stages are done."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from nas.config import Experiment
from nas.errors import RunError
from nas.files import cannot_write, read_json, write_json, write_text

STAGES = ("measure", "train", "search", "finish", "export", "verify", "report")


class RunFolder:
    """Opened by `with`, which takes the lock. Everything in it is written atomically, so it may be cut off anywhere."""

    def __init__(self, path: Path, experiment: Experiment):
        self.path = path
        self.experiment = experiment
        self._lock: Any = None

    def __enter__(self) -> "RunFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")
        except OSError as e:
            raise cannot_write(self.path, e) from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise RunError(
                f"{self.path}: another run (process {holder}) is using this folder. Wait for it, stop it, or choose "
                f"another folder with --out."
            ) from e
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
        """Writes config.toml, or compares with the one that is there."""
        path = self.path / "config.toml"
        mine = resolved(self.experiment)
        if not path.exists():
            others = [p.name for p in self.path.iterdir() if p.name not in (".lock", ".config.toml.part")]
            if others:
                raise RunError(
                    f"{self.path}: not a run folder: it has {sorted(others)[0]!r} and no config.toml. Choose an empty "
                    f"or new folder with --out."
                )
            write_text(path, mine)
            return
        theirs = path.read_text()
        if theirs != mine:
            a, b = theirs.splitlines(), mine.splitlines()
            changed = [f"`{x}`" for x in b if x not in a] or [f"no longer `{x}`" for x in a if x not in b]
            raise RunError(
                f"{self.path}: this folder belongs to another configuration. What differs now: "
                f"{', '.join(changed[:5])}. Use --out for a new folder, or move this one away."
            )

    # stages

    def done(self, stage: str) -> bool:
        """True if the stage has been finished."""
        return bool(self._stages().get(stage, {}).get("done"))

    def seconds(self) -> dict[str, float]:
        """Seconds spent on each stage, attempts that were interrupted included (not those that were killed)."""
        return {name: round(self._stages()[name]["seconds"], 2) for name in STAGES if name in self._stages()}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, and marks it done if it ends well."""
        began = time.perf_counter()
        ended_well = False
        try:
            yield
            ended_well = True
        finally:
            stages = self._stages()
            spent = stages.get(name, {}).get("seconds", 0.0) + time.perf_counter() - began
            stages[name] = {"done": ended_well, "seconds": spent}
            write_json(self.path / "stages.json", stages)

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

    def _stages(self) -> dict[str, Any]:
        path = self.path / "stages.json"
        return read_json(path) if path.exists() else {}


def resolved(experiment: Experiment) -> str:
    """The experiment as TOML, every default written out (TOML has no null: what is not set is left out)."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return [clean(v) for v in value] if isinstance(value, list | tuple) else value

    return tomli_w.dumps(clean(json.loads(msgspec.json.encode(experiment))))
