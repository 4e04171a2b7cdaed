"""TPUs without a TPU: latencies from what the TPU compiler says of a program, on any x86 Linux machine.

libtpu compiles ahead of time for TPU v2 to v6e. What comes out is a schedule: one instruction after the other, each
kernel with the cycles that the compiler expects of it (its HBM traffic included), and copies between HBM and on-chip
memory that run beside them. An estimate is that schedule played through: kernels follow each other on the core; copies
follow each other at the HBM's bandwidth, and whoever needs one waits for it.

An estimate is no measurement, and a table made of them says so (`kind = "estimated"`). How far it may be trusted
against measured TPUv2 throughput is found by `experiments/benchmarks/tpu_v2.py`. On a machine with a TPU of the
generation that is asked for, the same programs are run and timed instead.
"""

import dataclasses
import functools
import math
import os
import re
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from nas import config, files, kernels
from nas.config import Device, nearest
from nas.errors import DeviceError, RunError
from nas.fold import fold
from nas.latency import Proof, Table, prove
from nas.latency.table import date_of
from nas.measure.bundle import Progress
from nas.measure.plan import for_table
from nas.measure.recipe import entries
from nas.ondevice import machine
from nas.ondevice.timing import Timing
from nas.ops import Graph, Norm, weights
from nas.run import run
from nas.space import Space

RUNTIME = "tpu_compiler"
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a program of one JAX device runs on: one TensorCore of v2, v3, v5e and v6e, both of a v4 or v5p chip."""

    topology: str  # the smallest that libtpu knows
    kind: str  # `device_kind` of JAX
    clock_ghz: float
    hbm_gbps: float  # gigabytes a second; half of the chip's where two devices share it
    options: tuple[tuple[str, str], ...] = ()


# v2, v3: Jouppi et al. 2020, "A Domain-Specific Supercomputer for Training Deep Neural Networks", CACM 63(7): 0.70 and
# 0.94 GHz, 700 and 900 GB/s a chip of two cores. v4: Jouppi et al. 2023, arXiv:2304.01433: 1.05 GHz, 1200 GB/s.
# v5e, v5p, v6e: cloud.google.com/tpu/docs gives 197, 459 and 918 bfloat16 TFLOP/s and 819, 2765 and 1640 GB/s; clocks
# are not published, these are TFLOP/s over the 131072, 262144 and 524288 operations a cycle that libtpu counts on for a
# large matmul (by the same division v2, v3 and v4 come out at their published clocks).
GENERATIONS = {
    "v2": Generation("v2:2x2", "TPU v2", 0.70, 350.0),
    "v3": Generation("v3:2x2", "TPU v3", 0.94, 450.0),
    "v4": Generation("v4:2x2x1", "TPU v4", 1.05, 1200.0, (("chip_config_name", "megacore"),)),
    "v5e": Generation("v5e:2x2", "TPU v5 lite", 1.50, 819.0),
    "v5p": Generation("v5p:2x2x1", "TPU v5", 1.75, 2765.0),
    "v6e": Generation("v6e:2x2", "TPU v6 lite", 1.75, 1640.0),
}


class Estimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the compiler says of one program."""

    generation: str
    precision: str
    batch: int
    latency_ms: float  # the schedule played through
    cycles: int  # of all kernels
    kernels: int
    waiting_ms: float  # part of `latency_ms`: for copies that no kernel hides
    bytes_accessed: float  # by all kernels, whatever the memory; the compiler's own figure
    flops: float
    optimal_seconds: float  # the compiler's own lower bound
    peak_memory_bytes: int  # arguments, results, temporaries and code


