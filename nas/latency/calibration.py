"""From sums of blocks measured alone to networks: a correction fitted on a few networks measured whole.

What blocks measured alone miss is of several kinds. A factor, and something that comes once a call. Weights: a block
that is timed alone finds its own in the cache, a network that is larger than the cache does not. An op that costs
more, or less, wherever it stands next to ops of other blocks (a layout change, a fusion that happens only in company).
A type of block that is measured too fast or too slow. What one block costs another that follows it. And on an
accelerator that is faster than its ops are dispatched, a block costs no less than its dispatch.

`FORMS` has a form of correction for each. Which of them it is, is not decided by belief: every form is fitted with
each anchor left out in turn, and judged by that anchor (Stone 1974, J. R. Stat. Soc. B 36, sec. 3). A freer form is
taken only where it is clearly better than each simpler one, and all errors are kept with the correction.

Measured on 2 virtual CPUs of a Zen 5 server, one thread, batch 1, 16 anchors of MobileNetV3's spaces: root mean square
error in percent of anchors left out, * the form that was chosen.

                             scale  affine  weights  floor  block kinds  op kinds  neighbours
    ONNX Runtime       32 px   1.0    0.9*      0.9    0.9          0.9       0.9         0.9
                      224 px   2.2     1.8     1.0*    1.3          1.0       1.1         1.0
    OpenVINO           32 px   4.6    3.6*      3.4    3.8          3.4       3.4         3.5
                      224 px   2.3     2.3     1.3*    1.7          1.3       1.3         1.3
    LiteRT             32 px  1.2*     1.2      1.3    1.2          1.3       1.3         1.4
                      224 px  1.3*     1.3      1.2    1.3          1.2       1.2         1.2
    ONNX Runtime int8  32 px   0.7     0.6      0.6    0.6          0.6      0.3*         0.4
                      224 px   1.2     1.0     0.8*    1.1          0.8       0.9         0.8
    OpenVINO int8      32 px   2.4     2.6      2.5    2.7          2.5      1.9*         2.3
                      224 px   2.5     0.9     0.7*    0.9          0.7       0.8         0.7
    XLA                32 px  2.3*     2.4      2.3    2.4          2.3       2.3         2.3

    ONNX Runtime, digits_mixed, two types of block, 30 anchors, 60 held-out networks, unsettled (Zen 4):
                              3.67    2.82     2.80   2.82         2.65     1.98*         1.88

The networks were timed once they had settled (`nas.ondevice.timing`). Before, when they were not, weights were most of
it, and a scale alone left 2.4 to 4.9 % (Zen 4, 32 pixels). Where all blocks are of one type, block kinds and neighbours
have little to tell.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from nas.latency.entry import Entry
from nas.ops import AnyOp, Conv, Graph, Norm, weights

Floats = NDArray[np.float64]

_PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # ridge, on coefficients relative to the average block's or op's time
_FLOORS = np.linspace(0.0, 0.9, 10)  # shares of the blocks that a floor holds up
_MEGABYTE = 2**20


class Tried(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One form of correction, judged by anchors left out in turn."""

    form: str
    error: float  # root mean square of the relative errors
    error_low: float  # the same, less and plus one standard error of the mean square
    error_high: float


