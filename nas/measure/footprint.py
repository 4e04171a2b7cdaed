"""What a model file costs beside latency: bytes, start, memory, throughput and, where the machine counts it, energy.

Everything is measured in a process of its own, which has the runtime and this model and nothing else.
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nas.config import nearest
from nas.errors import DeviceError, ExportError, NasError
from nas.export import RUNTIMES, Session
from nas.ondevice.lock import alone, own_command
from nas.ondevice.machine import pinned
from nas.ops import Shape

_POWERCAP = Path("/sys/class/powercap")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SAMPLES = 10  # that the time for throughput is cut into; the median one counts
_CHILD = "import sys; from nas.measure.footprint import answer; answer(sys.argv[1])"


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Of one file, runtime, thread count and batch size."""

    size_bytes: int
    cold_start_ms: float  # importing the runtime's library and loading the file, until the first inference could run
    first_inference_ms: float  # the first batch, with whatever the runtime does on first sight of its size
    peak_memory_bytes: int | None  # most that loading and running added to the process; None: the system does not tell
    images_per_second: float  # batches one after another
    energy_mj: float | None  # an image, of the whole package or GPU, what idles in it included
    energy_source: str  # which counter, or that nobody asked

    def lines(self) -> list[str]:
        """In words, a line each."""
        memory = "unknown" if self.peak_memory_bytes is None else f"{self.peak_memory_bytes / 2**20:.2f} MiB"
        energy = (
            ""
            if self.energy_mj is None
            else f"energy            {self.energy_mj:.4g} mJ an image ({self.energy_source})"
        )
        lines = [
            f"file              {self.size_bytes:,} bytes",
            f"cold start        {self.cold_start_ms:.4g} ms",
            f"first inference   {self.first_inference_ms:.4g} ms",
            f"peak memory       {memory} above the runtime's own",
            f"throughput        {self.images_per_second:.4g} images/s",
        ]
        return [*lines, energy] if energy else lines


def footprint(
    model: str | Path,
    runtime: str,
    image_shape: Shape,
    *,
    threads: int = 1,
    batch: int = 1,
    seconds: float = 2.0,
    energy: bool = False,
) -> Footprint:
    """The footprint of a model file in `runtime`, on random images of `image_shape` (height, width, channels).

    Args:
        threads: the process is held on so many CPUs, the least busy ones.
        batch: images an inference.
        seconds: for throughput and energy.
        energy: whether energy is asked for.

    Raises:
        DeviceError: the runtime is unknown or not installed, or energy was asked for and is not counted here.
        ExportError: the file is missing, or the runtime cannot run it.
        LatencyError: another measuring is running on this machine, and is not to be waited for any longer.
    """
    path = Path(model)
    if runtime not in RUNTIMES:
        raise DeviceError(f"unknown runtime `{runtime}`.{nearest(runtime, RUNTIMES, kind='runtime')}")
    RUNTIMES[runtime]().version()
    if not path.is_file():
        raise ExportError(f"{path}: there is no such model file. `nas export` writes one.")
    if energy:
        energy_counter(runtime)  # refused before anything is measured
    asked = {
        "model": str(path.resolve()), "runtime": runtime, "image_shape": list(image_shape), "threads": threads,
        "batch": batch, "seconds": seconds, "energy": energy,
    }  # fmt: skip
    # XLA's pool is as large as this says; freed memory that is kept would hide what the model needs.
    environment = {**os.environ, "PJRT_NPROC": str(threads), "NAS_KEEP_MEMORY": "0"}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with alone(f"{own_command()} (the footprint of {path})"), pinned(threads):
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps(asked)], capture_output=True, text=True, env=environment
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"{runtime} ended with code {done.returncode} on {path}: {last}. Export the file again.")
    found = json.loads(lines[-1])
    if "error" in found:
        raise (DeviceError if found["kind"] == "DeviceError" else ExportError)(found["error"])
    return Footprint(size_bytes=path.stat().st_size, **found)


def answer(asked: str) -> None:
    """Measures what the JSON `asked` says, in this process, and prints it as JSON; for `footprint`."""
    try:
        print(json.dumps(_measure(**json.loads(asked))))
    except NasError as e:
        print(json.dumps({"error": str(e), "kind": type(e).__name__}))


