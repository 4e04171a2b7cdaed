"""The machine that measures: what it is, how busy it is, and which of its CPUs a process is held on."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")


def hardware() -> str:
    """CPU model, cores, and the vector extensions that decide which kernels run: "AMD EPYC, 2 cores, avx2 avx512f"."""
    model, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):  # there is no such file on macOS and Windows
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                model = value
            elif key in ("flags", "Features"):
                flags = " ".join(f for f in _TELLING_FLAGS if f in value.split())
                break
    return ", ".join(part for part in (model, f"{psutil.cpu_count() or 1} cores", flags) if part)


def load() -> str:
    """How busy the machine is, in words."""
    average = psutil.getloadavg()[0]
    return f"load average {average:.2f} on {psutil.cpu_count() or 1} CPUs"


def busiest(count: int = 3, *, seconds: float = 0.2) -> str:
    """The other processes that use the most CPU right now, in words; empty if none uses 5 % of one."""
    processes = [p for p in psutil.process_iter(["name", "pid"]) if p.pid != os.getpid()]
    for process in processes:
        _percent(process)  # the first call only starts the clock
    time.sleep(seconds)
    used = sorted(((_percent(p), p.pid, p.info["name"]) for p in processes), reverse=True)[:count]
    return ", ".join(f"{name} (pid {pid}) {percent:.0f} %" for percent, pid, name in used if percent >= 5)


def _percent(process: psutil.Process) -> float:
    try:
        return process.cpu_percent()
    except psutil.Error:  # it has ended, or is not ours to look at
        return 0.0


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...]]:
    """Holds this thread, and those it starts, on the `threads` least busy of its CPUs; yields their numbers.

    Where the system cannot pin (macOS), or there are no more CPUs than that, nothing is held and () is yielded.
    """
    before = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    if len(before) <= threads:
        yield ()
        return
    busy = psutil.cpu_percent(interval=0.2, percpu=True)
    order = sorted(before, key=lambda cpu: (busy[cpu] if cpu < len(busy) else 0.0, -cpu))
    chosen = tuple(sorted(order[:threads]))
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, before)
