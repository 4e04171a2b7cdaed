"""Latency tables that others published, as tables of a space: every block of the space is looked up in theirs.

A block that has no entry is left out and told, never invented; `nas.latency.find_table` then says what is missing.
Networks that somebody measured whole become a learned model instead (`import_networks`).
"""

import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nas import blocks, catalog, cost
from nas.config import Device, nearest
from nas.errors import DeviceError, LatencyError
from nas.files import write_json, write_text
from nas.latency.calibration import Correction, calibrate
from nas.latency.device import load_device
from nas.latency.entry import Entry
from nas.latency.learned import About, Learned, learn, prove_learned, require_unit
from nas.latency.proof import Proof
from nas.latency.shelf import find_sources, place
from nas.latency.table import Anchor, Table, date_of
from nas.latency.transfer import KnownDevices
from nas.ops import Add, Conv, Graph, Shape
from nas.space import Space

NETWORKS = "networks"  # the form of a CSV of networks measured whole
_ROLES = ("random", "chosen", "held-out")
_OF_DEVICE = ("runtime", "precision", "threads", "batch")
_SAID = ("space", "hash", "image", "classes", *_OF_DEVICE)
UNITS = {"ms": 1.0, "us": 1e-3, "s": 1e3}  # in milliseconds

# Multiply-adds of blocks per second of their latencies. Microcontrollers at batch 1 are below, data-centre GPUs above
# all else that networks run on; milliseconds told as seconds or as microseconds nearly always lie outside.
_SLOWEST_GMACS, _FASTEST_GMACS = 0.05, 5_000.0
_SAME_UNIT = 20.0  # a network and the sum of its blocks differ by less, whatever a sum leaves out
_INTERVAL = 1.96  # half the 95 % interval of a normal distribution, in standard deviations


class Sample(msgspec.Struct, frozen=True):
    """One published latency."""

    latency_ms: float
    interval_ms: float = 0.0  # as `Entry.interval_ms`; 0 where nothing was published
    rounds: int = 1


class Published(msgspec.Struct, frozen=True):
    """What a file has for a space: latencies by the block's key, and networks measured whole."""

    samples: dict[str, Sample]
    anchors: tuple[Anchor, ...] = ()


class Imported(msgspec.Struct, frozen=True):
    """The table made of a file, where it was written, and the labels of the blocks that the file does not have."""

    table: Table
    path: Path
    missing: tuple[str, ...]

    def __str__(self) -> str:
        count = len(self.table.entries)
        found = f"{self.path}: {count} of the {count + len(self.missing)} blocks of space {self.table.space!r}"
        if len(self.missing) == 0:
            return found
        have = "have" if len(self.missing) > 1 else "has"
        return f"{found}; {len(self.missing)} {have} no entry in the file and no latency, the first `{self.missing[0]}`"


class Learnt(msgspec.Struct, frozen=True):
    """The model learned from a file's networks, where it was written, its proof, and what was left out."""

    model: Learned
    path: Path
    proof: Proof
    left_out: int  # rows without a latency

    def __str__(self) -> str:
        empty = f"; {self.left_out} rows have no latency and are left out" if self.left_out else ""
        return f"{self.path}: learned from {len(self.model.measured)} networks{empty}\n{self.proof}"


def import_file(file: str | Path, *, form: str, **options: Any) -> Imported | Learnt:
    """`import_networks` if `form` is "networks", else `import_table`, with the same options."""
    return import_networks(file, **options) if form == NETWORKS else import_table(file, form=form, **options)


