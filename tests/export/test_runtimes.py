"""What every runtime must do: its files compute what JAX computes, in each of its precisions."""

import jax
import numpy as np
import pytest
from export.networks import ATTENTION, GRAPHS, emitted, images_of, params_of, reference

from nas.errors import ExportError
from nas.export import PRECISIONS as EVERY_PRECISION
from nas.export import RUNTIMES
from nas.fold import fold
from nas.quantise import placeholder, simulate

PRECISIONS = [(name, precision) for name, runtime in RUNTIMES.items() for precision in runtime.precisions]
WITH_INT8 = [name for name, precision in PRECISIONS if precision == "int8"]


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    return RUNTIMES[request.param]()


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
def test_a_runtime_says_what_it_has(runtime):
    assert runtime.precisions
    assert set(runtime.precisions) <= set(EVERY_PRECISION)
    assert runtime.suffix.startswith(".")
    assert runtime().version()
    assert runtime.__doc__  # `nas list runtimes` shows it


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", [n for n, precision in PRECISIONS if precision == "float32"])
def test_float_model_computes_what_jax_computes_at_any_batch_size(name, graph):
    images, expected = reference(graph)
    session = RUNTIMES[name]().open(emitted(name, graph, "float32")[0])
    for n in (5, 1):
        got = session(images[:n])
        assert got.shape == expected[:n].shape
        np.testing.assert_allclose(got, expected[:n], rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", WITH_INT8)
def test_simulated_int8_network_equals_the_runtimes(name, graph):
    images = images_of(GRAPHS[graph], 64, seed=2)
    file, quantisation = emitted(name, graph, "int8")
    folded, params = fold(GRAPHS[graph], params_of(GRAPHS[graph]))
    simulated = np.asarray(jax.jit(simulate, static_argnums=(0, 2))(folded, params, quantisation, images))
    got = RUNTIMES[name]().open(file)(images)
    # ONNX Runtime: equal to the last bit on x86-64 with FMA, in all of these; the slack is for other kernels, and for
    # attention: one of its results in a million is a step off, which may move all logits of that image.
    assert (got == simulated).mean() > (0.9 if graph in ATTENTION else 0.99)
    np.testing.assert_allclose(got, simulated, atol=0.05 * np.abs(simulated).max())
    if simulated.ndim == 2:
        top = np.sort(simulated, -1)
        clear = top[:, -1] - top[:, -2] > 0.02 * np.abs(simulated).max()
        assert clear.sum() > 20
        assert (got.argmax(-1) == simulated.argmax(-1))[clear].all()


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_equal_networks_give_equal_bytes(name, precision):
    graph = GRAPHS["residual"]
    quantisation = placeholder(fold(graph, params_of(graph))[0]) if precision == "int8" else None
    files = {
        RUNTIMES[name]().emit(
            graph, params_of(graph), precision=precision, quantisation=quantisation, metadata=metadata
        )
        for metadata in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    }
    assert len(files) == 1


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_prepared_inference_runs_and_threads_change_nothing(name, precision):
    images = images_of(GRAPHS["residual"], 1)
    file = emitted(name, "residual", precision)[0]
    sessions = [RUNTIMES[name]().open(file, threads=n) for n in (1, 2)]
    assert [s.prepare(images)(2) for s in sessions] == [None, None]
    np.testing.assert_allclose(sessions[0](images), sessions[1](images), rtol=1e-5)


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_a_file_can_be_checked_and_opened_by_its_path(tmp_path, name, precision):
    runtime = RUNTIMES[name]()
    path = tmp_path / f"model{runtime.suffix}"
    path.write_bytes(emitted(name, "residual", precision)[0])
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
