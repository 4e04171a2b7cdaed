"""What a process is doing right now, in a few bytes that outlive it: whom to blame when it dies or hangs.

A step is noted in a file that is mapped into memory. That takes a microsecond and no call of the system, so it can be
done between two timings; and what was written last is there for others to read, however the process ends.
"""

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

NOTHING = -1
_FORM = struct.Struct("<qqd")


class Step(NamedTuple):
    """What a process has begun."""

    what: int  # the number of a call, or NOTHING
    count: int  # of steps before it
    deadline_seconds: float  # it must have ended by then


class Watch:
    """Notes steps at `path`; one process writes."""

    def __init__(self, path: Path):
        path.write_bytes(_FORM.pack(NOTHING, 0, 0.0))
        with open(path, "r+b") as f:
            self._bytes = mmap.mmap(f.fileno(), _FORM.size)
        self._count = 0

    def __call__(self, what: int, deadline_seconds: float = 0.0) -> None:
        """`what` begins, and what was before it has ended."""
        self._count += 1
        _FORM.pack_into(self._bytes, 0, what, self._count, deadline_seconds)


def last_step(path: Path) -> Step:
    """What the process that writes `path` has begun last."""
    try:
        return Step(*_FORM.unpack(path.read_bytes()))
    except (OSError, struct.error):  # it has not come so far
        return Step(NOTHING, 0, 0.0)
