"""Tables that a device's folder keeps: latency_models/<device>/<space>/table.<precision>.csv and .json, proof.json."""

from pathlib import Path

import msgspec

from nas import catalog
from nas.errors import DeviceError, LatencyError, UnmeasuredBlock
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
    folder = device_folder(name)
    blocks = {key: block.label for key, (block, _) in space.blocks().items()}
    kept = sorted(p.parent for p in folder.glob(f"*/table.{precision}.csv"))
    kept.sort(key=lambda f: f.name != space.name)  # stable
    fewest: tuple[str, list[str]] = "", list(blocks.values())
    for where in kept:
        table = Table.load(where, precision)
        missing = [label for key, label in blocks.items() if key not in table.entries and key not in table.unsupported]
        if not missing:
            proof = read_proof(where / "proof.json", precision)
            return table, None if proof is None else proof.beside(table.digest)
        if len(missing) < len(fewest[1]):
            fewest = f"; the nearest is {where.name}/", missing
    nearest, missing = fewest
    having = f"none of its {len(kept)} tables has" if kept else "it has no table with"
    are = "blocks are" if len(missing) > 1 else "block is"
    raise UnmeasuredBlock(
        f"device {folder.name} is not at hand, and {having} all {len(blocks)} blocks of space {space.name!r} in "
        f"{precision} ({folder}){nearest}: {len(missing)} {are} missing, the first is `{missing[0]}`, for "
        f"{space.classes} classes and images of {_sides(space)} pixels. On that device, run "
        f"`nas measure {space.name} --device {folder.name}`; a table that others published is read by `nas import FILE "
        f"--format FORMAT --space {space.name} --device {folder.name}`."
    )


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
