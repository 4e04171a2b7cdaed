"""The whole job on a tiny space: what a run folder holds, resuming, and the contracts that scripts read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

import nas
from nas import cli
from nas.architecture import json_schema, load_params
from nas.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("measure", "train", "search", "finish", "export", "verify", "report")


FILES = [
    *("config.toml", "environment.json", "space.toml", "summary.json", "report.html"),
    *("latency/proof.json", "latency/table.float32.csv", "latency/table.int8.csv"),
    *("supernet/metrics.jsonl", "supernet/checkpoints", "search/journal.jsonl", "search/front.csv"),
]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "nas.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    tiny.write_experiment(folder)
    return folder


@pytest.fixture(scope="module")
def finished(workplace) -> Path:
    """A run that nothing interrupted."""
    experiment = nas.load_experiment(workplace / "tiny_experiment.toml")
    return nas.run_experiment(experiment, workplace / "whole")


@pytest.fixture(scope="module")
def measured(workplace, finished) -> Path:
    """A run folder with the finished run's latency table, and nothing else: timings are never the same twice."""
    folder = workplace / "measured"
    folder.mkdir()
    for name in ("config.toml", "environment.json"):
        shutil.copy(finished / name, folder)
    shutil.copytree(finished / "latency", folder / "latency")
    (folder / "stages.json").write_text(json.dumps({"measure": {"done": True, "seconds": 1.0}}))
    return folder


def outcome(run: Path) -> dict[str, object]:
    """Everything that must not depend on interruptions: front, winners, parameters, files."""
    files = [run / "search" / "front.csv"]
    for kind in ("winners", "baselines"):
        for folder in sorted((run / kind).iterdir()):
            names = ("architecture.json", "params/params.safetensors", "validation.json", "quantisation.json")
            files += [folder / name for name in (*names, "model.onnx", "model.int8.onnx")]
    return {str(f.relative_to(run)): f.read_bytes() for f in files}


def test_a_run_folder_holds_what_the_contract_says(finished):
    for name in FILES:
        assert (finished / name).exists(), name
    proof = json.loads((finished / "latency" / "proof.json").read_text())
    assert {"networks", "mape", "within_5", "within_10", "kendall_tau"} <= set(proof)
    assert 0 <= proof["within_5"] <= proof["within_10"] <= 1
    summary = json.loads((finished / "summary.json").read_text())
    assert {"winner", "limit_ms", "baselines", "seconds"} <= set(summary)
    assert {b["name"] for b in summary["baselines"]} == {"smallest", "largest", "handmade"}
    assert all({"accuracy", "latency_ms"} <= set(b) for b in summary["baselines"])
    assert set(STAGES[:-1]) <= set(summary["seconds"])
    environment = json.loads((finished / "environment.json").read_text())
    assert {"versions", "hardware", "seed", "git_commit", "space", "data", "tables"} <= set(environment)
    for entry in (*summary["winners"], *summary["baselines"]):
        folder = finished / entry["folder"]
        for name in ("architecture.json", "params", "model.onnx", "model.int8.onnx", "card.md", "verify.json"):
            assert (folder / name).exists(), name
        for verdict in json.loads((folder / "verify.json").read_text()).values():
            assert {"full_check", "max_abs_diff", "max_rel_diff", "top1_agreement", "accuracy", "jax_accuracy",
                    "latency_ms", "size_bytes", "passed"} <= set(verdict)  # fmt: skip
            assert set(verdict["latency_ms"]) == {"median", "p10", "p90", "predicted"}
            assert verdict["passed"], verdict["reason"]
            assert abs(verdict["accuracy"] - verdict["jax_accuracy"]) <= 0.001


def test_the_search_keeps_the_limit_and_finds_something_that_learns(finished):
    run = nas.load_run(finished)
    assert all(t.latency_ms <= run.summary["limit_ms"] for t in run.trials)
    assert len({t.genotype for t in run.trials}) == len(run.trials)
    assert run.winner.architecture.name.startswith("tiny/winner_")
    assert run.summary["winner"]["accuracy"] > 0.5  # three classes, chance is 0.33


def test_a_second_run_says_that_all_is_done_and_changes_nothing(finished, workplace):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    done = subprocess.run(
        command("run", workplace / "tiny_experiment.toml", "--out", finished), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "done already" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_an_architecture_rebuilds_its_network_without_the_space_and_round_trips(finished, tmp_path):
    path = finished / "winners" / "winner_1" / "architecture.json"
    made = nas.load_architecture(path)
    made.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    params = load_params(path.parent / "params", made.network)
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 1)).astype(np.uint8)
    winner = nas.load_winner(path.parent)
    assert winner.logits(images).shape == (3, 3)
    assert len(winner.classify(images)) == 3
    assert set(params) == set(winner.params)


def test_the_published_schema_is_that_of_the_code_and_accepts_what_runs_write(finished):
    jsonschema = pytest.importorskip("jsonschema")
    published = (ROOT / "nas" / "schemas" / "architecture.v2.schema.json").read_text()
    assert published == json_schema()
    document = json.loads((finished / "winners" / "winner_1" / "architecture.json").read_text())
    jsonschema.validate(document, json.loads(published))
    document["network"]["blocks"][0]["graph"]["ops"][0]["op"] = "convolution"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, json.loads(published))


