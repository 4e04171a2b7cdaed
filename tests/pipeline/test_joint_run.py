"""A whole run in a space whose stages choose their precision and how much is left away."""

import io
import json

import numpy as np
import pytest
import tiny
from export.networks import params_of

import nas
from nas import cost
from nas.architecture import Architecture, Input, save_float32_params, save_params, schema_of
from nas.console import Console
from nas.deliver import export_network
from nas.errors import ConfigError, UnmeasuredBlock
from nas.evaluate import Standalone
from nas.export import RUNTIMES
from nas.fold import fold
from nas.ops import PRECISIONS, WEIGHT_BITS, in_float32
from nas.pipeline.export import quantisation_json
from nas.quantise import has_narrow, placeholder
from nas.run import run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    tiny.write_joint_experiment(folder)
    return folder


@pytest.mark.slow  # half a minute; `make smoke` has it
def test_a_run_ends_with_verified_files_of_mixed_precision(place):
    asked = 'objectives=[{name="top1"}, {name="latency_ms"}, {name="size_bytes"}, {name="memory_bytes"}]'
    experiment = nas.load_experiment(place / "joint_experiment.toml", overrides=[asked, "search.trials=16"])
    run = nas.load_run(nas.run_experiment(experiment, place / "run"))
    assert sorted(p.name for p in (place / "run" / "latency").glob("table.*.csv")) == ["table.mixed.csv"]
    for folder in (*(place / "run").glob("winners/*"), *(place / "run").glob("baselines/*")):
        narrow = has_narrow(nas.load_winner(folder).architecture.network.flat())
        assert (folder / "params" / "float32" / "params.safetensors").exists() == narrow
    for winner in run.winners.values():
        assert (winner.folder / "model.mixed.onnx").exists()
        assert run.verified(winner.folder.name)["mixed"]["passed"]
        mixed = winner.architecture.network.flat().mixed
        assert winner.architecture.schema == f"nas.architecture/{2 if mixed else 1}"
        assert json.loads((winner.folder / "architecture.json").read_text())["choices"]["stage1/precision"]
    used = {run.front.setting.space.describe(t.genotype)["stage1/precision"] for t in run.trials}
    assert used == {"float32", "int8", "int4_weights"}
    mixed = next(t for t in run.trials if run.front.setting.space.decode(t.genotype).flat().mixed)
    table = run.front.setting.models["latency_ms"]
    network = run.front.setting.space.decode(mixed.genotype)
    assert mixed.latency_ms == table.network_ms(network)
    assert mixed.costs["memory_bytes"] == cost.peak_activation_bytes(network.flat())


def test_file_size_and_peak_memory_follow_the_precisions_that_stages_choose():
    space = nas.load_space("digits_joint", input_shape=(16, 16, 1), classes=10)
    problem = nas.make_problem(space, objectives=("top1", "size_bytes", "memory_bytes"))
    names = ("float32", "int8", "int4_weights")
    rows = [space.uniform(depth=max, expand=max, precision=lambda _, name=name: name) for name in names]
    in_float, in_int8, in_4_bits = ({"memory": m, "size": s} for m, s in problem.cheap(np.stack(rows)))
    assert in_4_bits["size"] < in_int8["size"] < 0.6 * in_float["size"]
    assert in_int8["memory"] < in_float["memory"] == in_4_bits["memory"]


@pytest.mark.parametrize("precision", WEIGHT_BITS)
def test_a_winner_with_narrow_weights_is_the_same_from_disk_in_jax_and_as_a_file(precision, tmp_path):
    space = tiny.joint_space(tmp_path, precisions=PRECISIONS)
    network = space.decode(space.uniform(precision=lambda _: precision))
    params, names = params_of(network.flat()), ("a", "b", "c")
    told = Architecture(schema_of(network), "narrow", network, Input(network.input, (0.5,), (0.25,)), names)
    told.save(tmp_path / "architecture.json")
    save_params(tmp_path / "params", params)
    scales = placeholder(fold(network.flat(), params)[0])
    (tmp_path / "quantisation.json").write_bytes(quantisation_json(scales))
    winner = nas.load_winner(tmp_path)
    assert (told.schema, winner.architecture) == ("nas.architecture/2", told)
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
    written = {path.name: path for path in export_network(tmp_path)}
    assert written.keys() == {"model.onnx", "model.mixed.onnx"}
    session = RUNTIMES["onnxruntime"]().open(written["model.mixed.onnx"])
    logits = winner.logits(images)
    np.testing.assert_allclose(session(told.input.normalise(images)), logits, atol=1e-4 * np.abs(logits).max())


def test_the_float32_file_of_a_network_with_narrow_weights_has_moments_of_its_own(tmp_path):
    """Its weights are others, so that norms see other values."""
    space, data = tiny.joint_space(tmp_path, precisions=PRECISIONS), tiny.data(tmp_path)
    network = space.decode(space.uniform(precision=lambda _: "int4_weights"))
    exact = in_float32(network)
    drawn = params_of(network.flat())
    narrow, plain = (Standalone(n, data).calibrate(drawn, images=64) for n in (network, exact))
    assert max(np.abs(narrow[name] - plain[name]).max() for name in plain) > 1e-3
    told = Architecture(schema_of(network), "narrow", network, Input(network.input, (0.5,), (0.25,)), ("a", "b", "c"))
    told.save(tmp_path / "architecture.json")
    save_params(tmp_path / "params", narrow)
    scales = placeholder(fold(network.flat(), drawn)[0])
    (tmp_path / "quantisation.json").write_bytes(quantisation_json(scales))
    images, logits = data.normalise(data.val.images[:], network.input[:2]), {}
    for moments in ("shared", "own"):  # as older versions left them, and as `finish` leaves them
        for path in export_network(tmp_path):
            logits[moments, path.name] = RUNTIMES["onnxruntime"]().open(path)(images)
        save_float32_params(tmp_path / "params", plain)
    np.testing.assert_array_equal(logits["own", "model.mixed.onnx"], logits["shared", "model.mixed.onnx"])
    expected = np.asarray(run(exact.flat(), plain, images)[0])
    np.testing.assert_allclose(logits["own", "model.onnx"], expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(logits["shared", "model.onnx"] - expected).max() > 1e-2 * np.abs(expected).max()


def test_bytes_are_those_of_the_precisions_that_stages_choose(place):
    asked = 'objectives=[{name="top1"}, {name="latency_ms"}, {name="size_bytes", precision="int8"}]'
    experiment = nas.load_experiment(place / "joint_experiment.toml", overrides=[asked])
    with pytest.raises(ConfigError, match="choose their precision"):
        nas.run_experiment(experiment, place / "bytes", stages=["measure"], console=Console(io.StringIO()))


def test_int8_accuracy_cannot_be_asked_for_where_stages_choose(place):
    int8 = 'objectives=[{name="top1", precision="int8"}, {name="latency_ms"}]'
    experiment = nas.load_experiment(place / "joint_experiment.toml", overrides=[int8])
    with pytest.raises(ConfigError, match="choose theirs"):
        nas.run_experiment(experiment, place / "other", stages=["measure"], console=Console(io.StringIO()))


def test_a_device_without_a_table_of_mixed_precision_is_refused_with_the_command(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(UnmeasuredBlock, match=r"nas measure joint"):
        nas.search("joint.toml", evaluate=str, device="epyc_zen4_onnxruntime", input_shape=(8, 8, 1), classes=3)
