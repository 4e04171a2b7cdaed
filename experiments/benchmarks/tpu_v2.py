"""Question: does the TPU compiler order networks as a TPU that runs them does, and how well does it know their speed?

Run: python experiments/benchmarks/tpu_v2.py DATA --cache FOLDER [--form blocks] [--networks N] [--seconds 240]
     [--json experiments/results/tpu_v2.json]
     3 to 5 s a block, 15 to 25 s a whole network on one core; cut off, or out of --seconds, the same command goes on

DATA is `accel_nasbench_half.npz`: networks of Accel-NASBench (Ahmad et al. 2024, arXiv:2404.08005) with their measured
throughput on a TPUv2. By their account (github.com/afzalxo/ANB-DatasetCollection: README, measure_throughput_tpu.py and
trainval/trainval_tpu.py) that is one core, batch 64, 224 px, PyTorch/XLA 1.13 with XLA_USE_BF16, ReLU, evaluation mode
but *without* `torch.no_grad()`. So every tensor that autograd keeps for a backward pass that never comes was still
referenced when the step was cut, and PyTorch/XLA made it a result of the program, written to HBM. By `--form`:

    as_run    that program: norms not folded, all that autograd keeps is a result, in the layouts that PyTorch/XLA
              gives to arrays on TPUs (torch_xla/csrc/layout_manager.cpp)
    blocks    the same, each block compiled alone and summed, as a latency table does: 170 programs for all networks
    deployed  what nas estimates for a device: norms folded, logits the only result

Nothing is fitted to the measured throughput, but for the rows `calibrated`: the correction that a latency table gets
(`nas.latency.calibrate`), fitted on 10 networks and judged on all others, for 200 random choices of the 10.
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding
from scipy import stats

from nas import cost, kernels
from nas.agreement import advantage, agreement, kendall_tau
from nas.blocks.rounding import expanded
from nas.files import read_as, write_json
from nas.latency import Entry, calibrate
from nas.measure import tpu
from nas.ops import NORM_EPSILON, Act, Add, Block, Graph, Network, Norm, Recorder, Shape, weights
from nas.run import compute

GENERATION, PRECISION, BATCH, PIXELS = "v2", "bfloat16", 64, 224
FORMS = ("as_run", "blocks", "deployed")
ANCHORS, DRAWS = 10, 200


def network(data: dict[str, np.ndarray], row: int) -> Network:
    """One network of the benchmark: stem, seven stages of inverted residuals, head."""
    net = Recorder((PIXELS, PIXELS, 3))
    conv = net.conv(net.input, "conv", int(data["stage_in"][0]), kernel=3, stride=2)
    net.act(net.norm(conv, "norm"), "relu")
    blocks = [Block("stem", "stem", net.graph())]
    for stage in range(7):
        expand, kernel, layers = (int(data[name][row, stage]) for name in "ekl")
        width, stride, se = (
            int(data["stage_out"][stage]),
            int(data["stage_stride"][stage]),
            bool(data["se"][row, stage]),
        )
        for layer in range(layers):
            options = (width, kernel, expand, stride if layer == 0 else 1, se)
            graph = residual(blocks[-1].graph.shape, *options)
            blocks.append(Block(f"stage{stage}/layer{layer}", f"residual {options}", graph))
    net = Recorder(blocks[-1].graph.shape)
    x = net.act(net.norm(net.conv(net.input, "conv", 4 * net.input.channels), "norm"), "relu")
    net.dense(net.pool(x), "logits", 1000)
    return Network((*blocks, Block("head", "head", net.graph())))


@functools.cache
def residual(shape: Shape, width: int, kernel: int, expand: int, stride: int, se: bool) -> Graph:
    """`nas.blocks.mbconv`, but for a squeeze to a quarter of the block's input, not of its hidden channels."""
    net = Recorder(shape)
    x = y = net.input
    hidden = expanded(x.channels, expand)
    if hidden != x.channels:
        y = net.act(net.norm(net.conv(y, "expand", hidden), "expand_norm"), "relu")
    y = net.conv(y, "depthwise", hidden, kernel=kernel, stride=stride, groups=hidden)
    y = net.act(net.norm(y, "depthwise_norm"), "relu")
    if se:
        squeezed = net.act(net.conv(net.pool(y), "se_reduce", x.channels // 4, bias=True), "relu")
        y = net.mul(y, net.act(net.conv(squeezed, "se_expand", hidden, bias=True), "hard_sigmoid"))
    y = net.norm(net.conv(y, "project", width), "project_norm")
    if y.shape == x.shape:
        net.add(x, y)
    return net.graph()


# the program that was measured


def kept(graph: Graph) -> list[int]:
    """Ops whose results autograd keeps: all, but for norms that a ReLU or a sum replaces in place."""
    readers = graph.consumers()

    def replaced(index: int) -> bool:
        after = [graph.ops[reader] for reader in readers[index + 1]]
        return isinstance(graph.ops[index], Norm) and bool(after) and all(isinstance(op, Act | Add) for op in after)

    return [index for index in range(len(graph.ops)) if not replaced(index)]


def forward(graph: Graph, params: dict[str, jax.Array], images: jax.Array) -> list[jax.Array]:
    """What `kept` names, computed op by op in the type of `images`."""
    values = [images]
    for op in graph.ops:
        x = values[op.inputs[0]]
        if isinstance(op, Norm):
            mean, var, scale, offset = (params[f"{op.name}/{role}"] for role in ("mean", "var", "scale", "offset"))
            y = (x - mean) * (scale * jax.lax.rsqrt(var + jnp.asarray(NORM_EPSILON, x.dtype))) + offset
        else:
            y = compute(op, params, [values[v] for v in op.inputs])
        values.append(y.astype(images.dtype))
    return [values[index + 1] for index in kept(graph)]


def torch_layout(shape: Shape) -> tuple[int, ...]:
    """Axes from major to minor that PyTorch/XLA gives to an array on a TPU: as they are, or sorted by size.

    The order is kept where padding the last two axes to tiles of 8 by 128 adds less than a quarter.
    """
    if len(shape) < 2:
        return tuple(range(len(shape)))
    padded = [-(-size // tile) * tile / size for size, tile in zip(shape[-2:], (8, 128), strict=True)]
    if padded[0] * padded[1] < 1.25:
        return tuple(range(len(shape)))
    return tuple(sorted(range(len(shape)), key=lambda axis: shape[axis]))


def layout(shape: Shape, sharding: Sharding, *, torch_axes: tuple[int, ...]) -> Format:
    """`torch_layout` of an array whose axes are ours; PyTorch's axis i is our axis torch_axes[i]."""
    order = torch_layout(tuple(shape[axis] for axis in torch_axes))
    return Format(Layout(tuple(torch_axes[axis] for axis in order)), sharding)


def activation(shape: Shape, sharding: Sharding) -> Format:
    """Of [n, h, w, c], which PyTorch has as [n, c, h, w], or [n, features]."""
    return layout(shape, sharding, torch_axes=(0, 3, 1, 2) if len(shape) == 4 else (0, 1))


def parameter(shape: Shape, sharding: Sharding) -> Format:
    """Of a kernel [h, w, in, out], which PyTorch has as [out, in, h, w], a matrix or a vector."""
    return layout(shape, sharding, torch_axes={4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(shape)])


def compile_as_run(graph: Graph) -> jax.stages.Compiled:
    """The program that was measured."""
    sharding, dtype = tpu.sharding_of(GENERATION), tpu.PRECISIONS[PRECISION]

    def array(shape: Shape) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shapes = {w.name: w.shape for w in weights(graph)}
    images = (BATCH, *graph.input)
    program = jax.jit(
        lambda params, x: forward(graph, params, x),
        in_shardings=({n: parameter(s, sharding) for n, s in shapes.items()}, activation(images, sharding)),
        out_shardings=[activation((BATCH, *graph.ops[index].shape), sharding) for index in kept(graph)],
    )
    with kernels.for_accelerator():
        lowered = program.lower({n: array(s) for n, s in shapes.items()}, array(images))
    return tpu.compile_lowered(lowered)


def estimate(graph: Graph, form: str, cache: Path) -> tpu.Estimate:
    """Of a network or block, kept in `cache`."""
    if form == "deployed":
        return tpu.estimate(graph, GENERATION, PRECISION, BATCH, cache=cache)
    path = cache / tpu.version() / "as_run" / f"{graph.key}.json"
    if not path.exists():
        found = tpu.describe(compile_as_run(graph), GENERATION, PRECISION, BATCH)
        write_json(path, msgspec.to_builtins(found))
    return read_as(path, tpu.Estimate)


def estimates(networks: list[Network], form: str, cache: Path, seconds: float) -> dict[str, np.ndarray] | None:
    """Columns [networks] of milliseconds, the compiler's lower bound and bytes; None if that took too long."""
    parts = [[b.graph for b in n.blocks] if form == "blocks" else [n.flat()] for n in networks]
    found: dict[Graph, tpu.Estimate] = {}
    distinct, begin = list(dict.fromkeys(graph for graphs in parts for graph in graphs)), time.monotonic()
    for index, graph in enumerate(distinct):
        if time.monotonic() - begin > seconds:
            print(f"{index} of {len(distinct)} programs are compiled; the same command goes on")
            return None
        found[graph] = estimate(graph, form, cache)
        print(f"{index + 1}/{len(distinct)}: {found[graph].latency_ms:.2f} ms", flush=True)
    columns = {"estimated latency": "latency_ms", "optimal_seconds": "optimal_seconds", "bytes": "bytes_accessed"}
    return {
        name: np.array([sum(getattr(found[graph], field) for graph in graphs) for graphs in parts])
        for name, field in columns.items()
    }


# what it is worth


def calibrated(graphs: list[Graph], estimated_ms: np.ndarray, measured_ms: np.ndarray) -> dict[str, float]:
    """Means over draws of anchors, each judged on the networks that are no anchors."""
    entries = {
        graph.key: Entry(float(ms), 0.0, "network", "first", 1) for graph, ms in zip(graphs, estimated_ms, strict=True)
    }
    rng, rows = np.random.default_rng(0), []
    for _ in range(DRAWS):
        order = rng.permutation(len(graphs))
        anchors, rest = order[:ANCHORS], order[ANCHORS:]
        found = calibrate(entries, [[graphs[i]] for i in anchors], measured_ms[anchors])
        ours = [found.offset_ms + found.block_ms(entries[graphs[i].key], graphs[i]) for i in rest]
        error = np.array(ours) / measured_ms[rest] - 1
        predicted = (1 + error) * measured_ms[rest]
        scale = float(np.mean(measured_ms[anchors] / estimated_ms[anchors]))
        plain = scale * estimated_ms[rest] / measured_ms[rest] - 1
        rows.append(
            {
                "tau": kendall_tau(predicted, measured_ms[rest]),
                "mape": float(np.abs(error).mean()),
                "within_10": float((np.abs(error) <= 0.1).mean()),
                "mape_scale_only": float(np.abs(plain).mean()),
                "within_10_scale_only": float((np.abs(plain) <= 0.1).mean()),
            }
        )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} | {
        f"tau_{end}": float(np.quantile([row["tau"] for row in rows], share))
        for end, share in (("low", 0.025), ("high", 0.975))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cache", type=Path, required=True, help="a folder that keeps estimates")
    parser.add_argument("--networks", type=int, help="so many, drawn at random; without it all that were measured")
    parser.add_argument("--form", choices=FORMS, default="blocks")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no compilation after so many")
    parser.add_argument("--json", type=Path, help="write everything there as well")
    options = parser.parse_args()
    with np.load(options.data) as file:
        data = dict(file)
    throughput = data["perf"][:, data["perf_names"].tolist().index("throughput_tpuv2")]
    measured = np.flatnonzero(~np.isnan(throughput))
    rows = np.random.default_rng(0).permutation(measured)[: options.networks]
    networks = [network(data, int(row)) for row in rows]
    columns = estimates(networks, options.form, options.cache, options.seconds)
    if columns is None:
        return
    graphs = [n.flat() for n in networks]
    measured_ms = BATCH / throughput[rows].astype(np.float64) * 1e3
    estimated_ms = columns["estimated latency"]
    columns["MACs"] = np.array([cost.macs(g) for g in graphs], np.float64)
    columns["parameters"] = np.array([cost.parameters(g) for g in graphs], np.float64)
    ratio = estimated_ms / measured_ms
    print(f"\n{len(rows)} networks, {options.form}; Kendall tau with measured latency [95 % bootstrap interval]")
    found = {name: agreement(column, measured_ms) for name, column in columns.items()}
    for name, column in columns.items():
        print(f"  {name:<28}{found[name]}   Spearman {stats.spearmanr(column, measured_ms)[0]:.3f}")
    over_macs = advantage(estimated_ms, columns["MACs"], measured_ms)
    after = calibrated(graphs, estimated_ms, measured_ms)
    print(f"  estimate above MACs by      {over_macs}")
    print(f"  estimated / measured: median {np.median(ratio):.2f}, p5 {np.quantile(ratio, 0.05):.2f}, p95 "
          f"{np.quantile(ratio, 0.95):.2f}")  # fmt: skip
    print(
        f"calibrated on {ANCHORS}, judged on the rest: tau {after['tau']:.2f} [{after['tau_low']:.2f}, "
        f"{after['tau_high']:.2f} over draws], error {after['mape']:.1%}, {after['within_10']:.0%} within 10 %; by a "
        f"scale alone {after['mape_scale_only']:.1%}, {after['within_10_scale_only']:.0%} within 10 %"
    )
    if options.json:
        best, macs = found["estimated latency"], found["MACs"]
        result = {
            "tpu_v2": {"tau": best.tau, "tau_low": best.low, "tau_high": best.high, "tau_macs": macs.tau,
                       "networks": len(rows)},
            "form": options.form, "agreement": {n: msgspec.to_builtins(a) for n, a in found.items()},
            "advantage_over_macs": msgspec.to_builtins(over_macs), "calibrated": after,
            "ratio": {"median": float(np.median(ratio)), "p5": float(np.quantile(ratio, 0.05)),
                      "p95": float(np.quantile(ratio, 0.95))},
            "versions": tpu.version(),
        }  # fmt: skip
        write_json(options.json, result)


if __name__ == "__main__":
    main()
