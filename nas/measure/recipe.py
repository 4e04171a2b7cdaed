"""The recipe by which a latency table is made.

Each distinct block is measured in a *sandwich*, conv 1x1 + block + conv 1x1, so that it reads and writes what it does
inside a network (a runtime's blocked memory layout above all) and a call costs the same in all of them; the convs,
measured without the block, are taken off. With c1 and c2 one and two convs at a shape:

    middle block = sandwich - (c2(in) + c2(out)) / 2        a call's overhead cancels
    first block  = (block + conv) - (c2(out) - c1(out))     the overhead stays: a network has it once
    last block   = (conv + block) - c1(in)

Whole networks are measured in the same rounds. *Anchors* fit the correction of the table (`nas.latency.calibration`);
*held-out* networks, uniformly random, have no part in the table and make its proof.
"""

import datetime
import time
from collections.abc import Callable, Hashable

import numpy as np
from numpy.typing import NDArray

from nas import config, cost
from nas.config import Device, nearest
from nas.errors import DeviceError, LatencyError
from nas.export import RUNTIMES, Runtime
from nas.fold import fold
from nas.latency import Anchor, Entry, Proof, Table, calibrate, op_counts, prove
from nas.measure import machine
from nas.measure.timing import Call, Samples, Timing, interleave
from nas.ops import Block, Graph, Recorder, Shape, flatten, weights
from nas.quantise import placeholder
from nas.space import Space
from nas.space.space import Genotypes

Progress = Callable[[str, float, float], None]  # (what is done, share done 0..1, seconds left)
Clock = Callable[[], float]

_REFERENCES = 3  # sessions of each reference: all blocks at a shape share its error, and sessions differ by 1-2 %
_CANDIDATES = 512  # random networks that anchors are chosen from
_SMALLEST_MS = 1e-6  # a block cheaper than the convs around it vary: it costs next to nothing, not less
_DRIFT_WARNING, _DRIFT_REFUSED = 0.05, 0.15  # 2 CPUs at load 9: 0.01-0.02 in 25 s
_ROUNDS_TO_REFUSE = 30  # 0.04-0.12 was seen in 15, and more than 1 in 5: a few preempted samples are enough


def measure(
    space: Space,
    device: Device,
    precision: str,
    settings: config.Latency,
    *,
    seed: int,
    progress: Progress | None = None,
    command: str = "nas measure",
    clock: Clock = time.perf_counter,
) -> tuple[Table, Proof]:
    """The latency table of all blocks of `space` on this machine, and its proof on held-out networks.

    Args:
        device: whose runtime, threads and batch size are used; it must be the machine this runs on.
        precision: one of the device's.
        seed: of the anchors, the held-out networks, the weights and the order of rounds.
        command: recorded in the table.

    Raises:
        DeviceError: the runtime is unknown, not installed, or does not have the precision.
        LatencyError: the machine was too uneven to measure on.
    """
    rng = np.random.default_rng(seed)
    networks = choose_networks(space, settings, rng)
    graphs = graphs_to_time(space, networks)
    busy = machine.load()
    with machine.pinned(device.threads):  # before the sessions are built: their threads inherit it
        report = reporter(progress, "building", clock)
        calls: dict[Hashable, Call] = {}
        for index, (what, graph) in enumerate(graphs.items(), 1):
            calls[what] = prepare(graph, device, precision, seed=seed)
            report(index / len(graphs))
        samples = interleave(
            calls,
            seconds=settings.seconds,
            min_rounds=settings.min_rounds,
            seed=seed,
            progress=reporter(progress, "timing", clock),
            clock=clock,
        )
    return _evaluate(space, device, precision, samples, networks, command=command, busy=busy, seed=seed)


def runtime_class(device: Device) -> type[Runtime]:
    """The class of a device's runtime, which need not be installed.

    Raises:
        DeviceError: it is unknown, or does not have one of the device's precisions.
    """
    if device.runtime == "tpu_compiler":
        raise DeviceError(
            f"nothing can be run on device {device.device!r}: `nas.measure.tpu.estimate_table` makes its tables. "
            f"Choose a device that is at hand for an experiment."
        )
    if device.runtime not in RUNTIMES:
        hint = nearest(device.runtime, RUNTIMES, kind="runtime")
        raise DeviceError(f"device {device.device!r} has the unknown runtime `{device.runtime}`.{hint}")
    cls = RUNTIMES[device.runtime]
    for precision in device.precision:
        if precision not in cls.precisions:
            hint = nearest(precision, cls.precisions, kind="precision")
            raise DeviceError(
                f"device {device.device!r} has the precision `{precision}`, which runtime `{device.runtime}` does not "
                f"have.{hint}"
            )
    return cls


