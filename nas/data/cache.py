"""Files made from a data set once and used again: in the user's cache folder, to be deleted at any time."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nas.errors import DataError


def cache_folder() -> Path:
    """`nas` in $XDG_CACHE_HOME, or in ~/.cache where that is not set (XDG Base Directory Specification 0.8)."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "nas"  # relative ones are to be ignored


def stamp(files: Iterable[Path], *more: str) -> str:
    """A name for what is made from `files` and `more`: another one once a file's size or time of change differs."""
    out = hashlib.sha256("\0".join(more).encode())
    for file in files:
        status = file.stat()
        out.update(f"\0{file.absolute()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return out.hexdigest()[:32]


def fingerprint(root: Path, files: Iterable[Path]) -> str:
    """sha256 of the names below `root` and the sizes in bytes: the same on every machine."""
    out = hashlib.sha256()
    for file in files:
        out.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
    return out.hexdigest()


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """The file of that name in the cache folder; `write` makes it where it is missing.

    It is there whole or not at all, however often this is killed, and one process writes it while others wait.

    Raises:
        DataError: the folder cannot be written, or what `write` raises.
    """
    path = cache_folder() / name
    if path.exists():
        return path
    part = path.with_name(f".{name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{name}.lock")):
            if not path.exists():  # another process has made it in the meantime
                write(part)
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(part, path)
    except (OSError, DataError) as e:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(e, DataError):
            raise
        raise DataError(
            f"{path}: cannot be written: {e.strerror or e}. What is made from a data set lies in this folder, which "
            "needs room for its encoded images: free some space, or name another folder in XDG_CACHE_HOME."
        ) from e
    return path


def damaged(file: Path, error: Exception) -> DataError:
    """The error for a file of the cache folder that cannot be used."""
    return DataError(f"{file}: damaged ({error}). It is made from the data set: delete it, and it is made again.")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process. Where the system has no such locks (Windows), there is none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
