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


def features(network: Network) -> dict[str, float]:
    """Of a network, by the names in `NAMES`.

    For each kind of op (convolutions apart by whether they are 1x1, full, or grouped) how many there are (norms, which
    are folded away, not counted); log(1 + MACs); log(1 + elements of their outputs). Then `depth`, ops in sequence on
    the longest path; log of `parameters` and of `input_elements`. Bytes are elements times those of the precision.
    """
    totals = np.sum([_totals(b.graph) for b in network.blocks], axis=0)
    values = np.r_[totals, math.prod(network.input)]
    counts = [name.endswith("_ops") or name == "depth" for name in NAMES]
    return dict(zip(NAMES, np.where(counts, values, np.log1p(values)).tolist(), strict=True))


def feature_groups(space: Space, genotypes: Genotypes) -> list[Floats]:
    """Of genotypes [n, genes], two groups of columns: `features`, and log(1 + MACs) by position, [n, positions]."""
    checked = space.check(genotypes)
    totals = np.array([list(features(space.decode(g)).values()) for g in checked])
    macs = [c[b] for c, b in zip(space.costs(cost.macs), space.branches(checked).T, strict=True)]
    return [totals, np.log1p(np.stack(macs, 1))]


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
