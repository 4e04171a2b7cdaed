"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nas.errors import RunError

T = TypeVar("T")


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` with `data`, atomically and on disk when it returns.

    Raises:
        RunError: the folder is read-only or the disk full; what stood at `path` still stands there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise cannot_write(path, e) from e


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        RunError: the file is missing or damaged.
    """
    return read_as(path, Any)


def read_as(path: Path, form: type[T] | Any, *, stage: str | None = None) -> T | Any:
    """The JSON in `path`, as a `form` of msgspec.

    Args:
        stage: of the run that made the file, for the advice to make it again.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=form)
    except (OSError, ValueError) as e:
        raise damaged(path, str(e), stage=stage) from e


def damaged(path: Path, why: str, *, stage: str | None = None) -> RunError:
    """The error for a file of a run folder that cannot be used."""
    again = f"`nas run EXPERIMENT --redo {stage}`" if stage else "`nas run EXPERIMENT --redo STAGE`"
    return RunError(
        f"{path}: missing or damaged: {why}. Bring it back, or make it again with {again}, which does that stage and "
        f"all after it anew and keeps what was done before."
    )


def cannot_write(path: Path, error: OSError) -> RunError:
    """The error for a write that the system refused."""
    return RunError(
        f"{path}: cannot write: {error.strerror or error}. Free some space or make the folder writable (or choose "
        f"another with --out), then run the same command: it goes on from what is there."
    )
