"""Files of mixed precision: what ONNX Runtime computes is what JAX simulates, and only int8 stages hold integers."""

import numpy as np
import pytest
import tiny

from nas.errors import ExportError
from nas.export import RUNTIMES
from nas.export.onnx import to_onnx
from nas.export.size import onnx_bytes
from nas.fold import fold
from nas.ops import weights
from nas.quantise import calibrate, placeholder, simulate, sources

PRECISIONS = [("float32", "int8"), ("int8", "float32"), ("int8", "int8")]


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return tiny.joint_space(tmp_path_factory.mktemp("joint"))


def network_of(space, precisions):
    choices = dict(zip(("stage1/precision", "stage2/precision"), precisions, strict=True))
    return space.decode(space.encode({"stage1/depth": 2, **choices}))


def params_of(network):
    rng = np.random.default_rng(0)
    return {
        w.name: (
            rng.normal(size=w.shape) * (2 / w.fan_in) ** 0.5
            if w.role == "kernel"
            else 1 + rng.random(w.shape) * (w.role in ("scale", "var")) - (w.role in ("offset", "mean", "bias"))
        ).astype(np.float32)
        for w in weights(network.flat())
    }


@pytest.mark.parametrize("precisions", PRECISIONS, ids=" ".join)
def test_a_mixed_file_computes_in_the_runtime_what_jax_simulates(space, precisions):
    network = network_of(space, precisions)
    graph, params = fold(network.flat(), params_of(network))
    images = np.random.default_rng(1).normal(size=(256, 8, 8, 1)).astype(np.float32)
    scales = calibrate(graph, params, images)
    runtime = RUNTIMES["onnxruntime"]()
    file = runtime.emit(network.flat(), params_of(network), precision="mixed", quantisation=scales)
    exact = runtime.emit(network.flat(), params_of(network), precision="float32")
    got, floats = runtime.open(file)(images), runtime.open(exact)(images)
    expected = np.asarray(simulate(graph, params, scales, images))
    # float32 ops before an int8 one may round a value to the neighbouring number
    assert np.abs(got - expected).mean() < 0.02 * np.abs(got - floats).mean()
    assert (got.argmax(-1) == expected.argmax(-1)).mean() > 0.99
    assert np.abs(got - floats).max() < 0.2 * np.abs(floats).max()


def test_only_the_ops_of_int8_stages_hold_integers(space):
    network = network_of(space, ("float32", "int8"))
    graph, _ = fold(network.flat(), params_of(network))
    model = to_onnx(network.flat(), params_of(network), placeholder(graph))
    stored = {i.name for i in model.graph.initializer if i.name.endswith("kernel/quantised")}
    assert stored
    assert all(name.startswith("stage2/") for name in stored)
    assert sources(graph)[0] is None  # the image is read by the stem, in float32


def test_a_mixed_network_has_no_int8_file_and_needs_its_ranges(space):
    network, runtime = network_of(space, ("int8", "float32")), RUNTIMES["onnxruntime"]()
    params = params_of(network)
    scales = placeholder(fold(network.flat(), params)[0])
    with pytest.raises(ExportError, match="ask for `mixed`"):
        runtime.emit(network.flat(), params, precision="int8", quantisation=scales)
    with pytest.raises(ExportError, match="mixed without a quantisation"):
        runtime.emit(network.flat(), params, precision="mixed")
    plain = network_of(space, ("float32", "float32"))
    assert runtime.emit(plain.flat(), params, precision="mixed") == runtime.emit(plain.flat(), params)


def test_the_size_of_mixed_files_is_known_without_writing_them(space):
    genotypes = space.sample(np.random.default_rng(2), 12)
    predicted = space.price(genotypes, onnx_bytes(space, "mixed"))
    for genotype, size in zip(genotypes, predicted, strict=True):
        network = space.decode(genotype)
        graph, _ = fold(network.flat(), params_of(network))
        scales = placeholder(graph, distinct=True) if graph.mixed else None
        assert to_onnx(network.flat(), params_of(network), scales).ByteSize() == pytest.approx(size, rel=0.015)
