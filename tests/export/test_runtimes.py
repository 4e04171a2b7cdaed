"""What every runtime must do: its files compute what JAX computes, in each of its precisions."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from export.networks import ATTENTION, GRAPHS, emitted, images_of, params_of, recorded, reference

from nas.errors import DeviceError, ExportError
from nas.export import PRECISIONS as EVERY_PRECISION
from nas.export import RUNTIMES
from nas.export.stablehlo import to_exported
from nas.fold import fold
from nas.quantise import placeholder, simulate

PRECISIONS = [(name, precision) for name, runtime in RUNTIMES.items() for precision in runtime.precisions]
WITH_INT8 = [name for name, precision in PRECISIONS if precision == "int8"]
FLOATS = [(name, precision) for name, precision in PRECISIONS if precision not in ("int8", "mixed")]

# Of the largest output; seen in all of GRAPHS: float32 1.5e-6, bfloat16 4e-2 (attention divides small sums).
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 0.1}
# What takes a second to compile is compiled for a few networks, which have most ops between them, unless asked for all.
COMPILES_LONG = ("xla", "iree")
FEW = ("everything", "mbconv, se, stride 2", "efficientvit", "shufflenet, stride 2", "mobilenet_v3_head")
# A fault of the library, which ends the process: no runtime may be asked for these.
CRASHES = {("openvino", "int8", "rectifiers"): "OpenVINO 2026.4 crashes compiling an int8 conv that three ops read"}
# The library that each cannot do without, and the extra that brings it.
NEEDS = {
    "onnxruntime": ("onnxruntime", "pip install onnxruntime"),
    "openvino": ("openvino", r"pip install openvino"),
    "litert": ("ai_edge_litert", r"pip install ai-edge-litert"),
    "iree": ("iree.compiler", r"pip install iree-base-compiler"),
}


def cases(pairs):
    """(runtime, precision, graph) of all, slow where compiling takes long."""
    for name, precision in pairs:
        for graph in GRAPHS:
            slow = name in COMPILES_LONG and (graph not in FEW or precision != "float32")
            yield pytest.param(name, precision, graph, marks=pytest.mark.slow if slow else ())


def installed(name):
    """A runtime; the test is skipped where it is absent."""
    runtime = RUNTIMES[name]()
    try:
        runtime.version()
    except DeviceError as e:
        pytest.skip(str(e))
    return runtime


def written(name, graph, precision):
    """A runtime and its file of a graph; the test is skipped where this machine does not have the precision."""
    runtime = installed(name)
    if (name, precision, graph) in CRASHES:
        pytest.skip(CRASHES[name, precision, graph])
    try:
        file, _ = emitted(name, graph, precision)
        runtime.open(file)
    except DeviceError as e:
        pytest.skip(str(e))
    return runtime, file


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    return installed(request.param)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_says_what_it_has(name):
    runtime = RUNTIMES[name]
    assert "float32" in runtime.precisions
    assert set(runtime.precisions) <= set(EVERY_PRECISION)
    assert runtime.suffix.startswith(".")
    assert runtime.__doc__  # `nas list runtimes` shows it
    assert installed(name).version()


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_library_is_named_with_the_command_that_installs_it(name, monkeypatch):
    library, hint = NEEDS[name]
    for module in [library, *(m for m in sys.modules if m.startswith(f"{library}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    if "." not in library:
        monkeypatch.setitem(sys.modules, f"{library}.interpreter", None)
    with pytest.raises(DeviceError, match=hint):
        RUNTIMES[name]().version()
    with pytest.raises(DeviceError, match=hint):
        RUNTIMES[name]().open(b"") if name != "iree" else RUNTIMES[name]().emit(GRAPHS["nothing"], {})


@pytest.mark.parametrize(("name", "precision", "graph"), [*cases(FLOATS)])
def test_float_model_computes_what_jax_computes_at_any_batch_size(name, precision, graph):
    images, expected = reference(graph)
    runtime, file = written(name, graph, precision)
    session = runtime.open(file)
    for n in (3, 1):
        got = session(images[:n])
        assert got.shape == expected[:n].shape
        assert got.dtype == np.float32
        largest = np.abs(expected).max()
        rtol = 1e-4 if precision == "float32" else 0.0
        np.testing.assert_allclose(got, expected[:n], rtol=rtol, atol=TOLERANCE[precision] * largest)
    if precision != "float32" and len(GRAPHS[graph].ops) > 2:
        assert np.abs(got - expected[:1]).max() > 1e-5 * largest  # it is not float32 after all


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", WITH_INT8)
def test_simulated_int8_network_equals_the_runtimes(name, graph):
    images = images_of(GRAPHS[graph], 64, seed=2)
    runtime, file = written(name, graph, "int8")
    quantisation = emitted(name, graph, "int8")[1]
    folded, params = fold(GRAPHS[graph], params_of(GRAPHS[graph]))
    simulated = np.asarray(jax.jit(simulate, static_argnums=(0, 2))(folded, params, quantisation, images))
    got = runtime.open(file)(images)
    if name == "onnxruntime":
        # Equal to the last bit on x86-64 with FMA, in all of these; the slack is for other kernels, and for attention:
        # one of its results in a million is a step off, which may move all logits of that image.
        assert (got == simulated).mean() > (0.9 if graph in ATTENTION else 0.99)
    # Others round a tie, or a sum before it is quantised, the other way now and then; logits then move by a step.
    np.testing.assert_allclose(got, simulated, atol=0.05 * np.abs(simulated).max())
    if simulated.ndim == 2:
        top = np.sort(simulated, -1)
        clear = top[:, -1] - top[:, -2] > 0.02 * np.abs(simulated).max()
        assert clear.sum() > 20
        assert (got.argmax(-1) == simulated.argmax(-1))[clear].all()


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_equal_networks_give_equal_bytes(name, precision):
    if name == "iree":
        pytest.skip("IREE's compiler does not give equal bytes")
    runtime, _ = written(name, "residual", precision)
    graph = GRAPHS["residual"]
    quantisation = placeholder(fold(graph, params_of(graph))[0]) if precision == "int8" else None
    files = {
        runtime.emit(graph, params_of(graph), precision=precision, quantisation=quantisation, metadata=metadata)
        for metadata in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    }
    assert len(files) == 1


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_prepared_inference_runs_and_threads_change_nothing(name, precision):
    images = images_of(GRAPHS["residual"], 1)
    runtime, file = written(name, "residual", precision)
    sessions = [runtime.open(file, threads=n) for n in (1, 2)]
    if name != "xla":  # it has one pool for the whole process: see below
        assert [s.prepare(images)(2) for s in sessions] == [None, None]
    np.testing.assert_allclose(sessions[0](images), sessions[1](images), rtol=1e-5)


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_a_file_can_be_checked_and_opened_by_its_path(tmp_path, name, precision):
    runtime, file = written(name, "residual", precision)
    path = tmp_path / f"model{runtime.suffix}"
    path.write_bytes(file)
    runtime.check(path)
    assert runtime.open(path)(images_of(GRAPHS["residual"], 2)).shape == (2, 10)


def test_what_is_no_model_is_refused(runtime, tmp_path):
    path = tmp_path / f"model{runtime.suffix}"
    path.write_bytes(b"not a model")
    for wrong in (path.read_bytes(), path, tmp_path / f"missing{runtime.suffix}"):
        with pytest.raises(ExportError):
            runtime.open(wrong)
    with pytest.raises(ExportError):
        runtime.check(path)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_precision_and_its_quantisation_belong_together(name):
    graph = GRAPHS["residual"]
    quantisation = placeholder(fold(graph, params_of(graph))[0])
    runtime = RUNTIMES[name]()
    with pytest.raises(ExportError, match=r"`float31`.*Did you mean `float32`"):
        runtime.emit(graph, params_of(graph), precision="float31")
    with pytest.raises(ExportError, match="only int8 has one"):
        runtime.emit(graph, params_of(graph), quantisation=quantisation)
    if "int8" in runtime.precisions:
        with pytest.raises(ExportError, match="int8 without a quantisation"):
            runtime.emit(graph, params_of(graph), precision="int8")


@pytest.mark.parametrize("name", WITH_INT8)
def test_ranges_of_another_network_are_refused(name):
    other = placeholder(fold(GRAPHS["two dense"], params_of(GRAPHS["two dense"]))[0])
    with pytest.raises(ExportError, match="Calibrate"):
        RUNTIMES[name]().emit(GRAPHS["residual"], params_of(GRAPHS["residual"]), precision="int8", quantisation=other)


XLA_ON_TWO_THREADS = """
import jax, numpy as np
from nas.export.xla import Xla
from nas.ops import Recorder
net = Recorder((4, 4, 2))
net.pool(net.input)
prepare = Xla().open(Xla().emit(net.graph(), {}), threads=2).prepare
print(prepare(np.zeros((1, 4, 4, 2), np.float32))(3))
"""


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="threads are of CPUs")
def test_xla_refuses_threads_that_its_pool_does_not_have_and_says_how_to_start_it():
    for pool, expected in (("2", r"^None$"), ("1", "DeviceError: the device has 2 threads.*PJRT_NPROC=2 in its env")):
        environment = {**os.environ, "PJRT_NPROC": pool, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", XLA_ON_TWO_THREADS],
            capture_output=True,
            text=True,
            env=environment,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert re.search(expected, done.stdout + done.stderr, re.MULTILINE), done.stderr


def test_iree_times_one_image_a_call():
    runtime, file = written("iree", "nothing", "float32")
    with pytest.raises(DeviceError, match="batch = 1"):
        runtime.open(file).prepare(images_of(GRAPHS["nothing"], 2))


def test_a_program_of_xla_reads_no_constant_larger_than_the_weights():
    """Depthwise convolutions on small images were matrices there, 64 times the kernel."""
    graph = recorded((8, 8, 64), lambda net, x: net.conv(x, "depthwise", 64, kernel=7, groups=64))
    exported = to_exported(graph, params_of(graph), batch=1, written_out=True)
    images = jax.ShapeDtypeStruct((1, *graph.input), np.float32)
    program = jax.jit(exported.call).lower(images).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]+)\]\S* constant", program)
    assert shapes
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes) <= 7 * 7 * 64
