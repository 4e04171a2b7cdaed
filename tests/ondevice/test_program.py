"""The measuring program: from a bundle to a table, on this machine and where only the runtime is installed."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import numpy as np
import pytest

from nas.config import Latency
from nas.errors import LatencyError
from nas.latency import load_device
from nas.measure import bundle, evaluate, for_table
from nas.measure.plan import Plan
from nas.ondevice import machine, program
from nas.ondevice.lock import alone
from nas.ondevice.manifest import MANIFEST, checksum, load_manifest
from nas.ondevice.results import RESULTS, Results, read
from nas.ondevice.sessions import version
from nas.space import load_space

# Other tests may run beside these, and take the CPU.
QUICK = Latency(seconds=1.0, min_rounds=6, anchors=4, holdout=4, patience=1.0, max_busy=1.0, max_drift=9.0)


@pytest.fixture(scope="module")
def plan() -> Plan:
    space = load_space("digits_mixed", input_shape=(8, 8, 1), classes=4)
    return for_table(space, load_device("host_onnxruntime"), "float32", QUICK, seed=0)


@pytest.fixture
def folder(plan, tmp_path) -> Path:
    bundle.write(plan, tmp_path / "bundle", QUICK)
    return tmp_path / "bundle"


def rewrite(folder: Path, manifest: dict) -> None:
    """As `nas measure --bundle` would have written it."""
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": checksum(manifest)}))


def start(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.Popen:
    """The program of the bundle itself, without this package on its path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, str(folder / "measure.py"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd="/",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # jobs in the background ignore it
    )  # fmt: skip


def finished(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def test_a_bundle_measures_itself_and_its_results_make_the_table(plan, folder):
    said = finished(start(folder))
    assert "nas measure --import" in said
    recording = read(folder / RESULTS)
    assert recording.complete
    assert len(recording.rounds) >= QUICK.min_rounds
    table, proof = evaluate(plan, recording, QUICK)
    assert set(table.entries) == set(plan.space.blocks())
    assert proof.networks == 4


def test_prolonged_or_not_the_share_never_falls_and_the_time_left_is_known(folder):
    """Nothing is narrow enough for it, so that it goes on beyond `seconds`, to the longest time that is allowed."""
    set_settings(folder, seconds=1.0, max_seconds=2.5, min_rounds=6, tolerance=0.0)
    said = finished(start(folder, "--json"))
    told = [json.loads(line) for line in said.splitlines() if line.startswith('{"what": "timing"')]
    shares, left = [t["share"] for t in told], [t["seconds_left"] for t in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert max(shares[:-1]) < 0.995  # nobody reads 100 % before it is done
    assert all(0 <= seconds <= 2.5 for seconds in left[6:])
    assert left[-1] == 0
    assert re.search(r"^\d+ rounds; noise of a sum \d.*the worst to \d+\.\d%", told[-1]["more"])
    rounds = [json.loads(line[9:]) for line in (folder / RESULTS).read_text().splitlines() if '"kind":"round"' in line]
    assert sum(r["seconds"] for r in rounds[:-1]) < 2.5  # it ends with the round in which the time is up


def test_the_program_is_all_that_the_bundle_needs_of_this_package(folder):
    there = sorted(str(p.relative_to(folder)) for p in (folder / "nas").rglob("*.py"))
    assert "nas/errors.py" in there
    assert all(p.startswith(("nas/ondevice/", "nas/errors", "nas/__init__")) for p in there)
    heavy = "import sys; sys.path.insert(0, '.'); import nas.ondevice.program; "
    heavy += "print([m for m in ('jax', 'scipy', 'msgspec', 'psutil', 'onnx', 'onnxruntime') if m in sys.modules])"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = subprocess.run([sys.executable, "-c", heavy], cwd=folder, capture_output=True, text=True, check=True, env=env)
    assert out.stdout.strip() == "[]"


@pytest.mark.slow  # an environment of its own
def test_a_machine_needs_only_numpy_and_the_runtime(plan, folder, tmp_path):
    venv.create(tmp_path / "there", with_pip=True)
    python = tmp_path / "there" / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "numpy", "onnxruntime"], check=True, timeout=600)
    finished(start(folder, python=str(python)))
    table, _ = evaluate(plan, read(folder / RESULTS), QUICK)
    assert set(table.entries) == set(plan.space.blocks())