def runtime_of(device: Device) -> Runtime:
    """The runtime of a device.

    Raises:
        DeviceError: it is unknown, not installed, or does not have one of the device's precisions.
    """
    runtime = runtime_class(device)()
    runtime.version()
    return runtime


def prepare(graph: Graph, device: Device, precision: str, *, seed: int = 0) -> Call:
    """One inference of `graph` with random weights on random images, ready to be timed.

    Raises:
        DeviceError: the runtime is unknown, not installed, or does not have the precision.
    """
    runtime = runtime_of(device)
    if precision not in runtime.precisions:
        hint = nearest(precision, runtime.precisions, kind="precision")
        raise DeviceError(f"runtime `{device.runtime}` does not have the precision `{precision}`.{hint}")
    rng = np.random.default_rng(seed)
    params = {
        w.name: rng.standard_normal(w.shape, np.float32) / np.float32(np.sqrt(w.fan_in))
        if w.role == "kernel"
        else np.full(w.shape, w.role in ("scale", "var"), np.float32)
        for w in weights(graph)
    }
    quantisation = placeholder(fold(graph, params)[0]) if precision == "int8" else None
    session = runtime.open(runtime.emit(graph, params, quantisation=quantisation), threads=device.threads)
    return session.prepare(rng.standard_normal((device.batch, *graph.input), np.float32))


# what is measured


def choose_networks(space: Space, settings: config.Latency, rng: np.random.Generator) -> dict[str, Genotypes]:
    """Genotypes of anchors and of held-out networks, [n, genes] each, no network in both.

    Held-out networks are uniformly random, stratified: random networks in order of MACs are cut into as many equal
    parts, and one of each is taken. So each is as likely as ever, and together they span the range. Anchors are
    chosen, to tell most, from the random networks that are left.

    Raises:
        LatencyError: the space has fewer than three networks.
    """
    random = np.unique(space.sample(rng, _CANDIDATES), axis=0)
    ops = sorted({kind for block, _ in space.blocks().values() for kind in op_counts(block.graph)})
    columns = [space.price(random, space.costs(lambda g, k=k: op_counts(g).get(k, 0))) for k in ops]
    macs = space.price(random, space.costs(cost.macs))
    if len(random) < 3:
        raise LatencyError(
            f"space {space.name!r} has {len(random)} networks; a table needs one to fix its scale and two that prove "
            f"it. Give the space a choice."
        )
    anchors = min(settings.anchors, len(random) - 2)
    strata = np.array_split(np.argsort(macs, kind="stable"), min(settings.holdout, len(random) - anchors))
    held_out = [int(rng.choice(stratum)) for stratum in strata]
    rest = np.setdiff1d(np.arange(len(random)), held_out)
    chosen = rest[_spread(np.stack([macs, *columns], axis=-1)[rest], anchors)]
    return {"anchor": random[chosen], "held_out": random[held_out]}


def _spread(features: NDArray[np.float64], count: int) -> list[int]:
    """The rows of `features` [n, f] that a linear fit learns most from: greedily D-optimal."""
    spread = features.std(0)
    unit = (features - features.mean(0)) / np.where(spread > 0, spread, 1)
    unit = np.c_[np.ones(len(unit)), unit]
    information = np.eye(unit.shape[1]) * 1e-2
    chosen: list[int] = []
    for _ in range(count):
        gain = np.einsum("ij,jk,ik->i", unit, np.linalg.inv(information), unit)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        information += np.outer(unit[chosen[-1]], unit[chosen[-1]])
    return chosen


def graphs_to_time(space: Space, networks: dict[str, Genotypes]) -> dict[Hashable, Graph]:
    """Everything that is timed, by what it is."""
    graphs: dict[Hashable, Graph] = {}
    shapes: dict[Shape, None] = {}
    for key, (block, role) in space.blocks().items():
        chain = [block]
        if role != "first":
            chain.insert(0, Block("before", "", _convs(block.graph.input, 1)))
            shapes[block.graph.input] = None
        if role != "last":
            chain.append(Block("after", "", _convs(block.graph.shape, 1)))
            shapes[block.graph.shape] = None
        graphs["sandwich", key] = flatten(tuple(chain))
    for shape in shapes:
        for repeat in range(_REFERENCES):
            graphs["one conv", shape, repeat] = _convs(shape, 1)
            graphs["two convs", shape, repeat] = _convs(shape, 2)
    for kind, genotypes in networks.items():
        for index, genotype in enumerate(genotypes):
            graphs[kind, index] = space.decode(genotype).flat()
    return graphs


