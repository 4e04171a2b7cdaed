"""Evaluates on Ray actors: on this machine, or on a cluster. The only file that imports Ray, and only when it starts.

What plain Ray leaves open is closed here (measured with Ray 2.60):

- A candidate that kills its worker is retried alone on a fresh worker and quarantined after three attempts.
- Each call has a deadline; Ray has none, so the worker is killed.
- A cluster without room waits silently; here that is an error that says what was asked for and what there is.
- A cluster of its own listens on the loopback interface only, behind a token, reports nothing to anyone, and dies with
  the driver, however that dies.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import psutil

from nas.errors import ExecutorError
from nas.search.executor import Evaluate, Result, Weights, build, evaluate_one
from nas.search.strategy import Genotype

_ATTEMPTS = 3  # of one candidate before it is quarantined, and of starting a worker before that is hopeless
_QUEUED = 2  # calls at each worker: the next one is there when one ends
_LONGEST_TEMP = 39  # bytes of a path: Ray puts Unix sockets 64 below it, whose paths may have 107, on macOS 103
_SHORT_TEMP = "/tmp"  # where the system's own folder is too long, as on macOS: /var/folders/...

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
        with warnings.catch_warnings():
            # Ray starts its daemons by fork and exec; between the two nothing of JAX's threads is touched.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            self._ray = _connect(self._address, self._workers * self._threads, self._weights, self._cluster)
        shared = None if self._weights is None else self._ray.put(dict(self._weights))
        self._setup_arguments = (*self._recipe, shared)  # at top level Ray turns the reference into the arrays
        environment = {f"{name}_NUM_THREADS": str(self._threads) for name in ("OMP", "OPENBLAS", "MKL")}
        flags = os.environ.get("XLA_FLAGS", "")
        if self._threads == 1:
            flags += " --xla_cpu_multi_thread_eigen=false"
        own = [p or os.getcwd() for p in sys.path if not p.startswith((sys.prefix, sys.base_prefix))]
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags.strip(),
            "PYTHONPATH": os.pathsep.join(own),  # what the driver can import, workers can
        }
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


def preflight(address: str = "local") -> None:
    """Says what would keep `RayExecutor` from starting here, as far as that shows without importing or starting Ray.

    Takes milliseconds, so that a pipeline can ask before it trains.

    Raises:
        ExecutorError: Ray is not installed, or a cluster of its own (`address` "local") would have no room for its
            sockets or no token.
    """
    if importlib.util.find_spec("ray") is None:
        raise ExecutorError(_MISSING)
    if address == "local" and not _connected():
        mode = os.environ.get("RAY_AUTH_MODE", "token")
        if mode.lower() != "token":
            raise ExecutorError(_no_token(f"RAY_AUTH_MODE is {mode!r}"))
        os.rmdir(_temporary_folder())


def _connect(address: str, cpus: int, weights: Weights | None, undo: contextlib.ExitStack) -> Any:
    """The ray module, connected; what must be undone at the end goes onto `undo`."""
    own = address == "local" and not _connected()
    imported = "ray" in sys.modules
    if own:  # read by Ray, here and in the processes that it starts; what the user has set stays
        settings = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: listen on loopback only, on any system
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_USAGE_STATS_ENABLED": "0",  # releases of Ray see to that themselves, nightly builds do not
        }
        for name, value in settings.items():
            os.environ.setdefault(name, value)
    try:
        import ray
        import ray.exceptions
    except ImportError as e:
        raise ExecutorError(_MISSING) from e
    if ray.is_initialized():
        return ray
    if own:
        _require_token(read_again=imported)
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    with contextlib.ExitStack() as started:  # undone at once if the start fails
        if own:
            folder = _temporary_folder()
            started.callback(shutil.rmtree, folder, ignore_errors=True)
            options |= {
                "include_dashboard": False,
                "num_cpus": cpus,  # of a cluster of our own: what is asked for is there
                "num_gpus": 0,
                "object_store_memory": 2 * sum(a.nbytes for a in (weights or {}).values()) + 256 * 2**20,
                "_temp_dir": folder,
            }
            internals: Any = ray._private  # pyright: ignore[reportPrivateImportUsage]
            internals.worker._worker_logs_enabled = False  # or each worker's death is printed on stdout
            internals.ray_constants.ENABLE_RAY_CLUSTER = False  # loopback, also if ray was imported before
        started.callback(ray.shutdown)
        try:
            ray.init(address=address, **options)
        except Exception as e:  # of many types, most of them private
            raise ExecutorError(f"Ray did not start at {address!r}: {e}. Or use the inline executor.") from e
        if own:
            started.callback(_guard(folder))
        undo.push(started.pop_all())
    return ray


def _connected() -> bool:
    """Whether the caller is connected to a cluster already."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _require_token(*, read_again: bool) -> None:
    """That a cluster which starts now asks for the token; `read_again` if Ray was imported before that was asked for.

    Raises:
        ExecutorError: it would not: the user has set another mode, or this version of Ray has no tokens.
    """
    import ray

    core: Any = importlib.import_module("ray._raylet")
    if not hasattr(core, "get_authentication_mode"):
        raise ExecutorError(_no_token(f"Ray {ray.__version__} has no tokens (`pip install 'ray>=2.52'`)"))
    if read_again:  # as Ray itself does where it turns tokens on
        core.Config.initialize("")
        core.AuthenticationTokenLoader.instance().reset_cache()
    if core.get_authentication_mode() != core.AuthenticationMode.TOKEN:
        raise ExecutorError(_no_token(f"RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']!r}"))


_MISSING = "Ray is not installed: `pip install 'ray>=2.52'`, or use the inline executor."


def _no_token(why: str) -> str:
    return (
        f"{why}, and a cluster of its own without a token would run the code of anyone on this machine. Let "
        f"RAY_AUTH_MODE be `token` or unset, give search.address of a cluster that runs, or use the inline executor."
    )


def _temporary_folder() -> str:
    """A new folder with so short a path that Ray's sockets fit below it.

    Raises:
        ExecutorError: there is no such place.
    """
    with contextlib.suppress(OSError):  # of a system without any folder for temporary files
        for parent in (tempfile.gettempdir(), _SHORT_TEMP):
            if len(os.fsencode(os.path.join(parent, "nas-12345678"))) <= _LONGEST_TEMP:
                return tempfile.mkdtemp(prefix="nas-", dir=parent)
    raise ExecutorError(
        f"Ray's sockets need a folder with a short path, and there is none: {tempfile.gettempdir()} is too long, and "
        f"{_SHORT_TEMP} cannot be used. Set TMPDIR to a path of at most {_LONGEST_TEMP - 13} bytes, or use the inline "
        f"executor."
    )


def _guard(folder: str) -> Callable[[], None]:
    """Starts the process that ends this cluster's servers should the driver be killed; returns what dismisses it."""
    family: dict[int, float] = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if any(folder in word for word in child.cmdline()):
                family |= {p.pid: p.create_time() for p in (child, *child.children(recursive=True))}
    guard = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("_guard.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of Ctrl-C
        text=True,
    )
    pipe = guard.stdin
    assert pipe is not None
    pipe.write(json.dumps({"family": list(family.items()), "folder": folder}) + "\n")
    pipe.flush()

    def dismiss() -> None:
        guard.kill()
        guard.wait()
        pipe.close()

    return dismiss
