"""Experiments for a device that is somewhere else: its table is read, nothing is measured, and everything says so."""

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny

import nas
from nas import catalog, cli, cost
from nas.console import Console
from nas.errors import DeviceError, LatencyError, RunError, SpaceError, UnmeasuredBlock
from nas.latency import Table, import_table, prove
from nas.pipeline import load_experiment, run_experiment
from nas.pipeline.costs import exact_costs
from nas.pipeline.job import Job
from nas.pipeline.measure import measure
from nas.runfolder import RunFolder
from nas.space import load_space


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with the tiny experiment in it."""
    monkeypatch.chdir(tmp_path)
    tiny.write_experiment(tmp_path)
    return tmp_path


def import_tiny(here: Path, *, classes: int = 3, device: str = "board") -> Table:
    """A table of the tiny space on a board of 2 GMAC/s, in latency_models/<device>."""
    space = load_space(str(here / "tiny.toml"), input_shape=(8, 8, 1), classes=classes)
    rows = [f"{key},{cost.macs(block.graph) / 2e6!r}" for key, (block, _) in space.blocks().items()]
    (here / "board.csv").write_text("\n".join(["key,latency_ms", *rows]) + "\n")
    return import_table(here / "board.csv", form="csv", space=space, device=device).table


def nas_command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as e:
        cli.main([str(a) for a in arguments])
    return e.value.code or 0


@pytest.mark.slow  # 15 s
def test_a_whole_run_for_a_device_that_is_not_at_hand_reports_predictions_only(here, capsys):
    table = import_tiny(here)
    assert nas_command("run", "tiny_experiment.toml", "--out", "run", "--device", "board") == 0
    said = capsys.readouterr().err
    assert "board is not at hand; its float32 latencies were imported by `nas import board.csv" in said
    assert "it has no proof" in said
    assert "latency: NOT measured, board is not at hand" in said
    assert " ms predicted, not measured" in said
    assert " ms measured" not in said
    run = nas.load_run(here / "run")
    assert Table.load(here / "run" / "latency", "float32") == table
    assert not (here / "run" / "latency" / "table.int8.csv").exists()
    assert run.proof == {"precisions": {}}
    winner = run.summary["winner"]
    assert winner["comparable_ms"] is None
    assert winner["latency_ms"] is None
    assert winner["machine_level"] is None
    assert winner["predicted_ms"] == table.network_ms(run.winner.architecture.network)
    assert winner["predicted_ms"] <= run.summary["limit_ms"]
    assert winner["passed"]
    assert "ms predicted, " in run.summary["verdict"]
    assert "was NOT measured" in run.summary["verdict"]
    verdict = run.verified(winner["name"])["float32"]
    assert verdict["latency_ms"] == {"median": None, "p10": None, "p90": None, "predicted": winner["predicted_ms"]}
    page = (here / "run" / "report.html").read_text()
    text = re.sub(r"\s+", " ", page[: page.index("<script>")])
    assert "Latency was not measured: board is not at hand" in text
    assert "the table has no proof" in text
    assert "ms</b><span>predicted by the device's table, not measured" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert " None" not in re.sub(r"<[^>]*>", " ", text)
    card = (here / "run" / winner["folder"] / "card.md").read_text()
    assert "latency was NOT measured, the device was not at hand" in card
    assert json.loads((here / "run" / "environment.json").read_text())["runtime"] == "unknown"


def test_without_a_table_the_error_says_what_is_missing_and_what_to_do(here):
    import_tiny(here, classes=4)
    experiment = load_experiment("tiny_experiment.toml", overrides=["device=board"])
    missing = r"nearest is tiny/, of 4 classes: 2 blocks are missing, the first is `classifier .*`, for 3 classes "
    missing += "and images of 8"
    todo = r".*nas measure tiny.toml --image 8x8x1 --classes 3 --device board`.*nas import FILE .*--device board`"
    with pytest.raises(UnmeasuredBlock, match=missing + todo):
        run_experiment(experiment, here / "run", stages=["measure"])
    (here / "latency_models/board/tiny/table.float32.csv").unlink()
    with pytest.raises(UnmeasuredBlock, match=r"it has no table with all 12 blocks.*: 12 blocks are missing"):
        run_experiment(experiment, here / "run", stages=["measure"])


def test_any_table_of_the_device_with_all_blocks_will_do_and_brings_its_proof(here):
    table = import_tiny(here)
    folder = here / "latency_models" / "board"
    (folder / "tiny").rename(folder / "another")
    proof = prove(np.array([1.0, 2.0, 3.0]), np.array([1.1, 2.0, 2.9]))
    (folder / "another" / "proof.json").write_bytes(nas_json({"precisions": {"float32": proof}}))
    experiment = load_experiment("tiny_experiment.toml", overrides=["device=board"])
    run_experiment(experiment, here / "run", stages=["measure"])
    assert Table.load(here / "run" / "latency", "float32") == table
    copied = json.loads((here / "run" / "latency" / "proof.json").read_text())
    assert copied["mape"] == copied["precisions"]["float32"]["mape"] == proof.mape
    (folder / "another" / "proof.json").write_text("{")
    with pytest.raises(LatencyError, match=r"proof\.json: the proof of this latency table is damaged"):
        run_experiment(experiment, here / "run2", stages=["measure"])


def estimate(here: Path, *precisions: str) -> Table:
    """A device `chip` of a compiler's estimates, with a table of the tiny space in each of `precisions`; the first."""
    folder = here / "latency_models" / "chip"
    tables = []
    for precision in precisions:
        imported = import_tiny(here)
        table = msgspec.structs.replace(imported, runtime="tpu_compiler", precision=precision, kind="estimated")
        table.save(folder / "tiny")
        tables.append(table)
    (folder / "device.toml").write_text(
        'device = "a chip"\nruntime = "tpu_compiler"\nhardware = "chip"\nbatch = 64\n'
        'precision = ["bfloat16", "float32", "int8"]\n'
    )
    return tables[0]