def import_networks(
    file: str | Path, *, space: Space, device: str, out: str | Path | None = None, unit: str | None = None
) -> Learnt:
    """Writes the model learned from networks that somebody measured whole, as `import_table` does a table.

    FILE is a CSV with a header line; `nas measure SPACE --networks 20 --bundle out/` writes one to fill in.

    | column | |
    |---|---|
    | `genotype` | of a network: its genes, separated by blanks |
    | `latency_ms` | empty where it was not measured |
    | `role` | "random" or "chosen": learned from; "held-out": for the proof; left out: learned from, drawn at random |
    | `model` | its file; not read |

    Lines "# key: value" at its beginning say what was measured, and must fit: `space`, `hash` (the space's digest),
    `image`, `classes`; `runtime`, `precision`, `threads` and `batch` of the device, which a new device takes over.

    Raises:
        LatencyError: the file is not of that format, has too few networks, or is not in milliseconds; no known device
            has a table of the space.
        SpaceError: a genotype is of another space.
        DeviceError, RunError: as `import_table`.
    """
    path = Path(file)
    if unit is not None and unit not in UNITS:
        raise LatencyError(f"unknown unit `{unit}` of latencies.{nearest(unit, UNITS, kind='unit')}")
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
        said, lines = _said(path, text)
        _require_said(path, said, space)
        networks, left_out = _networks(path, text, space, skip=lines)
    except (OSError, UnicodeDecodeError) as e:
        raise LatencyError(f"{path}: cannot read these networks: {e}. Check the path.") from e
    sources = find_sources(space)
    folder = Path("latency_models") / device if out is None else Path(out)
    about, toml = _device(device, folder, path, said)
    fit, held_out = ([n for n in networks if (n.role == "held-out") == proof] for proof in (False, True))
    genotypes, of_proof = (
        np.array([n.genotype for n in of], np.uint8).reshape(len(of), len(space.sizes)) for of in (fit, held_out)
    )
    if not fit and left_out:
        raise LatencyError(
            f"{path}: {left_out} of its rows have no `latency_ms`, among them all that are to learn from (chosen and "
            f"random ones). Fill in what your tool has measured, and import it again."
        )
    factor = UNITS[unit or "ms"]
    fit_ms, proof_ms = (np.array([n.latency_ms for n in of]) * factor for of in (fit, held_out))
    if unit is None and fit:
        macs = space.price(genotypes, space.costs(cost.macs)).sum() * about.batch
        _require_rate(path, float(macs / fit_ms.sum() / 1e6))
        known = KnownDevices(space, tuple(table for _, table in sources))
        require_unit(known, genotypes, fit_ms)
    model = learn(
        About(
            device=about.device,
            runtime=about.runtime,
            runtime_version="",
            precision=said.get("precision", about.precision[0]),
            threads=about.threads,
            batch=about.batch,
            hardware=about.hardware,
            date=date_of(time.time()),
            command=f"nas import {path.name} --format {NETWORKS} --space {space.name} --device {device}",
            notes=(
                f"imported from {path.name}, sha256 {hashlib.sha256(data).hexdigest()}",
                "the date is that of the import",
            ),
            licence=about.licence,
        ),
        space,
        sources,
        genotypes,
        fit_ms,
        at_random=[n.role != "chosen" for n in fit],
    )
    proof = prove_learned(model, of_proof, proof_ms)
    if toml is not None:
        write_text(folder / "device.toml", toml)
    where = model.save(place(folder, space))
    write_json(where.parent / "proof.json", {"precisions": {model.precision: msgspec.to_builtins(proof)}})
    return Learnt(model, where, proof, left_out)


def _said(path: Path, text: str) -> tuple[dict[str, str], int]:
    """What the lines that begin with # say, by key, and how many they are."""
    said: dict[str, str] = {}
    for line in text.splitlines():
        line = line.strip(' ",;')  # what spreadsheets add
        if not line.startswith("#"):
            break
        key, _, value = (part.strip("# ") for part in line.partition(":"))
        if key not in _SAID:
            raise LatencyError(
                f"{path}, line {len(said) + 1}: unknown `{key}` of networks.{nearest(key, _SAID, kind='key')}"
            )
        if key in said:
            raise LatencyError(f"{path}, line {len(said) + 1}: `{key}` is there twice. Leave one of them out.")
        said[key] = value.partition("(")[0].strip()
    return said, len(said)


def _require_said(path: Path, said: Mapping[str, str], space: Space) -> None:
    """The networks are of `space`, as the file says."""
    here = {"space": space.name, "image": _x(space.input), "classes": str(space.classes), "hash": space.digest}
    for key, value in here.items():
        if said.get(key, value) != value:
            raise LatencyError(
                f"{path}: its networks are of {key} {said[key]}, and {key} {value} was asked for. Give what it says: "
                f"--space {said.get('space', space.name)} --image {said.get('image', _x(space.input))} --classes "
                f"{said.get('classes', space.classes)}; with another hash, the space's file has changed since."
            )