def estimate(
    graph: Graph, generation: str, precision: str = "bfloat16", batch: int = 1, *, cache: Path | None = None
) -> Estimate:
    """One inference of `graph`, norms folded, as the compiler of a TPU generation expects it to run.

    float32 is XLA's default on TPUs: stored and added as float32, multiplied as bfloat16.

    Args:
        generation: a name in `GENERATIONS`.
        precision: a name in `PRECISIONS`.
        cache: a folder that keeps estimates, each under the versions of libtpu and JAX that it was made with.

    Raises:
        DeviceError: unknown generation or precision, or libtpu is not installed or cannot compile the graph.
    """
    _require(generation, GENERATIONS, kind="generation")
    _require(precision, PRECISIONS, kind="precision")
    if batch < 1:
        raise DeviceError(f"a batch of {batch} images was asked for: at least 1 is needed.")
    folder = version()
    path = None if cache is None else cache / folder / f"{generation}.{precision}.{batch}.{graph.key}.json"
    if path is not None and path.exists():
        try:
            return files.read_as(path, Estimate)
        except RunError:  # cut short, or of another version of nas: made again
            path.unlink(missing_ok=True)
    compiled = compile_graph(graph, sharding_of(generation), precision, batch)
    found = describe(compiled, generation, precision, batch)
    if path is not None:
        files.write_json(path, msgspec.to_builtins(found))
    return found


def compile_graph(graph: Graph, sharding: Sharding, precision: str, batch: int) -> jax.stages.Compiled:
    """The program of one inference, norms folded, for the device of `sharding`, which need not exist.

    Raises:
        DeviceError: the compiler refuses it, as it does a program that needs more memory than there is.
    """
    folded = fold(graph, {w.name: np.ones(w.shape, np.float32) for w in weights(graph)})[0]
    dtype = PRECISIONS[precision]
    norms = tuple(f"{op.name}/" for op in folded.ops if isinstance(op, Norm))  # what could not be folded is float32
    params = {
        w.name: jax.ShapeDtypeStruct(w.shape, jnp.float32 if w.name.startswith(norms) else dtype, sharding=sharding)
        for w in weights(folded)
    }
    images = jax.ShapeDtypeStruct((batch, *folded.input), dtype, sharding=sharding)
    with kernels.for_accelerator():
        lowered = jax.jit(lambda p, x: run(folded, p, x)[0]).lower(params, images)
    return compile_lowered(lowered)


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """`lowered.compile()`.

    Raises:
        DeviceError: the compiler refuses it.
    """
    try:
        with warnings.catch_warnings():
            # JAX's own cache keeps programs for a TPU, but cannot load them where there is none
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        reason = str(e).splitlines()[0]
        raise DeviceError(f"the TPU compiler refuses this program: {reason} A smaller batch needs less memory.") from e


def estimate_table(
    space: Space,
    device: Device,
    precision: str,
    settings: config.Latency,
    *,
    seed: int,
    cache: Path | None = None,
    progress: Progress | None = None,
    command: str = "nas measure",
) -> tuple[Table, Proof]:
    """The table of all blocks of `space` on a TPU that need not be at hand, and its proof.

    The recipe is that of `nas.measure.measure`, sandwiches and anchors included, with estimates for timings. So the
    proof says how well the table adds up to whole networks *as the compiler estimates them*, and nothing of how well
    the compiler estimates. On a machine that has the TPU all of it is measured, and `kind` is "measured".

    Args:
        device: one whose runtime is "tpu_compiler"; its hardware is "TPU " and a name in `GENERATIONS`.
        settings: only `anchors` and `holdout` are used.
        cache: see `estimate`; a second call, or one after a crash, goes on where the first ended.

    Raises:
        DeviceError: the device is none of a TPU's compiler, or see `estimate`.
        LatencyError: the space has fewer than three networks.
    """
    if device.runtime != RUNTIME:
        raise DeviceError(f"device {device.device!r} has the runtime `{device.runtime}`; `{RUNTIME}` is needed.")
    generation = device.hardware.removeprefix("TPU ")
    _require(generation, GENERATIONS, kind="generation")
    here = on_this_machine(generation)  # None where the TPU is not at hand
    plan = for_table(space, device, precision, settings, seed=seed)
    timings: dict[str, Timing] = {}
    known: dict[str, Timing] = {}
    start = time.perf_counter()
    for index, (name, graph) in enumerate(plan.graphs.items(), 1):
        if graph.key not in known:
            if here:
                known[graph.key] = measure_graph(graph, here, precision, device.batch, seed=seed)
            else:
                ms = estimate(graph, generation, precision, device.batch, cache=cache).latency_ms
                known[graph.key] = Timing(ms, spread=0.0, interval=0.0, p10_ms=ms, median_ms=ms, p90_ms=ms, rounds=1)
        timings[name] = known[graph.key]
        if progress is not None:
            share = index / len(plan.graphs)
            left = (time.perf_counter() - start) * (1 - share) / share
            progress("timing" if here else "estimating", share, left)
    note = "of a schedule, not of a run: see nas/measure/tpu.py; the proof's networks are estimated too"
    table = Table(
        device=device.device,
        runtime=device.runtime,
        runtime_version=version(),
        precision=precision,
        threads=device.threads,
        batch=device.batch,
        hardware=device.hardware,
        space=space.name,
        space_digest=space.digest,
        input=space.input,
        classes=space.classes,
        date=date_of(time.time()),
        command=command,
        kind="measured" if here else "estimated",
        notes=(machine.load(),) if here else (note,),
        **entries(plan, timings),
    )
    held_out = np.array([timings[name].latency_ms for name in plan.held_out_names])
    proof = prove(table.price(space, plan.held_out), held_out, genotypes=plan.held_out, table=table.digest, seed=seed)
    return table, proof


