"""Runs workers until the rounds are done, and finds out whom to blame when one dies, hangs or meets an error.

With hundreds of models open a process may also die because the machine has too little memory, whatever model was being
opened or run just then. So a model is never condemned for what happened in company: it is opened and run once more in a
process of its own, and only what fails there is unsupported. What works alone and fails while others are open is
tried again, and in the end refused in other words. A model that fails late, on some call of many, may pass alone as
well: it is condemned when it fails for the second time while it is timed, unless the system's shortage of memory may
have chosen it (SIGKILL, MemoryError).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from nas.errors import LatencyError
from nas.ondevice.lock import alone, own_command
from nas.ondevice.manifest import MANIFEST, load_manifest
from nas.ondevice.results import Failure, Recording, Results, read
from nas.ondevice.watch import NOTHING, last_step

WRONG_USE = 2  # exit statuses of workers
NOBODY_LISTENS = 3  # its reader is gone
FAILED = 4  # calls have failed, which the results name

_LOOK_SECONDS = 1.0
_RESTARTS = 3  # after deaths that no model can be blamed for
_TWICE = 2  # failures while it is timed that condemn a call
_SHORTAGE = ("signal 9", "MemoryError")  # how a system without memory ends whom it chooses, and what Python says


def watch_path(results: Path) -> Path:
    """Where a worker notes what it does."""
    return results.with_name(results.name + ".step")


def supervise(folder: Path, results: Path, *, machine_readable: bool, stream: TextIO, command: str = "") -> int:
    """Runs workers on the bundle in `folder` until one has ended; returns an exit status: 0 done, 2 wrong use, told.

    Args:
        stream: is told of models that are left out.
        command: that a person gave; told to others who wait for this one. Empty: that of this process.

    Raises:
        LatencyError: another measuring is running, and is not to be waited for any longer; the worker keeps dying and
            no model is to blame; the bundle is gone.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    what = f"{command or own_command()} ({results.resolve()})"
    with alone(what, say=_waiting if machine_readable else None) as held:
        if not (folder / MANIFEST).exists():
            raise LatencyError(
                f"{folder} is gone: most likely the measuring that this one waited for was of the same bundle, and has "
                f"made its table. Look whether it is there; the same command measures anew."
            )
        try:
            return _Supervisor(folder, results, machine_readable, stream, held).run()
        finally:
            with suppress(OSError):
                watch_path(results).unlink(missing_ok=True)


def _waiting(text: str) -> None:
    """Tells the program that started this one that another measuring is waited for; where that is gone, ends.

    It is told at every look, for nobody notices otherwise that it is gone.
    """
    try:
        print(json.dumps({"what": text, "share": 0.0, "seconds_left": None, "more": ""}), flush=True)
    except BrokenPipeError:
        os._exit(NOBODY_LISTENS)


class _Supervisor:
    def __init__(self, folder: Path, results: Path, machine_readable: bool, stream: TextIO, held: Sequence[int]):
        self._folder, self._path, self._stream, self._held = folder, results, stream, held
        self._manifest = load_manifest(folder)
        self._json = ["--json"] if machine_readable else []

    def run(self) -> int:
        """See `supervise`."""
        unexplained: list[Failure] = []
        while True:
            before = self._results().before
            code = self._worker("--worker", *self._json)
            if code in (0, WRONG_USE, NOBODY_LISTENS):
                return code
            failures = self._failures(code, before)
            # The first innocent one is enough: where company is to blame, hundreds may have failed.
            innocent = next((failure for failure in failures if not self._condemned(failure)), None)
            unsupported = read(self._path).unsupported
            unexplained = [failure for failure in unexplained if failure.name not in unsupported]
            if innocent or not failures:
                unexplained.append(innocent or Failure("", self._status(code), timing=False))
            if len(unexplained) > _RESTARTS:
                raise LatencyError(self._nobody_to_blame(unexplained[-1]))

    def _results(self) -> Results:
        return Results(self._path, self._manifest)

    def _worker(self, *options: str) -> int | None:
        """Exit status of a process that works on the bundle; None after it was ended because it hung."""
        command = [sys.executable, "-m", "nas.ondevice", str(self._folder), "--out", str(self._path), *options]
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        watch_path(self._path).unlink(missing_ok=True)  # of a process that has ended: nobody is to blame for that
        # The process holds the lock as well: should this one be killed, nobody measures beside what is left.
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, pass_fds=self._held)
        try:
            return _wait(process, watch_path(self._path))
        except BaseException:
            process.kill()
            process.wait()
            raise

    def _failures(self, code: int | None, before: Recording) -> tuple[Failure, ...]:
        """What a worker has failed at that has ended with `code`."""
        step = last_step(watch_path(self._path))
        if code != FAILED and step.what != NOTHING:  # it could not tell itself
            timing = len(read(self._path).starts) > len(before.starts)
            self._results().failed(Failure(self._manifest["calls"][step.what]["name"], self._status(code), timing))
        return read(self._path).failures[len(before.failures) :]

    def _condemned(self, failure: Failure) -> bool:
        """Whether the model is to blame for a failure; it is noted as unsupported then.

        Raises:
            LatencyError: that cannot be found out.
        """
        code = self._worker("--only", failure.name)
        if code == WRONG_USE:
            raise LatencyError(f"`{failure.name}` failed ({failure.why}), and cannot be tried alone: see above.")
        recording = read(self._path)
        if code == 0:
            late = sum(f.name == failure.name and f.timing for f in recording.failures)
            if late < _TWICE or any(word in failure.why for word in _SHORTAGE):
                return False
            self._results().unsupported(failure.name, f"{failure.why}, {late} times while it was timed")
        elif code != FAILED:  # it could not tell itself
            why = f"it brought the process down, which had nothing else open ({self._status(code)})"
            self._results().unsupported(failure.name, why)
        why = read(self._path).unsupported[failure.name]
        print(f"{failure.name}: {why}; going on without it", file=self._stream, flush=True)
        return True

    def _status(self, code: int | None) -> str:
        """How a process ended."""
        if code is None:
            return f"it had not ended after {last_step(watch_path(self._path)).deadline_seconds:.0f} s"
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def _nobody_to_blame(self, last: Failure) -> str:
        what = f" at `{last.name}`" if last.name else ""
        alone = ", which fails only while the other models are open" if last.name else ""
        return (
            f"{self._folder}: the measuring process has failed {_RESTARTS + 1} times, the last time{what} "
            f"({last.why}){alone}. No model is to blame that could be found; most likely there is too little memory "
            f"for {len(self._manifest['calls'])} models at once. Free some, or measure a smaller space; what was timed "
            f"is kept, and the same command goes on."
        )


def _wait(process: "subprocess.Popen[bytes]", watch: Path) -> int | None:
    """The exit status of `process`; None after it was ended because a step took longer than it may."""
    count, waited, looked = -1, 0.0, time.monotonic()
    while True:
        try:
            return process.wait(timeout=_LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            step, now = last_step(watch), time.monotonic()
            # A look counts for two at most: when all of this was stopped for an hour, nobody has taken an hour.
            waited = waited + min(now - looked, 2 * _LOOK_SECONDS) if step.count == count else 0.0
            count, looked = step.count, now
            if step.what != NOTHING and waited > step.deadline_seconds:
                process.kill()
                process.wait()
                return None