class _Whole(msgspec.Struct, frozen=True):
    """A row of a CSV of networks."""

    genotype: tuple[int, ...]
    latency_ms: float
    role: str


def _networks(path: Path, text: str, space: Space, *, skip: int) -> tuple[list[_Whole], int]:
    """The networks that have a latency, and how many rows have none; after `skip` lines."""
    reader = csv.DictReader(text.splitlines(keepends=True)[skip:])
    known, columns = {"genotype", "latency_ms", "role", "model"}, set(reader.fieldnames or ())
    if not {"genotype", "latency_ms"} <= columns <= known:
        raise LatencyError(
            f"{path}, line {skip + 1}: the columns are {', '.join(sorted(map(str, columns))) or 'missing'}. `genotype` "
            f"and `latency_ms` are needed; `role` and `model` are possible."
        )
    found, left_out = [], 0
    for row in reader:
        where = f"{path}, line {skip + reader.line_num}"
        role = (row.get("role") or "random").strip()
        if role not in _ROLES:
            raise LatencyError(f"{where}: unknown role `{role}`.{nearest(role, _ROLES, kind='role')}")
        if not (row["latency_ms"] or "").strip():
            left_out += 1
            continue
        genotype = _genotype(where, row["genotype"], space)
        found.append(_Whole(genotype, _positive(where, "latency_ms", row["latency_ms"]), role))
    return found, left_out


def _genotype(where: str, text: str, space: Space) -> tuple[int, ...]:
    try:
        genes = tuple(int(g) for g in text.split())
    except ValueError as e:
        raise LatencyError(f"{where}: `genotype` is {text!r}: whole numbers are needed.") from e
    return tuple(map(int, space.check(genes)))


def import_table(
    file: str | Path,
    *,
    form: str,
    space: Space,
    device: str,
    out: str | Path | None = None,
    unit: str | None = None,
) -> Imported:
    """Writes the table in `file` to `latency_models/<device>/<space>/` of the current folder.

    A device.toml is written beside it if there is none: the package's, or else one that names the file.

    Args:
        file: what others published.
        form: a name in `FORMATS`, whose functions say what they read.
        space: whose blocks are looked up.
        device: name of the device that the latencies are of.
        out: folder in place of `latency_models/<device>`.
        unit: of the file's latencies, a name in `UNITS`; None: ms, which are then held against the blocks' MACs.

    Raises:
        LatencyError: the file is not of that format, has nothing of this space, or is not in milliseconds.
        DeviceError: the device is this machine, which is measured, or its name cannot be a folder's.
        RunError: the folder cannot be written to.
    """
    for what, name, known in (("format", form, [*FORMATS, NETWORKS]), ("unit", unit or "ms", UNITS)):
        if name not in known:
            raise LatencyError(f"unknown {what} `{name}` of a latency table.{nearest(name, known, kind=what)}")
    path = Path(file)
    try:
        data = path.read_bytes()
        published = _scaled(FORMATS[form](path, data.decode("utf-8-sig"), space), UNITS[unit or "ms"])
    except (OSError, UnicodeDecodeError) as e:
        raise LatencyError(f"{path}: cannot read this latency table: {e}. Check the path.") from e
    wanted = space.blocks()
    if not published.samples:
        first = next(iter(wanted.values()))[0]
        raise LatencyError(
            f"{path}: it has none of the {len(wanted)} blocks of space {space.name!r}, the first of which is "
            f"`{first.label}`, {_x(first.graph.input)} to {_x(first.graph.shape)}. Give the space, the image size and "
            f"the classes that it was measured for; widths must be equal, since latencies of others are not scaled."
        )
    folder = Path("latency_models") / device if out is None else Path(out)
    about, toml = _device(device, folder, path)
    if unit is None:
        _require_plausible(path, published, space, about.batch)
    entries = {
        key: Entry(s.latency_ms, s.interval_ms, wanted[key][0].label, wanted[key][1], s.rounds)
        for key, s in published.samples.items()
    }
    table = Table(
        device=about.device,
        runtime=about.runtime,
        runtime_version="",
        precision=about.precision[0],
        threads=about.threads,
        batch=about.batch,
        hardware=about.hardware,
        space=space.name,
        space_digest=space.digest,
        input=space.input,
        classes=space.classes,
        date=about.date or date_of(time.time()),
        command=f"nas import {path.name} --format {form} --space {space.name} --device {device}",
        overhead_ms=0.0,  # nobody published it apart: it is in the entries
        correction=_correction(path, published.anchors, entries, space),
        anchors=published.anchors,
        notes=(
            f"source: {about.source or path.name}",
            f"imported from {path.name}, sha256 {hashlib.sha256(data).hexdigest()}",
            *(() if about.date else ("the date is that of the import",)),
        ),
        kind="imported",
        licence=about.licence,
        entries=entries,
    )
    if toml is not None:
        write_text(folder / "device.toml", toml)
    missing = tuple(block.label for key, (block, _) in wanted.items() if key not in published.samples)
    return Imported(table, table.save(place(folder, space)), missing)