def test_the_tpu_estimate_that_comes_along_limits_a_search(here, capsys):
    rng = np.random.default_rng(0)
    np.savez(
        here / "ten.npz",
        x_train=rng.integers(0, 255, (60, 32, 32, 3), np.uint8), y_train=np.arange(60) % 10,
        x_test=rng.integers(0, 255, (20, 32, 32, 3), np.uint8), y_test=np.arange(20) % 10,
    )  # fmt: skip
    options = ("--set", "space=mobilenet_v3_32", "--set", "data.source=ten.npz")
    command = ("measure", "tiny_experiment.toml", "--out", "run", "--device", "tpu_v2_estimate", *options)
    assert nas_command(*command) == 0
    said = capsys.readouterr().err
    assert "its bfloat16 latencies were estimated by" in said
    assert "its float32 latencies were estimated by" in said
    assert "limit: " in said
    asked = """objectives=[{name="top1"},{name="latency_ms",precision="%s",at_most="70%%"}]"""
    limits = []
    for precision in ("float32", "bfloat16"):
        assert nas_command(*command[:3], precision, *command[4:], "--set", asked % precision) == 0
        limits.append(re.search(r"limit: .* ms", capsys.readouterr().err)[0])
    assert limits[0] in said
    assert limits[1] not in said


def test_a_search_is_limited_by_what_the_device_has_of_the_space(here, capsys):
    estimate(here, "int8", "bfloat16")
    job = a_job(here)
    with job.folder:
        with job.folder.stage("measure"):
            measure(job)
        assert (job.precision, job.files, job.file) == ("bfloat16", ("int8",), "int8")
    assert "float32 is left out: the device has no latencies of this space in it" in capsys.readouterr().err
    again = a_job(here)
    assert (again.precision, list(again.tables), again.files) == ("bfloat16", ["bfloat16", "int8"], ("int8",))
    further = a_job(here, 'objectives=[{name="top1"},{name="latency_ms"},{name="latency_ms@chip"}]')
    assert exact_costs(further)[1].digest == again.tables["bfloat16"].digest
    old = load_experiment("tiny_experiment.toml", overrides=["device=chip", OBJECTIVES.format("float32")])
    with pytest.raises(UnmeasuredBlock, match="in float32"):
        run_experiment(old, here / "run2", stages=["measure"])
    with pytest.raises(DeviceError, match="asks for precision 'float16'"):
        run_experiment(
            load_experiment("tiny_experiment.toml", overrides=["device=chip", OBJECTIVES.format("float16")]),
            here / "run2",
            stages=["measure"],
        )


OBJECTIVES = 'objectives=[{{name="top1"}},{{name="latency_ms",precision="{}",at_most="70%"}}]'


def a_job(here: Path, *overrides: str) -> Job:
    experiment = load_experiment("tiny_experiment.toml", overrides=["device=chip", *overrides])
    return Job(experiment, RunFolder(here / "run", experiment), Console())


def test_a_run_folder_that_wrote_float32_out_goes_on(here):
    """Older versions wrote the precision of an objective out where none was asked for."""
    import_tiny(here)
    written, left_out = (
        load_experiment("tiny_experiment.toml", overrides=["device=board", *of])
        for of in ([OBJECTIVES.format("float32")], [OBJECTIVES.replace(',precision="{}"', "").format()])
    )
    run_experiment(written, here / "run", stages=["measure"])
    (here / "run" / "search").mkdir()
    run_experiment(left_out, here / "run", stages=["measure"])
    other = load_experiment("tiny_experiment.toml", overrides=["device=board", OBJECTIVES.format("int8")])
    with pytest.raises(RunError, match="another configuration"):
        run_experiment(other, here / "run", stages=["measure"])