def on_this_machine(generation: str) -> Sharding | None:
    """The device that JAX computes on, where that is a TPU of this generation."""
    if jax.default_backend() != "tpu" or jax.devices()[0].device_kind != GENERATIONS[generation].kind:
        return None
    return SingleDeviceSharding(jax.devices()[0])


def measure_graph(
    graph: Graph, sharding: Sharding, precision: str, batch: int, *, seed: int = 0, calls: int = 20, rounds: int = 9
) -> Timing:
    """One inference of `graph`, norms folded, on a device that is there.

    `calls` are enqueued and waited for together, so that the device computes without gaps, as it does in service.
    """
    compiled = compile_graph(graph, sharding, precision, batch)
    rng = np.random.default_rng(seed)
    params, images = jax.tree.map(
        lambda a: jax.device_put(jnp.asarray(rng.random(a.shape, np.float32) / 10, a.dtype), sharding),
        compiled.args_info[0],
    )
    jax.block_until_ready(compiled(params, images))
    times_ms = []
    for _ in range(rounds):
        begin = time.perf_counter()
        results = [compiled(params, images) for _ in range(calls)]
        jax.block_until_ready(results)
        times_ms.append((time.perf_counter() - begin) / calls * 1e3)
    low, p10, median, high, p90 = np.percentile(times_ms, (25, 10, 50, 75, 90)).tolist()
    interval = 1.96 * np.std(times_ms) / np.sqrt(rounds) / low
    return Timing(low, (high / low - 1) / 2, float(interval), p10, median, p90, rounds)


@functools.cache
def sharding_of(generation: str) -> Sharding:
    """Where to compile for: one device of a TPU that need not be there.

    Raises:
        DeviceError: libtpu is not installed, or does not start.
    """
    from jax.experimental import topologies

    version()
    found = GENERATIONS[generation]
    if jax.default_backend() != "tpu":  # nothing to keep other processes from, or to ask the cloud about
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)
    try:
        topology = topologies.get_topology_desc(found.topology, "tpu", **dict(found.options))
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as e:
        raise DeviceError(f"libtpu cannot compile for TPU {generation}: {str(e).splitlines()[0]}") from e
    return SingleDeviceSharding(topology.devices[0])


def describe(compiled: jax.stages.Compiled, generation: str, precision: str, batch: int) -> Estimate:
    """What the compiler says of any program that was compiled for `sharding_of(generation)`.

    Raises:
        DeviceError: the program has no schedule that can be played through.
    """
    costs, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    schedule = play(compiled.as_text() or "", GENERATIONS[generation])
    return Estimate(
        generation=generation,
        precision=precision,
        batch=batch,
        latency_ms=schedule.seconds * 1e3,
        cycles=schedule.cycles,
        kernels=schedule.kernels,
        waiting_ms=schedule.waiting_seconds * 1e3,
        bytes_accessed=float(costs.get("bytes accessed", 0.0)),
        flops=float(costs.get("flops", 0.0)),
        optimal_seconds=float(costs.get("optimal_seconds", 0.0)),
        peak_memory_bytes=0
        if memory is None
        else memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
    )


