"""Evaluates in worker processes on this machine, without Ray: pipes and nothing else, no port is opened.

A candidate that kills or blocks its worker is treated as on Ray (`nas.search.ray_executor`): retried alone on a fresh
worker and quarantined after three attempts. Workers end with the driver, however it ends: their standard input closes.
"""

import contextlib
import json
import logging
import math
import mmap
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from nas.cluster import python_path
from nas.errors import ExecutorError
from nas.search.executor import Result, Weights, worker_environment
from nas.search.strategy import Genotype

_ATTEMPTS = 3  # of one candidate before it is quarantined, and of starting a worker before that is hopeless
_QUEUED = 2  # calls at each worker: the next one is there when one ends
_ALIGNMENT = 64  # bytes: arrays of the weights begin at multiples of it
_LAST_WORDS = 2000  # bytes kept of what a worker prints, to say why it died

logger = logging.getLogger(__name__)

_Work = tuple[int, Genotype]  # trial and genotype


@dataclass(eq=False)
class _Seat:
    """A place for one worker at a time, with the calls that it has yet to answer, oldest (the running one) first."""

    index: int
    process: subprocess.Popen[bytes]
    since: float  # monotonic time at which the oldest call became so
    calls: deque[_Work | None] = field(default_factory=lambda: deque([None]))  # None: to build its evaluator
    answers: bytes = b""  # the beginning of a line
    words: bytes = b""  # the last that it printed


