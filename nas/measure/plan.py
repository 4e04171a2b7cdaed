"""What is timed to make a table, or to prove one: graphs by name.

Each distinct block is timed in a *sandwich*, conv 1x1 + block + conv 1x1, so that it reads and writes what it does
inside a network (a runtime's blocked memory layout above all) and a call costs the same in all of them; the convs,
timed without the block, are taken off (`nas.measure.recipe`). Whole networks are timed in the same rounds: *anchors*
fit the correction of the table (`nas.latency.calibration`), *held-out* networks, uniformly random, have no part in the
table and make its proof.
"""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas import config, cost
from nas.config import Device, nearest
from nas.errors import DeviceError, LatencyError
from nas.export import RUNTIMES, Runtime
from nas.fold import fold
from nas.latency import op_counts
from nas.ondevice.stopping import ANCHOR
from nas.ondevice.timing import Call
from nas.ops import Block, Graph, Held, Recorder, Shape, flatten, in_precision, weights
from nas.quantise import has_integers, placeholder
from nas.space import Space
from nas.space.space import Genotypes

REFERENCE = ("one conv ", "two convs ")  # how names of what blocks are compared with begin
REFERENCES = 3  # sessions of each reference: all blocks at a shape share its error, and sessions differ by 1-2 %
Side = tuple[Shape, Held]  # of a block: what goes in or out there, and what the neighbour is computed in
_CANDIDATES = 512  # random networks that anchors are chosen from


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What is timed for one table, or, without `blocks`, for one proof at another time."""

    space: Space
    device: Device
    precision: str
    anchors: Genotypes  # [n, genes]
    held_out: Genotypes  # [n, genes]
    blocks: bool
    seed: int

    @functools.cached_property
    def graphs(self) -> dict[str, Graph]:
        """By name, in the order of the manifest."""
        graphs = _of_blocks(self.space) if self.blocks else {}
        for names, genotypes in ((self.anchor_names, self.anchors), (self.held_out_names, self.held_out)):
            graphs |= {name: self.space.decode(g).flat() for name, g in zip(names, genotypes, strict=True)}
        return graphs

    @property
    def anchor_names(self) -> list[str]:
        """Of the anchors among `graphs`."""
        return [f"{ANCHOR}{i}" for i in range(len(self.anchors))]

    @property
    def held_out_names(self) -> list[str]:
        """Of the held-out networks among `graphs`."""
        return [f"held-out {i}" for i in range(len(self.held_out))]

    @functools.cached_property
    def entries(self) -> dict[str, dict[str, float]]:
        """What each block's entry is made of: name of its sandwich -> names of calls and their weights in a sum.

        With c1 and c2 the times of one and of two convolutions at a shape, in the precision of their side of the block:

            middle block = sandwich - (c2(in) + c2(out)) / 2        a call's overhead cancels
            first block  = (block + conv) - (c2(out) - c1(out))     the overhead stays: a network has it once
            last block   = (conv + block) - c1(in)

        Between precisions a block takes along what converting its input costs, and half the difference between that and
        converting back; the other half is that of the block which does so, and in a network the halves cancel. A last
        block after another precision is (conv + block) - c2(in) / 2, less what an empty call and half a conversion
        take, c1 - c2 / 2 in its own precision.
        """
        found: dict[str, dict[str, float]] = {}
        for key, (block, role) in (self.space.blocks() if self.blocks else {}).items():
            into, out = _sides(block.graph)
            match role:
                case "first":
                    convs = [(two_convs, out, -1.0), (one_conv, out, 1.0)]
                case "last" if into[1] != block.graph.activations:
                    own = (into[0], block.graph.activations)
                    convs = [(two_convs, into, -0.5), (one_conv, own, -1.0), (two_convs, own, 0.5)]
                case "last":
                    convs = [(one_conv, into, -1.0)]
                case _:
                    convs = [(two_convs, into, -0.5), (two_convs, out, -0.5)]
            terms = found[f"block {key}"] = {f"block {key}": 1.0}
            for name, side, weight in convs:
                for repeat in range(REFERENCES):
                    reference = name(side, repeat)
                    terms[reference] = terms.get(reference, 0.0) + weight / REFERENCES
        return found

    @property
    def network_blocks(self) -> float:
        """Of the median held-out network."""
        return float(np.median([len(self.space.decode(g).blocks) for g in self.held_out]))

    @functools.cached_property
    def digest(self) -> str:
        """Hash of all that decides what is timed."""
        of = [(name, graph.key) for name, graph in self.graphs.items()]
        device = (self.device.runtime, self.device.threads, self.device.batch, self.precision, self.seed)
        return hashlib.sha256(json.dumps([of, device]).encode()).hexdigest()[:16]

    def about(self) -> dict[str, Any]:
        """What `of_manifest` needs to make the same plan again."""
        return {
            "space": self.space.name,
            "space_digest": self.space.digest,
            "input": list(self.space.input),
            "classes": self.space.classes,
            "precision": self.precision,
            "anchors": self.anchors.tolist(),
            "held_out": self.held_out.tolist(),
            "blocks": self.blocks,
            "seed": self.seed,
        }

    def always(self, name: str) -> bool:
        """Whether the call is timed in every round: all others are compared with it."""
        return not name.startswith("block ")


def for_table(space: Space, device: Device, precision: str, settings: config.Latency, *, seed: int) -> Plan:
    """All blocks of `space`, anchors and held-out networks.

    Raises:
        LatencyError: the space has fewer than three networks, or networks of another precision.
        DeviceError: the precision is mixed, and the runtime writes no such files.
    """
    if space.mixed != (precision == "mixed"):
        wanted = "mixed, as its stages choose" if space.mixed else "one for all its blocks, which `mixed` is not"
        raise LatencyError(f"the precision of space {space.name!r} is {wanted}; it cannot be measured in {precision}.")
    if precision == "mixed" and precision not in getattr(RUNTIMES.get(device.runtime), "precisions", ()):
        used = sorted({b.graph.precision for b, _ in space.blocks().values()} - {"float32"})
        able = [name for name, runtime in RUNTIMES.items() if "mixed" in runtime.precisions]
        raise DeviceError(
            f"stages of space {space.name!r} choose {' and '.join(used)}, and runtime `{device.runtime}` of device "
            f"{device.device!r} has no files of mixed precision ({' and '.join(able)} has). Choose a device with that "
            f"runtime, or leave `precision` out of the space."
        )
    networks = choose_networks(space, settings.anchors, settings.holdout, np.random.default_rng(seed))
    return Plan(space, device, precision, *networks, blocks=True, seed=seed)


def choose_networks(space: Space, anchors: int, holdout: int, rng: np.random.Generator) -> tuple[Genotypes, Genotypes]:
    """Genotypes of anchors and of held-out networks, [n, genes] each, no network in both.

    Held-out networks are uniformly random, stratified: random networks in order of MACs are cut into as many equal
    parts, and one of each is taken. So each is as likely as ever, and together they span the range. Anchors are
    chosen, to tell most, from the random networks that are left.

    Raises:
        LatencyError: the space has fewer than three networks.
    """
    random = np.unique(space.sample(rng, max(_CANDIDATES, 2 * (anchors + holdout))), axis=0)
    ops = sorted({kind for block, _ in space.blocks().values() for kind in op_counts(block.graph)})
    columns = [space.price(random, space.costs(lambda g, k=k: op_counts(g).get(k, 0))) for k in ops]
    macs = space.price(random, space.costs(cost.macs))
    if len(random) < 3:
        raise LatencyError(
            f"space {space.name!r} has {len(random)} networks; a table needs one to fix its scale and two that prove "
            f"it. Give the space a choice."
        )
    count = min(anchors, len(random) - 2)
    strata = np.array_split(np.argsort(macs, kind="stable"), min(holdout, len(random) - count))
    held_out = [int(rng.choice(stratum)) for stratum in strata]
    rest = np.setdiff1d(np.arange(len(random)), held_out)
    chosen = rest[_spread(np.stack([macs, *columns], axis=-1)[rest], count)]
    return random[chosen], random[held_out]


def runtime_class(device: Device) -> type[Runtime]:
    """The class of a device's runtime, which need not be installed.

    Raises:
        DeviceError: it is unknown, or does not have one of the device's precisions.
    """
    if device.runtime == "tpu_compiler":
        raise DeviceError(
            f"nothing can be run on device {device.device!r}, which is estimated: `nas measure SPACE --device NAME` "
            f"makes its tables, and `nas run EXPERIMENT --device NAME` searches by them. Choose one at hand."
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


def model_of(graph: Graph, device: Device, precision: str, *, seed: int = 0) -> bytes:
    """The model file of `graph` with random weights: how long it takes does not depend on them.

    Raises:
        DeviceError: the runtime is unknown, lacks what writing needs, or does not have the precision.
    """
    runtime = runtime_class(device)()
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
    quantisation = placeholder(fold(graph, params)[0]) if has_integers(graph, precision) else None
    return runtime.emit(graph, params, precision=precision, quantisation=quantisation)


def prepare(graph: Graph, device: Device, precision: str, *, seed: int = 0) -> Call:
    """Inferences of `graph` with random weights on random images, ready to be timed in this process.

    Raises:
        DeviceError: the runtime is unknown, not installed, or does not have the precision.
    """
    session = runtime_of(device).open(model_of(graph, device, precision, seed=seed), threads=device.threads)
    images = np.random.default_rng(seed).standard_normal((device.batch, *graph.input), np.float32)
    return session.prepare(images)


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


def one_conv(side: Side, repeat: int) -> str:
    """The name of a reference: one 1x1 convolution."""
    return f"one conv {_worded(side)} {repeat}"


def two_convs(side: Side, repeat: int) -> str:
    """The name of a reference: two 1x1 convolutions."""
    return f"two convs {_worded(side)} {repeat}"


def _worded(side: Side) -> str:
    shape, precision = side
    return "x".join(map(str, shape)) + (f" {precision}" if precision != "float32" else "")


def _sides(graph: Graph) -> tuple[Side, Side]:
    """Before a block and after it."""
    return (graph.input, graph.source), (graph.shape, graph.activations)


def sides_of(space: Space) -> list[Side]:
    """The shapes at which convolutions stand around blocks, each with the precision that they are in."""
    sides: dict[Side, None] = {}
    for block, role in space.blocks().values():
        into, out = _sides(block.graph)
        if role != "first":
            sides[into] = None
        if role == "last":
            sides[into[0], out[1]] = None
        else:
            sides[out] = None
    return list(sides)


def _of_blocks(space: Space) -> dict[str, Graph]:
    """References and sandwiches."""
    graphs: dict[str, Graph] = {}
    for side in sides_of(space):
        for repeat in range(REFERENCES):
            graphs[one_conv(side, repeat)] = _convs(side, 1)
            graphs[two_convs(side, repeat)] = _convs(side, 2)
    for key, (block, role) in space.blocks().items():
        chain, (into, out) = [block], _sides(block.graph)
        if role != "first":
            chain.insert(0, Block("before", "", _convs(into, 1)))
        if role != "last":
            chain.append(Block("after", "", _convs(out, 1)))
        graphs[f"block {key}"] = flatten(tuple(chain))
    return graphs


def _convs(side: Side, count: int) -> Graph:
    """`count` 1x1 convolutions that keep the shape."""
    shape, precision = side
    net = Recorder(shape)
    x = net.input
    for index in range(count):
        x = net.conv(x, f"conv{index}", shape[-1], bias=True)
    return in_precision(net.graph(), precision)
