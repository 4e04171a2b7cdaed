"""Files of mixed precision: what ONNX Runtime computes is what JAX simulates, and each stage holds what it chose."""

import itertools
import math
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from export import networks
from export.networks import GRAPHS

from nas.errors import ExportError
from nas.export import RUNTIMES
from nas.export.onnx import to_onnx
from nas.export.size import onnx_bytes
from nas.fold import fold
from nas.ops import PRECISIONS, WEIGHT_BITS, Conv, Dense, Graph, activations, in_precision, weights
from nas.quantise import calibrate, narrow_weights, placeholder, simulate, sources
from nas.run import run

PAIRS = [pair for pair in itertools.product(PRECISIONS, repeat=2) if pair != ("float32", "float32")]


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return tiny.joint_space(tmp_path_factory.mktemp("joint"), precisions=PRECISIONS)


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


@pytest.mark.parametrize("precisions", PAIRS, ids=" ".join)
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
    if "int8" in precisions:  # float32 ops before an int8 one may round a value to the neighbouring number
        assert np.abs(got - expected).mean() < 0.02 * np.abs(got - floats).mean()
    else:  # weights alone are rounded, and by themselves
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(floats).max())
        assert np.abs(got - floats).mean() > 100 * np.abs(got - expected).mean()
    assert (got.argmax(-1) == expected.argmax(-1)).mean() > 0.99
    most = 0.5 if "int4_weights" in precisions else 0.2
    assert np.abs(got - floats).max() < most * np.abs(floats).max()


@pytest.mark.parametrize("precision", WEIGHT_BITS)
def test_narrow_kernels_are_stored_in_as_many_bits_with_one_scale_an_output_channel(space, precision):
    network = network_of(space, (precision, "float32"))
    graph, params = fold(network.flat(), params_of(network))
    stored = {i.name: i for i in to_onnx(network.flat(), params_of(network), placeholder(graph)).graph.initializer}
    seen = 0
    for op in graph.ops:
        if not isinstance(op, Conv | Dense):
            continue
        name = f"{op.name}/kernel"
        assert (f"{name}/narrow" in stored) == op.name.startswith("stage1/") != (name in stored)
        if name in stored:
            continue
        seen += 1
        kernel, scale = narrow_weights(op, params)
        held = stored[f"{name}/narrow"]
        assert len(held.raw_data) == math.ceil(kernel.size * WEIGHT_BITS[precision] / 8)
        whole = onnx.numpy_helper.to_array(held).astype(np.float32)
        assert (whole == kernel.transpose(3, 2, 0, 1)).all()
        assert np.abs(whole).max() == 2 ** (WEIGHT_BITS[precision] - 1) - 1
        assert onnx.numpy_helper.to_array(stored[f"{name}/scale"]).size == scale.size == op.shape[-1]
        error = np.abs(kernel * scale - params[name])
        assert (error <= scale / 2 * (1 + 1e-5)).all()
    assert seen


@pytest.mark.parametrize("precision", WEIGHT_BITS)
@pytest.mark.parametrize("name", ["everything", "two dense", "dense over an image", "rectifiers", "attention"])
def test_any_ops_may_have_narrow_weights(name, precision):
    graph, params = in_precision(GRAPHS[name], precision), networks.params_of(GRAPHS[name])
    folded, arrays = fold(graph, params)
    scales, runtime, images = placeholder(folded), RUNTIMES["onnxruntime"](), networks.images_of(graph)
    assert set(scales.values) == {None}
    got = runtime.open(runtime.emit(graph, params, precision="mixed", quantisation=scales))(images)
    expected = np.asarray(simulate(folded, arrays, scales, images))
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got, run(graph, params, images)[0], atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("precision", WEIGHT_BITS)
def test_the_runtime_makes_narrow_weights_float_once_when_it_loads_them(space, precision, tmp_path):
    network = network_of(space, (precision, precision))
    params = params_of(network)
    scales = placeholder(fold(network.flat(), params)[0])
    loaded = []
    for quantisation in (scales, None):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
        options.log_severity_level = 3
        model = to_onnx(network.flat(), params, quantisation).SerializeToString()
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(tmp_path / "loaded.onnx").graph
        shapes = Counter((i.data_type, tuple(i.dims)) for i in graph.initializer)
        loaded.append((Counter(node.op_type for node in graph.node), shapes))
    assert loaded[0] == loaded[1]


def test_the_kernel_of_a_channel_of_zeros_and_of_an_odd_number_of_weights_is_kept(tmp_path):
    op = Conv((0,), (4, 4, 3), "conv", kernel=3, bias=True, precision="int4_weights")
    graph, rng = Graph((4, 4, 1), (op,)), np.random.default_rng(0)
    params = {"conv/kernel": rng.normal(size=(3, 3, 1, 3)).astype(np.float32), "conv/bias": np.zeros(3, np.float32)}
    params["conv/kernel"][..., 1] = 0
    images = rng.normal(size=(2, 4, 4, 1)).astype(np.float32)
    scales = placeholder(graph)
    runtime = RUNTIMES["onnxruntime"]()
    got = runtime.open(runtime.emit(graph, params, precision="mixed", quantisation=scales))(images)
    np.testing.assert_allclose(got, simulate(graph, params, scales, images), atol=1e-6)
    assert (got[..., 1] == 0).all()
    assert activations(op.precision) == "float32"


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
