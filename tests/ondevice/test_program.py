"""The measuring program: from a bundle to a table, on this machine and where only the runtime is installed."""

import hashlib
import json
import os
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
from nas.ondevice import program
from nas.ondevice.program import MANIFEST, RESULTS, Results, read
from nas.space import load_space

QUICK = Latency(seconds=1.0, min_rounds=6, anchors=4, holdout=4, patience=1.0)


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
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": program.checksum(manifest)}))


def start(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.Popen:
    """The program of the bundle itself, without this package on its path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, str(folder / "measure.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd="/")


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


def test_a_model_that_brings_the_process_down_is_left_out_with_what_was_said(plan, folder):
    """The first call of one model ends the process, of another raises: both are noted, all else is timed."""
    manifest = json.loads((folder / MANIFEST).read_text())
    blocks = [c for c in manifest["calls"] if c["name"].startswith("block ")]
    for block, name in ((blocks[3], "fatal.onnx"), (blocks[5], "broken.onnx")):
        (folder / name).write_bytes(name.encode())
        block |= {"file": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}
    rewrite(folder, manifest)
    patched = folder / "nas" / "ondevice" / "onnxruntime.py"
    text = patched.read_text()
    trap = "    if str(model).endswith('fatal.onnx'):\n        __import__('os').kill(__import__('os').getpid(), 11)\n"
    assert "    ort = _library()" in text
    patched.write_text(text.replace("    ort = _library()", trap + "    ort = _library()", 1))
    said = finished(start(folder))
    assert "going on without it" in said
    recording = read(folder / RESULTS)
    assert set(recording.unsupported) == {blocks[3]["name"], blocks[5]["name"]}
    assert "signal 11" in recording.unsupported[blocks[3]["name"]]
    assert "cannot load" in recording.unsupported[blocks[5]["name"]]
    table, _ = evaluate(plan, recording, QUICK)
    assert set(table.unsupported) == {blocks[i]["name"].removeprefix("block ") for i in (3, 5)}


@pytest.mark.skipif(os.name == "nt", reason="locks are of POSIX")
def test_two_at_once_are_refused(folder):
    with program._alone(folder / RESULTS):
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


def test_a_bundle_that_was_edited_or_copied_in_part_condemns_no_block(folder):
    whole = (folder / MANIFEST).read_text()
    manifest = json.loads(whole)
    (folder / MANIFEST).write_text(json.dumps({**manifest, "threads": 4}))
    with pytest.raises(LatencyError, match="edited or damaged"):
        program.load_manifest(folder)
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
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        process = start(folder)
        said, _ = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert "another measuring is running" in said  # what is left of the first one still ends
        time.sleep(0.2)
    recording = read(results)
    assert recording.complete
    assert not recording.unsupported


def test_a_folder_that_is_no_bundle_is_told(tmp_path, capsys):
    assert program.main([str(tmp_path)]) == 2
    assert "this is no bundle" in capsys.readouterr().err
