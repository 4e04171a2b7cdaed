"""Evaluates on Ray actors: on this machine, or on a cluster. Ray is imported only when it starts (`nas.cluster`).

What plain Ray leaves open is closed here (measured with Ray 2.60):

- A candidate that kills its worker is retried alone on a fresh worker and quarantined after three attempts.
- Each call has a deadline; Ray has none, so the worker is killed.
- A cluster without room waits silently; here that is an error that says what was asked for and what there is.
"""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from nas.cluster import connect, python_path
from nas.errors import ExecutorError
from nas.search.executor import Evaluate, Result, Weights, build, evaluate_one, worker_environment
from nas.search.strategy import Genotype

_ATTEMPTS = 3  # of one candidate before it is quarantined, and of starting a worker before that is hopeless
_QUEUED = 2  # calls at each worker: the next one is there when one ends

logger = logging.getLogger(__name__)


class Worker:
    """Lives in the actor's process. Imports nothing heavy before the process is confined to its cores."""

    def __init__(self, index: int, threads: int):
        if hasattr(os, "sched_setaffinity"):  # not on macOS
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[(index * threads + i) % len(cores)] for i in range(threads)})
        self._evaluate: Evaluate | None = None

    def ready(self) -> None:
        """Answers once the actor is scheduled and its process runs."""

    def setup(self, factory: str, kwargs: dict[str, Any], weights: Weights | None) -> None:
        """Builds the evaluator. `weights` are views of Ray's shared memory, read once."""
        self._evaluate = build(factory, kwargs, weights)

    def evaluate(self, genotype: Genotype) -> Result:
        assert self._evaluate is not None, "setup comes first"
        return evaluate_one(self._evaluate, genotype)


@dataclass(frozen=True)
class _Call:
    what: Literal["ready", "setup", "evaluate"]
    reference: Any  # of the answer
    deadline_seconds: float  # from when it is the worker's oldest call
    work: tuple[int, Genotype] | None = None  # of "evaluate": trial and genotype


@dataclass
class _Seat:
    """A place for one worker at a time, with the calls that it has yet to answer, oldest (the running one) first."""

    index: int
    actor: Any
    calls: deque[_Call] = field(default_factory=deque)
    since: float = 0.0  # monotonic time at which the oldest call became so


