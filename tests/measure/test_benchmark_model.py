"""Measuring by TensorFlow Lite's benchmark_model, played by a program that prints the same."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import fake_benchmark_model as fake
import pytest
import tiny

from nas import measured
from nas.config import Device, Latency
from nas.errors import LatencyError
from nas.latency import Table, load_device
from nas.measure import benchmark_model, bundle, for_table
from nas.measure.benchmark_model import LOG
from nas.measure.plan import Plan
from nas.ondevice.manifest import load_manifest

QUICK = Latency(seconds=1.0, min_rounds=3, anchors=4, holdout=4, patience=1.0)
SHELLS = [["sh"], *([found, "sh"] for found in [shutil.which("busybox")] if found)]
SHELLS += [[name] for name in ("mksh", "dash", "bash") if shutil.which(name)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    space = tiny.space(tmp_path_factory.mktemp("space"))
    return for_table(space, load_device("host_litert"), "float32", QUICK, seed=0)


@pytest.fixture(scope="module")
def written(plan, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "bundle"
    bundle.write(plan, folder, QUICK)
    return folder


@pytest.fixture(scope="module")
def timed(plan, written, tmp_path_factory) -> Path:
    """A bundle with a log of three rounds."""
    folder = tmp_path_factory.mktemp("timed") / "bundle"
    shutil.copytree(written, folder)
    finished(folder, fake.write(folder.parent / "tool", plan, files_of(folder)))
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "bundle")


@pytest.fixture
def log(timed, tmp_path) -> Path:
    """Of three rounds, in a bundle of its own."""
    return shutil.copytree(timed, tmp_path / "bundle") / LOG


def files_of(folder: Path) -> dict[str, str]:
    return {call["name"]: call["file"] for call in load_manifest(folder)["calls"]}


def run(folder: Path, *arguments: object, shell: list[str] | None = None, **env: str) -> subprocess.CompletedProcess:
    """The script of a bundle."""
    command = [*(shell or ["sh"]), str(folder / "measure.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=60)


def finished(folder: Path, *arguments: object, shell: list[str] | None = None, **env: str) -> str:
    done = run(folder, *arguments, shell=shell, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(folder: Path, plan: Plan, monkeypatch) -> tuple[Table, str]:
    """The table that `nas measure --import` makes of it, and the proof."""
    monkeypatch.chdir(folder.parent)
    space = tiny.write_space(folder.parent)
    where = measured.import_results(folder, name="phone", space=str(space), settings=QUICK)
    return Table.load(where, "float32"), (where.parent / "device.toml").read_text()


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: Path(shell[0]).name)
def test_the_table_has_the_latencies_that_the_tool_told(plan, folder, tmp_path, monkeypatch, shell):
    tool = fake.write(tmp_path / "tool", plan, files_of(folder))
    said = finished(folder, tool, shell=shell)
    assert "100 %" in said
    assert "nas measure --import" in said
    table, device = imported(folder, plan, monkeypatch)
    assert set(table.entries) == set(plan.space.blocks())
    for key, entry in table.entries.items():
        terms = plan.entries[f"block {key}"]
        us = sum(weight * fake.mean_us(plan.graphs[name]) for name, weight in terms.items())
        assert entry.latency_ms == pytest.approx(us / 1e3, rel=2e-3)
        assert entry.rounds == 3
    assert "mean of a run" in " ".join(table.notes)
    assert "--use_xnnpack=true" in " ".join(table.notes)
    assert "others' share of our CPUs is not known" in " ".join(table.notes)
    assert not any("XNNPACK ran" in note for note in table.notes)
    assert re.fullmatch(r"benchmark_model of cksum \d+", table.runtime_version)
    assert table.runtime == "litert"
    assert re.search(r"\d cores", device)
    networks = plan.space.decode(plan.held_out[0])
    assert table.network_ms(networks) == pytest.approx(fake.mean_us(plan.graphs["held-out 0"]) / 1e3, rel=5e-3)


def test_every_model_is_run_once_a_round_in_orders_that_differ(plan, timed):
    recording = benchmark_model.read(timed / LOG)
    assert recording.complete
    orders = [r.order for r in recording.rounds]
    assert len(set(orders)) == len(orders) == 3
    assert all(sorted(order) == list(range(len(plan.graphs))) for order in orders)
    called = (timed.parent / "tool" / "called").read_text()
    assert len(called.splitlines()) == 3 * len(plan.graphs) + 1  # one tries the tool
    assert all("--num_threads=1 --use_xnnpack=true" in line for line in called.splitlines())


def test_models_that_fail_are_left_out_with_what_was_said_and_the_others_go_on(plan, folder, tmp_path):
    crashes, refused, rubbish, once = [name for name in plan.graphs if name.startswith("block ")][:4]
    does = {
        crashes: "echo INFO: Loaded model; kill -SEGV $$",
        refused: "echo 'ERROR: Op builtin_code out of range: 200.'; echo INFO: bye; exit 1",
        rubbish: "head -c 99 /dev/urandom | od; exit 0",
        once: "[ -e {folder}/once ] || {{ touch {folder}/once; exit 9; }}",
    }
    finished(folder, fake.write(tmp_path / "tool", plan, files_of(folder), does=does))
    recording = benchmark_model.read(folder / LOG)
    assert set(recording.unsupported) >= {crashes, refused, rubbish}
    assert once not in recording.unsupported
    assert re.fullmatch(r"benchmark_model: .+ \(signal 11\)", recording.unsupported[crashes])
    assert (
        recording.unsupported[refused] == "benchmark_model: ERROR: Op builtin_code out of range: 200. (exit status 1)"
    )
    assert "printed no timings" in recording.unsupported[rubbish]
    calls = [c["name"] for c in recording.manifest["calls"]]
    assert [calls.index(once) in r.order for r in recording.rounds] == [False, True, True]
    file = files_of(folder)[crashes]
    assert (tmp_path / "tool" / "called").read_text().count(file) == 2 * list(files_of(folder).values()).count(file)


def test_killed_in_a_round_it_goes_on_with_that_round_and_loses_no_other(plan, folder, tmp_path):
    late = "block " + list(plan.space.blocks())[-1]
    seen = f"$(grep -c {files_of(folder)[late]} {{folder}}/called)"
    kill = f"echo 'INFO: count=3 fir'; [ {seen} -ne 2 ] || kill -9 $(cat benchmark_model.running)"
    tool = fake.write(tmp_path / "tool", plan, files_of(folder), does={late: kill})
    assert run(folder, tool).returncode == -9
    before = benchmark_model.read(folder / LOG)
    assert len(before.rounds) == 1
    assert not before.complete
    with pytest.raises(LatencyError, match=r"cut off after 1 rounds\. Run `sh measure.sh` again"):
        measured.import_results(folder, name="phone")
    finished(folder, tool)
    after = benchmark_model.read(folder / LOG)
    assert after.complete
    assert len(after.rounds) == 3
    assert after.rounds[0] == before.rounds[0]
    assert "done already" in finished(folder, tool)


@pytest.mark.parametrize(
    "end", [r"@ done 2 \d+\n@ round 3\n@ r", r"@ done 2", r"@ done 2 \d+", r"@ ro", r"@ start \d+\n@ wi"]
)
def test_a_log_cut_off_in_a_record_goes_on(log, timed, end):
    text = log.read_text()
    log.write_text(text[: [m.end() for m in re.finditer(end, text)][-1]])
    kept = len(re.findall(r"^@ done \d+ \d", log.read_text(), re.MULTILINE))
    finished(log.parent, timed.parent / "tool" / "benchmark_model", 3)
    recording = benchmark_model.read(log)
    assert recording.complete
    assert len(recording.rounds) == 3
    assert len(recording.starts) == 2 - (kept == 0)
    assert recording.rounds[0].order == benchmark_model.read(timed / LOG).rounds[0].order


def test_of_a_log_cut_off_at_any_byte_only_complete_rounds_are_read(log, timed):
    whole, text = benchmark_model.read(timed / LOG).rounds, log.read_bytes()
    counts = set()
    for size in [*range(0, len(text), 1009), *range(len(text) - 40, len(text))]:
        log.write_bytes(text[:size])
        if not re.search(rb"\n@ done \d+ \d+\n", text[:size]):
            with pytest.raises(LatencyError, match=r"no round is complete|its first line is|another bundle"):
                benchmark_model.read(log)
            continue
        recording = benchmark_model.read(log)
        assert recording.rounds == whole[: len(recording.rounds)]
        assert not recording.complete or size >= len(text) - 1
        counts.add(len(recording.rounds))
    assert counts == {1, 2, 3}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"\A@ nas.*", "hello", "this is no log of measure.sh: its first line is 'hello'"),
        (r"\A@ nas (.*) (.*)", r"@ nas \1 0123", "it is of another bundle"),
        ("timings in us", "timings in ms", "timings in 'ms', 1 times: once, in us"),
        (r"Inference \(avg\): ([\d.]+)", "Inference (avg): 0.5", "does not fit .* both should be us"),
        (r"Inference \(avg\): (\d+)", r"Inference (avg): 1,\1", "could not convert string to float"),
        (r"count=\d+ .*(?s:.*?)count=\d+ .*", "", "timings without the line `count=... avg=...`"),
        (r"(?s)@ round 2\n.*(?=@ round 3)", "", "round 3 follows round 1"),
        (r"(?s)@ done 1 \d+\n", "", "round 1 has no end, and others follow"),
        (r"(?s)@ run (\d+)\n.*?@ ended \1 0\n", "", "are missing"),
        (r"@ ended (\d+) 0\n", "", "damaged"),
        (r"@ run (\d+)\n((?s:.*?))@ ended \1 0\n", r"@ run 999\n\2@ ended 999 0\n", "no call 999"),
        (r"Num threads: \[1\]", "Num threads: [4]", r"ran with threads 4, and it should be 1"),
        (r"Graph: \[models/\w+", "Graph: [models/other", "ran with the model models/other.tflite"),
        ("INFO: STARTING!", "WARN: Unconsumed cmdline flags: --use_xnnpack=true", "does not know --use_xnnpack.*newer"),
        (r"(?s)@ round 1\n.*", "", "no round is complete"),
    ],
)
def test_a_log_that_cannot_be_understood_is_refused(log, old, new, message):
    text, count = re.subn(old, new, log.read_text(), count=1)
    assert count
    log.write_text(text)
    with pytest.raises(LatencyError, match=message):
        benchmark_model.read(log)


def test_a_log_of_two_devices_or_beside_no_bundle_is_refused(log):
    text = log.read_text()
    start = text[text.index("@ start") : text.index("@ round 1")]
    log.write_text(text.replace("@ round 3\n", start.replace("cpus=any", "cpus=80") + "@ round 3\n"))
    with pytest.raises(LatencyError, match=r"parts are of several devices, tools or settings: .*cpus=80"):
        benchmark_model.read(log)
    (log.parent / "manifest.json").unlink()
    with pytest.raises(LatencyError, match="put it into the bundle's folder"):
        benchmark_model.read(log)


def test_a_tool_that_times_no_model_is_told(log):
    log.write_text(log.read_text().replace("Inference timings in us", "Inference results"))
    with pytest.raises(LatencyError, match=r"not one model was timed: .*Is it TensorFlow Lite's benchmark_model\?"):
        benchmark_model.read(log)


@pytest.mark.parametrize("prefix", ["", "INFO: ", "07-14 13:14:56.521 22838 22838 I tflite  : ", "[2023-07-14 13:14] "])
@pytest.mark.parametrize(
    ("statistics", "mean"),
    [
        ("count=25 first=187533 curr=140990 min=140071 max=195121 avg=145528 std=13583", 145.528),
        ("count=25 first=187 curr=140 min=139 max=195 avg=145.5 std=13 p5=140 median=141 p95=187", 0.1455),
        ("count=9 first=1 curr=9 min=1 max=2000001 avg=1.23457e+06 std=3", 1234.57),
        ("count=5 curr=20(all same)", 0.02),
        ("count=1 curr=20", 0.02),
    ],
)
def test_the_mean_is_read_as_versions_of_the_tool_print_it(prefix, statistics, mean):
    us = f"{mean * 1e3:.6g}"
    last = f"Inference timings in us: Init: 92318, First inference: 235158, Warmup (avg): 211669, Inference (avg): {us}"
    warm = "count=3 first=235158 curr=200386 min=199462 max=235158 avg=211669 std=16613"
    said = "\n".join(prefix + line for line in ("STARTING!", warm, statistics, last, "Memory footprint (MB): init=5"))
    assert benchmark_model._mean_ms(said, "here") == pytest.approx(mean)
    assert benchmark_model._mean_ms("rubbish", "here") is None


def test_what_the_script_cannot_do_is_told(folder, timed, tmp_path):
    tool = timed.parent / "tool" / "benchmark_model"
    assert "Download TensorFlow Lite's benchmark_model" in run(folder).stderr
    assert "there is no /nowhere" in run(folder, "/nowhere").stderr
    other = tmp_path / "other_benchmark_model"
    other.write_text("#!/bin/sh\necho hello\n")
    assert "not executable here: chmod +x" in run(folder, other).stderr
    other.chmod(0o755)
    assert "it did not say `Inference timings in us` but: hello" in run(folder, other).stderr
    other.write_bytes(b"\x7fELF for another machine")
    assert "is not a benchmark_model that runs here (exit status 12" in run(folder, other).stderr
    for rounds in ("no", "0", "-1"):
        assert f"ROUNDS is {rounds}" in run(folder, tool, rounds).stderr
    (folder / "benchmark_model.running").write_text(f"{os.getpid()}\n")
    assert f"measured already, by process {os.getpid()}" in run(folder, tool).stderr
    (folder / "benchmark_model.running").write_text("")
    finished(folder, tool, 1)
    assert not (folder / "benchmark_model.running").exists()
    if shutil.which("taskset"):
        changed = run(folder, tool, 2, CPUS="1")
        assert re.search("what was timed so far is .*cpus=any.*now it would be .*cpus=1", changed.stderr)
        assert "give the mask of CPUs" in run(folder, tool, 2, CPUS="0").stderr
    log = folder / LOG
    log.write_text(re.sub(r"\A.*", "@ nas benchmark_model 1 0123", log.read_text()))
    assert "is of another bundle" in run(folder, tool, 2).stderr
    next((folder / "models").iterdir()).unlink()
    assert "is missing: copy the whole bundle again" in run(folder, tool, 2).stderr


@pytest.mark.skipif(not shutil.which("taskset"), reason="there is no taskset here")
def test_the_cpus_that_it_ran_on_are_part_of_the_hardware(folder, timed):
    cpu = min(os.sched_getaffinity(0))
    finished(folder, timed.parent / "tool" / "benchmark_model", 1, CPUS=f"{1 << cpu:x}")
    assert benchmark_model.read(folder / LOG).starts[0]["hardware"].endswith(f"on CPUs of mask {1 << cpu:x}")


def test_a_bundle_of_another_runtime_or_batch(plan, tmp_path):
    other = for_table(plan.space, load_device("host_onnxruntime"), "float32", QUICK, seed=0)
    bundle.write(other, tmp_path / "onnx", QUICK)
    assert not (tmp_path / "onnx" / "measure.sh").exists()
    device = Device(device="x", runtime="litert", batch=8, threads=2)
    eight = for_table(plan.space, device, "float32", QUICK, seed=0)
    bundle.write(eight, tmp_path / "eight", QUICK)
    tool = fake.write(tmp_path / "tool", eight, files_of(tmp_path / "eight"))
    finished(tmp_path / "eight", tool, 1)
    called = (tmp_path / "tool" / "called").read_text()
    assert "--num_threads=2" in called
    assert re.search(r"--input_layer=images --input_layer_shape=8,8,8,1", called)
    with pytest.raises(LatencyError, match="threads 1, and it should be 2"):
        benchmark_model.read(tmp_path / "eight" / LOG)


def test_rounds_change_with_the_settings_of_a_bundle_and_not_its_calls(plan, folder):
    bundle.write(plan, folder, Latency(min_rounds=7, anchors=4, holdout=4))
    text = (folder / "calls.txt").read_text()
    assert "rounds 7\n" in text
    assert re.findall(r"^call (\d+)", text, re.MULTILINE) == [str(number) for number in range(len(plan.graphs))]


def test_results_of_two_programs_in_one_bundle_are_refused(log, plan, monkeypatch):
    (log.parent / "results.jsonl").write_text("of this machine, where the bundle was tried")
    with pytest.raises(LatencyError, match=r"benchmark_model\.log and results\.jsonl are both here"):
        imported(log.parent, plan, monkeypatch)


def test_a_tool_that_fails_with_all_models_ends_after_a_round(folder, tmp_path):
    (tool := tmp_path / "tool").write_text("#!/bin/sh\necho no such symbol\nexit 1\n")
    tool.chmod(0o755)
    done = run(folder, tool, 5)
    assert done.returncode != 0
    assert "no model has run with" in done.stderr
    assert (folder / LOG).read_text().count("@ done") == 1