def _measure(
    model: str, runtime: str, image_shape: Sequence[int], threads: int, batch: int, seconds: float, energy: bool
) -> dict[str, Any]:
    images = np.random.default_rng(0).standard_normal((batch, *image_shape), np.float32)
    made = RUNTIMES[runtime]()
    begin = time.perf_counter()
    made.version()
    imported = time.perf_counter()
    base = _resident_bytes(reset=True)
    loading = time.perf_counter()
    session = made.open(Path(model), threads=threads)
    loaded = time.perf_counter()
    session(images)
    first = time.perf_counter()
    source, read = energy_counter(runtime) if energy else ("not asked for", None)
    rate, joules = _sustained(session, images, seconds, read)
    peak = _resident_bytes()
    return {
        "cold_start_ms": (imported - begin + loaded - loading) * 1e3,
        "first_inference_ms": (first - loaded) * 1e3,
        "peak_memory_bytes": None if base is None or peak is None else max(peak - base, 0),
        "images_per_second": rate,
        "energy_mj": None if joules is None else joules * 1e3,
        "energy_source": source,
    }


def _sustained(
    session: Session, images: np.ndarray, seconds: float, read: Callable[[], float] | None
) -> tuple[float, float | None]:
    """Images a second, and joules an image by `read`."""
    run = session.prepare(images)
    run(2)
    begin = time.perf_counter()
    run(3)
    each = max((time.perf_counter() - begin) / 3, 1e-7)
    count = max(1, round(seconds / _SAMPLES / each))
    before, times = read() if read else 0.0, []
    for _ in range(_SAMPLES):
        begin = time.perf_counter()
        run(count)
        times.append((time.perf_counter() - begin) / count)
    used = (read() - before) / (_SAMPLES * count * len(images)) if read else None
    return len(images) / float(np.median(times)), used


def energy_counter(runtime: str) -> tuple[str, Callable[[], float]]:
    """Name of the energy counter of what `runtime` computes on, and a function that reads it: joules since some moment.

    That of the GPU, or of the CPU packages. Counters that start again at 0 are followed
    if they are read at least once a turn, which at 100 W is some 40 minutes.

    Raises:
        DeviceError: it has none that this process may read.
    """
    if _on_gpu(runtime):
        return _nvml_counter()
    domains = [p for p in sorted(_POWERCAP.glob("*-rapl:*")) if _is_package(p)]
    if not domains:
        raise DeviceError(
            "this machine offers no energy counter: there is no RAPL domain in /sys/class/powercap (virtual machines "
            "seldom have one). Leave energy out."
        )
    try:
        turns = [int((d / "max_energy_range_uj").read_text()) for d in domains]
        last = [int((d / "energy_uj").read_text()) for d in domains]
    except OSError as e:
        raise DeviceError(
            f"the energy counter cannot be read: {e}. Run as root, let this user read energy_uj, or leave energy out."
        ) from e
    total = 0

    def read() -> float:
        nonlocal total
        for index, domain in enumerate(domains):
            now = int((domain / "energy_uj").read_text())
            total += (now - last[index]) % (turns[index] + 1)
            last[index] = now
        return total / 1e6

    return f"RAPL, {len(domains)} package{'s' if len(domains) > 1 else ''}", read


def _is_package(domain: Path) -> bool:
    """Whether a powercap zone (docs.kernel.org/power/powercap) counts a whole CPU package.

    Zones within one have a second number; "psys" counts the platform, packages included, and the same package may
    appear again through another interface (intel-rapl-mmio).
    """
    if not re.fullmatch(r"[a-z]+-rapl:\d+", domain.name):
        return False
    try:
        return (domain / "name").read_text().startswith("package")
    except OSError:
        return False


def _on_gpu(runtime: str) -> bool:
    """Whether a runtime computes on a GPU here."""
    if runtime == "xla":
        import jax

        return jax.default_backend() == "gpu"
    return runtime in ("onnxruntime_cuda", "onnxruntime_tensorrt")


def _nvml_counter() -> tuple[str, Callable[[], float]]:
    """Of the GPU that is computed on: the first one that CUDA_VISIBLE_DEVICES leaves.

    Raises:
        DeviceError: NVML is not there, or the GPU has no counter.
    """
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(int(gpu)) if gpu.isdigit() else nvml.nvmlDeviceGetHandleByUUID(gpu)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as e:  # not installed, no driver, or a GPU without the counter: NVML has an exception for each
        raise DeviceError(
            f"the GPU's energy counter cannot be read: {e}. NVML tells it of GPUs since Volta (pip install "
            f"nvidia-ml-py). Leave energy out."
        ) from e
    return "NVML", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _resident_bytes(*, reset: bool = False) -> int | None:
    """The most memory that this process held since the last reset; None where the system does not tell (Linux does)."""
    try:
        if reset:
            _CLEAR.write_text("5")  # proc(5): the high-water mark becomes what is held now
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