# formats


def once_for_all(path: Path, text: str, space: Space) -> Published:
    """Tables of Once-for-All (Cai et al. 2020, arXiv:1908.09791), {name: {resolution: {op: {mean, std, count}}}}, JSON.

    What is added up over a network is what the authors add up (github.com/mit-han-lab/once-for-all,
    ofa/tutorial/latency_table.py): the first convolution, the blocks, and of the head, here one block, the final
    expansion, the pooling, the feature mix and the classifier.

    Ops are looked up by their exact widths, as there. The Note10's table is of width 1.2 (space
    `ofa_mobilenet_v3_w12`), and says nothing of networks of width 1.0.

    Where resolutions meet in one shape the same op was measured with each of them, on the Note10 up to 2 % apart. It
    gets the mean of its measurements at those resolutions that the space has; with only one, sums are the authors'.
    """
    lookup = _Lookup(path, text, tables={str(r) for r in space.resolutions})

    def ops(graph: Graph) -> list[str] | None:
        if stem := _like(graph, "conv_stem", kernel=3, act="hard_swish"):
            return [f"Conv-input:{_x(graph.input)}-output:{_x(stem.shape)}"]
        if head := _like(graph, "mobilenet_v3_head", act="hard_swish"):
            (height, width, channels), (last, mixed) = graph.input, (c.shape[-1] for c in _convs(head))
            side = f"{height}x{width}x"
            return [
                f"Conv_1-input:{side}{channels}-output:{side}{last}",
                f"AvgPool2D-input:{side}{last}-output:1x1x{last}",
                f"Conv_2-input:1x1x{last}-output:1x1x{mixed}",
                f"Logits-input:1x1x{mixed}-output:{head.shape[-1]}",
            ]
        for act in ("relu", "hard_swish"):
            for se in (False, True):
                if block := _like(graph, "mbconv", act=act, se=se):
                    hidden, kernel, stride, skip = _inverted(block)
                    return [
                        f"expanded_conv-input:{_x(graph.input)}-output:{_x(graph.shape)}-expand:{hidden}-kernel:{kernel}"
                        f"-stride:{stride}-idskip:{skip}-se:{se:d}-hs:{act == 'hard_swish':d}"
                    ]
        return None

    return lookup.published(space, ops)


def proxyless(path: Path, text: str, space: Space) -> Published:
    """Tables of ProxylessNAS (Cai et al. 2019, arXiv:1812.00332), {op: {mean, var, count}}, JSON: the Pixel 1's.

    Added up as the authors do: the first convolution, the blocks, the last convolution, and the classifier with its
    pooling. Their blocks are `mbconv` with ReLU6; the space is `proxyless_nas`, at 224 pixels and 1000 classes.
    """
    lookup = _Lookup(path, text)

    def ops(graph: Graph) -> list[str] | None:
        if stem := _like(graph, "conv_stem", kernel=3, act="relu6"):
            return [f"Conv-input:{_x(graph.input)}-output:{_x(stem.shape)}"]
        if head := _like(graph, "classifier", act="relu6"):
            last = _convs(head)[0].shape
            return [
                f"Conv_1-input:{_x(graph.input)}-output:{_x(last)}",
                f"Logits-input:{_x(last)}-output:{head.shape[-1]}",
            ]
        if block := _like(graph, "mbconv", act="relu6"):
            hidden, kernel, stride, skip = _inverted(block)
            expand = hidden / graph.input[-1]
            return [
                f"expanded_conv-input:{_x(graph.input)}-output:{_x(graph.shape)}-expand:{expand:g}-kernel:{kernel}"
                f"-stride:{stride}-idskip:{skip}"
            ]
        return None

    return lookup.published(space, ops)


