"""From sums of blocks measured alone to networks: a correction fitted on a few networks measured whole.

What blocks measured alone miss is of two kinds: something that comes once a call, and something that comes with an op
wherever it stands next to ops of other blocks (a layout change, a fusion that happens only in company). So a
correction is a scale, an offset, and milliseconds for each op of a kind. How much of that a few anchors can tell is
not decided by belief: how freely the ops' part may move is what has the smallest leave-one-out error.
"""

from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from nas.ops import Graph, Norm

Floats = NDArray[np.float64]

_PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # ridge, on milliseconds of an op relative to those of the average op
_FEWEST_FOR_OFFSET = 4
_FEWEST_FOR_OPS = 10  # with 6 anchors leave-one-out error itself is too noisy to choose by


class Correction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """network = scale * sum of entries + offset_ms + sum over its ops of op_ms[kind]."""

    scale: float = 1.0
    offset_ms: float = 0.0
    op_ms: dict[str, float] = {}
    leave_one_out: float | None = None  # root mean square relative error over the anchors, each left out in turn


def op_counts(graph: Graph) -> dict[str, int]:
    """Number of ops of each kind. Norms, which are folded away, are not counted."""
    return dict(Counter(type(op).__name__.lower() for op in graph.ops if not isinstance(op, Norm)))


def calibrate(sums_ms: Floats, counts: Sequence[dict[str, int]], measured_ms: Floats) -> Correction:
    """The correction that fits the anchors: a scale; from 4 anchors on an offset; from 10 on perhaps ops as well.

    Relative errors are minimised: a small network counts as much as a large one.

    Args:
        sums_ms: of the entries of each anchor's blocks, [anchors].
        counts: `op_counts` of each anchor.
        measured_ms: of each anchor, [anchors].
    """
    count, kinds = len(measured_ms), sorted({k for c in counts for k in c})
    ops = np.array([[c.get(k, 0) for k in kinds] for c in counts], np.float64)
    per_op = measured_ms.mean() / max(ops.sum(1).mean(), 1.0)
    columns = np.c_[sums_ms, np.full(count, per_op)][:, : 2 if count >= _FEWEST_FOR_OFFSET else 1]
    solution, error = _fit(columns, np.zeros(columns.shape[1]), measured_ms)
    for penalty in _PENALTIES if count >= _FEWEST_FOR_OPS else ():
        freer = _fit(np.c_[columns, ops * per_op], np.r_[0.0, 0.0, np.full(len(kinds), penalty)], measured_ms)
        if freer[1] < error:
            solution, error = freer
    scale, offset, *of_ops = (*solution, 0.0) if len(solution) == 1 else solution
    op_ms = {k: float(v * per_op) for k, v in zip(kinds, of_ops, strict=False)}
    return Correction(float(scale), float(offset * per_op), op_ms, error)


def _fit(columns: Floats, penalties: Floats, measured_ms: Floats) -> tuple[Floats, float]:
    """Ridge regression in relative error, and its leave-one-out error (by the hat matrix, exactly)."""
    relative = columns / measured_ms[:, None]
    inverse = np.linalg.pinv(relative.T @ relative + np.diag(penalties), hermitian=True)
    solution = inverse @ relative.sum(0)
    leverage = np.einsum("ij,jk,ik->i", relative, inverse, relative)
    left_out = (1 - relative @ solution) / np.maximum(1 - leverage, 1e-9)
    return solution, float(np.sqrt(np.mean(left_out**2)))
