"""One measuring at a time on a machine: two would time each other. Who comes second waits for its turn."""

import datetime
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nas.errors import LatencyError

Say = Callable[[str], None]

_BEYOND = 1 << 30  # Windows lets nobody read what is locked: a byte is locked that no text reaches
_LOOK_SECONDS = 0.2
_NAMED_SECONDS = 1.0  # who has just got the lock writes its name into it at once


@contextmanager
def alone(what: str, *, wait_seconds: float | None = None, say: Say | None = None) -> Iterator[tuple[int, ...]]:
    """Holds this user's lock of the machine while something is timed; the system frees it when the process ends.

    While another measuring holds it, this one waits: a table takes minutes, and whoever started this wants it after
    all. No clock of a measuring runs meanwhile. NAS_WAIT_SECONDS limits that for all that time something (0: none
    waits). It is no setting of an experiment, since it decides nothing about the outcome.

    NAS_LOCKS names the folder of the lock, where several jobs are to be let alone with each other (as tests are).

    Args:
        what: is timed, for the message to others: a command, or what it is about.
        wait_seconds: for another measuring to end; None: as NAS_WAIT_SECONDS says, else as long as it takes.
        say: is told who is waited for, at every look (`once`); by default that is printed to stderr, once.

    Yields:
        Descriptors: a process that is started with them (`pass_fds`) holds the lock as well, until it ends. None on
        Windows, where locks are not inherited.

    Raises:
        LatencyError: another measuring is running, and has not ended in that time; NAS_WAIT_SECONDS is no number.
    """
    user = os.getuid() if hasattr(os, "getuid") else ""
    path = Path(os.environ.get("NAS_LOCKS") or tempfile.gettempdir()) / f"nas-measuring-{user}.lock"
    limit = _limit() if wait_seconds is None else wait_seconds
    say = say or once(lambda text: print(text, file=sys.stderr, flush=True))
    with open(path, "a+", encoding="utf-8") as lock:
        begin = named = time.monotonic()
        while not _taken(lock):
            lock.seek(0)
            holder, now = lock.read().strip(), time.monotonic()
            named, waited = now if holder else named, now - begin
            if waited >= limit:
                told = f" after {waited:.0f} s of waiting" if limit else ""
                raise LatencyError(
                    f"another measuring is running on this machine{told} ({holder or 'unknown'}); each would time the "
                    f"other. Wait until it has ended, and run the same command; with a larger NAS_WAIT_SECONDS, or "
                    f"none, it waits by itself."
                )
            if holder or now - named > _NAMED_SECONDS:
                say(f"waiting for another measuring on the same machine to end ({holder or 'unknown'})")
            time.sleep(_LOOK_SECONDS)
        since = datetime.datetime.now().isoformat(" ", "seconds")
        lock.truncate(0)
        lock.write(f"process {os.getpid()}, since {since}: {what}")
        lock.flush()
        try:
            yield () if sys.platform == "win32" else (lock.fileno(),)
        finally:
            lock.truncate(0)  # who has it next is not taken for this one before it has written who it is


def once(say: Say) -> Say:
    """`say`, for what is told again and again: only where it differs from the last time."""
    last = ""

    def told(text: str) -> None:
        nonlocal last
        if text != last:
            last = text
            say(text)

    return told


def own_command() -> str:
    """The command line of this process, as a person would have typed it."""
    program, *arguments = sys.argv or [""]
    return shlex.join([Path(program).name, *arguments])


def _limit() -> float:
    """Seconds to wait at most.

    Raises:
        LatencyError: what was asked for is no number of seconds.
    """
    asked = os.environ.get("NAS_WAIT_SECONDS") or "inf"
    try:
        limit = float(asked)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise LatencyError(
            f"NAS_WAIT_SECONDS is {asked!r}: seconds that another measuring is waited for are needed, 0 or more. Leave "
            f"it unset to wait as long as it takes."
        )
    return limit


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
