import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from nas.errors import LatencyError
from nas.measure import footprint, measure_files
from nas.ondevice.lock import alone

fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Of the lock."""
    monkeypatch.setenv("NAS_LOCKS", str(tmp_path))
    return tmp_path


def test_a_second_measuring_is_refused_and_told_of_the_first():
    told = rf"process {os.getpid()}, the first.*Wait until"
    with alone("the first"), pytest.raises(LatencyError, match=told), alone("the second"):
        pass
    with alone("the second"):
        pass


def test_it_waits_as_long_as_it_is_told():
    taken, free = threading.Event(), threading.Event()

    def first():
        with alone("the first"):
            taken.set()
            free.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    taken.wait(30)
    begin = time.monotonic()
    with pytest.raises(LatencyError), alone("the second", wait_seconds=0.3):
        pass
    assert time.monotonic() - begin >= 0.3
    threading.Timer(0.3, free.set).start()
    with alone("the second", wait_seconds=30):
        assert free.is_set()
    thread.join()


def test_a_process_that_is_started_with_it_holds_it_as_well():
    with alone("the first") as held:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=held)
    with pytest.raises(LatencyError), alone("the second"):
        pass
    child.communicate(b"\n")
    with alone("the second"):
        pass


def test_all_that_times_uses_it(tmp_path):
    (tmp_path / "model.onnx").write_text("of no matter")
    with alone("the first"):
        with pytest.raises(LatencyError, match="the first"):
            measure_files({"a": lambda: lambda n: None}, seconds=0.0)
        with pytest.raises(LatencyError, match="the first"):
            footprint(tmp_path / "model.onnx", "onnxruntime", (8, 8, 1))


def test_on_windows_a_byte_is_locked_that_keeps_nobody_from_reading_who_it_is(monkeypatch):
    asked = []

    def locking(descriptor, mode, size):
        asked.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, size))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(sys, "platform", "win32")
    with alone("the first") as held:
        assert held == ()
        with pytest.raises(LatencyError, match=rf"process {os.getpid()}, the first"), alone("the second"):
            pass
    assert asked == [(1 << 30, 2, 1)] * 2
