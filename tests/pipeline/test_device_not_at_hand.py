"""Experiments for a device that is somewhere else: its table is read, nothing is measured, and everything says so."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny

import nas
from nas import catalog, cli, cost
from nas.errors import LatencyError, SpaceError, UnmeasuredBlock
from nas.latency import Table, import_table, prove
from nas.pipeline import load_experiment, run_experiment
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
    missing = r"nearest is tiny/: 2 blocks are missing, the first is `classifier .*`, for 3 classes and images of 8"
    todo = r".*nas measure tiny --device board`.*nas import FILE .*--device board`"
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


def nas_json(value) -> bytes:
    import msgspec

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