class Correction(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """network = offset_ms + the sum of `block_ms` over its blocks + that of `between_ms` over its borders.

    A block of kind k with entry t costs

        factor * max(t, floor_ms * its ops) + weights_ms * megabytes of weights + the sum of op_ms over its ops

    where factor is kind_scale[k], or `scale` where that has no k.
    """

    scale: float = 1.0
    offset_ms: float = 0.0
    op_ms: dict[str, float] = {}
    leave_one_out: float | None = None  # root mean square relative error over the anchors, each left out in turn
    form: str = ""  # a name in `FORMS`; empty where nothing was fitted, or before there were several
    weights_ms: float = 0.0  # of a megabyte (2^20 bytes) of float32 weights
    floor_ms: float = 0.0  # of an op
    kind_scale: dict[str, float] = {}
    border_ms: dict[str, float] = {}  # `border` of two blocks in a row -> ms
    tried: tuple[Tried, ...] = ()  # from simple to free; empty where there were too few anchors to choose

    @property
    def deciding(self) -> dict:
        """What decides predictions, without how it was found."""
        return {k: v for k, v in msgspec.to_builtins(self).items() if k not in ("form", "tried", "leave_one_out")}

    def block_ms(self, entry: Entry, graph: Graph) -> float:
        """Of one block, without the offset and its borders."""
        latency_ms = entry.latency_ms
        if self.floor_ms:
            latency_ms = max(latency_ms, self.floor_ms * sum(op_counts(graph).values()))
        ops = sum(self._op_ms(kind) * n for kind, n in sorted(_kinds(graph).items())) if self.op_ms else 0.0
        weights = self.weights_ms * _megabytes(graph) if self.weights_ms else 0.0
        return self.kind_scale.get(entry.kind, self.scale) * latency_ms + ops + weights

    @property
    def choice(self) -> str:
        """Which form was chosen, and what the others would have been worth."""
        if not self.tried:
            return f"correction: {self.form or 'none'}, the anchors being too few to choose among forms"
        tried = ", ".join(f"{t.form} {t.error:.1%}" for t in self.tried)
        return f"correction: {self.form}, the simplest within a standard error of the best; left-out anchors: {tried}"

    def _op_ms(self, kind: str) -> float:
        """Of an op; a depthwise convolution is one like others where no anchor had one."""
        return self.op_ms.get(kind, self.op_ms.get("conv", 0.0) if kind == "depthwise" else 0.0)

    def __str__(self) -> str:
        parts = [f"{self.scale:.4g} x the sum of blocks"]
        if self.offset_ms:
            parts.append(f"{self.offset_ms:+.3g} ms")
        if self.weights_ms:
            parts.append(f"{self.weights_ms:+.3g} ms a megabyte of weights")
        if self.floor_ms:
            parts.append(f"no block below {self.floor_ms:.3g} ms an op")
        for values, sign, unit in ((self.kind_scale, "x ", ""), (self.op_ms, "", " ms"), (self.border_ms, "", " ms")):
            least = 1e-6 * max(map(abs, values.values()), default=0.0)  # what ridge leaves of what says nothing
            if said := [f"{k} {sign}{v:.3g}{unit}" for k, v in sorted(values.items()) if abs(v) > least]:
                parts.append(", ".join(said))
        return f"{self.form}: {'; '.join(parts)}" if self.form else "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to correct: `scale`, and the coefficients named here."""

    about: str
    free: tuple[str, ...] = ()  # of offset_ms and weights_ms, as many as the anchors say
    shrunk: str = ""  # kind_scale, op_ms or border_ms: ridge, as freely as the anchors bear
    floor: bool = False
    fewest: int = 1  # anchors; with 6 leave-one-out error itself is too noisy to choose a ridge by


FORMS: dict[str, Form] = {  # from simple to free: a tie goes to the earlier one
    "scale": Form("a factor"),
    "affine": Form("a factor, and a time once a network", ("offset_ms",), fewest=4),
    "weights": Form(
        "affine, and a time for each megabyte of weights, which a block alone finds in the cache",
        ("offset_ms", "weights_ms"),
        fewest=6,
    ),
    "dispatch floor": Form(
        "affine, but no block costs less than its ops take to be dispatched", ("offset_ms",), floor=True, fewest=10
    ),
    "block kinds": Form(
        "as weights, with a factor of its own for each type of block",
        ("offset_ms", "weights_ms"),
        "kind_scale",
        fewest=10,
    ),
    "op kinds": Form("as weights, and a time for each op of a kind", ("offset_ms", "weights_ms"), "op_ms", fewest=10),
    "neighbours": Form(
        "as weights, and a time for each border between blocks, by the ops that meet there",
        ("offset_ms", "weights_ms"),
        "border_ms",
        fewest=10,
    ),
}


def op_counts(graph: Graph) -> dict[str, int]:
    """Number of ops of each kind. Norms, which are folded away, are not counted."""
    return dict(Counter(type(op).__name__.lower() for op in graph.ops if not isinstance(op, Norm)))


def ends(graph: Graph) -> str | None:
    """What a block ends with, norms aside: `conv`, `depthwise`, `add` ...; None for one without ops."""
    ops = [op for op in graph.ops if not isinstance(op, Norm)]
    return _kind(ops[-1]) if ops else None


def begins(graph: Graph) -> str | None:
    """What first reads a block's input, norms aside; None for one without ops."""
    return next((_kind(op) for op in graph.ops if not isinstance(op, Norm)), None)


def border(end: str, begin: str) -> str:
    """The name of a border: a block that `ends` so before one that `begins` so."""
    return f"{end} > {begin}"


def borders(graphs: Sequence[Graph]) -> list[str | None]:
    """For each block of a chain its `border` with the one before; None for the first, and for one without ops."""
    out: list[str | None] = []
    before = None
    for graph in graphs:
        begin, end = begins(graph), ends(graph)
        out.append(None if before is None or begin is None else border(before, begin))
        before = end or before
    return out


def calibrate(
    entries: Mapping[str, Entry], networks: Sequence[Sequence[Graph]], measured_ms: Sequence[float] | Floats
) -> Correction:
    """The correction that fits the anchors, in the form that predicts those best that it is not fitted on.

    Relative errors are minimised: a small network counts as much as a large one.

    Args:
        entries: of all blocks of the anchors, by `Graph.key`.
        networks: the blocks of each anchor, in order.
        measured_ms: of each anchor, [anchors].
    """
    anchors = _Anchors.of(entries, networks, np.asarray(measured_ms, np.float64))
    errors = {name: anchors.left_out(form) for name, form in FORMS.items() if anchors.count >= max(form.fewest, 2)}
    chosen = _choose({name: of**2 for name, of in errors.items()})
    found = anchors.fit(FORMS[chosen])
    return msgspec.structs.replace(
        found,
        form=chosen,
        leave_one_out=float(np.sqrt(np.mean(errors[chosen] ** 2))) if errors else None,
        tried=tuple(_tried(name, of**2) for name, of in errors.items()) if len(errors) > 1 else (),
    )


def _choose(squares: Mapping[str, Floats]) -> str:
    """The simplest form that is within one standard error of the best, given squared errors [anchors] of each.

    The one-standard-error rule (Breiman et al. 1984, Classification and Regression Trees, sec. 3.4.3). Beside taking
    the best itself it loses 0.0 to 0.2 points of error on held-out networks (25 draws of 16 and of 24 anchors of eight
    tables), and where the truth is a scale and 3 % of noise it takes the scale in 54 of 60 draws of 16 anchors.
    """
    if not squares:
        return next(iter(FORMS))
    best = min(squares.values(), key=np.mean)
    return next(name for name, of in squares.items() if of.mean() <= best.mean() + _standard_error(best))


def _standard_error(values: Floats) -> float:
    """Of the mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _tried(form: str, squares: Floats) -> Tried:
    mean, error = squares.mean(), _standard_error(squares)
    low, middle, high = np.sqrt([max(mean - error, 0.0), mean, mean + error]).tolist()
    return Tried(form, middle, low, high)


def _kinds(graph: Graph) -> Counter[str]:
    """`op_counts`, with depthwise convolutions, for which runtimes have kernels of their own, apart."""
    return Counter(_kind(op) for op in graph.ops if not isinstance(op, Norm))


def _kind(op: AnyOp) -> str:
    return "depthwise" if isinstance(op, Conv) and op.groups > 1 else type(op).__name__.lower()


def _megabytes(graph: Graph) -> float:
    """Of its weights as float32, norms folded."""
    return sum(4 * math.prod(w.shape) for w in weights(graph) if w.role in ("kernel", "bias")) / _MEGABYTE


@dataclasses.dataclass(frozen=True, eq=False)
class _Anchors:
    """What forms are fitted on. Blocks are padded with such as cost nothing."""

    measured_ms: Floats  # [anchors]
    block_ms: Floats  # [anchors, blocks] entries
    ops: Floats  # [anchors, blocks]
    megabytes: Floats  # [anchors]
    shrunk: dict[str, dict[str, Floats]]  # for each of `Form.shrunk`: name -> [anchors], in units of its coefficient

    @classmethod
    def of(cls, entries: Mapping[str, Entry], networks: Sequence[Sequence[Graph]], measured_ms: Floats) -> "_Anchors":
        longest = max(map(len, networks))
        of_blocks = [[entries[g.key] for g in network] for network in networks]
        kinds = [
            {kind: math.fsum(e.latency_ms for e in network if e.kind == kind) for kind in {e.kind for e in network}}
            for network in of_blocks
        ]
        return cls(
            measured_ms,
            np.array([_padded([e.latency_ms for e in network], longest) for network in of_blocks]),
            np.array([_padded([sum(op_counts(g).values()) for g in network], longest) for network in networks]),
            np.array([sum(map(_megabytes, network)) for network in networks]),
            {
                "kind_scale": _table(kinds),
                "op_ms": _table([sum(map(_kinds, network), Counter()) for network in networks]),
                "border_ms": _table([Counter(filter(None, borders(network))) for network in networks]),
            },
        )

    @property
    def count(self) -> int:
        return len(self.measured_ms)

    def only(self, rows: NDArray[np.intp]) -> "_Anchors":
        """Some of the anchors."""
        return _Anchors(
            self.measured_ms[rows],
            self.block_ms[rows],
            self.ops[rows],
            self.megabytes[rows],
            {of: {name: column[rows] for name, column in table.items()} for of, table in self.shrunk.items()},
        )

    def left_out(self, form: Form) -> Floats:
        """Relative error [anchors] of each anchor, predicted by a fit on all others, choice of penalties included."""
        everyone = np.arange(self.count)
        errors = np.empty(self.count)
        for out in everyone:
            found = self.only(np.delete(everyone, out)).fit(form)
            errors[out] = self.only(everyone[out : out + 1]).predict(found)[0] / self.measured_ms[out] - 1
        return errors

    def predict(self, by: Correction) -> Floats:
        """Milliseconds [anchors]."""
        total = by.scale * self._sums(by.floor_ms) + by.offset_ms + by.weights_ms * self.megabytes
        for kind, column in self.shrunk["kind_scale"].items():
            total = total + (by.kind_scale.get(kind, by.scale) - by.scale) * column
        for of in ("op_ms", "border_ms"):
            for name, column in self.shrunk[of].items():
                total = total + getattr(by, of).get(name, 0.0) * column
        return total

    def fit(self, form: Form) -> Correction:
        """The correction of that form; penalty and floor are those of the smallest leave-one-out error."""
        candidates = [
            self._fit(form, floor_ms, penalty)
            for floor_ms in (self._floors() if form.floor else (0.0,))
            for penalty in (_PENALTIES if form.shrunk else (0.0,))
        ]
        return min(candidates, key=lambda found: found[1])[0]

    def _fit(self, form: Form, floor_ms: float, penalty: float) -> tuple[Correction, float]:
        """With these, and its leave-one-out error."""
        columns = {"scale": self._sums(floor_ms)}
        columns |= {name: {"offset_ms": np.ones(self.count), "weights_ms": self.megabytes}[name] for name in form.free}
        shrunk = self.shrunk.get(form.shrunk, {})
        # A coefficient of 1 is to mean as much of each: a factor of 1, or the time of the average op or border.
        each = max(sum(column.mean() for column in shrunk.values()), 1.0)
        unit = 1.0 if form.shrunk == "kind_scale" else self.measured_ms.mean() / each
        matrix = np.stack([*columns.values(), *(unit * column for column in shrunk.values())], axis=1)
        penalties = np.repeat([0.0, penalty], [len(columns), len(shrunk)])
        solution, error = _ridge(matrix, penalties, self.measured_ms)
        values = dict(zip(columns, solution.tolist(), strict=False))
        more = dict(zip(shrunk, (unit * solution[len(columns) :]).tolist(), strict=True))
        if form.shrunk == "kind_scale":
            more = {kind: values["scale"] + value for kind, value in more.items()}
        if form.shrunk:
            values[form.shrunk] = more
        return Correction(**values, floor_ms=floor_ms), error

    def _sums(self, floor_ms: float) -> Floats:
        """Of blocks [anchors], none below the floor."""
        return np.maximum(self.block_ms, floor_ms * self.ops).sum(1)

    def _floors(self) -> list[float]:
        """Milliseconds an op that hold up none, a tenth, ... of the blocks."""
        there = self.ops > 0
        return [0.0, *np.quantile(self.block_ms[there] / self.ops[there], _FLOORS[1:]).tolist()]


def _padded(values: Sequence[float], length: int) -> list[float]:
    return [*values, *[0.0] * (length - len(values))]


def _table(rows: Sequence[Mapping[str, float]]) -> dict[str, Floats]:
    """Name -> column."""
    return {name: np.array([float(row.get(name, 0.0)) for row in rows]) for name in sorted(set().union(*rows))}


def _ridge(columns: Floats, penalties: Floats, measured_ms: Floats) -> tuple[Floats, float]:
    """Ridge regression in relative error, and its leave-one-out error (by the hat matrix, exactly)."""
    size = np.abs(columns).mean(0) * (penalties == 0) + (penalties > 0)  # what is not shrunk may be of any unit
    relative = columns / np.where(size > 0, size, 1.0) / measured_ms[:, None]
    inverse = np.linalg.pinv(relative.T @ relative + np.diag(penalties), hermitian=True)
    solution = inverse @ relative.sum(0)
    leverage = np.einsum("ij,jk,ik->i", relative, inverse, relative)
    left_out = (1 - relative @ solution) / np.maximum(1 - leverage, 1e-9)
    return solution / np.where(size > 0, size, 1.0), float(np.sqrt(np.mean(left_out**2)))
