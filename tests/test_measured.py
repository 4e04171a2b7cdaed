"""`nas measure` and `nas export` on the command line: options that would be ignored, precisions."""

import tomllib
from pathlib import Path

import numpy as np
import pytest
import tiny

from nas import cli
from nas.architecture import Architecture, Input, save_params
from nas.export import RUNTIMES
from nas.ops import weights


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_experiment(tmp_path)
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as e:
        cli.main(list(arguments))
    assert e.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        "--bundle out",
        "--prove 10",
        "--as mine",
        "--precision int8",
        "--image 8x8x1",
        "--classes 4",
        "--seed 1",
        "--over adb",
    ],
)
def test_options_of_spaces_are_refused_for_an_experiment(here, capsys, option):
    said = refused(capsys, "measure", "tiny_experiment.toml", *option.split())
    assert f"{option.split()[0]} has no meaning where WHAT is an experiment" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--out x", "--out has no meaning where WHAT is a space"),
        ("--smoke", "--smoke has no meaning where WHAT is a space"),
        ("--bundle x --as mine", "--as has no meaning with --bundle"),
        ("--bundle x --prove 10", "--prove has no meaning with --bundle"),
        ("--prove 10 --as mine", "--as has no meaning with --prove"),
        ("--bundle x --over adb", "--over needs --as NAME"),
        ("--over adb --as mine", "--over needs --bundle FOLDER"),
        ("--bundle x --precision int8 --precision float32", "a bundle is of one precision"),
    ],
)
def test_options_that_do_not_go_together_are_refused(here, capsys, options, message):
    assert message in refused(capsys, "measure", "digits_mixed", "--device", "host_onnxruntime", *options.split())


def test_results_are_imported_with_what_they_say_themselves(here, capsys):
    said = refused(capsys, "measure", "--import", "out", "--as", "mine", "--device", "host_onnxruntime")
    assert "--device has no meaning for --import" in said


def test_devices_name_providers(here):
    from nas import catalog

    for name in ("host_onnxruntime_cuda", "host_onnxruntime_tensorrt"):
        text = (catalog.folder("latency_models") / name / "device.toml").read_text()
        assert tomllib.loads(text)["runtime"] in RUNTIMES


@pytest.fixture
def winner(here) -> Path:
    """The folder of a network that was never calibrated."""
    space = tiny.space(here)
    network = space.decode(space.smallest())
    folder = here / "winner"
    folder.mkdir()
    Architecture(
        schema="nas.architecture/1",
        name="w",
        network=network,
        classes=("a", "b", "c"),
        input=Input((8, 8, 1), (0.5,), (0.5,)),
    ).save(folder / "architecture.json")
    save_params(folder / "params", {w.name: np.full(w.shape, 0.1, np.float32) for w in weights(network.flat())})
    return folder


def exported(capsys, *arguments: str) -> list[str]:
    with pytest.raises(SystemExit) as e:
        cli.main(["export", *arguments])
    assert e.value.code == 0, capsys.readouterr().err
    return capsys.readouterr().out.split()


def test_a_network_is_exported_in_any_precision_of_the_runtime(winner, capsys):
    assert exported(capsys, str(winner)) == [str(winner / "model.onnx")]
    pytest.importorskip("openvino", reason="openvino is not installed")
    of_openvino = ("--runtime", "openvino", "--precision", "bfloat16")
    assert exported(capsys, str(winner), *of_openvino) == [str(winner / "model.bfloat16.onnx")]
    assert exported(capsys, str(winner), *of_openvino, "--out", "best.onnx") == ["best.onnx"]
    both = exported(capsys, str(winner), *of_openvino, "--precision", "float32", "--out", "best.onnx")
    assert both == ["best.bfloat16.onnx", "best.onnx"]
    assert Path("best.onnx").read_bytes() != Path("best.bfloat16.onnx").read_bytes()  # it says what to compute in


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--precision bfloat16", "onnxruntime has no precision `bfloat16`"),
        ("--precision float31", "Did you mean `float32`"),
        ("--precision int8", "int8 needs the ranges"),
        ("--runtime openvin", "Did you mean `openvino`"),
        ("--smoke", "--smoke has no meaning where SOURCE is a network"),
    ],
)
def test_what_cannot_be_exported_is_told(winner, capsys, options, message):
    assert message in refused(capsys, "export", str(winner), *options.split())


def test_an_experiment_says_its_precisions_itself(here, capsys):
    said = refused(capsys, "export", "tiny_experiment.toml", "--precision", "int8")
    assert "--precision has no meaning where SOURCE is an experiment" in said
