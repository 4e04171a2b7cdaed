"""What can be said of a network's latency without a device: how much there is to compute, to move and to launch."""

import functools
import math

import numpy as np
from numpy.typing import NDArray

from nas import cost
from nas.ops import Conv, Graph, Network, Norm
from nas.space import Space
from nas.space.space import Genotypes

Floats = NDArray[np.float64]

_KINDS = (
    "conv1x1", "conv", "depthwise", "dense", "act", "pool", "add", "mul", "concat", "split", "shuffle",
    "linearattention",
)  # fmt: skip
_PER_KIND = ("ops", "macs", "elements")
NAMES = (*(f"{kind}_{what}" for kind in _KINDS for what in _PER_KIND), "depth", "parameters", "input_elements")

_COUNTS = np.array([name.endswith("_ops") or name == "depth" for name in NAMES])
_PART = 1024  # networks at a time, so that what is made of them stays in cache


def features(network: Network) -> dict[str, float]:
    """Of a network, by the names in `NAMES`.

    For each kind of op (convolutions apart by whether they are 1x1, full, or grouped) how many there are (norms, which
    are folded away, not counted); log(1 + MACs); log(1 + elements of their outputs). Then `depth`, ops in sequence on
    the longest path; log of `parameters` and of `input_elements`. Bytes are elements times those of the precision.
    """
    totals = np.sum([_totals(b.graph) for b in network.blocks], axis=0)
    values = np.r_[totals, math.prod(network.input)]
    return dict(zip(NAMES, _scaled(values[None])[0].tolist(), strict=True))


def feature_groups(space: Space, genotypes: Genotypes) -> list[Floats]:
    """Of genotypes [n, genes], two groups of columns: `features`, and log(1 + MACs) by position.

    Columns in which no two networks of the space differ are left out.

    Raises:
        SpaceError: they are of another space.
    """
    return branch_groups(space, space.branches(genotypes))


def branch_groups(space: Space, branches: NDArray[np.int32]) -> list[Floats]:
    """`feature_groups` of networks given by their branches [n, positions]."""
    totals, counts, macs = _by_branch(space)
    sums = np.zeros((len(branches), len(counts)))
    for start in range(0, len(branches), _PART):
        part = slice(start, start + _PART)
        for position, of in totals.items():
            sums[part] += of.take(branches[part, position], axis=0)  # whole numbers: in any order the same
    by_position = [of[branches[:, position]] for position, of in macs.items()]
    return [_scaled(sums, counts), np.stack(by_position, axis=1) if macs else np.zeros((len(branches), 0))]


def _scaled(values: Floats, counts: NDArray[np.bool_] = _COUNTS) -> Floats:
    """Quantities [n, columns] as they are told: counts as they are, of all others the logarithm."""
    out = values.copy()
    out[:, ~counts] = np.log1p(values[:, ~counts])
    return out


@functools.lru_cache(maxsize=4)
def _by_branch(space: Space) -> tuple[dict[int, Floats], NDArray[np.bool_], dict[int, Floats]]:
    """Of `space`: additive quantities [branches, columns] by position, of which columns, those that vary.

    Then which columns are counts; and log(1 + MACs) [branches] of the positions where they vary.
    """
    totals = [np.zeros((len(p.branches), len(NAMES))) for p in space.positions]
    for number, (position, of) in enumerate(zip(space.positions, totals, strict=True)):
        for row, block in zip(of, position.branches, strict=True):
            if block is not None:
                row[:-1] = _totals(block.graph)
                row[-1] = 0 if number else math.prod(block.graph.input)
    varies = np.any([np.ptp(of, axis=0) > 0 for of in totals], axis=0)
    macs = {number: np.log1p(c) for number, c in enumerate(space.costs(cost.macs)) if np.ptp(c) > 0}
    return {number: of[:, varies] for number, of in enumerate(totals)}, _COUNTS[varies], macs


@functools.lru_cache(maxsize=65536)
def _totals(graph: Graph) -> Floats:
    """The additive quantities of one block, [len(NAMES) - 1]."""
    out = dict.fromkeys(NAMES[:-1], 0.0)
    depth = [0]
    for op in graph.ops:
        before = max(depth[v] for v in op.inputs)
        depth.append(before + (not isinstance(op, Norm)))
        if isinstance(op, Norm):
            continue
        kind = type(op).__name__.lower()
        if isinstance(op, Conv):
            kind = "depthwise" if op.groups > 1 else "conv1x1" if op.kernel == 1 else "conv"
        out[f"{kind}_ops"] += 1
        out[f"{kind}_elements"] += math.prod(op.shape)
        out[f"{kind}_macs"] += cost.op_macs(graph, op)
    out["depth"] = depth[-1]
    out["parameters"] = cost.parameters(graph)
    return np.array(list(out.values()))
