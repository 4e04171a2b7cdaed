"""Evaluates on Ray actors: on this machine, or on a cluster. Ray is imported only when it starts (`nas.cluster`).

What plain Ray leaves open is closed here (measured with Ray 2.60):

- A candidate that kills its worker is retried alone on a fresh worker and quarantined after three attempts.
- Each call has a deadline; Ray has none, so the worker is killed.
- Short evaluations share a call, which costs half a millisecond. They still run one at a time, and what was in a call
  that died is retried one by one.
- Nodes come and go: workers of a dead one are placed again where there is room, and until then the others go on.
- A cluster without room waits silently; here that is an error that says what was asked for and what there is.
- Where the head of the cluster dies, Ray aborts the process after a minute; here that is an error in a third of it.
"""

import contextlib
import itertools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

from nas.cluster import connect, node_id, python_path, reachable, waiting_for_room
from nas.errors import ExecutorError
from nas.search.executor import Evaluate, Result, Weights, build, evaluate_one, worker_environment
from nas.search.strategy import Genotype, Genotypes

_ATTEMPTS = 3  # of one candidate before it is quarantined, and of starting each worker before that is hopeless
_NODES = 10  # that may die under one candidate before it is quarantined too
_QUEUED = 2  # calls at each worker: the next one is there when one ends
_CALL_SECONDS = 0.1  # that a call is to last: evaluations shorter than half of it share one
_LARGEST = 256  # evaluations in a call
_WATCH_SECONDS = 2.0  # between two looks at whether the cluster is there
_REPORT_SECONDS = 10.0  # that a worker waits for room before that is told
_SILENCES = 3  # such looks in a row without an answer, and it is lost

logger = logging.getLogger(__name__)


class Worker:
    """Lives in the actor's process. Imports nothing heavy before the process is confined to its cores."""

    def __init__(self) -> None:
        self._evaluate: Evaluate | None = None

    def ready(self) -> str:
        """Answers once the actor is scheduled and its process runs: on which node."""
        return node_id()

    def setup(
        self, place: int, threads: int, factory: str, kwargs: dict[str, Any], weights: Weights | None = None
    ) -> None:
        """Builds the evaluator, on the cores of the `place`-th worker of this node.

        `weights` are views of Ray's shared memory, which a node reads once for all its workers.
        """
        if hasattr(os, "sched_setaffinity"):  # not on macOS
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[(place * threads + i) % len(cores)] for i in range(threads)})
        self._evaluate = build(factory, kwargs, weights)

    def evaluate(self, genotypes: Genotypes) -> list[Result]:
        """Of [n, genes], one after the other."""
        assert self._evaluate is not None, "setup comes first"
        return [evaluate_one(self._evaluate, genotype) for genotype in genotypes]


_Work = tuple[int, Genotype]  # a trial's number and genotype


@dataclass(frozen=True)
class _Call:
    what: Literal["ready", "setup", "evaluate"]
    reference: Any  # of the answer
    deadline_seconds: float  # from when it is the worker's oldest call
    work: tuple[_Work, ...] = ()  # of "evaluate"


@dataclass
class _Seat:
    """A place for one worker at a time, with the calls that it has yet to answer, oldest (the running one) first."""

    actor: Any = None
    node: str | None = None  # that the worker is on; None: it waits for room
    place: int = 0  # among this executor's workers on that node
    up: bool = False  # it has built its evaluator
    calls: deque[_Call] = field(default_factory=deque)
    since: float = 0.0  # monotonic time at which the oldest call became so