def comma_separated(path: Path, text: str, space: Space) -> Published:
    """A CSV of one's own, with a header line. A row is a block, or a network measured whole.

    | column | |
    |---|---|
    | `latency_ms` | always |
    | `key` | of a block, `block.graph.key`, as table.<precision>.csv has it |
    | `label` | of a block, in place of `key`, where one block of the space has it: "mbconv expand=6 kernel=3 ..." |
    | `input`, `output` | shapes such as "56x56x24", where several blocks have the label |
    | `interval_ms` | half the 95 % interval of latency_ms; may be left out |
    | `genotype` | of a network in place of a block: its genes, separated by blanks |

    Networks fix a correction of the sums, as in tables that are measured, and give units away.
    """
    reader = csv.DictReader(io.StringIO(text))
    known = {"latency_ms", "key", "label", "input", "output", "interval_ms", "genotype"}
    columns = set(reader.fieldnames or ())
    if "latency_ms" not in columns or not columns & {"key", "label"} or not columns <= known:
        raise LatencyError(
            f"{path}, line 1: the columns are {', '.join(sorted(map(str, columns))) or 'missing'}. `latency_ms` and "
            f"`key` or `label` are needed; {', '.join(sorted(known - {'latency_ms'}))} are possible."
        )
    samples: dict[str, Sample] = {}
    anchors: list[Anchor] = []
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        latency_ms = _positive(where, "latency_ms", row["latency_ms"])
        if (row.get("genotype") or "").strip():
            anchors.append(Anchor(_genotype(where, row["genotype"], space), latency_ms))
            continue
        key = _key_of(where, row, space)
        if key in samples:
            raise LatencyError(f"{where}: this block has a row above. Leave one of them out.")
        if key is not None:
            said = row.get("interval_ms")
            samples[key] = Sample(latency_ms, _positive(where, "interval_ms", said, least=0.0) if said else 0.0)
    return Published(samples, tuple(anchors))


Format = Callable[[Path, str, Space], Published]

FORMATS: dict[str, Format] = {"ofa": once_for_all, "proxyless": proxyless, "csv": comma_separated}


class _Lookup:
    """A published table: op -> its latency. Tables of one op are merged, weighted by the number of measurements."""

    def __init__(self, path: Path, text: str, *, tables: set[str] | None = None):
        self._ops: dict[str, list[Sample]] = {}
        try:
            for op, row in _leaves(json.loads(text), tables):
                mean = _positive(f"{path}, `{op}`", "mean", row["mean"])
                deviation = float(row["std"]) if "std" in row else math.sqrt(row.get("var", 0.0))
                count = max(int(row.get("count", 1)), 1)
                self._ops.setdefault(op, []).append(Sample(mean, _INTERVAL * deviation / math.sqrt(count), count))
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise LatencyError(
                f"{path}: not a table of ops with `mean`, `std` or `var`, and `count`, in JSON: {e}. Is it of another "
                f"format (--format)?"
            ) from e

    def published(self, space: Space, ops: Callable[[Graph], list[str] | None]) -> Published:
        """The blocks of `space` all of whose `ops` are there."""
        samples = {}
        for key, (block, _) in space.blocks().items():
            names = ops(block.graph)
            if names is not None and all(name in self._ops for name in names):
                samples[key] = _in_a_row([_merged(self._ops[name]) for name in names])
        return Published(samples)