def _convs(shape: Shape, count: int) -> Graph:
    """`count` 1x1 convolutions that keep `shape`."""
    net = Recorder(shape)
    x = net.input
    for index in range(count):
        x = net.conv(x, f"conv{index}", shape[-1], bias=True)
    return net.graph()


def reporter(progress: Progress | None, what: str, clock: Clock) -> Callable[[float], None]:
    """Turns a share that is done into `progress` with the seconds that are left."""
    start = clock()

    def report(share: float) -> None:
        if progress is not None:
            progress(what, share, (clock() - start) * (1 - share) / share if share > 0 else float("inf"))

    return report


# what it says


def _evaluate(
    space: Space,
    device: Device,
    precision: str,
    samples: Samples[Hashable],
    networks: dict[str, Genotypes],
    *,
    command: str,
    busy: str,
    seed: int,
) -> tuple[Table, Proof]:
    timings = samples.timings()
    names: dict[str, list[Hashable]] = {k: [(k, i) for i in range(len(g))] for k, g in networks.items()}
    drift = samples.disagreement(names["anchor"] + names["held_out"], parts=3)
    notes = [f"{busy} before, {machine.load()} after; {len(samples.times_ms)} rounds"]
    if drift > _DRIFT_REFUSED and len(samples.times_ms) >= _ROUNDS_TO_REFUSE:
        others = machine.busiest()
        raise LatencyError(
            f"the networks measured at the start and at the end disagree by {drift:.0%}, beyond a common factor; at "
            f"most {_DRIFT_REFUSED:.0%} can be used. {machine.load()}; using CPU now: {others or 'nothing'}. "
            f"Measure when the machine is quieter, or longer (latency.seconds)."
        )
    if drift > _DRIFT_WARNING:
        notes.append(f"uneven: networks measured at the start and at the end disagree by {drift:.0%}")
    table = Table(
        device=device.device,
        runtime=device.runtime,
        runtime_version=runtime_of(device).version(),
        precision=precision,
        threads=device.threads,
        batch=device.batch,
        hardware=machine.hardware(),
        space=space.name,
        space_digest=space.digest,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        notes=tuple(notes),
        **entries(space, networks["anchor"], timings),
    )
    held_out = [timings[name] for name in names["held_out"]]
    proof = prove(
        table.price(space, networks["held_out"]),
        np.array([t.latency_ms for t in held_out]),
        genotypes=networks["held_out"],
        p90_ms=np.array([t.p90_ms for t in held_out]),
        repeat_mape=samples.disagreement(names["held_out"], parts=2),
        drift=drift,
        seed=seed,
    )
    return table, proof


def entries(space: Space, anchors: Genotypes, timings: dict[Hashable, Timing]) -> dict:
    """The fields of a table that come from timings."""

    def reference(kind: str, shape: Shape) -> float:
        return float(np.mean([timings[kind, shape, repeat].latency_ms for repeat in range(_REFERENCES)]))

    entries: dict[str, Entry] = {}
    for key, (block, role) in space.blocks().items():
        timing, graph = timings["sandwich", key], block.graph
        match role:
            case "first":
                convs = reference("two convs", graph.shape) - reference("one conv", graph.shape)
            case "last":
                convs = reference("one conv", graph.input)
            case _:
                convs = (reference("two convs", graph.input) + reference("two convs", graph.shape)) / 2
        latency_ms = max(timing.latency_ms - convs, _SMALLEST_MS)
        spread = timing.spread * timing.latency_ms / latency_ms
        entries[key] = Entry(latency_ms, spread, block.label, role, timing.rounds)
    shapes = {name[1] for name in timings if isinstance(name, tuple) and name[0] == "one conv"}
    overhead = min(2 * reference("one conv", s) - reference("two convs", s) for s in shapes)
    measured = np.array([timings["anchor", i].latency_ms for i in range(len(anchors))])
    sums = space.price(anchors, space.costs(lambda g: entries[g.key].latency_ms))
    counts = [op_counts(space.decode(g).flat()) for g in anchors]
    return {
        "entries": entries,
        "overhead_ms": max(overhead, 0.0),
        "correction": calibrate(sums, counts, measured),
        "anchors": tuple(Anchor(tuple(map(int, g)), float(m)) for g, m in zip(anchors, measured, strict=True)),
    }
