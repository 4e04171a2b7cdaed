"""The ONNX back-end and ONNX Runtime, beyond what every runtime must do (test_runtimes.py)."""

import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from export.networks import ATTENTION, GRAPHS, emitted, images_of, params_of, recorded

from nas.errors import DeviceError, ExportError
from nas.export import onnx as writer
from nas.export.onnxruntime import OnnxRuntime
from nas.fold import fold
from nas.ops import LinearAttention
from nas.quantise import calibrate, placeholder, simulate
from nas.run import run

RUNTIME = OnnxRuntime()


def int8(graph, params, quantisation):
    """The int8 file of `graph`."""
    return RUNTIME.emit(graph, params, precision="int8", quantisation=quantisation)


def optimised(file, folder):
    """Kinds of nodes that are left when ONNX Runtime has fused all it can."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def attentions(graph):
    """How many ops of `graph` are attention."""
    return sum(isinstance(op, LinearAttention) for op in graph.ops)


def test_scales_that_are_all_equal_meet_ties_everywhere_and_round_them_alike():
    graph = GRAPHS["everything"]
    images = images_of(graph, 32, seed=5)
    folded, params = fold(graph, params_of(graph))
    quantisation = placeholder(folded)
    simulated = jax.jit(simulate, static_argnums=(0, 2))(folded, params, quantisation, images)
    got = RUNTIME.open(int8(graph, params_of(graph), quantisation))(images)
    assert (got == simulated).mean() > 0.99


@pytest.mark.parametrize("kind", ["add", "mul", "concat"])
def test_every_pair_of_bytes_gives_the_byte_that_the_runtime_gives(kind):
    def write(net, x):
        a, b = net.act(net.split(x, 0, 1), "hard_swish"), net.split(x, 1, 2)
        getattr(net, kind)(a, b)

    graph = recorded((256, 256, 2), write)
    rng = np.random.default_rng(0)
    for _ in range(4):  # scales differ, and with them where the ties are
        images = np.stack(np.meshgrid(np.arange(256), np.arange(256)), -1).astype(np.float32)[None]
        images = (images - rng.integers(60, 200)) * np.float32(rng.uniform(0.01, 0.1))
        quantisation = calibrate(graph, {}, images)
        got = RUNTIME.open(int8(graph, {}, quantisation))(images)
        wrong = got != np.asarray(simulate(graph, {}, quantisation, images))
        assert wrong.mean() < 1e-4  # none on x86-64 with FMA


@pytest.mark.parametrize(("size", "heads", "dim"), [((16, 16), 4, 16), ((7, 5), 8, 8)])
def test_attention_between_bytes_is_that_of_the_runtime_but_for_a_rare_single_step(size, heads, dim):
    graph = recorded((*size, heads * 3 * dim), lambda net, x: net.linear_attention(x, dim))
    images = np.random.default_rng(0).normal(size=(50, *graph.input)).astype(np.float32)
    quantisation = calibrate(graph, {}, images)
    got = RUNTIME.open(int8(graph, {}, quantisation))(images)
    simulated = np.asarray(jax.jit(simulate, static_argnums=(0, 2))(graph, {}, quantisation, images))
    step = quantisation.values[-1].scale
    assert (got != simulated).mean() < 1e-4  # 1e-6 on x86-64: float32 sums are ordered otherwise
    np.testing.assert_allclose(got, simulated, atol=1.001 * step)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_turns_only_its_keys_and_the_runtime_not_even_those(name, tmp_path):
    file = emitted("onnxruntime", name, "float32")[0]
    written = Counter(node.op_type for node in onnx.load_from_string(file).graph.node)
    shuffles = sum(type(op).__name__ == "Shuffle" for op in GRAPHS[name].ops)
    assert written["Transpose"] == attentions(GRAPHS[name]) + shuffles
    assert optimised(file, tmp_path)["Transpose"] <= shuffles


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(8, 7), (1, 2), (5, 6)])
def test_strided_windows_are_padded_as_xla_pads_them(size, kernel):
    def write(net, x):
        y = net.conv(x, "conv", 4, kernel=kernel, stride=2)
        z = net.pool(x, "mean", window=3, stride=2)
        net.concat(y, z, net.pool(x, "max", window=kernel, stride=2))

    graph = recorded((*size, 4), write)
    images, params = images_of(graph, 3), params_of(graph)
    got = RUNTIME.open(RUNTIME.emit(graph, params))(images)
    np.testing.assert_allclose(got, run(graph, params, images)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in GRAPHS if n not in ("nothing", "everything", "rectifiers")])
def test_runtime_computes_convolutions_sums_and_products_of_int8_models_in_integers(name, tmp_path):
    kinds = optimised(emitted("onnxruntime", name, "int8")[0], tmp_path)
    attention = attentions(GRAPHS[name])
    for kind in ("Relu", "MatMul", "MatMul", "Relu", "Add"):  # inside attention, which is computed in float32
        kinds[kind] -= attention
    kinds = +kinds
    smooth = {"HardSigmoid", "Sigmoid", "Gelu"} & set(kinds)  # these are computed in float32, between 8-bit numbers
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "Concat", "Relu", "Clip", "HardSwish"} & set(kinds)
    assert smooth or "Mul" not in kinds
    read = 1 + sum(kinds[k] for k in ("HardSigmoid", "Sigmoid", "Gelu")) + attention
    assert kinds["QuantizeLinear"] <= read  # the input's, and one after each smooth activation and each attention


def test_models_say_what_goes_in_and_out_and_carry_the_metadata():
    graph = GRAPHS["residual"]
    quantisation = placeholder(fold(graph, params_of(graph))[0])
    for precision, q in (("float32", None), ("int8", quantisation)):
        file = RUNTIME.emit(graph, params_of(graph), precision=precision, quantisation=q, metadata={"a": "1", "b": "2"})
        model = onnx.load_from_string(file)
        assert {p.key: p.value for p in model.metadata_props} == {"a": "1", "b": "2"}
        assert [i.name for i in model.graph.input] == ["images"]
        assert [o.name for o in model.graph.output] == ["logits"]
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_nodes_are_named_by_the_scopes_that_recorded_them():
    graph = GRAPHS["digits_mixed"]
    names = [node.name for node in writer.to_onnx(graph, params_of(graph)).graph.node]
    assert len(set(names)) == len(names)
    assert "stem/conv_stem/conv" in names
    assert all("/" in name for name in names)


def test_mistakes_are_named():
    with pytest.raises(ExportError, match="cannot load"):
        RUNTIME.open(b"not a model")
    model = writer.to_onnx(GRAPHS["residual"], params_of(GRAPHS["residual"]))
    model.graph.node[0].op_type = "Nonsense"
    with pytest.raises(ExportError, match="refuses"):
        writer.check(model)


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    assert RUNTIME.version() == onnxruntime.__version__
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(DeviceError, match="pip install onnxruntime"):
        RUNTIME.version()
    with pytest.raises(DeviceError, match="pip install onnx"):
        writer.to_onnx(GRAPHS["residual"], params_of(GRAPHS["residual"]))


def test_importing_the_table_imports_no_runtime():
    code = "import sys, nas.export; assert not {'onnx', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
