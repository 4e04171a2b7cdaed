"""The benchmark builds the published networks, and compiles what was measured."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from nas import cost
from nas.ops import Act, Conv, Norm, weights
from nas.run import run

SCRIPT = Path(__file__).parents[2] / "experiments" / "benchmarks" / "tpu_v2.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("tpu_v2_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one(e=1, k=3, layers=1, se=False) -> dict[str, np.ndarray]:
    """A data file with one network, all stages alike."""
    same = {"e": e, "k": k, "l": layers, "se": se}
    return {name: np.full((1, 7), value) for name, value in same.items()} | {
        "stage_in": np.array([32, 16, 24, 40, 80, 112, 192]),
        "stage_out": np.array([16, 24, 40, 80, 112, 192, 320]),
        "stage_stride": np.array([1, 2, 2, 2, 1, 2, 1]),
    }


def test_networks_have_the_published_numbers_of_parameters(script, real_data):
    with np.load(real_data / "accel_nasbench_half.npz") as file:
        data = dict(file)
    for row in range(0, len(data["e"]), 50):
        graph = script.network(data, row).flat()
        assert cost.parameters(graph) / 1e6 == pytest.approx(float(data["params_M"][row]), rel=1e-5)
        assert 0.85 < cost.macs(graph) / 1e6 / data["macs_M"][row] < 0.97  # theirs count norms and pooling as well


def test_autograd_keeps_all_but_norms_that_are_replaced_in_place(script):
    graph = script.network(one(layers=2, se=True), 0).flat()
    kept = [graph.ops[index] for index in script.kept(graph)]
    assert sum(isinstance(op, Conv) for op in kept) == sum(isinstance(op, Conv) for op in graph.ops)
    assert sum(isinstance(op, Act) for op in kept) == sum(isinstance(op, Act) for op in graph.ops)
    norms = sum(isinstance(op, Norm) for op in kept)
    assert norms == 7  # of the first block of each stage: no ReLU follows, and no sum, since its shape changes


def test_what_is_kept_ends_with_the_logits_that_nas_computes(script, monkeypatch):
    monkeypatch.setattr(script, "PIXELS", 32)
    graph = script.network(one(), 0).flat()
    rng = np.random.default_rng(0)
    params = {w.name: rng.random(w.shape, np.float32) / 10 + (w.role == "var") for w in weights(graph)}
    images = rng.standard_normal((2, 32, 32, 3)).astype(np.float32)
    values = jax.jit(lambda p, x: script.forward(graph, p, x))(params, images)
    assert len(values) == len(script.kept(graph))
    np.testing.assert_allclose(values[-1], run(graph, params, images)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((64, 32, 112, 112), (0, 1, 2, 3)),  # 112 fills 128 lanes well: as it is
        ((64, 144, 56, 56), (2, 3, 0, 1)),  # 56 would not: the largest axis is minor
        ((64, 16, 7, 7), (2, 3, 1, 0)),
        ((1000, 1280), (0, 1)),
        ((1280,), (0,)),
    ],
)
def test_layouts_are_those_of_pytorch_xla(script, shape, order):
    assert script.torch_layout(shape) == order