class RayExecutor:
    """Evaluates on `workers` actors of `threads` cores each.

    Args:
        factory: "package.module:function" that builds the evaluate function in each worker.
        kwargs: for the factory; JSON-like and small.
        weights: arrays that the factory gets as `weights=`; shared between the workers of a node, read-only there.
        workers: how many actors. Fewer do where the cluster has no room for all, as long as there is one.
        address: of a running cluster ("auto" finds it), or "local" for one of its own. If the process is connected to a
            cluster already, that one is used and left running.
        timeout_seconds: for one evaluation, from when it runs.
        threads: cores of one worker.
        schedule_seconds: that no worker at all may have room.
        setup_seconds: until the first worker must have started, and until the factory must have returned.

    Raises:
        ExecutorError: from `submit` and `next`, when workers cannot be started, keep dying, or find no room, or the
            cluster is lost.
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
        schedule_seconds: float = 20.0,
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
        self._pending: deque[_Work] = deque()
        self._answers: deque[tuple[int, Result]] = deque()
        self._open = 0  # trials submitted and not yet returned
        self._attempts: dict[int, int] = {}  # of trials whose worker died
        self._nodes: dict[int, int] = {}  # that died, of trials whose node did
        self._failed_starts = 0  # in a row
        self._evaluation_seconds = math.inf  # a moving average; not yet known
        self._watched_at = self._placed_at = 0.0  # monotonic times: of the last look, and of a worker that had room
        self._silences = 0  # looks in a row without an answer
        self._doomed: list[Any] = []  # actors that are to end
        self._told = False  # that there are fewer workers than asked for

    @property
    def slots(self) -> int:
        return self._workers * _QUEUED

    def submit(self, trial: int, genotype: Genotype) -> None:
        self._pending.append((trial, genotype))
        self._open += 1
        if self._ray is None:
            self._start()
        self._feed(idle_only=True)  # the others when `next` is asked for: by then there may be more to share a call

    def next(self) -> tuple[int, Result]:
        if not self._open:
            raise LookupError("next() without a submitted trial")
        while not self._answers:
            self._feed()
            self._watch()
            oldest = {seat.calls[0].reference: seat for seat in self._seats if seat.calls}
            answered, _ = self._ray.wait(list(oldest), num_returns=len(oldest), timeout=0)
            if not answered:
                deadline = min(seat.since + seat.calls[0].deadline_seconds for seat in oldest.values())
                seconds = min(_WATCH_SECONDS, max(0.0, deadline - time.monotonic()))
                answered, _ = self._ray.wait(list(oldest), timeout=seconds)
            for reference, seat in oldest.items():
                if reference in answered:
                    self._receive(seat)
                elif time.monotonic() >= seat.since + seat.calls[0].deadline_seconds:
                    self._replace(seat, f"gave no answer within {seat.calls[0].deadline_seconds:g} s")
        self._open -= 1
        return self._answers.popleft()

    def close(self) -> None:
        self._pending.clear()
        self._answers.clear()
        self._open = 0
        if self._ray is not None:
            self._kill(*(seat.actor for seat in self._seats))
            self._seats.clear()
            self._doomed.clear()
            self._cluster.close()
            self._ray, self._silences = None, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        shared_bytes = sum(a.nbytes for a in (self._weights or {}).values())
        cpus = self._workers * self._threads
        self._ray = connect(self._address, self._cluster, cpus=cpus, shared_bytes=shared_bytes)
        shared = None if self._weights is None else self._ray.put(dict(self._weights))
        self._setup_arguments = (self._threads, *self._recipe, shared)  # at top level Ray makes arrays of the reference
        environment = worker_environment(self._threads) | {"PYTHONPATH": python_path()}
        self._actor = self._ray.remote(Worker).options(
            num_cpus=self._threads,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": environment},
        )
        self._watched_at = self._placed_at = time.monotonic()
        self._seats = [_Seat() for _ in range(self._workers)]
        for seat in self._seats:
            self._occupy(seat)

    def _occupy(self, seat: _Seat) -> None:
        """Puts a fresh worker on `seat`. Its constructor is trivial, so that waiting for room is told from building."""
        seat.actor, seat.node, seat.up = self._actor.remote(), None, False
        self._call(seat, "ready", seat.actor.ready.remote(), math.inf)

    def _call(
        self, seat: _Seat, what: Literal["ready", "setup", "evaluate"], reference: Any, deadline: float, *work: _Work
    ) -> None:
        if not seat.calls:
            seat.since = time.monotonic()
        seat.calls.append(_Call(what, reference, deadline, work))

    def _feed(self, *, idle_only: bool = False) -> None:
        """Hands out pending trials; one whose worker died before runs alone, so that no neighbour is blamed."""
        while self._pending:
            free = [s for s in self._seats if s.up and not any(w[0] in self._attempts for c in s.calls for w in c.work)]
            seat = min(free, key=lambda seat: len(seat.calls), default=None)
            alone = self._pending[0][0] in self._attempts
            if seat is None or len(seat.calls) >= (1 if alone or idle_only else _QUEUED):
                return
            places = sum(_QUEUED - len(seat.calls) for seat in free)
            size = 1 if alone else min(self._most(), math.ceil(len(self._pending) / places))
            work = [self._pending.popleft()]
            while len(work) < size and self._pending[0][0] not in self._attempts:
                work.append(self._pending.popleft())
            reference = seat.actor.evaluate.remote(np.stack([genotype for _, genotype in work]))
            self._call(seat, "evaluate", reference, self._timeout_seconds, *work)

    def _most(self) -> int:
        """Evaluations that a call should have, by how long they were lately; a call has the deadline of one."""
        wanted_seconds = min(_CALL_SECONDS, self._timeout_seconds / 4)
        return max(1, min(_LARGEST, int(wanted_seconds / max(self._evaluation_seconds, 1e-9))))

    def _receive(self, seat: _Seat) -> None:
        """Takes the answer to the oldest call, or the news that the worker has died."""
        call = seat.calls[0]
        try:
            value: Any = self._ray.get(call.reference)
        except self._ray.exceptions.RayTaskError as e:
            if call.what != "evaluate":
                cause = e.cause if isinstance(e.cause, Exception) else e
                raise ExecutorError(f"A worker could not build its evaluator {self._recipe[0]!r}: {cause!r}.") from e
            value = [Result(None, 0.0, str(e).strip().splitlines()[-1])] * len(call.work)
        except self._ray.exceptions.RayError as e:
            detail = " ".join(str(e).split())
            self._replace(seat, "crashed the worker", detail, node_died="node has died" in detail)
            return
        seat.calls.popleft()
        seat.since = time.monotonic()
        if call.what == "ready":
            seat.node = value
            taken = {s.place for s in self._seats if s.node == value and s is not seat}
            seat.place = next(place for place in itertools.count() if place not in taken)
            reference = seat.actor.setup.remote(seat.place, *self._setup_arguments)
            self._call(seat, "setup", reference, self._setup_seconds)
        elif call.what == "setup":
            seat.up, self._failed_starts = True, 0
        else:
            self._answers.extend((trial, result) for (trial, _), result in zip(call.work, value, strict=True))
            seconds = sum(result.seconds for result in value) / len(value)
            known = math.isfinite(self._evaluation_seconds)
            self._evaluation_seconds = 0.8 * self._evaluation_seconds + 0.2 * seconds if known else seconds

    def _replace(self, seat: _Seat, what: str, detail: str = "no more is known", *, node_died: bool = False) -> None:
        """Puts a fresh worker on `seat` and its trials back into the queue; what ran is blamed."""
        first, *others = seat.calls
        again = [work for call in others for work in call.work]
        if first.what != "evaluate":
            self._failed_starts += not node_died
            if self._failed_starts >= _ATTEMPTS * self._workers:
                raise ExecutorError(
                    f"Workers keep dying before they evaluate anything: {what} ({detail}). "
                    f"Look for too little memory, and try the inline executor."
                )
        for trial, _ in again:  # it may have been one of these, with the answer before it lost: they go on alone too
            self._attempts.setdefault(trial, 0)
        what, counts, most = ("lost its node", self._nodes, _NODES) if node_died else (what, self._attempts, _ATTEMPTS)
        for trial, genotype in reversed(first.work):
            attempts = counts[trial] = counts.get(trial, 0) + 1
            logger.warning("Trial %d %s, attempt %d of %d.", trial, what, attempts, most)
            logger.debug("Trial %d: %s", trial, detail)
            if attempts < most:
                again.insert(0, (trial, genotype))
            else:
                self._answers.append((trial, Result(None, 0.0, f"{what} {attempts} times")))
        self._pending.extendleft(reversed(again))
        seat.calls.clear()
        self._kill(seat.actor)
        self._occupy(seat)

    def _kill(self, *actors: Any) -> None:
        """Ends what is not dead, now or when the head answers: Ray could wait a minute for it, and then abort."""
        self._doomed += actors
        if self._doomed and not self._silences and self._heard():
            for actor in self._doomed:
                with contextlib.suppress(Exception):  # of many types; it may be dead already
                    self._ray.kill(actor)
            self._doomed.clear()

    def _heard(self) -> bool:
        """Looks whether the head answers."""
        heard = reachable(self._ray, within_seconds=_WATCH_SECONDS)
        self._silences = 0 if heard else self._silences + 1
        self._watched_at = time.monotonic()
        return heard

    def _watch(self) -> None:
        """Looks from time to time whether the cluster is there and has room for a worker at least."""
        now = time.monotonic()
        if now - self._watched_at < _WATCH_SECONDS:
            return
        if self._heard():
            self._kill()
            self._look_for_room(now)
        elif self._silences >= _SILENCES:
            raise ExecutorError(
                "The Ray cluster is lost: its head does not answer, or has given this machine up. Every trial that was "
                "finished is in the journal: the same command goes on, with a cluster that runs."
            )

    def _look_for_room(self, now: float) -> None:
        """Tells of workers that wait for room; an error where that is all of them, for long, or none starts."""
        waiting = [seat for seat in self._seats if seat.node is None]
        if len(waiting) < self._workers:
            self._placed_at = now
        if not waiting:
            self._told = False
            return
        longest = now - min(seat.since for seat in waiting)
        without = now - self._placed_at  # seconds without any worker
        if longest < min(_REPORT_SECONDS, self._schedule_seconds):
            return
        crowded = waiting_for_room(self._ray, self._threads) >= len(waiting)  # else some are placed, and slow to start
        if crowded and not self._told:
            self._told = True
            logger.warning("%d of %d workers go on. %s", self._workers - len(waiting), self._workers, self._room())
        if crowded and without > self._schedule_seconds:
            raise ExecutorError(
                f"The cluster placed no worker within {self._schedule_seconds:g} s. {self._room()} Ask for fewer "
                f"workers or threads, wait until others are done, or use another cluster; the same command goes on."
            )
        if without > self._setup_seconds:
            raise ExecutorError(
                f"No worker has started within {self._setup_seconds:g} s. {self._room()} Look for what keeps processes "
                f"on its nodes from starting, or use another cluster; the same command goes on."
            )

    def _room(self) -> str:
        """What is demanded of the cluster, and what exists."""
        exist, free = self._ray.cluster_resources(), self._ray.available_resources()
        return (
            f"{self._workers} workers of {self._threads} CPUs need {self._workers * self._threads}; the cluster has "
            f"{exist.get('CPU', 0):g} CPUs, of which {free.get('CPU', 0):g} are free."
        )
