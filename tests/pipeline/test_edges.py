"""Mistakes, made on purpose: each ends with exit code 2 and one clear paragraph, no traceback, and nothing is lost."""

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

import nas
from nas import cli
from nas.config import load_experiment
from nas.errors import CheckpointError, ConfigError, NasError, RunError, SpaceError
from nas.files import write_bytes
from nas.runfolder import RunFolder, resolved


@pytest.fixture
def place(tmp_path) -> Path:
    tiny.write_experiment(tmp_path)
    return tmp_path


def told(capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and what was printed of a command, run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return int(ended.value.code or 0), capsys.readouterr().err


def run(capsys, place: Path, *overrides: str) -> tuple[int, str]:
    sets = [x for o in overrides for x in ("--set", o)]
    return told(capsys, "run", place / "tiny_experiment.toml", "--out", place / "run", *sets)


MISTAKES = {
    "a missing data path": ("data.source='nowhere.npz'", "nowhere.npz"),
    "an unknown space": ("space='digits_mixd'", "Did you mean `digits_mixed`"),
    "an unknown device": ("device='host_onnxruntim'", "Did you mean `host_onnxruntime`"),
    "an unknown key": ("train.epoch=3", "Did you mean `epochs`"),
    "an unknown format": ("data.format='npy'", "npz"),
    "a value out of range": ("search.lag=0", "`search.lag` is 0"),
    "not a number": ("train.epochs=inf", "a finite number is needed"),
    "an unknown strategy": ("search.strategy='nsga22'", "Did you mean `nsga2`"),
    "an unknown executor": ("search.executor='rey'", "Did you mean `ray`"),
    "an unknown optimiser": ("train.optimiser.name='sgdd'", "Did you mean `sgd`"),
    "a limit that is no latency": ("objectives=[{name='top1'},{name='latency_ms',at_most=nan}]", "positive number"),
    "two values in one override": ("search.trials=20\nseed=5", "its own --set"),
    "images too small for the strides": ("data.image_size=4", "too small for stride 4"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_command_line_is_told_in_a_paragraph(capsys, place, monkeypatch, mistake):
    monkeypatch.chdir(place)
    override, message = MISTAKES[mistake]
    (place / "tiny.toml").write_text(tiny.SPACE.replace("depth = [1, 2]", "depth = [1, 2]\nstride = 4", 1))
    code, text = run(capsys, place, override)
    assert code == 2
    assert message in text
    assert len(text.strip().splitlines()) <= 3, text  # the data's and the space's line may come first
    assert "Traceback" not in text
    assert not (place / "run" / "latency").exists()


def test_a_mistake_does_not_claim_the_folder(capsys, place):
    code, _ = run(capsys, place, "data.source='nowhere.npz'")
    assert code == 2
    code, text = run(capsys, place, "train.epochs=7", "data.source='elsewhere.npz'")
    assert code == 2
    assert "elsewhere.npz" in text  # not: this folder belongs to another configuration


def test_an_override_that_is_wrong_is_blamed_not_the_file(capsys, place):
    _, text = run(capsys, place, "search.trials=0")
    assert text.startswith("error: --set search.trials=0: `search.trials` is 0")


def test_smoke_needs_a_table_of_that_name(capsys, place):
    path = place / "tiny_experiment.toml"
    code, text = told(capsys, "run", path, "--smoke")
    assert code == 2
    assert "no [smoke] table" in text
    path.write_text("smoke = 3\n" + path.read_text())
    code, text = told(capsys, "run", path)
    assert code == 2
    assert "line 1: `smoke` is 3" in text


def test_debug_shows_the_traceback(capsys, place):
    for arguments in (("--debug", "run", place / "none.toml"), ("run", place / "none.toml", "--debug")):
        code, text = told(capsys, *arguments)
        assert code == 2
        assert "Traceback" in text


BAD_DATA = {
    "labels out of range": (lambda x, y: (x, np.where(y == 2, 900, y)), "900"),
    "negative labels": (lambda x, y: (x, y - 1), "-1"),
    "one class only": (lambda x, y: (x, y * 0), "one class"),
    "two channels": (lambda x, y: (np.repeat(x, 2, -1), y), "channel"),
    "NaNs": (lambda x, y: (np.where(x > 200, np.nan, x / 255.0), y), "NaN"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_are_told_before_anything_is_measured(capsys, place, kind):
    change, message = BAD_DATA[kind]
    stored = dict(np.load(place / "bars.npz"))
    stored["x_train"][0] = 255
    stored["x_train"], stored["y_train"] = change(stored["x_train"], stored["y_train"].astype(int))
    np.savez(place / "bars.npz", **stored)
    code, text = run(capsys, place)
    assert code == 2
    assert message in text
    assert not (place / "run" / "latency").exists()


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A folder with an experiment and a run whose table is measured."""
    place = tmp_path_factory.mktemp("measured")
    experiment = load_experiment(tiny.write_experiment(place))
    nas.run_experiment(experiment, place / "run", stages=["measure"])
    return place


@pytest.fixture
def copy(measured, tmp_path) -> Path:
    shutil.copytree(measured, tmp_path / "copy")
    for name in ("tiny_experiment.toml", "tiny.toml", "bars.npz"):
        assert (tmp_path / "copy" / name).exists()
    return tmp_path / "copy"


def test_a_limit_that_no_network_meets_is_told_before_training_with_the_reachable_range(capsys, place):
    text = (place / "tiny_experiment.toml").read_text()
    (place / "tiny_experiment.toml").write_text(text.replace('"70%"', "1e-6"))
    code, text = run(capsys, place)
    assert code == 2
    assert "the fastest network" in text
    assert "the slowest" in text
    assert not (place / "run" / "supernet").exists()
    with RunFolder(place / "run", load_experiment(tiny.write_experiment(place))) as folder:  # the limit corrected
        assert folder.done("measure")


def test_a_run_folder_of_another_configuration_is_refused_and_the_difference_named(capsys, copy):
    code, text = run(capsys, copy, "latency.anchors=4")
    assert code == 2
    assert "another configuration" in text
    assert "`latency.anchors` is 4, was 3" in text
    assert "--redo measure`" in text
    (copy / "run" / "supernet").mkdir()
    code, text = run(capsys, copy, "train.epochs=9")
    assert code == 2
    assert "`train.epochs` is 9.0, was 3.0" in text
    assert "--redo train`" in text


@pytest.mark.parametrize(
    "change", ["search.executor=ray", "search.workers=7", "question='Why?'", "verify.seconds=1.0", "train.epochs=9.0"]
)
def test_what_decides_nothing_that_was_made_may_change_between_calls(copy, change):
    from nas.pipeline import load_experiment

    changed = load_experiment(copy / "tiny_experiment.toml", overrides=[change])
    with RunFolder(copy / "run", changed) as folder:
        assert folder.done("measure")
    assert load_experiment(copy / "run" / "config.toml") == changed


@pytest.mark.parametrize("change", ["train.tensorboard=true", "train.profile_steps=5"])
def test_what_only_shows_a_training_may_change_while_it_is_under_way(copy, change):
    (copy / "run" / "supernet").mkdir()
    with RunFolder(copy / "run", load_experiment(copy / "tiny_experiment.toml", overrides=[change])) as folder:
        assert folder.done("measure")


def test_a_folder_of_a_version_that_did_not_know_a_key_yet_goes_on_with_its_default(copy):
    from nas.pipeline import load_experiment

    path = copy / "run" / "config.toml"
    (copy / "run" / "supernet").mkdir()
    older = [line for line in path.read_text().splitlines() if not line.startswith("rematerialise")]
    assert len(older) < len(path.read_text().splitlines())
    for value, refused in (("true", True), ("false", False)):
        path.write_text("\n".join(older))
        experiment = load_experiment(copy / "tiny_experiment.toml", overrides=[f"train.rematerialise={value}"])
        with pytest.raises(RunError, match="rematerialise") if refused else contextlib.nullcontext():
            RunFolder(copy / "run", experiment).__enter__().__exit__()


def test_a_folder_of_a_version_that_wrote_the_phases_out_goes_on_with_phases_left_out(copy):
    path = copy / "run" / "config.toml"
    (copy / "run" / "supernet").mkdir()
    text = path.read_text()
    assert "phases" not in text
    for phases, refused in (('["kernel", "depth", "expand", "width"]', False), ('["kernel", "depth"]', True)):
        path.write_text(text.replace("[train]\n", f"[train]\nphases = {phases}\n"))
        with pytest.raises(RunError, match="phases") if refused else contextlib.nullcontext():
            RunFolder(copy / "run", load_experiment(copy / "tiny_experiment.toml")).__enter__().__exit__()


@pytest.mark.parametrize(("strategy", "same"), [("nsga2", True), ("predictor", False)])
def test_a_population_of_32_is_the_same_as_none_where_it_is_the_strategys_own(copy, strategy, same):
    path = copy / "tiny_experiment.toml"
    path.write_text(re.sub(r"^(population|strategy) = .*\n", "", path.read_text(), flags=re.MULTILINE))
    overrides = [f"search.strategy={strategy}"]
    begun, left_out = (load_experiment(path, overrides=[*overrides, *more]) for more in (["search.population=32"], []))
    with RunFolder(copy / "run", begun):
        (copy / "run" / "search").mkdir()
    for experiment, refused in ((left_out, not same), (begun, False), (left_out, not same), (begun, False)):
        with pytest.raises(RunError, match="population") if refused else contextlib.nullcontext():
            RunFolder(copy / "run", experiment).__enter__().__exit__()


def test_a_training_that_has_begun_may_go_on_in_another_number_of_processes(copy):
    from nas.pipeline import load_experiment

    (copy / "run" / "supernet").mkdir()
    changed = load_experiment(copy / "tiny_experiment.toml", overrides=["train.processes=2", "train.address='auto'"])
    with RunFolder(copy / "run", changed) as folder:
        assert folder.done("measure")


def test_a_batch_that_does_not_divide_over_the_processes_is_told_before_anything_is_measured(capsys, place):
    code, text = run(capsys, place, "train.processes=3")
    assert code == 2
    assert "train.batch_size is 32, which does not divide over 3 devices" in text
    assert not (place / "run" / "latency").exists()


def test_a_folder_that_is_no_run_is_left_alone(capsys, place):
    (place / "run").mkdir()
    (place / "run" / "thesis.tex").write_text("years of work")
    code, text = run(capsys, place)
    assert code == 2
    assert "thesis.tex" in text
    assert (place / "run" / "thesis.tex").read_text() == "years of work"


def test_a_space_or_data_that_changed_since_the_run_began_are_told(capsys, copy):
    tiny.write_data(copy, seed=1)
    code, text = run(capsys, copy)
    assert code == 2
    assert "the data has changed" in text
    tiny.write_data(copy)
    (copy / "tiny.toml").write_text(tiny.SPACE.replace("expand = [1, 2]", "expand = [1, 3]"))
    code, text = run(capsys, copy)
    assert code == 2
    assert "the space has changed" in text


def test_an_edited_latency_table_is_refused(capsys, copy):
    path = copy / "run" / "latency" / "table.float32.csv"
    path.write_text(path.read_text().replace("0.0", "0.1", 1))
    code, text = run(capsys, copy)
    assert code == 2
    assert "checksum" in text
    assert "--redo measure" in text


def test_a_table_of_another_run_is_refused(capsys, copy, place):
    from nas.pipeline import load_experiment

    nas.run_experiment(load_experiment(place / "tiny_experiment.toml"), place / "other", stages=["measure"])
    for name in ("table.float32.csv", "table.float32.json"):
        shutil.copy(place / "other" / "latency" / name, copy / "run" / "latency" / name)
    code, text = run(capsys, copy)
    assert code == 2
    assert "the float32 latency table has changed" in text


def test_a_device_that_changed_is_told(capsys, copy):
    environment = json.loads((copy / "run" / "environment.json").read_text())
    environment["device"]["threads"] = 4
    (copy / "run" / "environment.json").write_text(json.dumps(environment))
    code, text = run(capsys, copy)
    assert code == 2
    assert "has changed since its table was measured (threads)" in text


@pytest.mark.parametrize("name", ["environment.json", "stages.json", "config.toml"])
@pytest.mark.parametrize("content", [b"", b"{}x", b"[]", b"\xff\xfe"])
def test_a_damaged_file_of_the_run_is_told_and_redo_makes_it_again(capsys, copy, name, content):
    path = copy / "run" / name
    path.write_bytes(content)
    code, text = run(capsys, copy)
    if name == "config.toml" and not content:
        assert "another configuration" in text
    assert code == 2
    assert str(path) in text or "another configuration" in text
    assert "Traceback" not in text


def test_redo_forgets_a_stage_and_all_after_it(copy):
    from nas.pipeline import load_experiment

    experiment = load_experiment(copy / "tiny_experiment.toml")
    (copy / "run" / "supernet").mkdir()
    with RunFolder(copy / "run", experiment) as folder:
        folder.redo("train")
        assert folder.done("measure")
        assert not (copy / "run" / "supernet").exists()
        assert (copy / "run" / "latency").exists()
        (copy / "run" / "stages.json").write_text("damaged")
        folder.redo("search")
        assert folder.done("train")
        folder.redo("measure")
        assert not folder.done("measure")
        assert not (copy / "run" / "latency").exists()


def test_a_damaged_journal_is_refused_with_the_offset(tmp_path):
    from nas.errors import JournalError
    from nas.search.journal import Journal

    with Journal(tmp_path / "journal.jsonl", {"seed": 0}) as journal:
        for k in range(3):
            journal.append({"trial": k})
    data = bytearray((tmp_path / "journal.jsonl").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "journal.jsonl").write_bytes(data)
    with pytest.raises(JournalError, match=r"byte \d+"):
        Journal(tmp_path / "journal.jsonl", {"seed": 0}).__enter__()
    assert (tmp_path / "journal.jsonl").read_bytes() == data


def test_a_damaged_checkpoint_is_refused_and_kept(tmp_path):
    import jax.numpy as jnp

    from nas.train import Checkpoints

    tree = {"params": {"a": jnp.arange(4096.0)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, tree)
    for file in (tmp_path / "3").rglob("*"):
        if file.is_file() and "d" in file.parent.name and file.stat().st_size:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="cannot be restored"):
        checkpoints.restore(3, tree)
    assert (tmp_path / "3").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d | {"schema": "nas.architecture/9"}, ConfigError, "reads 'nas.architecture/1'"),
        (lambda d: d | {"colour": 1}, ConfigError, "colour"),
        (lambda d: d | {"classes": ["a"]}, SpaceError, "number of classes"),
        (lambda d: d["network"]["blocks"].pop(1) and d, SpaceError, "reads"),
        (lambda d: d["network"]["blocks"][0]["graph"]["ops"][0].update(inputs=[7]) or d, SpaceError, "not exist yet"),
    ],
)
def test_an_architecture_that_was_tampered_with_is_refused(tmp_path, change, error, message):
    space = tiny.space(tmp_path)
    from nas.architecture import SCHEMA, Architecture, Input

    made = Architecture(SCHEMA, "x", space.decode(space.largest()), Input((8, 8, 1), (0.5,), (0.2,)), ("a", "b", "c"))
    (tmp_path / "a.json").write_text(json.dumps(change(json.loads(made.to_json()))))
    with pytest.raises(error, match=message):
        nas.load_architecture(tmp_path / "a.json")


def test_parameters_of_another_network_are_refused(tmp_path):
    from nas.architecture import load_params, save_params

    space = tiny.space(tmp_path)
    save_params(tmp_path / "params", {"other/kernel": np.zeros(3)})
    with pytest.raises(CheckpointError, match="another network"):
        load_params(tmp_path / "params", space.decode(space.largest()))
    (tmp_path / "params" / "params.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_params(tmp_path / "params", space.decode(space.largest()))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; the next test covers the path")
def test_a_read_only_folder_is_told(capsys, place):
    (place / "run").mkdir(mode=0o500)
    code, text = run(capsys, place)
    assert code == 2
    assert "cannot write" in text


def test_a_disk_that_is_full_or_read_only_is_told_and_what_stood_there_still_stands(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    write_bytes(path, b"measured")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match="No space left on device"):
        write_bytes(path, b"half")
    monkeypatch.undo()
    assert path.read_bytes() == b"measured"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_by_every_writer(capsys, copy, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["nas.pipeline.train"], "train_supernet", refuse)
    code, text = run(capsys, copy)
    assert code == 2
    assert "No space left on device" in text
    assert "it goes on from what is there" in text
    assert "Traceback" not in text


def test_a_run_in_a_place_that_cannot_hold_a_folder_is_told(place):
    (place / "file").write_text("not a folder")
    experiment = load_experiment(place / "tiny_experiment.toml")
    with pytest.raises(RunError, match="cannot write"), RunFolder(place / "file" / "run", experiment):
        pass


def test_every_error_is_of_the_family_that_the_command_line_explains():
    from nas import errors

    family = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert all(issubclass(e, NasError) for e in family)


def test_help_has_an_example_for_every_command():
    runner = CliRunner()
    assert runner.invoke(cli.cli, ["--help"]).exit_code == 0
    for name in cli.cli.commands:
        text = runner.invoke(cli.cli, [name, "--help"]).output
        assert f"Example: nas {name}" in text, name


@pytest.mark.parametrize("what", ["spaces", "devices", "blocks", "precisions", "strategies", "runtimes", "data"])
def test_lists_name_things_with_a_word_about_each(what):
    shown = CliRunner().invoke(cli.cli, ["list", what])
    assert shown.exit_code == 0, shown.output
    assert all(len(line.split(maxsplit=1)) == 2 for line in shown.output.splitlines())


def test_the_doctor_names_versions_runtimes_and_hardware():
    shown = CliRunner().invoke(cli.cli, ["doctor"])
    assert shown.exit_code == 0, shown.output
    assert "runtime onnxruntime" in shown.output
    assert "accelerators:" in shown.output


def test_the_resolved_configuration_says_every_default(place):
    text = resolved(load_experiment(place / "tiny_experiment.toml"))
    assert "lag = 4" in text
    assert "timeout_seconds = 300.0" in text
