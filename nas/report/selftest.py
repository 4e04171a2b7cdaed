"""The self-test of latency tables: a page on all tables of one folder and how far each may be trusted."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from nas import catalog, cost, drawing, words
from nas.errors import ConfigError, LatencyError, SpaceError
from nas.files import write_text
from nas.latency import FORMS, Entry, Proof, Table, device_folder, own_folder, proof_beside
from nas.ops import Block, Network
from nas.report import figures
from nas.report.page import render
from nas.space import Space, load_space

Floats = NDArray[np.float64]
Interval = tuple[float, float]

WITHIN_10, WITHIN_5, OF_REPEAT_TAU, DRIFT = 0.99, 0.90, 0.95, 0.03  # what a good table reaches
_WORST = 4  # networks that are drawn
_WIDEST = 10  # entries that are listed
_OPTIONS = 6  # options that are listed
_RESAMPLES = 2000
_USUAL = (((32, 32, 3), 10), ((224, 224, 3), 1000))  # images and classes to try, for tables that do not tell theirs


@dataclasses.dataclass(frozen=True)
class Place:
    """A stage of the space, and what its blocks take in the networks of a proof, on average."""

    name: str
    ms: float
    share: float


@dataclasses.dataclass(frozen=True)
class Widest:
    """A block that was measured less surely than others, and what it takes in the networks of a proof, on average."""

    block: Block
    entry: Entry
    share: float


@dataclasses.dataclass(frozen=True)
class Leaning:
    """An option of blocks, and the mean error of networks with more and with less of it than the median."""

    option: str
    more: float
    less: float
    difference: Interval  # 95 %


@dataclasses.dataclass(frozen=True)
class Worst:
    """A network that is predicted badly."""

    name: str
    error: float
    predicted_ms: float
    measured_ms: float
    macs: int
    picture: Markup


@dataclasses.dataclass(frozen=True)
class Test:
    """What the page says of one table."""

    table: Table
    proof: Proof | None
    correction: str  # in words
    unsupported: list[tuple[str, str]]  # label of a block, and why
    mape: Interval  # these are 95 % intervals
    bias: Interval
    within_5: Interval
    within_10: Interval
    places: list[Place]
    widest: list[Widest]
    leanings: list[Leaning]
    worst: list[Worst]
    reaches: list[tuple[bool | None, str]]  # whether the table is as good as this


def table_folders(what: str) -> list[Path]:
    """Folders with tables: `what` itself, or those of the device of that name or path.

    Raises:
        DeviceError: there is no such device.
        LatencyError: it has no tables.
    """
    if _precisions(Path(what)):
        return [Path(what)]
    if not Path(what).is_dir() and len(Path(what).parts) > 1 and not what.endswith(".toml"):
        raise LatencyError(f"{what}: there is no such folder of tables. `nas measure SPACE --device NAME` writes one.")
    device = device_folder(what)
    folders = sorted(f for f in device.iterdir() if f.is_dir() and _precisions(f))
    if not folders:
        raise LatencyError(
            f"{what}: device {device.name} has no latency tables ({device}). Measure one: `nas measure SPACE --device "
            f"{device.name}`, with --as NAME where that is whatever machine a run is on."
        )
    return folders


def write_table_report(folder: Path, *, space: str | None = None, out: Path | None = None) -> Path:
    """Writes the self-test of all tables in `folder`, one self-contained page, and returns its path.

    Args:
        space: name or path of the space that the tables are of; the one that they name if not given.
        out: the file; `folder`/report.html if not given (of tables that came installed, in `nas.latency.own_folder`).

    Raises:
        LatencyError: a table or its proof is damaged, or its space is not here as it was.
        RunError: the page cannot be written.
    """
    tests, plots = [], {}
    name = folder.name
    for precision in _precisions(folder):
        table = Table.load(folder, precision)
        of = _space_of(table, folder, space)
        proof = proof_beside(folder, precision, table.digest)
        proof = None if proof is None else _doubted(proof, table, of)
        tests.append(_test(table, proof, of))
        plots |= _plots(table, proof, of)
        name = of.name
    if not tests:
        raise LatencyError(f"{folder}: there are no latency tables here.")
    path = out or own_folder(folder) / "report.html"
    context = {
        "tests": tests,
        "plots": plots,
        "device": folder.resolve().parent.name,
        "space": name,
        "forms": FORMS,
        "colours": figures.COLOURS,
        "shares": {"within_10": WITHIN_10, "within_5": WITHIN_5},
    }
    write_text(path, render("table.html", context))
    return path


def _precisions(folder: Path) -> list[str]:
    return sorted(p.name.split(".")[1] for p in folder.glob("table.*.json"))


def _space_of(table: Table, folder: Path, name: str | None) -> Space:
    """The space of a table, as it was.

    Raises:
        LatencyError: it is not here, or not as it was.
    """
    if name is None and table.space not in catalog.list_spaces():
        raise LatencyError(f"{folder}: its table is of space {table.space!r}, which is not here: --space FILE.")
    for shape, classes in ((table.input, table.classes),) if table.classes else _USUAL:
        try:
            space = load_space(name or table.space, input_shape=(shape[0], shape[1], shape[2]), classes=classes)
        except (ConfigError, SpaceError):
            continue
        if space.digest == table.space_digest:
            return space
    raise LatencyError(
        f"{folder}: its {table.precision} table is of another form of space {table.space!r} (hash "
        f"{table.space_digest}). Bring that file back as it was (--space FILE), or measure again."
    )


def _doubted(proof: Proof, table: Table, space: Space) -> Proof:
    """The proof, with a doubt where it is of another table; older proofs, that do not say, are told by their rows."""
    if proof.table or not proof.rows:
        return proof.beside(table.digest)
    try:
        predicted = table.price(space, np.array([r.genotype for r in proof.rows]))
    except SpaceError:
        predicted = np.zeros(len(proof.rows))
    if np.allclose(predicted, [r.predicted_ms for r in proof.rows], rtol=1e-9):
        return proof
    return msgspec.structs.replace(proof, doubt="PROOF OF ANOTHER TABLE: this table predicts otherwise")


def _test(table: Table, proof: Proof | None, space: Space) -> Test:
    """All that is said of one table."""
    rows = proof.rows if proof else ()
    networks = [space.decode(np.array(r.genotype, np.uint8)) for r in rows]
    errors = np.array([r.predicted_ms / r.measured_ms - 1 for r in rows])
    parts = [table.parts_ms(network) for network in networks]
    totals = [math.fsum(ms) + once for ms, once in parts]
    count = proof.networks if proof else 0
    return Test(
        table=table,
        proof=proof,
        correction=str(table.correction),
        unsupported=[(space.blocks()[key][0].label, why) for key, why in table.unsupported.items()],
        mape=_interval(np.abs(errors)),
        bias=_interval(errors),
        within_5=words.wilson(proof.within_5, count) if proof else (0.0, 1.0),
        within_10=words.wilson(proof.within_10, count) if proof else (0.0, 1.0),
        places=_places(networks, parts, totals),
        widest=_widest(table, space, networks, parts, totals),
        leanings=_leanings(networks, parts, totals, errors),
        worst=_worst(proof, space, networks, parts, errors) if proof else [],
        reaches=_reaches(proof) if proof else [],
    )


def _interval(values: Floats) -> Interval:
    """95 % bootstrap interval of the mean."""
    if len(values) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _reaches(proof: Proof) -> list[tuple[bool | None, str]]:
    """What a good table reaches, and whether this one does; None where it cannot be told."""
    out: list[tuple[bool | None, str]] = [
        (
            proof.within_10 >= WITHIN_10,
            f"{words.percent(proof.within_10)} of the networks within 10 %; {words.percent(WITHIN_10, 0)} is good",
        ),
        (
            proof.within_5 >= WITHIN_5,
            f"{words.percent(proof.within_5)} of the networks within 5 %; {words.percent(WITHIN_5, 0)} is good",
        ),
    ]
    if proof.kendall_tau is None:
        out.append((None, f"no order to compare: {proof.no_order}"))
    elif proof.repeat_tau is not None:
        least = OF_REPEAT_TAU * proof.repeat_tau
        out.append(
            (
                proof.kendall_tau >= least,
                f"order: Kendall τ {proof.kendall_tau:.3f}; the measuring agrees with itself to "
                f"{proof.repeat_tau:.3f}, {words.percent(OF_REPEAT_TAU, 0)} of which, {least:.3f}, is good",
            )
        )
    if proof.drift is not None:
        out.append(
            (
                proof.drift <= DRIFT,
                f"while it was proved, the anchors drifted by {words.percent(proof.drift)}; up to "
                f"{words.percent(DRIFT, 0)} is good",
            )
        )
    return out


def _places(
    networks: Sequence[Network], parts: Sequence[tuple[list[float], float]], totals: Sequence[float]
) -> list[Place]:
    """Where the latency goes, in the order of the chain."""
    sums: dict[str, float] = {}
    for network, (blocks_ms, once_ms) in zip(networks, parts, strict=True):
        for block, ms in zip(network.blocks, blocks_ms, strict=True):
            where = words.stage(block.name)
            sums[where] = sums.get(where, 0.0) + ms
        sums["once a network"] = sums.get("once a network", 0.0) + once_ms
    ends = ("head", "once a network")
    order = sorted(sums, key=lambda where: ends.index(where) if where in ends else -1)  # stable
    return [Place(where, sums[where] / len(networks), sums[where] / math.fsum(totals)) for where in order]


def _widest(
    table: Table,
    space: Space,
    networks: Sequence[Network],
    parts: Sequence[tuple[list[float], float]],
    totals: Sequence[float],
) -> list[Widest]:
    """The entries with the widest intervals, in milliseconds: what they can cost a network."""
    taken: dict[str, float] = {}
    for network, (blocks_ms, _) in zip(networks, parts, strict=True):
        for block, ms in zip(network.blocks, blocks_ms, strict=True):
            taken[block.graph.key] = taken.get(block.graph.key, 0.0) + ms
    whole = math.fsum(totals) or 1.0
    known = [
        Widest(block, table.entries[key], taken.get(key, 0.0) / whole)
        for key, (block, _) in space.blocks().items()
        if key in table.entries
    ]
    return sorted(known, key=lambda w: -w.entry.interval_ms)[:_WIDEST]


def _leanings(
    networks: Sequence[Network],
    parts: Sequence[tuple[list[float], float]],
    totals: Sequence[float],
    errors: Floats,
) -> list[Leaning]:
    """Options of blocks that go with the error: those whose interval leaves out 0, the clearest first."""
    if len(networks) < 8:
        return []
    shares: dict[str, Floats] = {}
    for index, (network, (blocks_ms, _)) in enumerate(zip(networks, parts, strict=True)):
        for block, ms in zip(network.blocks, blocks_ms, strict=True):
            for option in [words.kind(block), *words.options(block, all_of_them=True)]:
                shares.setdefault(option, np.zeros(len(networks)))[index] += ms / totals[index]
    found = []
    for option, share in shares.items():
        more = share > np.median(share)
        if not 4 <= more.sum() <= len(networks) - 4:
            continue
        drawn = [_means(errors[of]) for of in (more, ~more)]
        low, high = np.quantile(drawn[0] - drawn[1], (0.025, 0.975))
        if low > 0 or high < 0:
            clear = abs(low + high) / (high - low)
            leaning = Leaning(option, errors[more].mean(), errors[~more].mean(), (float(low), float(high)))
            found.append((clear, leaning))
    return [leaning for _, leaning in sorted(found, key=lambda f: -f[0])[:_OPTIONS]]


def _means(values: Floats) -> Floats:
    """Of resamples."""
    drawn = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    return values[drawn].mean(1)


def _worst(
    proof: Proof,
    space: Space,
    networks: Sequence[Network],
    parts: Sequence[tuple[list[float], float]],
    errors: Floats,
) -> list[Worst]:
    """The networks with the largest errors, drawn to one scale."""
    chosen = np.argsort(-np.abs(errors), kind="stable")[:_WORST].tolist()
    times = {i: [*parts[i][0], parts[i][1]] for i in chosen}
    span = max([proof.rows[i].measured_ms for i in chosen] + [drawing.reach(t) for t in times.values()], default=1.0)
    out = []
    for i in chosen:
        row = proof.rows[i]
        picture = drawing.draw(
            networks[i],
            times[i],
            positions=[p.name for p in space.positions],
            limit_ms=row.measured_ms,
            limit_name=f"measured {words.ms(row.measured_ms)}",
            span_ms=1.02 * span,
        )
        macs = sum(cost.macs(b.graph) for b in networks[i].blocks)
        name = figures.numbered(i + 1)
        out.append(Worst(name, float(errors[i]), row.predicted_ms, row.measured_ms, macs, Markup(picture)))
    return out


def _plots(table: Table, proof: Proof | None, space: Space) -> dict[str, figures.Figure]:
    """By name, that of the table's precision at its end."""
    out = {}
    if table.correction.tried:
        out[f"forms-{table.precision}"] = figures.forms(table.correction.tried, table.correction.form)
    if proof is not None and proof.rows:
        macs = space.price(np.array([r.genotype for r in proof.rows]), space.costs(cost.macs)).tolist()
        out[f"proved-{table.precision}"] = figures.proved(proof)
        measured = [r.measured_ms for r in proof.rows]
        out[f"latency-{table.precision}"] = figures.errors(proof, measured, "measured, ms (logarithmic)")
        out[f"macs-{table.precision}"] = figures.errors(proof, macs, "MACs (logarithmic)", macs=True)
    return out
