"""XLA, on the CPU, GPU or TPU that JAX uses in this process."""

import os
from collections.abc import Callable
from importlib import metadata as packages
from pathlib import Path

import jax
import numpy as np
from jax import export

from nas.errors import DeviceError, ExportError
from nas.ondevice.sessions import Images, Session

_POOL = "tf_XLAEigen"  # how the threads that XLA computes on are named

NEEDS = ("jax", "jax")


def version() -> str:
    """See `nas.ondevice.sessions`; with the platform, since one jaxlib serves several."""
    return f"{packages.version('jaxlib')} {jax.default_backend()}"


def open_model(model: bytes | Path, *, threads: int = 1) -> Session:
    """See `nas.ondevice.sessions`.

    `threads` is of CPUs alone, and only prepared inferences hold to it (see `_honour`).
    """
    what = "the model" if isinstance(model, bytes) else str(model)
    try:
        exported = export.deserialize(bytearray(model if isinstance(model, bytes) else model.read_bytes()))
    except Exception as e:  # of flatbuffers, struct, MLIR and the system, as the bytes have it
        raise ExportError(f"XLA cannot load {what}: {e}. Export it again.") from e
    if platform() not in exported.platforms:
        raise ExportError(
            f"{what} is for {', '.join(exported.platforms)}, and JAX computes on {platform()} in this process. "
            f"Export it again here, or set JAX_PLATFORMS."
        )
    return _Session(exported, threads)


class _Session:
    """See `Session`. Each batch size is compiled when it is first seen, outside of what is timed."""

    def __init__(self, exported: export.Exported, threads: int):
        self._run, self._threads = jax.jit(exported.call), threads

    def __call__(self, images: Images) -> np.ndarray:
        return np.array(self._run(np.asarray(images, np.float32)))

    def prepare(self, images: Images) -> Callable[[int], None]:
        on_cpu = platform() == "cpu"
        if on_cpu:
            _honour(self._threads)
        placed = jax.device_put(np.asarray(images, np.float32))
        run = self._run.lower(placed).compile()
        jax.block_until_ready(run(placed))

        def one_by_one(n: int) -> None:
            for _ in range(n):  # enqueued together, calls that need nothing of each other could overlap on CPU
                run(placed).block_until_ready()

        def enqueued(n: int) -> None:
            last = placed
            for _ in range(n):
                last = run(placed)
            last.block_until_ready()  # a device runs its queue in order

        return one_by_one if on_cpu else enqueued


def platform() -> str:
    """As `jax.export` names it."""
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def _honour(threads: int) -> None:
    """Nothing, if XLA computes on `threads` threads in this process.

    It has one pool for the whole process, made when JAX first computes, of a thread for each CPU that the process may
    use at that moment, or of as many as the variable PJRT_NPROC says. Nothing changes it later.

    Raises:
        DeviceError: it has another number.
    """
    jax.devices()  # the pool is there now
    try:
        tasks = Path("/proc/self/task")
        pool = sum((tasks / task / "comm").read_text().strip() == _POOL for task in os.listdir(tasks))
    except OSError:  # only Linux tells; elsewhere nothing pins the process either
        pool = int(os.environ.get("PJRT_NPROC") or os.cpu_count() or 1)
    if pool != threads:
        raise DeviceError(
            f"the device has {threads} threads, and XLA computes on {pool} in this process, which cannot be changed "
            f"once JAX has started. Run the same command with PJRT_NPROC={threads} in its environment."
        )