def test_killed_measuring_goes_on_and_loses_no_round(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["settings"] |= {"seconds": 1e9, "max_seconds": 1e9, "tolerance": 0.0}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    process = start(folder)
    results = folder / RESULTS
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (results.exists() and b'"round"' in results.read_bytes()):
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    with open(results, "ab") as f:
        f.write(b"1234 {half a li")  # what a kill in the middle of a write leaves
    before = read(results)
    assert before.rounds
    assert not before.complete
    manifest["settings"] |= {"seconds": 0.0, "max_seconds": 0.0, "min_rounds": len(before.rounds) + 3}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    finished(start(folder))
    after = read(results)
    assert after.rounds[: len(before.rounds)] == before.rounds
    assert len(after.rounds) == len(before.rounds) + 3
    assert after.complete


TRAPS = """
import os, signal, time

untrapped, opened = open_model, 0


def fail(error=RuntimeError("it fell over")):
    raise error


def open_model(model, *, threads=1):
    global opened
    opened += 1
    eval(OPENING)
    session = untrapped(model, threads=threads)
    trap, prepare = RUNNING.get(os.path.basename(model)), session.prepare

    def prepared(images):
        inferences, count = prepare(images), 0

        def trapped(n):
            nonlocal count
            count += 1
            eval(trap, globals() | {"count": count})
            inferences(n)

        return trapped if trap else inferences

    session.prepare = prepared
    return session
"""


def trapped(folder: Path, *running: str, opening: str = "None") -> list[str]:
    """Lets models of a bundle misbehave in ONNX Runtime, one for each of `running`; returns the names of their calls.

    Args:
        running: expressions that are evaluated with every inference of a model, the `count`th.
        opening: one that is evaluated before any model is opened, the `opened`th in its process.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    blocks = [c for c in manifest["calls"] if c["name"].startswith("block ")][3 : 3 + len(running)]
    for number, block in enumerate(blocks):
        shutil.copy(folder / block["file"], folder / f"{number}.onnx")
        block["file"] = f"{number}.onnx"
    rewrite(folder, manifest)
    path = folder / "nas" / "ondevice" / "onnxruntime.py"
    traps = {f"{number}.onnx": trap for number, trap in enumerate(running)}
    path.write_text(f"{path.read_text()}\nOPENING, RUNNING = {opening!r}, {traps!r}\n{TRAPS}")
    return [block["name"] for block in blocks]


def set_settings(folder: Path, **settings: float) -> None:
    """The settings of a bundle, which may be changed."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["settings"] |= settings
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_model_that_brings_the_process_down_is_left_out_with_what_was_said(plan, folder):
    """The first call of one model ends the process, of another raises: both are noted, all else is timed."""
    fatal, broken = trapped(folder, "os.kill(os.getpid(), signal.SIGSEGV)", "fail()")
    said = finished(start(folder))
    assert "going on without it" in said
    recording = read(folder / RESULTS)
    assert set(recording.unsupported) == {fatal, broken}
    assert "nothing else open (signal 11)" in recording.unsupported[fatal]
    assert "RuntimeError: it fell over" in recording.unsupported[broken]
    table, _ = evaluate(plan, recording, QUICK)
    assert set(table.unsupported) == {name.removeprefix("block ") for name in (fatal, broken)}


@pytest.mark.parametrize(
    ("trap", "why"),
    [
        ("count == 30 and fail()", "RuntimeError: it fell over"),
        pytest.param("count == 30 and os.abort()", "signal 6", marks=pytest.mark.slow),
        ("count == 30 and time.sleep(1000)", "not ended after 2 s"),
        pytest.param(
            "count == 5 and opened > 1 and fail()", "it fell over, 2 times while it was timed", marks=pytest.mark.slow
        ),
    ],
    ids=["raises", "aborts", "hangs", "raises in company"],
)
def test_a_model_that_fails_late_is_left_out_and_the_rounds_before_it_stay(plan, folder, trap, why):
    set_settings(folder, hang_seconds=2.0, min_rounds=40)
    (name,) = trapped(folder, trap)
    finished(start(folder))
    recording = read(folder / RESULTS)
    assert recording.complete
    assert set(recording.unsupported) == {name}
    assert why in recording.unsupported[name]
    assert len(recording.rounds) >= 40
    assert recording.failures[0].timing
    table, _ = evaluate(plan, recording, QUICK)
    assert set(table.unsupported) == {name.removeprefix("block ")}


@pytest.mark.parametrize(
    "shortage",
    ["fail(MemoryError())", pytest.param("os.kill(os.getpid(), signal.SIGKILL)", marks=pytest.mark.slow)],
)
def test_a_shortage_of_memory_condemns_no_model(folder, shortage):
    """Whatever model is opened as the sixth cannot be, in every process: nobody is condemned, and it is told."""
    trapped(folder, opening=f"opened > 5 and {shortage}")
    process = start(folder)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "too little memory" in said
    assert "fails only while the other models are open" in said
    assert not read(folder / RESULTS).unsupported


def test_a_shortage_of_memory_that_passes_costs_nothing_but_time(folder):
    flag = str(folder / "flag")
    trapped(
        folder, opening=f"opened > 5 and not os.path.exists({flag!r}) and (os.mkdir({flag!r}), fail(MemoryError()))"
    )
    finished(start(folder))
    recording = read(folder / RESULTS)
    assert recording.complete
    assert not recording.unsupported
    assert [f.why for f in recording.failures] == ["MemoryError: "]


def test_of_two_at_once_the_second_waits_and_no_deadline_of_its_runs_meanwhile(folder):
    set_settings(folder, seconds=0.0, max_seconds=0.0, min_rounds=2, open_seconds=2.0, hang_seconds=2.0)
    with alone("nas measure something"):
        process = start(folder)
        told = process.stdout.readline()
        assert "waiting for another measuring" in told
        assert f"process {os.getpid()}, since" in told
        assert "nas measure something" in told
        time.sleep(4.0)
        assert process.poll() is None
    said = finished(process)
    assert "waiting" not in said
    assert not read(folder / RESULTS).failures


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_waiting_for_another_measuring_ends_with_who_asked_for_it(plan, folder, stop):
    """As `nas measure` does it: one process follows the measuring program, which waits."""
    text = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # else ignored in the background
    text += "from pathlib import Path; from nas.measure import bundle; "
    text += f"bundle.run(Path({str(folder)!r}), progress=print)"
    with alone("nas measure something"):
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert "nas measure something" in process.stdout.readline()
        time.sleep(1.0)
        process.send_signal(stop)
        told, _ = process.communicate(timeout=30)  # its pipe is closed when nobody has it any more
        assert process.returncode != 0
        assert told == ""  # it was told once
        deadline = time.monotonic() + 30
        while followers(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not followers(folder)


def followers(folder: Path) -> list[int]:
    """Processes that measure the bundle in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"nas.ondevice\0" + str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_a_bundle_that_was_cleared_away_while_it_waited_is_told(folder):
    with alone("nas measure something"):
        process = start(folder)
        process.stdout.readline()
        shutil.rmtree(folder)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "is gone: most likely the measuring that this one waited for" in said


def test_who_does_not_want_to_wait_is_refused(folder, monkeypatch):
    monkeypatch.setenv("NAS_WAIT_SECONDS", "0")
    with alone("something"):
        process = start(folder)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "another measuring is running" in said
    assert str(os.getpid()) in said


def test_results_of_another_bundle_or_machine_or_damaged_ones_are_refused(folder, tmp_path):
    manifest = json.loads((folder / MANIFEST).read_text())
    path = tmp_path / "r.jsonl"
    out = Results(path, manifest)
    with pytest.raises(LatencyError, match="another bundle"):
        Results(path, {**manifest, "digest": "0" * 16})
    out.append({"kind": "start", "hardware": "another", "version": "0", "cpus": [], "time": 0.0, "load": ""})
    with pytest.raises(LatencyError, match="timed with hardware 'another'"):
        program.work(folder, path, lambda *_: None)
    with pytest.raises(LatencyError, match="nothing was timed"):
        read(path).samples()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole) - 1, 60):  # a bit flipped anywhere is refused, or was after the last newline
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(LatencyError, match=r"damaged|no results"):
            read(path)
    for cut in rng.integers(1, len(whole), 20):  # cut anywhere: the lines before are read, or nothing is there yet
        path.write_bytes(whole[:cut])
        if b"\n" in whole[:cut]:
            assert len(read(path).starts) <= 1
        else:
            with pytest.raises(LatencyError, match="no results"):
                read(path)
    with pytest.raises(LatencyError, match="cannot read"):
        read(tmp_path / "none.jsonl")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_rounds_go_on_on_the_cpus_they_began_on_or_not_at_all(folder):
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        pytest.skip("one CPU: nothing to pin to")
    set_settings(folder, seconds=0.0, max_seconds=0.0, min_rounds=2)
    for cpu in usable:
        manifest = json.loads((folder / MANIFEST).read_text())
        results = folder / f"{cpu}.jsonl"
        now = {"hardware": machine.hardware(), "version": version("onnxruntime")}
        Results(results, manifest).append({"kind": "start", **now, "cpus": [cpu], "time": 0.0, "load": ""})
        finished(start(folder, "--out", str(results)))
        assert [start["cpus"] for start in read(results).starts] == [[cpu], [cpu]]
    results.unlink()
    Results(results, manifest).append({"kind": "start", **now, "cpus": [4096], "time": 0.0, "load": ""})
    with pytest.raises(LatencyError, match="ran on CPU 4096"):
        program.work(folder, results, lambda *_: None)


def test_a_bundle_that_was_edited_or_copied_in_part_condemns_no_block(folder):
    whole = (folder / MANIFEST).read_text()
    manifest = json.loads(whole)
    (folder / MANIFEST).write_text(json.dumps({**manifest, "threads": 4}))
    with pytest.raises(LatencyError, match="edited or damaged"):
        load_manifest(folder)
    (folder / MANIFEST).write_text(whole)
    model = folder / manifest["calls"][-1]["file"]
    content = model.read_bytes()
    for spoilt in (content[:-7], None):
        model.unlink()
        if spoilt is not None:
            model.write_bytes(spoilt)
        process = start(folder)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "opy it again" in said or "Copy the whole bundle again" in said
    model.write_bytes(content)
    finished(start(folder))
    assert not read(folder / RESULTS).unsupported


@pytest.mark.skipif(os.name == "nt", reason="signals are of POSIX")
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_supervisor_leaves_no_second_measuring_and_nobody_to_blame(folder, stop):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["settings"] |= {"seconds": 1e9, "max_seconds": 1e9, "tolerance": 0.0}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    process, results = start(folder, "--json"), folder / RESULTS
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (results.exists() and b'"round"' in results.read_bytes()):
        time.sleep(0.05)
    process.send_signal(stop)
    process.stdout.close()
    process.wait(60)
    manifest["settings"] |= {"seconds": 0.0, "max_seconds": 0.0, "min_rounds": 3}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    finished(start(folder))  # it waits for what is left of the first one
    recording = read(results)
    assert recording.complete
    assert not recording.unsupported


def test_a_folder_that_is_no_bundle_is_told(tmp_path, capsys):
    assert program.main([str(tmp_path)]) == 2
    assert "this is no bundle" in capsys.readouterr().err
