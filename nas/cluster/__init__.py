"""Ray, started or joined: on this machine, or on a cluster. The way in for everything here that runs on Ray.

What plain Ray leaves open is closed here (measured with Ray 2.60): a cluster of its own listens on the loopback
interface only, behind a token, reports nothing to anyone, and dies with the driver, however that dies.
"""

import atexit
import contextlib
import importlib
import importlib.util
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from nas.errors import ExecutorError

_LONGEST_TEMP = 39  # bytes of a path: Ray puts Unix sockets 64 below it, whose paths may have 107, on macOS 103
_LEAVE_SECONDS = 2.0  # for a head to answer, and for leaving one that does not
_SHORT_TEMP = "/tmp"  # where the system's own folder is too long, as on macOS: /var/folders/...
_WITHOUT = 'do without Ray (`search.executor = "processes"`, `train.processes = 1`)'


def preflight(address: str = "local") -> None:
    """Says what would keep `connect` from starting Ray here, as far as that shows without importing or starting Ray.

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


def connect(address: str, undo: contextlib.ExitStack, *, cpus: int, gpus: int = 0, shared_bytes: int = 0) -> Any:
    """The ray module, connected; what must be undone at the end goes onto `undo`.

    Args:
        address: of a running cluster ("auto" finds it), or "local" for one of its own. If the process is connected to a
            cluster already, that one is used and left running.
        undo: closed by the caller when the work is done.
        cpus: that a cluster of its own has; what is asked for is there.
        gpus: likewise.
        shared_bytes: of arrays that its processes will share.

    Raises:
        ExecutorError: Ray is not installed, does not start, or would start unprotected.
    """
    own = address == "local" and not _connected()
    imported = "ray" in sys.modules
    # read by Ray, here and in the processes that it starts; what the user has set stays
    settings = {"RAY_py_gcs_connect_timeout_s": "10"}
    if own:
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
    internals: Any = ray._private  # pyright: ignore[reportPrivateImportUsage]
    # Where there is no head to join, that is an error after 20 s, not a quarter of an hour; one's own has to start.
    internals.ray_constants.NUM_REDIS_GET_RETRIES = 20 if own else 1
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    with contextlib.ExitStack() as started:  # undone at once if the start fails
        if own:
            folder = _temporary_folder()
            started.callback(shutil.rmtree, folder, ignore_errors=True)
            options |= {
                "include_dashboard": False,
                "num_cpus": cpus,
                "num_gpus": gpus,
                "object_store_memory": 2 * shared_bytes + 256 * 2**20,
                "_temp_dir": folder,
            }
            internals.worker._worker_logs_enabled = False  # or each worker's death is printed on stdout
            internals.ray_constants.ENABLE_RAY_CLUSTER = False  # loopback, also if ray was imported before
        started.callback(_leave, ray)
        try:
            with warnings.catch_warnings():
                # Ray starts its daemons by fork and exec; between the two nothing of JAX's threads is touched.
                warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
                ray.init(address=address, **options)
        except Exception as e:  # of many types, most of them private
            raise ExecutorError(
                f"Ray did not {'start' if own else 'answer'} at {address!r}: {e}. Or {_WITHOUT}."
            ) from e
        if own:
            started.callback(_end_what_is_left, folder)
            started.callback(_guard(folder))
        undo.push(started.pop_all())
    return ray


def python_path() -> str:
    """PYTHONPATH with which a worker on this machine, or on one with the same files, imports what this process can."""
    return os.pathsep.join(p or os.getcwd() for p in sys.path if not p.startswith((sys.prefix, sys.base_prefix)))


def node_id() -> str:
    """Of the node that this process, connected to a cluster, runs on."""
    import ray

    return ray.get_runtime_context().get_node_id()


def reachable(ray: Any, *, within_seconds: float) -> bool:
    """Whether the head of the cluster answers in time, and counts the node of this process among the living.

    Other calls wait for a head that is gone until, after a minute, Ray aborts the process.
    """
    client = ray._private.worker.global_worker.gcs_client
    try:
        return client.check_alive([ray.NodeID.from_hex(node_id())], timeout=within_seconds)[0]
    except ray.exceptions.RayError:
        return False


def waiting_for_room(ray: Any, cpus: int) -> float:
    """How many processes of `cpus` CPUs wait for room, of everyone; what has been placed and is starting does not.

    Infinite where this version of Ray cannot tell.
    """
    try:
        from ray.autoscaler.v2.sdk import get_cluster_resource_state

        state = get_cluster_resource_state(ray._private.worker.global_worker.gcs_client)
    except (ImportError, ray.exceptions.RayError):
        return math.inf
    requests = state.pending_resource_requests
    return sum(r.count for r in requests if dict(r.request.resources_bundle) == {"CPU": cpus})


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


_MISSING = f"Ray is not installed: `pip install 'ray>=2.52'`, or {_WITHOUT}."


def _no_token(why: str) -> str:
    return (
        f"{why}, and a cluster of its own without a token would run the code of anyone on this machine. Let "
        f"RAY_AUTH_MODE be `token` or unset, give the address of a cluster that runs, or {_WITHOUT}."
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
        f"{_SHORT_TEMP} cannot be used. Set TMPDIR to a path of at most {_LONGEST_TEMP - 13} bytes, or "
        f"{_WITHOUT}."
    )


def _leave(ray: Any) -> None:
    """Disconnects; from a head that is gone in the background, since Ray then waits for up to a minute."""
    if not ray.is_initialized() or reachable(ray, within_seconds=_LEAVE_SECONDS):
        ray.shutdown()
        return
    thread = threading.Thread(target=ray.shutdown, daemon=True)
    thread.start()
    thread.join(_LEAVE_SECONDS)
    if thread.is_alive():
        atexit.unregister(ray._private.worker.shutdown)  # it would wait for the thread


def _end_what_is_left(folder: str) -> None:
    """Where a server of this cluster has died, ends the others, for each of which Ray would wait for many seconds."""
    servers = [p for p in psutil.Process().children() if _belongs(p, folder)]
    if {"gcs_server", "raylet"} <= {p.name() for p in servers if p.status() != psutil.STATUS_ZOMBIE}:
        return
    for server in servers:
        for process in (server, *server.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                process.kill()


def _belongs(process: psutil.Process, folder: str) -> bool:
    """Whether it was started for the cluster of this folder; a process that has just ended was not."""
    try:
        return any(folder in word for word in process.cmdline())
    except psutil.Error:
        return False


def _guard(folder: str) -> Callable[[], None]:
    """Starts the process that ends this cluster's servers should the driver be killed; returns what dismisses it."""
    family: dict[int, float] = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if _belongs(child, folder):
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
