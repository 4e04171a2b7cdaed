"""What a person sees while a job runs: live progress with ETA on a terminal, plain lines elsewhere."""

import math
import shutil
import sys
import time
from collections.abc import Mapping
from typing import TextIO


class Console:
    """Writes to `stream`. Progress lines are rewritten in place on a terminal and thinned out elsewhere."""

    def __init__(self, stream: TextIO | None = None, *, plain_seconds: float = 10.0):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.plain_seconds = plain_seconds
        self._told = time.monotonic()
        self._first: tuple[int, float] | None = None  # what was done, and when, at the first call of `progress`
        self._open = False

    def say(self, text: str = "") -> None:
        """One line that stays."""
        self._end_line()
        print(text, file=self.stream, flush=True)

    def start(self, text: str) -> None:
        """Begins a stage."""
        self.say(text)
        self._told = time.monotonic()
        self._first = None

    def progress(self, done: int, total: int, values: Mapping[str, float | str] | None = None) -> None:
        """`done` of `total`, with the newest values.

        The time left follows from what was done since the first call: not from the compiling before it, nor from what
        an earlier process had done.
        """
        now = time.monotonic()
        self._first = self._first or (done, now)
        wait = 0.1 if self.live else self.plain_seconds
        if now - self._told < wait and done < total:
            return
        self._told = now
        first, began = self._first
        known = done > first or done >= total
        eta = _duration((now - began) / max(done - first, 1) * (total - done)) if known else "?"
        words = "  ".join(f"{k} {v if isinstance(v, str) else format(v, '.4g')}" for k, v in (values or {}).items())
        self._line(f"  {done}/{total}  eta {eta}  {words}", last=done >= total)

    def share(self, what: str, share: float, eta_seconds: float) -> None:
        """`share` (0 to 1) of something is done, and the rest takes so long.

        Where that is infinite, nobody knows: something is waited for, which is told at once by a line that stays.
        """
        if eta_seconds == math.inf:
            self.say(f"  {what}")
            return
        now = time.monotonic()
        if now - self._told < (0.1 if self.live else self.plain_seconds) and share < 1:
            return
        self._told = now
        left = _duration(eta_seconds) if eta_seconds < 1e6 else "?"
        self._line(f"  {share:4.0%}  eta {left}  {what}", last=share >= 1)  # a narrow terminal cuts off the words

    def _line(self, line: str, *, last: bool) -> None:
        if self.live:
            width = min(shutil.get_terminal_size((151, 24)).columns - 1, 150)  # a line that wraps cannot be rewritten
            print(f"\r\033[K{line[:width]}", end="", file=self.stream, flush=True)
            self._open = True
            if last:
                self._end_line()
        else:
            print(line, file=self.stream, flush=True)

    def _end_line(self) -> None:
        if self._open:
            print(file=self.stream)
            self._open = False


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
