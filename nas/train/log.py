"""The log of a training: metrics.jsonl always, TensorBoard events on request (the one place tensorboardX enters)."""

import importlib.util
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from nas.errors import RunError
from nas.files import write_bytes


class Log:
    """Rows as JSON lines, each on disk as soon as it is appended. Use it by `with`.

    What a training that was cut off wrote after step `start`, where it goes on, is dropped.
    """

    def __init__(self, path: Path, start: int):
        self.path = path
        self.start = start

    def append(self, row: Mapping[str, float]) -> None:
        """Adds a row; "step" is the number of steps done."""
        self._file.write(json.dumps(row) + "\n")  # a line is one write to the system

    def __enter__(self) -> "Log":
        before = self.path.read_bytes() if self.path.exists() else b""
        kept = b"".join(line for line in before.splitlines(keepends=True) if _step(line) <= self.start)
        if kept != before:
            write_bytes(self.path, kept)
        self._file: TextIO = open(self.path, "a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def _step(line: bytes) -> float:
    """The step of a row; infinite if the line is torn or no row."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
    except (ValueError, TypeError, LookupError):
        return float("inf")


class Events:
    """The same rows as TensorBoard scalars, in `folder`: `tensorboard --logdir` shows them live. Use it by `with`.

    A training that goes on from step `start` writes a file of its own, which tells TensorBoard to forget what the files
    before it say about later steps.

    Raises:
        RunError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, start: int):
        require_tensorboard()
        self.folder = folder
        self.start = start

    def append(self, row: Mapping[str, float]) -> None:
        """Adds a row; "step" is the number of steps done, all else is a scalar."""
        scalars = [self._Summary.Value(tag=k, simple_value=v) for k, v in row.items() if k != "step"]
        self._write(step=int(row["step"]), summary=self._Summary(value=scalars))

    def __enter__(self) -> "Events":
        from tensorboardX import RecordWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._Event, self._Summary = event_pb2.Event, summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]
        self.folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        self._file = RecordWriter(str(self.folder / name))
        self._write(file_version="brain.Event:2")
        if self.start:
            session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # pyright: ignore[reportAttributeAccessIssue]
            self._write(step=self.start + 1, session_log=session)
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._file.write(self._Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()


def require_tensorboard() -> None:
    """Raises:
    RunError: tensorboardX is not installed.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise RunError(
            "train.tensorboard is true, but tensorboardX is not installed, which writes its events: "
            "`pip install 'tensorboardX>=2.6'`. Or leave that setting out: metrics.jsonl has the same figures."
        )
