"""The machine that measures: what it is, how busy it is, and which of its CPUs a process is held on.

Linux tells all of it in /proc, so a phone or a small board needs no further package; elsewhere psutil is asked.
"""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from nas.errors import LatencyError

_TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
_NUMBERS = {"cpu family": "family", "model": "model", "CPU implementer": "implementer", "CPU part": "part"}
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100  # of /proc, a second
_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA = Path("/proc/driver/nvidia/gpus")
_LINUX = sys.platform.startswith("linux")


def hardware() -> str:
    """CPU, cores, vector extensions, which decide what kernels run, and GPUs.

    "AMD EPYC (family 25 model 17), 2 cores, avx2 avx512f": virtual machines name CPUs of several generations alike, and
    their numbers tell them apart.
    """
    model, flags, numbers = platform.processor() or platform.machine(), "", dict[str, str]()
    with contextlib.suppress(OSError):  # there is no such file on macOS and Windows
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key in ("model name", "Model", "Hardware"):  # the latter two on ARM
                model = value
            elif key in _NUMBERS:
                numbers.setdefault(_NUMBERS[key], value)
            elif key in ("flags", "Features"):
                flags = " ".join(f for f in _TELLING_FLAGS if f in value.split())
            if key in ("flags", "Model"):
                break
    if numbers:
        model = f"{model} ({' '.join(f'{name} {value}' for name, value in numbers.items())})"
    return ", ".join(part for part in (model, f"{os.cpu_count() or 1} cores", flags, *_gpus()) if part)


def _gpus() -> list[str]:
    """NVIDIA's, as their driver names them."""
    found = []
    for path in sorted(_NVIDIA.glob("*/information")):
        with contextlib.suppress(OSError):
            fields = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
            found.append(fields.get("Model", "").strip())
    return found


def load() -> str:
    """How busy the machine is, in words."""
    average = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return f"load average {average:.2f} on {os.cpu_count() or 1} CPUs"


def busy_seconds() -> dict[int, float]:
    """CPU -> seconds that it has worked, or was taken by another guest of its host, since it started.

    Empty where the system does not say and psutil is not installed.
    """
    if not _LINUX:
        try:
            import psutil
        except ImportError:
            return {}
        return {cpu: sum(t) - t.idle for cpu, t in enumerate(psutil.cpu_times(percpu=True))}
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines():
            name, *ticks = line.split()
            if name.startswith("cpu") and name != "cpu":
                user, nice, system, _idle, _wait, irq, soft, stolen = map(int, ticks[:8])
                found[int(name[3:])] = (user + nice + system + irq + soft + stolen) / _TICKS
    return found


def busiest(count: int = 3, *, seconds: float = 0.2) -> str:
    """The other processes that use the most CPU right now, in words; empty if none uses 5 % of one."""
    before = _processes()
    time.sleep(seconds)
    used = {pid: (name, now - before[pid][1]) for pid, (name, now) in _processes().items() if pid in before}
    used.pop(os.getpid(), None)
    percent = sorted(((100 * cpu / seconds, pid, name) for pid, (name, cpu) in used.items()), reverse=True)[:count]
    return ", ".join(f"{name} (pid {pid}) {of:.0f} %" for of, pid, name in percent if of >= 5)


def _processes() -> dict[int, tuple[str, float]]:
    """Process id -> (name, CPU seconds so far)."""
    found: dict[int, tuple[str, float]] = {}
    if _LINUX:
        for path in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):  # not a process, or it has ended
                pid, stat = int(path.name), (path / "stat").read_text(encoding="utf-8", errors="replace")
                name, _, rest = stat.partition("(")[2].rpartition(")")
                fields = rest.split()
                found[pid] = (name, (int(fields[11]) + int(fields[12])) / _TICKS)
        return found
    try:
        import psutil
    except ImportError:
        return found
    for process in psutil.process_iter(["name", "pid"]):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[process.pid] = (process.name(), times.user + times.system)
    return found


@contextlib.contextmanager
def pinned(threads: int, *, on: Collection[int] = ()) -> Iterator[tuple[int, ...]]:
    """Holds this thread, and those it starts, on the `threads` least busy of its CPUs; yields their numbers.

    Where there are no more CPUs than that (taskset, a container's share) they are held already; where the system cannot
    pin (macOS) () is yielded.

    Args:
        on: these CPUs instead, if there are any, however busy they are.

    Raises:
        LatencyError: this process may not use them.
    """
    before = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    if not before >= set(on):
        raise LatencyError(
            f"what was timed so far ran on CPU {', '.join(map(str, on))}, and this process may use "
            f"{', '.join(map(str, sorted(before))) or 'no certain ones'}. CPUs of one machine need not be equally "
            f"fast: let it use the same ones (taskset, the container's settings), or measure anew into another file."
        )
    if len(before) <= threads:
        yield tuple(sorted(before))
        return
    chosen = tuple(sorted(on)) or _least_busy(before, threads)
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, before)


def _least_busy(cpus: Collection[int], count: int) -> tuple[int, ...]:
    """`count` of `cpus`."""
    then = busy_seconds()
    time.sleep(0.2)
    used = {cpu: now - then.get(cpu, now) for cpu, now in busy_seconds().items()}
    return tuple(sorted(sorted(cpus, key=lambda cpu: (used.get(cpu, 0.0), -cpu))[:count]))
