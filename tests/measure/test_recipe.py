import os
from typing import Any

import numpy as np
import pytest
import tiny

from nas import cost
from nas.config import Device, Latency, load_experiment
from nas.errors import DeviceError, LatencyError
from nas.latency import Table, load_device, op_counts
from nas.measure import measure, prepare, recipe, runtime_class, runtime_of
from nas.ops import Graph
from nas.pipeline.job import Job
from nas.space import Space, load_space


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits_mixed", input_shape=(16, 16, 1), classes=10)


@pytest.fixture(scope="module")
def device() -> Device:
    return load_device("host_onnxruntime")


class Simulated:
    """A device on which a call costs an overhead and so much for each op and MAC, and SE doubles at some time."""

    def __init__(self, changes_at: float = float("inf")):
        self.now, self.changes_at = 0.0, changes_at

    def own_ms(self, graph: Graph) -> float:
        return 0.02 + 0.01 * sum(op_counts(graph).values()) + cost.macs(graph) * 1e-6

    def prepare(self, graph: Graph, *_, **__):
        own = self.own_ms(graph) / 1e3
        se = "mul" in op_counts(graph)

        def call() -> None:
            self.now += own * (2.0 if se and self.now > self.changes_at else 1.0)

        return call


def simulate(monkeypatch, space: Space, device: Device, simulated: Simulated, **options):
    monkeypatch.setattr(recipe, "prepare", simulated.prepare)
    settings = Latency(**{"seconds": 3.0, "min_rounds": 5, "anchors": 12, "holdout": 16, **options})
    return measure(space, device, "float32", settings, seed=0, clock=lambda: simulated.now)


def test_where_costs_add_up_the_table_is_exact_and_counts_a_call_once(monkeypatch, space, device):
    simulated = Simulated()
    table, proof = simulate(monkeypatch, space, device, simulated)
    assert proof.mape < 1e-6
    assert proof.kendall_tau > 0.999
    assert table.overhead_ms == pytest.approx(0.02)
    for key, (block, role) in space.blocks().items():
        alone = simulated.own_ms(block.graph) - (0.0 if role == "first" else 0.02)
        assert table.entries[key].latency_ms == pytest.approx(alone)
    assert table.correction.scale == pytest.approx(1)


@pytest.mark.parametrize("anchors", [1, 3, 6])
def test_any_number_of_anchors_will_do(monkeypatch, space, device, anchors):
    table, proof = simulate(monkeypatch, space, device, Simulated(), anchors=anchors)
    assert len(table.anchors) == anchors
    assert proof.mape < 1e-6


def test_an_uneven_machine_is_refused_and_who_uses_it_is_told(monkeypatch, space, device):
    with pytest.raises(LatencyError, match=r"disagree by \d+%.*using CPU now.*quieter"):
        simulate(monkeypatch, space, device, Simulated(changes_at=4.0), seconds=8.0)


def test_a_space_without_choices_is_refused(monkeypatch, space, device, tmp_path):
    single = tmp_path / "single.toml"
    stage = '[[stage]]\nblock = "mbconv"\nwidth = 16\n'
    single.write_text(f'[stem]\nblock = "conv_stem"\nwidth = 16\n{stage}[head]\nblock = "classifier"\nwidth = 32\n')
    with pytest.raises(LatencyError, match="has 1 networks"):
        simulate(monkeypatch, load_space(str(single)), device, Simulated())


def test_the_same_seed_measures_the_same_networks_none_of_them_twice(space):
    settings = Latency(anchors=16, holdout=24)
    first, again = (recipe.choose_networks(space, settings, np.random.default_rng(5)) for _ in range(2))
    assert all((first[k] == again[k]).all() for k in first)
    both = np.concatenate([first["anchor"], first["held_out"]])
    assert len(np.unique(both, axis=0)) == 16 + 24
    macs = space.price(space.sample(np.random.default_rng(0), 2000), space.costs(cost.macs))
    held_out = space.price(first["held_out"], space.costs(cost.macs))
    assert held_out.min() < np.quantile(macs, 0.1)
    assert held_out.max() > np.quantile(macs, 0.9)


def test_a_real_table_is_complete_ranks_networks_and_comes_back_from_disk(space, device, tmp_path):
    told: list[tuple[str, float, float]] = []
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    table, proof = measure(
        space,
        device,
        "float32",
        Latency(seconds=3.0, min_rounds=15, anchors=12, holdout=16),
        seed=0,
        progress=lambda *what: told.append(what),
    )
    assert set(table.entries) == set(space.blocks())
    assert all(e.latency_ms > 0 and e.rounds >= 15 for e in table.entries.values())
    assert (table.runtime, table.threads, table.space_digest) == ("onnxruntime", 1, space.digest)
    assert proof.networks == 16
    assert proof.kendall_tau > 0.5
    assert proof.rows[0].predicted_ms == table.network_ms(space.decode(proof.rows[0].genotype))
    assert {what for what, _, _ in told} == {"building", "timing"}
    assert told[-1][1:] == (1.0, 0.0)
    table.save(tmp_path)
    assert Table.load(tmp_path, "float32") == table
    if affinity is not None:
        assert os.sched_getaffinity(0) == affinity


def test_an_int8_block_runs_without_data(space, device):
    block = space.decode(space.smallest()).blocks[1]
    prepare(block.graph, device, "int8")()


def test_an_unknown_runtime_or_precision_names_the_nearest(space):
    with pytest.raises(DeviceError, match="Did you mean `onnxruntime`"):
        runtime_of(Device(device="x", runtime="onnx_runtime"))
    with pytest.raises(DeviceError, match="Did you mean `int8`"):
        prepare(space.decode(space.smallest()).flat(), Device(device="x", runtime="onnxruntime"), "int4")
    with pytest.raises(DeviceError, match="precision `int4`, which runtime `onnxruntime` does not have"):
        runtime_class(Device(device="x", runtime="onnxruntime", precision=("float32", "int4")))


@pytest.mark.parametrize(
    ("line", "message"),
    [('runtime = "onnxruntim"', "unknown runtime"), ('runtime = "onnxruntime"\nprecision = ["int4"]', "`int4`")],
)
def test_a_job_tells_them_when_its_device_is_first_asked_for(tmp_path, line, message):
    (tmp_path / "device.toml").write_text(f'device = "x"\n{line}\n')
    experiment = load_experiment(tiny.write_experiment(tmp_path), overrides=(f"device='{tmp_path}'",))
    unused: Any = None
    for part in ("device", "runtime"):
        with pytest.raises(DeviceError, match=message):
            getattr(Job(experiment, unused, unused), part)
