"""Tables that a device's folder keeps: latency_models/<device>/<space>/table.<precision>.csv and .json, proof.json.

Another form of a space, over other images or for other classes, has a folder of its own: `place`.
"""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from nas import catalog
from nas.errors import DeviceError, LatencyError, UnmeasuredBlock
from nas.latency.device import load_device, precisions_of
from nas.latency.learned import Learned
from nas.latency.model import LatencyModel
from nas.latency.proof import Proof
from nas.latency.table import Table
from nas.space import Space


class _Proofs(msgspec.Struct):
    """proof.json, which says more in a run's folder."""

    precisions: dict[str, Proof] = {}


def device_folder(name: str) -> Path:
    """The folder of the device `name` (of `nas.list_devices()`, or a path to a device.toml or its folder).

    Raises:
        DeviceError: there is none.
    """
    known = catalog.list_devices()
    return catalog.find(name, kind="device", file="device.toml", known=known, error=DeviceError).parent


def find_table(name: str, precision: str, space: Space) -> tuple[Table, Proof | None]:
    """A table in the folder of device `name` that has all blocks of `space`, and its proof, if it has one.

    A proof that is of another table says so (`Proof.doubt`).

    The table under the name of the space comes first; every other one will do as well, since equal blocks cost the
    same in all spaces.

    Raises:
        DeviceError: there is no such device.
        UnmeasuredBlock: no table has all blocks; names the first block that the best of them lacks, and how many.
        LatencyError: a table or its proof is damaged.
    """
    where, table = _find_table(name, precision, space)
    proof = proof_beside(where, precision, table.digest)
    return table, None if proof is None else proof.beside(table.digest)


def proof_beside(where: Path, precision: str, digest: str) -> Proof | None:
    """The proof of the table of that digest in `where`: the one that was made here, or the one that came along.

    Raises:
        LatencyError: it is damaged.
    """
    mine = read_proof(own_folder(where) / "proof.json", precision)
    return mine if mine is not None and mine.table == digest else read_proof(where / "proof.json", precision)


def table_folder(name: str, precision: str, space: Space) -> Path:
    """Where the table lies that `find_table` finds; errors as of that."""
    return _find_table(name, precision, space)[0]


def place(folder: Path, space: Space) -> Path:
    """Where a device's folder keeps what it knows of `space`: under its name; another form of it beside, with its hash.

    Raises:
        LatencyError: what is kept under its name is damaged.
    """
    where = folder / space.name
    for head in (*where.glob("table.*.json"), *where.glob("learned.*/model.json")):
        if _head(head).space_digest != space.digest:
            return folder / f"{space.name}.{space.digest}"
    return where


def own_folder(where: Path) -> Path:
    """Where proofs and pages of what lies in `where` are written: there; of what came installed, in the current folder.

    That is latency_models/<device>/<space>, too.
    """
    package = catalog.folder("latency_models").resolve()
    installed = package.name == "latency_models" and package.parent.name == "_data"
    if installed and where.resolve().is_relative_to(package):
        return Path("latency_models") / where.resolve().relative_to(package)
    return where


class _Head(msgspec.Struct):
    """What is asked of the header of a table, or of a learned model."""

    space_digest: str


def _head(path: Path) -> _Head:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Head)
    except (OSError, ValueError) as e:
        raise LatencyError(f"{path}: damaged: {e}. Restore it, or remove {path.parent} and measure again.") from e


def _find_table(name: str, precision: str, space: Space) -> tuple[Path, Table]:
    """Where the table lies that `find_table` finds, and that; errors as of it."""
    folder = device_folder(name)
    blocks = {key: block.label for key, (block, _) in space.blocks().items()}
    kept = sorted(p.parent for p in folder.glob(f"*/table.{precision}.csv"))
    kept.sort(key=lambda f: (_head(f / f"table.{precision}.json").space_digest != space.digest, f.name != space.name))
    fewest: tuple[str, list[str]] = "", list(blocks.values())
    for where in kept:
        table = Table.load(where, precision)
        missing = [label for key, label in blocks.items() if key not in table.entries and key not in table.unsupported]
        if not missing:
            return where, table
        if len(missing) < len(fewest[1]):
            other = f", of {table.classes} classes" if table.classes not in (0, space.classes) else ""
            fewest = f"; the nearest is {where.name}/{other}", missing
    nearest, missing = fewest
    device = load_device(name)
    if device.at_hand and not kept:
        raise UnmeasuredBlock(
            f"device {folder.name} is whatever machine a run is on: it is measured anew in every run, and no tables "
            f"are kept of it. Keep one under a name: `nas measure {space.argument} --device {folder.name} --as NAME`."
        )
    having = f"none of its {len(kept)} tables has" if kept else "it has no table with"
    are = "blocks are" if len(missing) > 1 else "block is"
    learned = [p.parent.parent.name for p in sorted(folder.glob(f"*/learned.{precision}/model.json"))]
    besides = f" It has a model learned from whole networks, of {', '.join(learned)}; that is no table." * bool(learned)
    there = "With the TPU compiler" if device.runtime == "tpu_compiler" else "On that device"
    raise UnmeasuredBlock(
        f"device {folder.name}: {having} all {len(blocks)} blocks of space {space.name!r} in {precision} "
        f"({folder}){nearest}: {len(missing)} {are} missing, the first is `{missing[0]}`, for {space.classes} classes "
        f"and images of {_sides(space)} pixels.{besides} {there}, run `nas measure {space.argument} --device "
        f"{folder.name}`; a table that others published is read by `nas import FILE --format FORMAT --space "
        f"{space.argument} --device {folder.name}`."
    )