def test_export_works_from_architecture_and_parameters_alone(finished, tmp_path):
    source = finished / "winners" / "winner_1"
    shutil.copy(source / "architecture.json", tmp_path)
    shutil.copytree(source / "params", tmp_path / "elsewhere")
    files = tmp_path / "architecture.json", "--params", tmp_path / "elsewhere", "--out", tmp_path / "x.onnx"
    done = subprocess.run(
        command("export", *files),
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.onnx").read_bytes() == (source / "model.onnx").read_bytes()


DAMAGE = {
    "winners/winner_1/verify.json": [b"{", b"{}", b"[]"],
    "winners/winner_1/validation.json": [b"{", b"[]"],
    "winners/winner_1/architecture.json": [b"{}", None],
    "winners/winner_1/params/params.safetensors": [b"0", None],
    "winners/winner_1/blocks.json": [b"{}", None],
    "baselines/smallest": [None],
    "winners": [None],
    "environment.json": [b"{}", None],
    "search/journal.jsonl": [b"", None],
    "supernet/metrics.jsonl": [b"3\n"],
    "latency/table.float32.csv": [b"", None],
    "latency/proof.json": [b"{}", None],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_missing_file_of_a_run_is_told_with_how_to_make_it_again(
    finished, workplace, tmp_path, name, capsys
):
    for content in DAMAGE[name]:
        folder = tmp_path / "run"
        shutil.copytree(finished, folder)
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", str(workplace / "tiny_experiment.toml"), "--out", str(folder)])
        told = capsys.readouterr().err
        assert ended.value.code == 2, told
        assert "Traceback" not in told
        assert name.split("/")[-1] in told, told
        shutil.rmtree(folder)


def test_files_that_the_system_strews_about_do_no_harm(finished, workplace, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "winners" / ".DS_Store").write_bytes(b"\0")
    experiment = nas.load_experiment(workplace / "tiny_experiment.toml")
    nas.stages.report(experiment, tmp_path / "run")


def test_a_file_that_does_not_do_what_its_network_does_is_refused_and_set_aside(finished, workplace, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    best, other = folder / "winners" / "winner_1", folder / "baselines" / "smallest"
    sound = (best / "model.onnx").read_bytes()
    shutil.copy(other / "model.onnx", best / "model.onnx")
    experiment = nas.load_experiment(workplace / "tiny_experiment.toml")
    nas.stages.verify(experiment, folder)
    nas.stages.report(experiment, folder)
    verdict = json.loads((best / "verify.json").read_text())["float32"]
    assert not verdict["passed"]
    assert "differ" in verdict["reason"] or "apart" in verdict["reason"]
    assert not (best / "model.onnx").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["winner"]["name"] != "winner_1"
    assert [(r["name"], r["precision"]) for r in summary["refused"]] == [("winner_1", "float32")]
    (best / "model.onnx.refused").write_bytes(sound)
    nas.stages.verify(experiment, folder)
    assert json.loads((best / "verify.json").read_text())["float32"]["passed"]


def _killed_at(folder: Path, experiment: Path, marker: str) -> bool:
    """Runs the job and kills it hard as soon as `marker` exists below the run folder; False if it ended before."""
    process = subprocess.Popen(
        command("run", experiment, "--out", folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if any(folder.glob(marker)):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    return process.returncode == -signal.SIGKILL


KILL_AT = {
    "train, before a checkpoint": "supernet/checkpoints",
    "train, after a checkpoint": "supernet/checkpoints/8",
    "search": "search/journal.jsonl",
    "finish, first network": "winners/winner_1/training/metrics.jsonl",
    "finish, later": "baselines/smallest/params",
    "export": "winners/winner_1/model.onnx",
    "verify": "winners/winner_1/verify.json",
}


@pytest.mark.slow  # two minutes; `make smoke` has it
def test_killed_in_every_stage_and_resumed_it_ends_the_same_to_the_bit(measured, finished, workplace):
    experiment = workplace / "tiny_experiment.toml"
    killed = [name for name, marker in KILL_AT.items() if _killed_at(measured, experiment, marker)]
    assert killed == list(KILL_AT)
    done = subprocess.run(command("run", experiment, "--out", measured), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    wanted, got = outcome(finished), outcome(measured)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if got[name] != wanted[name]] == []


def test_two_runs_on_one_folder_the_second_is_refused(finished, workplace):
    experiment = nas.load_experiment(workplace / "tiny_experiment.toml")
    from nas.runfolder import RunFolder

    with RunFolder(finished, experiment):
        done = subprocess.run(
            command("run", workplace / "tiny_experiment.toml", "--out", finished),
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"process {os.getpid()}" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_stops_within_ten_seconds_with_the_line_to_continue(workplace, tmp_path):
    process = subprocess.Popen(
        command("run", workplace / "tiny_experiment.toml", "--out", tmp_path / "run"),
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "supernet").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert process.returncode == 130
    assert f"nas run {workplace / 'tiny_experiment.toml'} --out" in told
    assert "Traceback" not in told


def test_unfinished_runs_and_missing_stages_are_told(workplace, tmp_path):
    with pytest.raises(RunError, match="not a finished run"):
        nas.load_run(tmp_path)
    experiment = nas.load_experiment(workplace / "tiny_experiment.toml")
    with pytest.raises(RunError, match=r"stage `measure` has not been done.*Run `nas measure`"):
        nas.run_experiment(experiment, tmp_path / "run", stages=["train"])