class ProcessExecutor:
    """Evaluates in `workers` processes of `threads` cores each.

    Args:
        factory: "package.module:function" that builds the evaluate function in each worker.
        kwargs: for the factory; JSON-like.
        weights: numeric arrays that the factory gets as `weights=`; written once, mapped by every worker, read-only.
        workers: how many processes.
        address: taken for the sake of the common signature, as all are on this machine.
        timeout_seconds: for one evaluation, from when it runs.
        threads: cores of one worker, to which it keeps where the system can see to that (not on macOS).
        setup_seconds: until a worker must have built its evaluator.

    Raises:
        ExecutorError: from `submit` and `next`, when workers cannot be started or keep dying.
    """

    def __init__(
        self,
        factory: str,
        kwargs: Mapping[str, Any] | None = None,
        weights: Weights | None = None,
        *,
        workers: int = 2,
        address: str = "local",
        timeout_seconds: float = 300.0,
        threads: int = 1,
        setup_seconds: float = 600.0,
    ):
        self._recipe = {"factory": factory, "kwargs": dict(kwargs or {})}
        self._weights = weights
        self._workers, self._threads = workers, threads
        self._timeout_seconds, self._setup_seconds = timeout_seconds, setup_seconds
        self._open = contextlib.ExitStack()  # what to undo at the end
        self._seats: list[_Seat] = []
        self._pending: deque[_Work] = deque()
        self._found: deque[tuple[int, Result]] = deque()
        self._attempts: dict[int, int] = {}  # of trials whose worker died
        self._failed_starts = 0  # in a row

    @property
    def slots(self) -> int:
        return self._workers * _QUEUED

    def submit(self, trial: int, genotype: Genotype) -> None:
        self._pending.append((trial, genotype))
        if not self._seats:
            self._start()
        self._feed()

    def next(self) -> tuple[int, Result]:
        while not self._found:
            self._feed()
            if not any(work for seat in self._seats for work in seat.calls) and not self._pending:
                raise LookupError("next() without a submitted trial")
            deadline = min(seat.since + self._allowed(seat) for seat in self._seats if seat.calls)
            events = self._selector.select(max(0.0, deadline - time.monotonic()))
            for seat in dict.fromkeys(key.data for key, _ in events):
                self._receive(seat)
            for seat in self._seats:  # after what has come: the driver may have been away for long
                if seat.calls and time.monotonic() >= seat.since + self._allowed(seat):
                    self._replace(seat, f"gave no answer within {self._allowed(seat):g} s", self._end(seat))
        return self._found.popleft()

    def close(self) -> None:
        self._pending.clear()
        self._found.clear()
        for seat in self._seats:
            self._end(seat)
        self._seats.clear()
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  without a name: it ends with its users
            self._open.callback(self._file.close)
            pack(self._file, self._recipe, self._weights)
        except OSError as e:
            raise ExecutorError(
                f"{tempfile.gettempdir()}: cannot hand the weights over to workers: {e.strerror or e}. Make room "
                f"there, or set TMPDIR to another folder."
            ) from e
        self._selector = self._open.enter_context(selectors.DefaultSelector())
        for index in range(self._workers):
            self._seats.append(_Seat(index, self._worker(index), time.monotonic()))
            self._watch(self._seats[-1])

    def _worker(self, index: int) -> subprocess.Popen[bytes]:
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
        cores = {usable[(index * self._threads + i) % len(usable)] for i in range(self._threads)}
        descriptor = self._file.fileno()
        program = str(Path(__file__).with_name("_worker.py"))
        try:
            return subprocess.Popen(
                [sys.executable, "-P", program, json.dumps(sorted(cores)), str(descriptor)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=(descriptor,),
                env={**os.environ, **worker_environment(self._threads), "PYTHONPATH": python_path()},
                start_new_session=True,  # out of reach of Ctrl-C, and ended together with what it has started
            )
        except OSError as e:
            raise ExecutorError(
                f"Worker {index + 1} of {self._workers} cannot be started: {e.strerror or e}. Ask for fewer workers, "
                f"or use the inline executor."
            ) from e

    def _watch(self, seat: _Seat) -> None:
        for stream in (seat.process.stdout, seat.process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, seat)

    def _ignore(self, stream: IO[bytes] | None) -> None:
        assert stream is not None
        if stream.fileno() in self._selector.get_map():
            self._selector.unregister(stream)

    def _allowed(self, seat: _Seat) -> float:
        """Seconds that the oldest call of `seat` may take."""
        return self._setup_seconds if seat.calls[0] is None else self._timeout_seconds

    def _feed(self) -> None:
        """Hands out pending trials; one whose worker died before runs alone, so that no neighbour is blamed."""
        while self._pending:
            trial, genotype = self._pending[0]
            free = [s for s in self._seats if not any(work and work[0] in self._attempts for work in s.calls)]
            seat = min(free, key=lambda seat: len(seat.calls), default=None)
            if seat is None or len(seat.calls) >= (1 if trial in self._attempts else _QUEUED):
                return
            if not seat.calls:
                seat.since = time.monotonic()
            seat.calls.append(self._pending.popleft())
            stream = seat.process.stdin
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # it has just died, which its output will say
                stream.write(json.dumps([trial, genotype.tolist()]).encode() + b"\n")

    def _receive(self, seat: _Seat) -> None:
        """Takes what a worker has answered and printed, and replaces one that has died."""
        words = _read(seat.process.stderr)
        seat.words = (seat.words + (words or b""))[-_LAST_WORDS:]
        if words == b"":  # a dying worker's streams need not end together
            self._ignore(seat.process.stderr)
        data = _read(seat.process.stdout)
        if data is None:
            return
        *lines, seat.answers = (seat.answers + data).split(b"\n")
        for line in lines:
            self._take(seat, json.loads(line))
        if not data:
            self._replace(seat, "crashed the worker", self._end(seat, wait_seconds=1.0))  # it is just ending

    def _take(self, seat: _Seat, answer: dict[str, Any]) -> None:
        if "broken" in answer:
            raise ExecutorError(
                f"A worker could not build its evaluator {self._recipe['factory']!r}: {answer['broken']}."
            )
        work = seat.calls.popleft()
        seat.since = time.monotonic()
        self._failed_starts = 0
        if work is not None:
            self._attempts.pop(work[0], None)
            correct = answer["correct"]
            count = tuple(correct) if isinstance(correct, list) else correct
            self._found.append((answer["trial"], Result(count, answer["seconds"], answer["failure"])))

    def _replace(self, seat: _Seat, what: str, detail: str) -> None:
        """Puts a fresh worker on `seat` and its trials back into the queue; the one that was running is blamed."""
        again = [work for work in list(seat.calls)[1:] if work is not None]
        blamed = seat.calls[0] if seat.calls else None
        if blamed is not None:
            trial = blamed[0]
            attempts = self._attempts[trial] = self._attempts.get(trial, 0) + 1
            logger.warning("Trial %d %s, attempt %d of %d.", trial, what, attempts, _ATTEMPTS)
            logger.debug("Trial %d: %s", trial, detail)
            if attempts < _ATTEMPTS:
                again.insert(0, blamed)
            else:
                del self._attempts[trial]
                self._found.append((trial, Result(None, 0.0, f"{what} {attempts} times")))
        elif seat.calls:  # it was starting
            self._failed_starts += 1
            if self._failed_starts >= _ATTEMPTS:
                raise ExecutorError(
                    f"Workers keep dying before they evaluate anything: {what} ({detail}). "
                    f"Look for too little memory, and try the inline executor."
                )
        self._pending.extendleft(reversed(again))
        self._seats[seat.index] = _Seat(seat.index, self._worker(seat.index), time.monotonic())
        self._watch(self._seats[seat.index])

    def _end(self, seat: _Seat, *, wait_seconds: float = 0.0) -> str:
        """Kills the worker of `seat`, if it has not ended by then, and what it has started; returns how it ended."""
        process = seat.process
        if process.returncode is not None:
            return "it had ended"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_seconds)
        ended = process.returncode is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: not permitted for zombies
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        seat.words = (seat.words + (_read(process.stderr) or b""))[-_LAST_WORDS:]
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            self._ignore(stream)
            stream.close()
        how = f"signal {-status}, {signal.strsignal(-status)}" if status < 0 else f"exit status {status}"
        said = seat.words.decode(errors="replace").strip().splitlines()
        return (how if ended else "it was ended") + (f"; it said last: {said[-1]}" if said else "")