def _leaves(value: Any, tables: set[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every (op, row) in nested tables. Of tables whose names are numbers (resolutions) only those in `tables`."""
    for name, inner in value.items():
        if "mean" in inner:
            yield name, inner
        elif tables is None or not name.isdigit() or name in tables:
            yield from _leaves(inner, tables)


def _merged(samples: list[Sample]) -> Sample:
    """Measurements of one thing."""
    rounds = sum(s.rounds for s in samples)
    mean = sum(s.latency_ms * s.rounds for s in samples) / rounds
    return Sample(mean, math.hypot(*(s.interval_ms * s.rounds for s in samples)) / rounds, rounds)


def _in_a_row(samples: list[Sample]) -> Sample:
    """Ops that run one after the other, errors independent."""
    total = sum(s.latency_ms for s in samples)
    return Sample(total, math.hypot(*(s.interval_ms for s in samples)), min(s.rounds for s in samples))


# blocks


def _like(graph: Graph, block: str, **options: Any) -> Graph | None:
    """`graph`, if it is what `block` records with these options and with the widths, kernel and stride of `graph`."""
    convs = _convs(graph)
    if not convs:
        return None
    match block:
        case "conv_stem":
            found = {"width": convs[0].shape[-1], "stride": convs[0].stride}
        case "mbconv":
            depthwise = [c for c in convs if c.groups > 1]
            if len(depthwise) != 1:
                return None
            ((kernel, stride, hidden),) = ((c.kernel, c.stride, c.shape[-1]) for c in depthwise)
            found = {"width": graph.shape[-1], "kernel": kernel, "stride": stride, "expand": hidden / graph.input[-1]}
        case _:
            found = {"width": convs[0].shape[-1], "classes": graph.shape[-1]}
            if block == "mobilenet_v3_head":
                found |= {"features": convs[-1].shape[-1]}
    try:
        recorded = blocks.record(block, graph.input, tuple(sorted({**found, **options}.items())))
    except (ValueError, TypeError):
        return None
    return graph if recorded == graph else None


def _convs(graph: Graph) -> list[Conv]:
    return [op for op in graph.ops if isinstance(op, Conv)]


def _inverted(block: Graph) -> tuple[int, int, int, int]:
    """(expanded width, kernel, stride, 1 with a residual connection) of an `mbconv`."""
    depthwise = next(c for c in _convs(block) if c.groups > 1)
    return depthwise.shape[-1], depthwise.kernel, depthwise.stride, int(any(isinstance(op, Add) for op in block.ops))


def _x(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _key_of(where: str, row: dict[str, str], space: Space) -> str | None:
    """The key of the block that a row names; None if it is none of the space's."""
    if key := (row.get("key") or "").strip():
        return key if key in space.blocks() else None
    label = (row.get("label") or "").strip()
    if not label:
        raise LatencyError(f"{where}: neither `key` nor `label` (nor `genotype`) says what this is the latency of.")
    found = [
        key
        for key, (block, _) in space.blocks().items()
        if block.label == label
        and (row.get("input") or "").strip() in ("", _x(block.graph.input))
        and (row.get("output") or "").strip() in ("", _x(block.graph.shape))
    ]
    if len(found) > 1:
        raise LatencyError(
            f"{where}: {len(found)} blocks of space {space.name!r} are `{label}`. Tell them apart by `input` and "
            f'`output`, shapes such as "56x56x24", or by `key`.'
        )
    return found[0] if found else None


def _positive(where: str, name: str, value: Any, *, least: float | None = None) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < (least or 0.0) or (least is None and number == 0):
        raise LatencyError(f"{where}: `{name}` is {value!r}: a {'positive ' if least is None else ''}number is needed.")
    return number


# plausibility


def _scaled(published: Published, factor: float) -> Published:
    """In milliseconds."""
    replace = msgspec.structs.replace
    return Published(
        {key: replace(s, latency_ms=s.latency_ms * factor) for key, s in published.samples.items()},
        tuple(replace(a, measured_ms=a.measured_ms * factor) for a in published.anchors),
    )


def _require_plausible(path: Path, published: Published, space: Space, batch: int) -> None:
    """The latencies could be milliseconds, given the MACs."""
    macs = sum(cost.macs(space.blocks()[key][0].graph) for key in published.samples) * batch
    _require_rate(path, macs / sum(s.latency_ms for s in published.samples.values()) / 1e6)


def _require_rate(path: Path, gmacs: float) -> None:
    """Some device could make so many billion multiply-adds a second."""
    if not _SLOWEST_GMACS <= gmacs <= _FASTEST_GMACS:
        likely = "s" if gmacs > _FASTEST_GMACS else "us"
        raise LatencyError(
            f"{path}: read as milliseconds, its latencies say {gmacs:.3g} billion multiply-adds a second; devices make "
            f"{_SLOWEST_GMACS:g} to {_FASTEST_GMACS:g}. If the file is in another unit, say so: `--unit {likely}`. If "
            f"the device is like that, `--unit ms`."
        )


def _correction(path: Path, anchors: Sequence[Anchor], entries: Mapping[str, Entry], space: Space) -> Correction:
    """Fitted on the networks of the file; without any, sums are taken as they are.

    Raises:
        LatencyError: a network has a block without entry, or is far from the sum of its blocks.
    """
    if not anchors:
        return Correction()
    networks = [space.decode(anchor.genotype).blocks for anchor in anchors]
    for chain in networks:
        if missing := [b.label for b in chain if b.graph.key not in entries]:
            raise LatencyError(
                f"{path}: a network measured whole has `{missing[0]}`, which has no latency in the file. Add that row, "
                f"or leave the network out."
            )
    measured = np.array([a.measured_ms for a in anchors])
    ratios = measured / [sum(entries[b.graph.key].latency_ms for b in chain) for chain in networks]
    if (worst := ratios[np.abs(np.log(ratios)).argmax()]) > _SAME_UNIT or worst < 1 / _SAME_UNIT:
        raise LatencyError(
            f"{path}: a network measured whole takes {worst:.3g} times the sum of its blocks; networks and blocks must "
            f"be in one unit. Correct the file: `latency_ms` is in milliseconds in every row (or all as --unit says)."
        )
    return calibrate(entries, [[b.graph for b in chain] for chain in networks], measured)


# the device


def _device(name: str, folder: Path, source: Path, said: Mapping[str, str] | None = None) -> tuple[Device, str | None]:
    """The device, and the device.toml to write for it; None where `folder` has one.

    Args:
        said: in the file, of a device: its runtime, precision, threads and batch.

    Raises:
        DeviceError: it is this machine, its name is a path, or it is not as the file says.
    """
    said = {key: value for key, value in (said or {}).items() if key in _OF_DEVICE}
    if not name or Path(name).name != name or name in (".", ".."):
        raise DeviceError(f"--device {name}: a name without folders is needed; the place is for --out to say.")
    if (folder / "device.toml").is_file():
        about, text = load_device(str(folder.resolve())), None
    elif name in catalog.list_devices():
        found = catalog.find(name, kind="device", file="device.toml", known=[name], error=DeviceError)
        about, text = load_device(str(found)), found.read_text(encoding="utf-8")
    else:
        as_said = {
            "runtime": said.get("runtime", "unknown"),
            "threads": _count(source, "threads", said),
            "batch": _count(source, "batch", said),
            "precision": (said.get("precision", "float32"),),
        }
        about = Device(device=name, hardware=name, source=source.name, **as_said)
        text = (
            "# Written by `nas import`. Say what was measured, and how: a number is worth no more than that.\n"
            f"device = {json.dumps(name)}\n"
            f"runtime = {json.dumps(about.runtime)}\n"
            f"threads = {about.threads}\n"
            f"batch = {about.batch}\n"
            f"precision = {json.dumps(about.precision)}\n"
            f"hardware = {json.dumps(name)}\n"
            f"source = {json.dumps(source.name)}\n"
            f'licence = ""\n'
        )
    if about.at_hand:
        raise DeviceError(
            f'device {name} is the machine that runs are on (hardware = "host"), which is measured for every run. Give '
            f"the device that the file is of a name of its own."
        )
    has = {"runtime": about.runtime, "threads": str(about.threads), "batch": str(about.batch)}
    for key, value in said.items():
        if value not in (about.precision if key == "precision" else [has[key]]):
            raise DeviceError(
                f"{source}: its networks are of {key} {value}, and device {name} has "
                f"{', '.join(about.precision) if key == 'precision' else has[key]}. Give the device that was measured "
                f"a name of its own, or correct whichever is wrong."
            )
    return about, text


def _count(source: Path, key: str, said: Mapping[str, str]) -> int:
    value = said.get(key, "1")
    if not value.isdigit() or int(value) < 1:
        raise LatencyError(f"{source}: `{key}` is {value!r}: a whole number is needed.")
    return int(value)
