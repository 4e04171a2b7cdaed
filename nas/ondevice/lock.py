"""One measuring at a time on a machine: two would time each other."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nas.errors import LatencyError

_BEYOND = 1 << 30  # Windows lets nobody read what is locked: a byte is locked that no text reaches
_LOOK_SECONDS = 0.2


@contextmanager
def alone(what: str, *, wait_seconds: float = 0.0) -> Iterator[tuple[int, ...]]:
    """Holds this user's lock of the machine while something is timed; the system frees it when the process ends.

    NAS_LOCKS names the folder of the lock, where several jobs are to be let alone with each other (as tests are).

    Args:
        what: is timed, for the message to others.
        wait_seconds: for another measuring to end.

    Yields:
        Descriptors: a process that is started with them (`pass_fds`) holds the lock as well, until it ends. None on
        Windows, where locks are not inherited.

    Raises:
        LatencyError: another measuring is running.
    """
    user = os.getuid() if hasattr(os, "getuid") else ""
    path = Path(os.environ.get("NAS_LOCKS") or tempfile.gettempdir()) / f"nas-measuring-{user}.lock"
    until = time.monotonic() + wait_seconds
    with open(path, "a+", encoding="utf-8") as lock:
        while not _taken(lock):
            if time.monotonic() >= until:
                lock.seek(0)
                raise LatencyError(
                    f"another measuring is running on this machine ({lock.read().strip() or 'unknown'}); each would "
                    f"time the other. Wait until it has ended, and run the same command."
                )
            time.sleep(_LOOK_SECONDS)
        lock.truncate(0)
        lock.write(f"process {os.getpid()}, {what}")
        lock.flush()
        yield () if sys.platform == "win32" else (lock.fileno(),)


def _taken(lock: IO[str]) -> bool:
    """Whether the lock is this process's now."""
    if sys.platform == "win32":
        import msvcrt

        lock.seek(_BEYOND)
        try:
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:  # the only word for it that there is
            return False
        return True
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