def pack(file: IO[bytes], recipe: Mapping[str, Any], weights: Weights | None) -> None:
    """Writes a recipe and weights for `unpack`: a line of JSON, padded, then the arrays as they lie in memory."""
    index, arrays, end = {}, [], 0
    for name, array in (weights or {}).items():
        array = np.asarray(array, order="C")
        if array.dtype.hasobject or array.dtype != _dtype(array.dtype.name):
            raise ExecutorError(
                f"Weights {name!r} are {array.dtype}: numbers in the byte order of this machine are needed."
            )
        index[name] = (array.dtype.name, array.shape, end)
        arrays.append((end, array))
        end = math.ceil((end + array.nbytes) / _ALIGNMENT) * _ALIGNMENT
    head = json.dumps({"recipe": recipe, "weights": None if weights is None else index}).encode()
    file.write(head.ljust(math.ceil((len(head) + 1) / _ALIGNMENT) * _ALIGNMENT - 1) + b"\n")
    start = file.tell()
    for begin, array in arrays:
        file.seek(start + begin)
        file.write(array.tobytes())
    file.truncate(start + end)
    file.flush()


def unpack(descriptor: int) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
    """The recipe and the weights of `pack`, these as read-only views of pages that all who map the file share."""
    pages = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    start = pages.find(b"\n") + 1
    head = json.loads(pages[:start])
    if head["weights"] is None:
        return head["recipe"], None
    weights = {}
    for name, (dtype, shape, begin) in head["weights"].items():
        count = math.prod(shape)
        weights[name] = np.frombuffer(pages, _dtype(dtype), count, start + begin if count else 0).reshape(shape)
    return head["recipe"], weights


def _dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes  # noqa: F401  bfloat16 and its like have names from here on

    try:
        return np.dtype(name)
    except TypeError as e:
        raise ExecutorError(f"Weights cannot be handed over to workers as {name!r}: numbers are needed.") from e


def _read(stream: IO[bytes] | None) -> bytes | None:
    """What is there; empty at the end, None if there is nothing yet."""
    assert stream is not None
    try:
        return os.read(stream.fileno(), 65536)
    except BlockingIOError:
        return None
