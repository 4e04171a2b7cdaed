import importlib.util
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from nas import catalog, cost
from nas.config import Latency
from nas.errors import DeviceError
from nas.latency import Table, load_device, op_counts
from nas.measure import runtime_class, tpu
from nas.ops import Graph, Recorder
from nas.space import Space, load_space

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)

ESTIMATED = '"window_config":{"kernel_window_bounds":[],"estimated_cycles":"%d","iteration_bounds":["1"]}'
PROGRAM = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[8,8]{1,0:T(8,128)(2,1)})->bf16[8,8]{1,0}}

%fused (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %inner = bf16[8,8]{1,0:T(8,128)(2,1)} copy(%a), backend_config={"estimated_cycles":"999999"}
}

ENTRY %main (x: bf16[8,8], w: bf16[1000,1280]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %w = bf16[1000,1280]{0,1:T(8,128)(2,1)} parameter(1)
  %begun = (bf16[1000,1280]{0,1:T(8,128)(2,1)S(1)}, bf16[1000,1280]{0,1:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %fusion = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused, backend_config={FIRST}
  %moved = bf16[1000,1280]{0,1:T(8,128)(2,1)S(1)} copy-done(%begun)
  ROOT %out = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%fusion, %moved), kind=kOutput, calls=%fused, backend_config={LAST}
}
"""
MOVED = 1280 * 1024 * 2  # bytes of the copy: 1000 is the minor axis, padded to 128
HARDWARE = tpu.Generation("", "", clock_ghz=1.0, hbm_gbps=1.0)


def program(first: int, last: int) -> str:
    return PROGRAM.replace("FIRST", ESTIMATED % first).replace("LAST", ESTIMATED % last)


def test_a_copy_runs_beside_a_kernel_and_who_needs_it_waits():
    schedule = tpu.play(program(1_000_000, 5_000), HARDWARE)
    assert (schedule.kernels, schedule.cycles) == (2, 1_005_000)  # what is inside a fusion is part of it
    assert schedule.waiting_seconds == pytest.approx(MOVED / 1e9 - 1e-3)
    assert schedule.seconds == pytest.approx(MOVED / 1e9 + 5e-6)


def test_a_copy_that_a_kernel_outlasts_costs_nothing():
    schedule = tpu.play(program(4_000_000, 5_000), HARDWARE)
    assert schedule.waiting_seconds == 0
    assert schedule.seconds == pytest.approx(4.005e-3)


def test_what_only_moves_costs_its_bytes_where_the_compiler_gives_no_cycles():
    moves = program(1_000, 1_000).replace("fusion(%x), kind=kLoop, calls=%fused", "reshape(%x), metadata={}")
    schedule = tpu.play(moves.replace(ESTIMATED % 1_000, "", 1), HARDWARE)
    once = 8 * 128 * 2 / 1e9  # written, and as much is read
    assert schedule.kernels == 2
    assert schedule.seconds == pytest.approx(MOVED / 1e9 + 1e-6)
    assert schedule.waiting_seconds == pytest.approx(MOVED / 1e9 - 2 * once)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("bf16[64,56,56,24]{0,3,2,1:T(8,128)(2,1)}", 128 * 24 * 56 * 56 * 2),  # 64 images fill half of the 128 lanes
        ("bf16[64,56,56,24]{3,0,2,1:T(8,128)(2,1)}", 64 * 128 * 56 * 56 * 2),
        ("f32[10,3]{1,0:T(8,128)}", 16 * 128 * 4),
        ("bf16[1280]{0:T(1024)(128)(2,1)S(1)}", 2048 * 2),
        ("pred[5,7]{1,0}", 35),
        ("f32[]", 4),
        ("(bf16[16]{0}, u32[]{:S(2)})", 32),
    ],
)
def test_bytes_are_those_of_whole_tiles(shape, expected):
    assert tpu.nbytes(shape) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (program(1, 1).replace("is_scheduled=true, ", ""), "without a schedule"),
        ("", "without a schedule"),
        (program(1, 1).replace("fusion(%x), kind=kLoop,", "while(%x), body=%b,").replace(ESTIMATED % 1, ""), "`while`"),
        (program(1, 1).replace("(bf16[1000,1280]{0,1:T(8,128)(2,1)S(1)}, ", "(?[1000], ", 1), "shape"),
    ],
)
def test_what_cannot_be_read_is_refused_not_counted_as_nothing(text, message):
    if message == "shape":
        text = text.replace("bf16[1000,1280]{0,1:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start", "?) copy-start")
    with pytest.raises(DeviceError, match=message):
        tpu.play(text, HARDWARE)


def conv(features: int, *, size: int = 16, kernel: int = 3) -> Graph:
    net = Recorder((size, size, 16))
    net.act(net.norm(net.conv(net.input, "conv", features, kernel=kernel), "norm"), "relu")
    return net.graph()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"generation": "v1"}, r"generation `v1`.*Known: v2, v3, v4, v5e, v5p, v6e"),
        ({"precision": "int8"}, r"precision `int8`.*Known: float32, bfloat16"),
        ({"batch": 0}, "batch of 0 images.*at least 1"),
    ],
)
def test_what_is_unknown_is_told_with_what_is_known(asked, message):
    with pytest.raises(DeviceError, match=message):
        tpu.estimate(conv(16), **{"generation": "v5e", "precision": "bfloat16", "batch": 1, **asked})


def test_without_libtpu_the_error_says_how_to_install_it(monkeypatch):
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tpu.metadata, "version", version)
    with pytest.raises(DeviceError, match=r"pip install 'jax\[tpu\]'"):
        tpu.estimate(conv(16), "v5e")


@needs_libtpu
def test_an_estimate_is_kept_and_a_damaged_one_made_again(tmp_path, monkeypatch):
    first = tpu.estimate(conv(16), "v5e", cache=tmp_path)
    assert (first.generation, first.precision, first.batch) == ("v5e", "bfloat16", 1)
    assert 0 <= first.waiting_ms < first.latency_ms
    assert first.flops > 2 * cost.macs(conv(16)) * 0.8  # it counts no products with padding
    assert first.peak_memory_bytes > 2 * 16 * 16 * 16 * 2  # images and results
    (kept,) = tmp_path.rglob("*.json")
    with monkeypatch.context() as patched:
        patched.setattr(tpu, "compile_graph", lambda *_: pytest.fail("compiled again"))
        assert tpu.estimate(conv(16), "v5e", cache=tmp_path) == first
    kept.write_bytes(kept.read_bytes()[:20])
    assert tpu.estimate(conv(16), "v5e", cache=tmp_path) == first


@needs_libtpu
@pytest.mark.slow
def test_more_work_is_estimated_to_take_longer():
    one, batch, wide = (
        tpu.estimate(conv(features, size=32), "v5e", batch=images)
        for features, images in ((64, 1), (64, 64), (512, 64))
    )
    assert 0 < one.latency_ms < batch.latency_ms < wide.latency_ms
    assert one.optimal_seconds < batch.optimal_seconds < wide.optimal_seconds
    assert one.peak_memory_bytes < batch.peak_memory_bytes < wide.peak_memory_bytes


@needs_libtpu
def test_a_program_that_does_not_fit_is_refused():
    with pytest.raises(DeviceError, match="smaller batch"):
        tpu.estimate(conv(512, size=512, kernel=1), "v2", "float32", batch=256)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("generation", tpu.GENERATIONS)
@pytest.mark.parametrize("precision", tpu.PRECISIONS)
def test_every_generation_estimates_a_network(generation, precision):
    space = load_space("digits_mixed", input_shape=(16, 16, 1), classes=10)
    network = space.decode(space.sample(np.random.default_rng(0), 1)[0]).flat()
    for batch in (1, 64):
        assert tpu.estimate(network, generation, precision, batch).latency_ms > 0


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits_mixed", input_shape=(16, 16, 1), classes=10)


@pytest.mark.parametrize("name", [n for n in catalog.list_devices() if n.startswith("tpu_")])
def test_the_devices_that_come_along_name_a_generation_and_its_precisions(name):
    device = load_device(name)
    assert device.hardware.removeprefix("TPU ") in tpu.GENERATIONS
    assert set(device.precision) <= set(tpu.PRECISIONS)
    with pytest.raises(DeviceError, match="which is estimated: `nas measure"):
        runtime_class(device)


def test_where_estimates_add_up_the_table_is_exact_and_says_that_it_is_estimated(monkeypatch, space, tmp_path):
    asked = []

    def estimate(graph: Graph, generation: str, precision: str, batch: int, *, cache: Path | None) -> tpu.Estimate:
        asked.append(graph.key)
        ms = 0.02 + 0.01 * sum(op_counts(graph).values()) + cost.macs(graph) * 1e-6
        return tpu.Estimate(generation, precision, batch, ms, 1, 1, 0.0, 0.0, 0.0, 0.0, 0)

    monkeypatch.setattr(tpu, "estimate", estimate)
    monkeypatch.setattr(tpu, "version", lambda: "libtpu 0, jax 0")
    done = []
    table, proof = tpu.estimate_table(
        space,
        load_device("tpu_v2_estimate"),
        "bfloat16",
        Latency(anchors=12, holdout=16),
        seed=0,
        progress=lambda what, share, left: done.append((what, share)),
    )
    assert table.kind == "estimated"
    assert (table.hardware, table.batch, table.runtime_version) == ("TPU v2", 64, "libtpu 0, jax 0")
    assert proof.mape < 1e-6
    assert len(asked) == len(set(asked))  # each distinct program once
    assert done[-1] == ("estimating", 1.0)
    table.save(tmp_path)
    assert Table.load(tmp_path, "bfloat16") == table


def test_a_device_of_another_runtime_is_refused(space):
    with pytest.raises(DeviceError, match="has the runtime `onnxruntime`"):
        tpu.estimate_table(space, load_device("host_onnxruntime"), "float32", Latency(), seed=0)


def test_a_device_that_is_there_is_timed():
    here = SingleDeviceSharding(jax.devices()[0])
    timing = tpu.measure_graph(conv(16), here, "float32", 2, calls=2, rounds=3)
    assert 0 < timing.p10_ms <= timing.latency_ms <= timing.p90_ms
    assert timing.rounds == 3


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="there is a TPU here")
def test_without_a_tpu_nothing_is_measured():
    assert all(tpu.on_this_machine(generation) is None for generation in tpu.GENERATIONS)
