import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from nas.errors import LatencyError
from nas.measure import footprint, measure_files
from nas.ondevice.lock import alone, once

fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Of the lock."""
    monkeypatch.setenv("NAS_LOCKS", str(tmp_path))
    return tmp_path


# Jobs in the background ignore it otherwise.
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
HOLDER = """
import sys, time
from nas.ondevice.lock import alone, once
with alone("nas measure something"):
    print("has it", flush=True)
    time.sleep(float(sys.argv[1]))
"""
WAITER = """
import sys, time
from nas.ondevice.lock import alone, once
with alone("the second"):
    print(time.monotonic(), flush=True)
"""


def process(program: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE + program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def line(stream) -> str:
    return stream.readline().strip()


@pytest.fixture
def holder():
    """A process that measures for a minute."""
    first = process(HOLDER, "60")
    assert line(first.stdout) == "has it"
    yield first
    first.kill()
    first.communicate()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_second_process_waits_until_the_first_has_ended_however_that_ends(holder, stop):
    second = process(WAITER)
    told = line(second.stderr)
    assert re.search(rf"waiting for another .*process {holder.pid}, since 2\S+ \S+: nas measure something", told)
    time.sleep(0.5)
    assert second.poll() is None
    holder.send_signal(stop)
    holder.wait(30)
    ended = time.monotonic()
    out, err = second.communicate(timeout=30)
    assert second.returncode == 0
    assert float(out) - ended < 5.0  # it looks five times a second; the machine may be busy
    assert err == ""  # told once


def test_who_waits_can_be_interrupted_and_leaves_the_other_alone(holder):
    second = process(WAITER)
    line(second.stderr)
    second.send_signal(signal.SIGINT)
    second.communicate(timeout=30)
    assert second.returncode in (-signal.SIGINT, 130, 1)
    assert holder.poll() is None
    third = process(WAITER)
    assert f"process {holder.pid}" in line(third.stderr)
    third.kill()
    third.communicate()


def test_who_is_waited_for_next_is_told_as_well(tmp_path):
    told = []
    with open(tmp_path / f"nas-measuring-{os.getuid()}.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: wait(told))
        thread.start()
        for name in ("the first", "", "the second"):
            lock.truncate(0)
            lock.write(name)
            lock.flush()
            time.sleep(0.5)
    thread.join(30)
    assert [text.partition("(")[2] for text in told] == ["the first)", "the second)"]


def wait(told: list[str]) -> None:
    with alone("the third", say=once(told.append)):
        pass


def test_it_may_be_refused_instead_or_limited(monkeypatch):
    told = rf"another measuring is running .*process {os.getpid()}, since .*: the first.*Wait until"
    with alone("the first"):
        monkeypatch.setenv("NAS_WAIT_SECONDS", "0")
        with pytest.raises(LatencyError, match=told), alone("the second"):
            pass
        monkeypatch.setenv("NAS_WAIT_SECONDS", "0.3")
        begin = time.monotonic()
        with pytest.raises(LatencyError, match=r"after 0 s of waiting"), alone("the second"):
            pass
        assert time.monotonic() - begin >= 0.3
        for wrong in ("soon", "-1", "nan"):
            monkeypatch.setenv("NAS_WAIT_SECONDS", wrong)
            with pytest.raises(LatencyError, match=f"NAS_WAIT_SECONDS is '{wrong}': seconds"), alone("the second"):
                pass
    monkeypatch.setenv("NAS_WAIT_SECONDS", "0")
    with alone("the second"):
        pass


def test_a_process_that_is_started_with_it_holds_it_as_well():
    with alone("the first") as held:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=held)
    with pytest.raises(LatencyError), alone("the second", wait_seconds=0):
        pass
    child.communicate(b"\n")
    with alone("the second"):
        pass


def test_all_that_times_uses_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NAS_WAIT_SECONDS", "0")
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
        with pytest.raises(LatencyError, match=rf"process {os.getpid()}, "), alone("the second", wait_seconds=0):
            pass
    assert asked == [(1 << 30, 2, 1)] * 2
