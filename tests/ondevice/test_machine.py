import os
import time

import pytest

from nas.errors import LatencyError
from nas.ondevice import machine
from nas.ondevice.machine import busiest, busy_seconds, hardware, load, pinned


def test_the_hardware_is_told():
    assert f"{os.cpu_count()} cores" in hardware()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f\n\ncpu family\t: 1\n",
            "AMD EPYC (family 25 model 17), ",
        ),
        (
            "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f\n",
            "(family 26 model 2), ",
        ),
        (
            "Features\t: asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\nCPU part\t: 0xd05\nModel\t: Pi 5\n",
            "Pi 5 (implementer 0x41 part 0xd0b), ",
        ),
    ],
)
def test_generations_of_one_name_are_told_apart(monkeypatch, tmp_path, lines, told):
    (tmp_path / "cpuinfo").write_text(lines)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert told in hardware()


def test_what_the_machine_works_is_told():
    before = busy_seconds()
    if not before:
        pytest.skip("this system does not say")
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    assert sum(busy_seconds().values()) - sum(before.values()) > 0.2


def test_load_and_busy_processes_are_told():
    assert "load average" in load()
    assert isinstance(busiest(seconds=0.01), str)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_affinity_is_restored_also_after_an_error():
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one CPU: nothing to pin to")
    with pinned(1) as cpus:
        assert os.sched_getaffinity(0) == set(cpus)
        assert len(cpus) == 1
    assert os.sched_getaffinity(0) == before

    with pytest.raises(RuntimeError), pinned(1):
        raise RuntimeError
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_what_is_continued_is_held_on_the_same_cpus_or_refused():
    before = sorted(os.sched_getaffinity(0))
    if len(before) < 2:
        pytest.skip("one CPU: nothing to pin to")
    for cpu in before:
        with pinned(1, on=(cpu,)) as cpus:
            assert cpus == (cpu,)
            assert os.sched_getaffinity(0) == {cpu}
    with pytest.raises(LatencyError, match=r"ran on CPU 4096.*measure anew"), pinned(1, on=(4096,)):
        pass


def test_no_more_cpus_than_threads_are_held_already():
    mine = os.sched_getaffinity(0)
    with pinned(10_000) as cpus:
        assert set(cpus) == mine
    try:
        os.sched_setaffinity(0, {max(mine)})  # as under taskset
        with pinned(1) as cpus:
            assert cpus == (max(mine),)
        with pytest.raises(LatencyError, match="measure anew"), pinned(1, on=(4096,)):
            pass
    finally:
        os.sched_setaffinity(0, mine)
