"""Training of the supernet in several processes, on this machine or on the nodes of a cluster, under Ray Train.

Ray Train's JaxTrainer (alpha in Ray 2.60) places the processes, watches them, and ends all when one fails. It could
connect JAX between them too, but that is done here: on CPUs it leaves them unconnected without a word, each training
alone, and the service through which they meet would listen on all interfaces. Here it listens where Ray does, and each
process makes sure of the number of processes before it trains.

What the processes do is `train_supernet`, each with its own rows of every batch.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import msgspec

from nas import cluster, config
from nas.data import load_data
from nas.errors import ConfigError, ExecutorError, NasError, RunError
from nas.space import load_space
from nas.train.loop import Progress
from nas.train.supernet import require_divisible, train_supernet

_PARTS = ("fsspec", "pandas", "pyarrow", "pydantic", "requests")  # what Ray Train imports and Ray alone does not bring
_SCHEDULE_SECONDS = 30  # until all processes must have been placed
_CONNECT_SECONDS = 60  # until all processes must have met
_POLL_SECONDS = 0.5  # between two looks at the progress


def train_on_ray(
    data: config.Data,
    space: str,
    settings: config.Train,
    *,
    seed: int,
    folder: Path,
    digests: tuple[str, str],
    progress: Progress | None = None,
) -> None:
    """Trains as `train_supernet` does, in `settings.processes` processes; the result is the newest checkpoint.

    Its loss equals that of one process on as many devices; only the last bits depend on the number of devices.

    Args:
        data: loaded anew in every process, so its source must be found under the same path on every node.
        space: name or path, likewise.
        settings: `processes`, each with `process_gpus` GPUs (0: with its share of the node's CPU cores), on the cluster
            at `address`.
        seed: of the initial weights, the batches, and all that is drawn.
        folder: for checkpoints and metrics; one that all nodes share. A training that was cut off goes on from there.
        digests: of the space and of the data, which every process must find to be its own.
        progress: called in this process.

    Raises:
        ConfigError: the batch does not divide over the devices of all processes.
        ExecutorError: Ray is missing or does not start, there is no room, or a process died or stayed alone.
        NasError: what `train_supernet` raises in the processes.
    """
    preflight(settings)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    count, gpus = settings.processes, settings.process_gpus
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_SCHEDULE_SECONDS))
    with contextlib.ExitStack() as undo:
        ray = cluster.connect(settings.address, undo, cpus=count, gpus=count * gpus)
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.jax import JaxTrainer
        from ray.train.v2.jax.config import JaxConfig
        from ray.util.queue import Queue

        told = Queue(actor_options={"num_cpus": 0})
        undo.callback(_dismiss, told)
        undo.callback(shutil.rmtree, folder / ".ray", ignore_errors=True)
        job = {
            "data": msgspec.to_builtins(data),
            "space": space,
            "settings": msgspec.to_builtins(settings),
            "seed": seed,
            "folder": str(folder),
            "digests": digests,
            "told": told,
        }
        trainer = JaxTrainer(
            _train,
            train_loop_config=job,
            jax_config=JaxConfig(use_tpu=False, use_gpu=False),  # connects nothing
            scaling_config=ScalingConfig(
                num_workers=count, use_gpu=gpus > 0, resources_per_worker={"CPU": 1} | ({"GPU": gpus} if gpus else {})
            ),
            run_config=RunConfig(
                name=".ray",  # only a mark by which Ray Train sees that all nodes share the folder
                storage_path=str(folder),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                worker_runtime_env={"env_vars": _environment(settings)},
            ),
        )
        _fit(ray, trainer, told, settings, progress)


def preflight(settings: config.Train) -> None:
    """Says what would keep `train_on_ray` from training, as far as that shows without importing or starting Ray.

    Raises:
        ConfigError: the batch does not divide over the devices of all processes.
        ExecutorError: Ray or what Ray Train needs is not installed, or a cluster of its own cannot be started.
    """
    require_divisible(settings, devices=settings.processes * max(settings.process_gpus, 1))
    cluster.preflight(settings.address)
    if missing := [name for name in _PARTS if importlib.util.find_spec(name) is None]:
        raise ExecutorError(
            f"train.processes is {settings.processes}, and Ray Train needs {', '.join(missing)}: "
            f"`pip install 'ray[train]'`, or set train.processes = 1."
        )


# in the process that asks


def _environment(settings: config.Train) -> dict[str, str]:
    """Environment of the training processes: JAX's settings are those of this process, but for the platform."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))}
    platform = "cuda" if settings.process_gpus else "cpu"
    return environment | {"JAX_PLATFORMS": platform, "PYTHONPATH": cluster.python_path()}


def _fit(ray: Any, trainer: Any, told: Any, settings: config.Train, progress: Progress | None) -> None:
    """Waits for the end, and tells the progress meanwhile."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as e:
            failures.append(e)

    # In the main thread Ray Train would take Ctrl-C for itself.
    thread = threading.Thread(target=fit, daemon=True, name="ray-train")
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        with contextlib.suppress(ray.exceptions.RayError):  # of a cluster that is gone: `fit` says more
            for news in told.get_nowait_batch(told.qsize()):
                if progress is not None:
                    progress(*news)
    if failures:
        cause = _explained(ray, failures[0], settings)
        raise cause from failures[0]


def _explained(ray: Any, error: BaseException, settings: config.Train) -> BaseException:
    """What a failure of Ray Train comes from, in words of this project."""
    causes: dict[int, BaseException] = getattr(error, "worker_failures", {})
    for cause in causes.values():
        if isinstance(cause, NasError):
            return cause
    again = "The same command goes on from the newest checkpoint."
    look = "look for too little memory, or a node that was lost"
    # When one dies, the others lose their connection to it, and any of them may be seen first.
    dead = {rank: e for rank, e in causes.items() if isinstance(e, ray.exceptions.RayError)}
    if dead:
        who = " and ".join(map(str, sorted(dead)))
        first = " ".join(str(next(iter(dead.values()))).split())
        return ExecutorError(f"Training process {who} of {settings.processes} died: {look}. {again} Ray says: {first}")
    if causes:
        rank, cause = next(iter(causes.items()))
        return ExecutorError(
            f"Training process {rank} of {settings.processes} failed: {cause!r}. If it has lost the connection to "
            f"another process, that one died: {look}. {again}"
        )
    if "startup timed out" in str(error):
        exist, free = ray.cluster_resources(), ray.available_resources()
        gpus = settings.process_gpus
        need = f"{settings.processes} processes of 1 CPU" + (f" and {gpus} GPUs" if gpus else "")
        return ExecutorError(
            f"The cluster did not place {need} within {os.environ['RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S']} s; it has "
            f"{exist.get('CPU', 0):g} CPUs and {exist.get('GPU', 0):g} GPUs, of which {free.get('CPU', 0):g} and "
            f"{free.get('GPU', 0):g} are free. Ask for fewer (train.processes, train.process_gpus), wait until others "
            f"are done, or use another cluster (train.address)."
        )
    return ExecutorError(f"Ray Train failed: {' '.join(str(error).split())}. {again}")


def _dismiss(told: Any) -> None:
    """Takes the queue away; processes that an interrupted training left on a cluster fail at their next news."""
    with contextlib.suppress(Exception):  # of a cluster that is gone
        told.shutdown(force=True)


# in each training process


def _train(job: dict[str, Any]) -> None:
    """What every process does."""
    import ray.train

    place = ray.train.get_context()
    settings = msgspec.convert(job["settings"], config.Train)
    if not settings.process_gpus:
        _confine(place.get_local_rank(), place.get_local_world_size())
    _meet(place.get_world_rank(), place.get_world_size())
    _require_connected(settings)

    import jax

    from nas.supernet import Supernet

    images = load_data(msgspec.convert(job["data"], config.Data))
    space = load_space(job["space"], input_shape=images.image_shape, classes=images.classes)
    for what, mine, wanted in zip(("space", "data"), (space.digest, images.digest), job["digests"], strict=True):
        if mine != wanted:
            raise RunError(
                f"The {what} that training process {jax.process_index()} finds on {socket.gethostname()} is another "
                f"one (hash {mine[:12]}, wanted {wanted[:12]}). All nodes need the same files under the same paths."
            )
    train_supernet(
        Supernet(space),
        images,
        settings,
        seed=job["seed"],
        folder=Path(job["folder"]),
        progress=lambda *news: job["told"].put(news),
    )
    jax.distributed.shutdown()  # not after an error: it would wait for the others


def _confine(index: int, count: int) -> None:
    """Leaves this process, one of `count` on its node, its share of the cores, before JAX counts them."""
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[index::count] or {cores[index % len(cores)]})


def _meet(rank: int, count: int) -> None:
    """Connects JAX between the processes, through a service of the first one."""
    import jax
    import ray.util
    from jax._src.lib import _jax as internals  # pyright: ignore[reportPrivateImportUsage]
    from ray.train.collective import broadcast_from_rank_zero

    here = ray.util.get_node_ip_address()  # 127.0.0.1 in a cluster of its own
    address = broadcast_from_rank_zero(f"{here}:{_free_port(here)}" if rank == 0 else None)
    # Without a name Gloo, which adds up over CPUs, would listen at whatever address the host's name stands for.
    internals.make_gloo_tcp_collectives = functools.partial(internals.make_gloo_tcp_collectives, hostname=here)
    jax.distributed.initialize(
        address,
        count,
        rank,
        coordinator_bind_address=address,
        initialization_timeout=_CONNECT_SECONDS,
        cluster_detection_method="deactivate",
    )


def _free_port(host: str) -> int:
    """A port of this host that nobody uses."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _require_connected(settings: config.Train) -> None:
    """That JAX sees all processes and their devices; unconnected ones would each train alone, and none would say so.

    Raises:
        ExecutorError: it does not see all processes.
        ConfigError: a process has other devices than the settings give it.
    """
    import jax

    if jax.process_count() != settings.processes:
        raise ExecutorError(
            f"JAX connects {jax.process_count()} processes, but train.processes is {settings.processes}: this process "
            f"would train alone. Ports between the nodes may be closed, or the platform {jax.default_backend()!r} "
            f"cannot connect processes. Open them, or set train.processes = 1."
        )
    local = jax.local_device_count()
    if local != max(settings.process_gpus, 1):
        raise ConfigError(
            f"A training process on {socket.gethostname()} has {local} devices of {jax.default_backend()!r}, but "
            f"train.process_gpus is {settings.process_gpus}. Set it to what each process has (0 is one CPU device), or "
            f"take --xla_force_host_platform_device_count out of XLA_FLAGS."
        )