def find_model(name: str, precision: str, space: Space) -> tuple[LatencyModel, Proof | None]:
    """What the folder of device `name` has that knows all networks of `space`, and its proof, if it has one.

    A table as of `find_table`, or a model learned for this very space; of both the newer one.

    Raises:
        DeviceError, UnmeasuredBlock, LatencyError: as `find_table`.
    """
    models = sorted(device_folder(name).glob(f"*/learned.{precision}/model.json"))
    where = next((p.parent.parent for p in models if _head(p).space_digest == space.digest), None)
    if where is None:
        return find_table(name, precision, space)
    learned = Learned.load(where, precision, space)
    try:
        table, proof = find_table(name, precision, space)
    except UnmeasuredBlock:
        table, proof = None, None
    if table is not None and table.date > learned.date:
        return table, proof
    proof = read_proof(where / f"learned.{precision}" / "proof.json", precision)
    return learned, None if proof is None else proof.beside(learned.digest)


def find_models(name: str, space: Space) -> tuple[dict[str, tuple[LatencyModel, Proof | None]], dict[str, str]]:
    """By precision what `find_model` finds in the folder of device `name`; and why nothing, where it finds nothing.

    Raises:
        UnmeasuredBlock: it finds nothing in any precision.
        DeviceError, LatencyError: as `find_model`.
    """
    found: dict[str, tuple[LatencyModel, Proof | None]] = {}
    missing: dict[str, UnmeasuredBlock] = {}
    for precision in precisions_of(load_device(name), space):
        try:
            found[precision] = find_model(name, precision, space)
        except UnmeasuredBlock as e:
            missing[precision] = e
    if not found:
        raise next(iter(missing.values()))
    return found, {precision: str(e) for precision, e in missing.items()}


def preferred(precisions: Iterable[str]) -> str:
    """The one that counts where nobody has said: float32, or the first."""
    known = list(precisions)
    return "float32" if "float32" in known else known[0]


def load_model(folder: Path, precision: str, space: Space) -> LatencyModel:
    """What was saved to `folder`: a table, or a model learned for `space`.

    Raises:
        LatencyError: missing, damaged, or edited by hand.
    """
    if (folder / f"learned.{precision}" / "model.json").exists():
        return Learned.load(folder, precision, space)
    return Table.load(folder, precision)


def find_sources(space: Space) -> list[tuple[str, Table]]:
    """(name of the device, table) of every device, and precision, whose folder has a table that prices `space`.

    Those of the device that is to be learned among them: sums that are wrong by themselves still tell a lot.

    Raises:
        LatencyError: there is none; a table is damaged.
    """
    found: list[tuple[str, Table]] = []
    wanted = space.blocks().keys()
    for name in catalog.list_devices():
        folder = device_folder(name)
        kept = sorted(folder.glob("*/table.*.csv"), key=lambda p: (p.parent.name != space.name, str(p)))
        done: set[str] = set()
        for path in kept:
            precision = path.name.split(".")[1]
            if precision not in done and wanted <= (table := Table.load(path.parent, precision)).entries.keys():
                found.append((name, table))
                done.add(precision)
    if not found:
        raise LatencyError(
            f"no device has a table of all blocks of space {space.name!r}, for {space.classes} classes and images of "
            f"{_sides(space)} pixels. Networks measured whole say little alone: other devices' latencies of all "
            f"networks say most of the rest. Make a table of this machine, which takes minutes: "
            f"`nas measure {space.argument} --device host_onnxruntime --as this_machine`."
        )
    return found


def _sides(space: Space) -> str:
    low, high = min(space.resolutions), max(space.resolutions)
    return str(low) if low == high else f"{low} to {high}"


def read_proof(path: Path, precision: str) -> Proof | None:
    """The proof in proof.json; None without that file, or without that precision in it.

    Raises:
        LatencyError: it is damaged.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Proofs).precisions.get(precision)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise LatencyError(
            f"{path}: the proof of this latency table is damaged: {e}. Restore it, or remove the file: the table then "
            f"counts as one without proof."
        ) from e