@pytest.mark.slow  # 15 s
def test_a_whole_run_by_an_estimate_writes_float32_and_says_that_nothing_was_measured(here, capsys):
    table = estimate(here, "bfloat16")
    assert nas_command("run", "tiny_experiment.toml", "--out", "run", "--device", "chip") == 0
    said = capsys.readouterr().err
    assert "in float32; predictions are of bfloat16" in said
    run = nas.load_run(here / "run")
    winner = run.summary["winner"]
    assert winner["predicted_ms"] == table.network_ms(run.winner.architecture.network)
    assert winner["file"].endswith("model.onnx")
    assert winner["passed"]
    assert (run.summary["precision"], run.summary["file_precision"]) == ("bfloat16", "float32")
    assert "They are of bfloat16; no runtime at hand has that, and the file is float32." in run.summary["verdict"]
    assert set(run.verified(winner["name"])) == {"float32"}
    page = (here / "run" / "report.html").read_text()
    text = re.sub(r"\s+", " ", page[: page.index("<script>")])
    assert "float32 file" in text
    assert "predicted by the device's bfloat16 table, not measured" in text
    card = (here / "run" / winner["folder"] / "card.md").read_text()
    assert "ms in bfloat16" in card
    assert "the files are in float32, since onnxruntime has no bfloat16" in card


def nas_json(value) -> bytes:
    return msgspec.json.encode(value)


# names of the current folder


def test_names_are_looked_for_in_the_current_folder_first(here):
    assert "board" not in catalog.list_devices()
    import_tiny(here)
    assert "board" in catalog.list_devices()
    assert "note10" in catalog.list_devices()
    (here / "search_spaces").mkdir()
    (here / "tiny.toml").rename(here / "search_spaces" / "mixed_32.toml")
    assert "mixed" in catalog.list_spaces()
    assert load_space("mixed_32").description == "for tests"
    experiment = load_experiment("tiny_experiment.toml", overrides=["device=board", "space=mixed_32"])
    assert experiment.space == str(here / "search_spaces" / "mixed_32.toml")
    assert experiment.device == str(here / "latency_models" / "board")
    experiment = load_experiment("tiny_experiment.toml", overrides=["device=note10", "space=mixed"])
    assert (experiment.space, experiment.device) == ("mixed", "note10")


def test_without_such_folders_names_are_the_packages(here):
    assert catalog.folders("search_spaces") == [catalog.folder("search_spaces")]
    with pytest.raises(SpaceError, match=r"unknown space `tiny`"):
        load_space("tiny")


# as published


SMALL = """
resolution = 160
[stem]
block = "conv_stem"
width = 24
stride = 2
[[stage]]
block = "mbconv"
width = 24
expand = 1
act = "relu"
{stages}
[head]
block = "mobilenet_v3_head"
width = 1152
features = 1536
"""
STAGE = """
[[stage]]
block = "mbconv"
stride = {stride}
width = {width}
kernel = 3
expand = {expand}
se = {se}
act = "{act}"
"""


@pytest.mark.slow
def test_once_for_alls_table_serves_an_experiment_to_the_end_of_its_search(real_data, here, capsys):
    """One choice of OFA's at width 1.2, for time's sake; its networks are the ones that the table is of."""
    rows = ((32, 2, "false", "relu", "[3, 4]"), (48, 2, "true", "relu", "[3, 4]"), (96, 2, "false", "hard_swish", 3),
            (136, 1, "true", "hard_swish", 3), (192, 2, "true", "hard_swish", "[3, 4]"))  # fmt: skip
    stages = [STAGE.format(width=w, stride=s, se=se, act=act, expand=e) for w, s, se, act, e in rows]
    (here / "small.toml").write_text(SMALL.format(stages="".join(stages)))
    labels = np.arange(2200) % 1000
    images = np.random.default_rng(0).integers(0, 255, (2200, 8, 8, 3), np.uint8)
    np.savez(
        here / "thousand.npz", x_train=images[:2000], y_train=labels[:2000], x_test=images[2000:], y_test=labels[2000:]
    )
    file = real_data / "lut_ofa_mbv3_note10.json"
    assert nas_command("import", file, "--format", "ofa", "--space", "small.toml", "--device", "note10") == 0
    assert "11 of the 11 blocks" in capsys.readouterr().out
    settings = {
        "space": "small.toml", "data.source": "thousand.npz", "data.train_images": 1100, "data.validation": 0.02,
        "train.epochs": 0.002, "train.batch_size": 2, "train.random_subnets": 0, "train.calibration_images": 4,
        "train.eval_batch_size": 22, "search.trials": 4, "search.population": 3,
    }  # fmt: skip
    options = [o for key, value in settings.items() for o in ("--set", f"{key}={value}")]
    for stage in ("measure", "train", "search"):
        assert nas_command(stage, "tiny_experiment.toml", "--out", "run", "--device", "note10", *options) == 0
    table = Table.load(here / "run" / "latency", "float32")
    space = load_space(str(here / "small.toml"), classes=1000)
    trials = nas.search.read_trials(here / "run" / "search" / "journal.jsonl")
    assert len(trials) == 4
    for trial in trials:
        assert trial.latency_ms == table.network_ms(space.decode(trial.genotype))