def version() -> str:
    """What an estimate depends on, beside the program.

    Raises:
        DeviceError: libtpu is not installed.
    """
    try:
        return f"libtpu {metadata.version('libtpu')}, jax {jax.__version__}"
    except metadata.PackageNotFoundError as e:
        raise DeviceError("the TPU compiler is not installed: `pip install 'jax[tpu]'` (x86 Linux only).") from e


# what the compiler says


def _require(name: str, known: dict[str, Any], *, kind: str) -> None:
    if name not in known:
        raise DeviceError(f"unknown TPU {kind} `{name}`.{nearest(name, known, kind=kind)} Known: {', '.join(known)}.")


# Without them libtpu locks /tmp/libtpu_lockfile against a second process, and looks for the TPU it is attached to.
_NO_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v2-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%[\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}  # names for what is there
_MOVES = {"reshape", "copy", "transpose", "broadcast", "slice", "concatenate", "pad"}  # where without cycles: its bytes


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A compiled program, played through."""

    seconds: float
    waiting_seconds: float  # part of `seconds`: for copies that no kernel hides
    cycles: int
    kernels: int


def play(text: str, generation: Generation) -> Schedule:
    """The schedule that the compiler prints, played through from the first instruction to the last.

    Raises:
        DeviceError: it is not scheduled, or has an instruction that costs something nobody says (a loop).
    """
    header, _, rest = text.partition("\n")
    if "is_scheduled=true" not in header or "\nENTRY " not in rest:
        raise DeviceError("the TPU compiler prints a program without a schedule: nas cannot read this libtpu's.")
    seconds = waiting = copied = 0.0  # `copied`: when the last copy that was started has ended
    hbm, clock = generation.hbm_gbps * 1e9, generation.clock_ghz * 1e9
    ends: dict[str, float] = {}  # of copies under way
    sizes: dict[str, int] = {}
    cycles: list[int] = []
    for name, shape, op, operands, line in _instructions(rest):
        sizes[name] = nbytes(shape)
        if op == "copy-start":
            copied = max(copied, seconds) + sizes[name] / hbm
            ends[name] = copied
        elif op == "copy-done":
            late = max(ends[operands[0]] - seconds, 0.0)
            seconds, waiting = seconds + late, waiting + late
        elif found := _CYCLES.search(line):
            cycles.append(int(found[1]))
            seconds += cycles[-1] / clock
        elif op in _MOVES:
            cycles.append(0)
            seconds += (sizes[name] + sum(sizes[operand] for operand in operands)) / hbm
        elif op not in _FREE:
            raise DeviceError(f"the TPU compiler does not say what `{op}` costs ({name}): nas cannot estimate this.")
    return Schedule(seconds, waiting, sum(cycles), len(cycles))


def _instructions(text: str) -> Iterator[tuple[str, str, str, list[str], str]]:
    """(name, shape, opcode, operands, all of it) of the instructions of the program's entry, in order."""
    for line in text[text.index("\nENTRY ") :].splitlines()[2:]:
        if match := _INSTRUCTION.match(line):
            name, shape, op, rest = match.groups()
            yield name, shape, op, re.findall(r"%[\w.\-]+", rest[: rest.find(")")]), line


def nbytes(shape: str) -> int:
    """Bytes of an array as the compiler prints its shape, padded to its tiles; of a tuple, those of its first array."""
    match = _SHAPE.search(shape)
    if shape == "()":
        return 0
    if match is None:
        raise DeviceError(f"the TPU compiler prints a shape that nas cannot read: {shape[:80]}.")
    kind, sizes, order, layout = match.groups()
    dims = [int(size) for size in sizes.split(",") if size]
    minor_first = [int(axis) for axis in order.split(",")] if order else list(reversed(range(len(dims))))
    if tile := _TILE.search(layout or ""):
        for axis, multiple in zip(minor_first, reversed(tile[1].split(",")), strict=False):
            dims[axis] += -dims[axis] % int(multiple)
    bits = 8 if kind == "pred" else int("".join(c for c in kind if c.isdigit())[:2])
    return math.prod(dims) * bits // 8
