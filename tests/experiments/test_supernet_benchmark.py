"""The benchmark compares like with like: PyTorch's supernet gives our answers at our cost."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from nas import config, cost
from nas.run import run
from nas.space import load_space
from nas.supernet import Supernet

FOLDER = Path(__file__).parents[2] / "experiments" / "benchmarks"
SPACES = {
    "plain": (FOLDER / "mbconv_32.toml").read_text(),
    "squeezed": """
[stem]
block = "conv_stem"
width = 8
[[stage]]
block = "mbconv"
stride = 2
depth = [1, 2]
width = [8, 16]
kernel = [3, 5, 7]
expand = [1, 3]
se = [false, true]
act = ["relu", "hard_swish"]
[head]
block = "classifier"
width = 24
""",
}


@pytest.fixture
def load(monkeypatch):
    """Imports a script of the folder by its name, under another: there is a `supernet` among the tests."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look it up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(params=SPACES)
def pair(request, tmp_path, load):
    """(space, weights that show every mistake, our supernet, PyTorch's)."""
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[benchmark]'")
    path = tmp_path / "space.toml"
    path.write_text(SPACES[request.param])
    space = load_space(str(path), input_shape=(16, 16, 3))
    supernet, rng = Supernet(space), np.random.default_rng(0)
    params = {n: (a + 0.1 * rng.normal(size=a.shape)).astype(np.float32) for n, a in supernet.init(0).items()}
    return space, params, supernet, load("torch_supernet").Peer(space, params, config.Optimiser(), form="channels_last")


def subnets(space):
    return [space.smallest(), space.largest(), *space.sample(np.random.default_rng(1), 4)]


@pytest.mark.slow
def test_pytorch_gives_our_logits(pair):
    space, params, supernet, peer = pair
    images = np.random.default_rng(2).normal(size=(32, *space.input)).astype(np.float32)
    peer.net.train()
    for genotype in subnets(space):
        network = space.decode(genotype)
        ours, _ = run(network.flat(), supernet.slice(params, network), images, batch_stats=True)
        theirs = peer.net(peer.images(images[:, ::-1, ::-1].copy()), peer.subnet(genotype)).detach().numpy()
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_pytorch_recalibrates_batch_norm_as_we_do(pair):
    space, params, supernet, peer = pair
    rng = np.random.default_rng(3)
    batches = rng.normal(size=(3, 32, *space.input)).astype(np.float32)
    for genotype in subnets(space):
        network = space.decode(genotype)
        graph, mine = network.flat(), supernet.slice(params, network)
        seen = [run(graph, mine, batch, batch_stats=True)[1] for batch in batches]
        statistics = {name: np.mean([s[name] for s in seen], axis=0) for name in seen[0]}
        ours, _ = run(graph, mine | statistics, batches[0])
        images = peer.images(batches[:, :, ::-1, ::-1].copy())
        peer.calibrate(peer.subnet(genotype), list(images))
        theirs = peer.net(images[0], peer.subnet(genotype)).detach().numpy()
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_pytorch_counts_our_macs_and_parameters(pair):
    space, _, _, peer = pair
    for genotype in subnets(space):
        graph = space.decode(genotype).flat()
        assert peer.size(genotype) == (cost.macs(graph), cost.parameters(graph))


def test_the_json_has_the_issues_keys_and_says_what_was_not_measured(load):
    benchmark = load("supernet")
    figure = benchmark.Figure((3.0, 1.0, 2.0), load=1.5, busy=1, more={"ms": 12.34567})
    out = benchmark.as_json({"memory_ratio": figure, "step_ratio_alone.largest": figure})
    assert out["memory_ratio"] == {
        "median": 2.0, "quartiles": [1.5, 2.5], "rounds": 3, "load": 1.5, "busy_rounds": 1, "ms": 12.35
    }  # fmt: skip
    assert out["step_ratio_alone"] == {"smallest": None, "random": None, "largest": out["memory_ratio"]}
    assert out["eval_rate_prefix_vs_torch"] is None
    assert set(out) == {
        "step_ratio_alone", "memory_ratio", "compile_seconds", "recompilations", "train_time_vs_torch",
        "eval_rate_vs_torch", "eval_rate_prefix_vs_torch",
    }  # fmt: skip
    assert set(out["train_time_vs_torch"]) == {"xla", "native"}


def test_ratios_are_taken_within_a_round(load):
    rounds = load("supernet").Rounds({"a": np.array([1.0, 10.0]), "b": np.array([2.0, 20.0])}, load=0.0, busy=0)
    assert rounds.ratio("a", "b").samples == (0.5, 0.5)