class RayExecutor:
    """Evaluates on `workers` actors of `threads` cores each.

    Args:
        factory: "package.module:function" that builds the evaluate function in each worker.
        kwargs: for the factory; JSON-like and small.
        weights: arrays that the factory gets as `weights=`; shared between the workers of a node, read-only there.
        workers: how many actors.
        address: of a running cluster ("auto" finds it), or "local" for one of its own. If the process is connected to a
            cluster already, that one is used and left running.
        timeout_seconds: for one evaluation, from when it runs.
        threads: cores of one worker.
        schedule_seconds: until an actor must have been placed and answer.
        setup_seconds: until the factory must have returned.

    Raises:
        ExecutorError: from `submit` and `next`, when workers cannot be started, keep dying, or find no room.
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
        schedule_seconds: float = 30.0,
        setup_seconds: float = 600.0,
    ):
        self._recipe = factory, dict(kwargs or {})
        self._weights = weights
        self._workers, self._threads, self._address = workers, threads, address
        self._timeout_seconds = timeout_seconds
        self._schedule_seconds, self._setup_seconds = schedule_seconds, setup_seconds
        self._ray: Any = None  # the module, from the start on
        self._cluster = contextlib.ExitStack()  # what to undo at the end
        self._seats: list[_Seat] = []
        self._pending: deque[tuple[int, Genotype]] = deque()
        self._lost: deque[tuple[int, Result]] = deque()  # quarantined
        self._attempts: dict[int, int] = {}  # of trials whose worker died
        self._failed_starts = 0  # in a row

    @property
    def slots(self) -> int:
        return self._workers * _QUEUED

    def submit(self, trial: int, genotype: Genotype) -> None:
        self._pending.append((trial, genotype))
        if self._ray is None:
            self._start()
        self._feed()

    def next(self) -> tuple[int, Result]:
        while not self._lost:
            self._feed()
            oldest = {seat.calls[0].reference: seat for seat in self._seats if seat.calls}
            if not oldest:
                raise LookupError("next() without a submitted trial")
            deadline = min(seat.since + seat.calls[0].deadline_seconds for seat in oldest.values())
            answered, _ = self._ray.wait(list(oldest), timeout=max(0.0, deadline - time.monotonic()))
            for reference in answered:
                if (answer := self._receive(oldest[reference])) is not None:
                    return answer
            for seat in () if answered else oldest.values():
                if time.monotonic() >= seat.since + seat.calls[0].deadline_seconds:
                    self._overdue(seat)
        return self._lost.popleft()

    def close(self) -> None:
        self._pending.clear()
        if self._ray is not None:
            for seat in self._seats:
                with contextlib.suppress(Exception):  # of a cluster that is gone
                    self._ray.kill(seat.actor)
            self._seats.clear()
            self._cluster.close()
            self._ray = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        shared_bytes = sum(a.nbytes for a in (self._weights or {}).values())
        cpus = self._workers * self._threads
        self._ray = connect(self._address, self._cluster, cpus=cpus, shared_bytes=shared_bytes)
        shared = None if self._weights is None else self._ray.put(dict(self._weights))
        self._setup_arguments = (*self._recipe, shared)  # at top level Ray turns the reference into the arrays
        environment = worker_environment(self._threads) | {"PYTHONPATH": python_path()}
        self._actor = self._ray.remote(Worker).options(
            num_cpus=self._threads,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": environment},
        )
        for index in range(self._workers):
            seat = _Seat(index, None)
            self._seats.append(seat)
            self._occupy(seat)

    def _occupy(self, seat: _Seat) -> None:
        """Puts a fresh worker on `seat`. Its constructor is trivial, so that waiting for room is told from building."""
        actor = seat.actor = self._actor.remote(seat.index, self._threads)
        seat.since = time.monotonic()
        seat.calls = deque(
            [
                _Call("ready", actor.ready.remote(), self._schedule_seconds),
                _Call("setup", actor.setup.remote(*self._setup_arguments), self._setup_seconds),
            ]
        )

    def _feed(self) -> None:
        """Hands out pending trials; one whose worker died before runs alone, so that no neighbour is blamed."""
        while self._pending:
            trial, genotype = self._pending[0]
            free = [s for s in self._seats if not any(c.work and c.work[0] in self._attempts for c in s.calls)]
            seat = min(free, key=lambda seat: len(seat.calls), default=None)
            if seat is None or len(seat.calls) >= (1 if trial in self._attempts else _QUEUED):
                return
            if not seat.calls:
                seat.since = time.monotonic()
            reference = seat.actor.evaluate.remote(genotype)
            seat.calls.append(_Call("evaluate", reference, self._timeout_seconds, self._pending.popleft()))

    def _receive(self, seat: _Seat) -> tuple[int, Result] | None:
        """Takes the answer to the oldest call: a result, or None for a worker that has started or died."""
        call = seat.calls[0]
        try:
            value = self._ray.get(call.reference)
        except self._ray.exceptions.RayTaskError as e:
            if call.what != "evaluate":
                cause = e.cause if isinstance(e.cause, Exception) else e
                raise ExecutorError(f"A worker could not build its evaluator {self._recipe[0]!r}: {cause!r}.") from e
            value = Result(None, 0.0, str(e).strip().splitlines()[-1])
        except self._ray.exceptions.RayError as e:
            self._replace(seat, "crashed the worker", detail=" ".join(str(e).split()))
            return None
        seat.calls.popleft()
        seat.since = time.monotonic()
        if call.what == "setup":
            self._failed_starts = 0
        return None if call.work is None else (call.work[0], value)

    def _overdue(self, seat: _Seat) -> None:
        call = seat.calls[0]
        if call.what == "ready":
            raise ExecutorError(self._starved())
        self._ray.kill(seat.actor)
        self._replace(seat, f"gave no answer within {call.deadline_seconds:g} s")

    def _replace(self, seat: _Seat, what: str, detail: str = "no more is known") -> None:
        """Puts a fresh worker on `seat` and its trials back into the queue; the one that was running is blamed."""
        blamed, *others = seat.calls
        again = [call.work for call in others if call.work is not None]
        if blamed.work is None:
            self._failed_starts += 1
            if self._failed_starts >= _ATTEMPTS:
                raise ExecutorError(
                    f"Workers keep dying before they evaluate anything: {what} ({detail}). "
                    f"Look for too little memory, and try the inline executor."
                )
        else:
            trial = blamed.work[0]
            attempts = self._attempts[trial] = self._attempts.get(trial, 0) + 1
            logger.warning("Trial %d %s, attempt %d of %d.", trial, what, attempts, _ATTEMPTS)
            logger.debug("Trial %d: %s", trial, detail)
            if attempts < _ATTEMPTS:
                again.insert(0, blamed.work)
            else:
                self._lost.append((trial, Result(None, 0.0, f"{what} {attempts} times")))
        self._pending.extendleft(reversed(again))
        self._occupy(seat)

    def _starved(self) -> str:
        exist, free = self._ray.cluster_resources(), self._ray.available_resources()
        return (
            f"The cluster placed no worker within {self._schedule_seconds:g} s: {self._workers} workers of "
            f"{self._threads} CPUs need {self._workers * self._threads}; it has {exist.get('CPU', 0):g} CPUs, of which "
            f"{free.get('CPU', 0):g} are free. Ask for fewer workers or threads, wait until others are done, or use "
            f"another cluster."
        )
