"""Latency tables: milliseconds of every block on one device, and exact arithmetic over a whole space with them.

On disk a table is two text files that diff well: `table.<precision>.csv`, one line a block, and
`table.<precision>.json`, what it was measured on and with, and a checksum over both. Numbers are written so that they
come back to the last bit.
"""

import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from nas.errors import LatencyError, UnmeasuredBlock
from nas.latency.calibration import Correction, begins, border, borders, ends
from nas.latency.entry import Entry
from nas.latency.pair import read_pair, write_pair
from nas.ops import Graph, Network
from nas.space import Space
from nas.space.space import Between, Genotypes

_COLUMNS = ("key", "label", "role", "latency_ms", "interval_ms", "rounds")


class Anchor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network measured whole; the correction was fitted on these, and moves are noticed by them."""

    genotype: tuple[int, ...]
    measured_ms: float


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything but the entries."""

    device: str  # in words
    runtime: str
    runtime_version: str
    precision: str
    threads: int
    batch: int
    hardware: str
    space: str
    space_digest: str  # of the space that the anchors' genotypes belong to
    date: str  # ISO 8601, UTC
    command: str
    overhead_ms: float  # of a call that computes next to nothing; already part of the first block's entry
    correction: Correction
    anchors: tuple[Anchor, ...]
    notes: tuple[str, ...] = ()  # what else to know before trusting it: load, drift
    unsupported: dict[str, str] = {}  # key of a block that the device cannot run -> what the runtime said
    kind: Literal["measured", "imported", "estimated"] = "measured"  # here, by others, or not at all
    licence: str = ""  # of the numbers, where others published them
    input: tuple[int, ...] = ()  # shape of the images that the space was made for; empty in tables without it
    classes: int = 0  # likewise
    recipe: int = 1  # of the timings (`nas.measure.recipe.RECIPE`): those of two recipes do not compare


class Table(_Header, frozen=True, kw_only=True):
    """Latencies of blocks on one device, runtime, precision, thread count and batch size."""

    entries: dict[str, Entry]  # by `Graph.key`

    @property
    def digest(self) -> str:
        """Hash of everything that decides what the table predicts."""
        deciding: list[Any] = [sorted((k, e.latency_ms) for k, e in self.entries.items())]
        deciding += [self.correction.deciding, *([sorted(self.unsupported)] if self.unsupported else [])]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]

    def block_ms(self, graph: Graph) -> float:
        """Of one block, corrected, without the offset that comes once a network and without what neighbours cost.

        Raises:
            UnmeasuredBlock: it is not in the table.
        """
        self._require([(graph.key, graph.key)])
        return self._corrected(graph)

    def costs(self, space: Space) -> list[NDArray[np.float64]]:
        """Corrected milliseconds [branches] for each position, for `space.price` and `space.extreme`.

        Blocks that the device cannot run cost infinitely much.

        The offset that comes once a network is with the first position, which every network passes through. What
        neighbours cost is `between`.

        Raises:
            UnmeasuredBlock: naming the first block that is missing, and how many are.
        """
        self._require([(key, block.label) for key, (block, _) in space.blocks().items()])
        costs = space.costs(self._corrected)
        costs[0] = costs[0] + self.correction.offset_ms
        return costs

    def between(self, space: Space) -> Between | None:
        """Milliseconds that it costs that one block follows another, for `space.price` and `space.extreme`."""
        of = self.correction.border_ms
        return space.between(ends, begins, lambda end, begin: of.get(border(end, begin), 0.0)) if of else None

    def price(self, space: Space, genotypes: Genotypes) -> NDArray[np.float64]:
        """latency_ms [n] of genotypes [n, genes]: to the last bit what `network_ms` gives for each.

        Raises:
            UnmeasuredBlock: some block of the space is not in the table.
            SpaceError: the genotypes are of another space.
        """
        return space.price(genotypes, self.costs(space), self.between(space))

    def network_ms(self, network: Network) -> float:
        """Of one network, as a sum over its blocks.

        Raises:
            UnmeasuredBlock: naming the first of its blocks that is missing, and how many are.
        """
        total = 0.0
        for index, (block_ms, border_ms) in enumerate(self._parts(network)):
            total += (block_ms + (0.0 if index else self.correction.offset_ms)) + border_ms
        return total

    def parts_ms(self, network: Network) -> tuple[list[float], float]:
        """What each block of a network takes, its border with the block before it included, and what comes once.

        Raises:
            UnmeasuredBlock: as of `network_ms`.
        """
        return [block_ms + border_ms for block_ms, border_ms in self._parts(network)], self.correction.offset_ms

    def reachable(self, space: Space) -> tuple[float, Genotypes, float, Genotypes]:
        """(smallest latency_ms, its genotype, largest latency_ms, its genotype) over the whole space, exactly."""
        costs, between = self.costs(space), self.between(space)
        fastest, low = space.extreme(costs, between, largest=False)
        slowest, high = space.extreme(costs, between, largest=True)
        return low, fastest, high, slowest

    def level(self, anchors_ms: NDArray[np.float64]) -> float:
        """How fast the machine is now, given its anchors measured again [anchors]: 1.1 is 10 % slower than then.

        Other latencies measured together with them, divided by it, compare with the table.
        """
        return float(np.nanmedian(np.asarray(anchors_ms) / [a.measured_ms for a in self.anchors]))

    @property
    def basis(self) -> str:
        """How sums of blocks are corrected, in a line."""
        return self.correction.choice

    @property
    def caveat(self) -> str:
        """Nothing: what is reachable is exact."""
        return ""

    def bound(self, space: Space, genotypes: Genotypes) -> NDArray[np.float64]:
        """What a limit is held against [n]: `price`. How far a table errs is known for all networks, not for each."""
        return self.price(space, genotypes)

    def interval_ms(self, network: Network) -> None:
        """Not known for single networks: the table's proof says how far it errs."""

    def without(self, unsupported: dict[str, str]) -> "Table":
        """The same table, but all of these blocks (key -> why) count as ones that the device cannot run."""
        return msgspec.structs.replace(self, unsupported=unsupported)

    def save(self, folder: Path) -> Path:
        """Writes both files to `folder`, each atomically; returns the path of the CSV.

        Raises:
            RunError: the folder cannot be written to.
        """
        values: list[tuple[str, ...]] = [_COLUMNS]
        for key, e in sorted(self.entries.items(), key=lambda item: (item[1].role, item[1].label, item[0])):
            values.append((key, e.label, e.role, repr(e.latency_ms), repr(e.interval_ms), str(e.rounds)))
        head = {name: msgspec.to_builtins(getattr(self, name)) for name in _Header.__struct_fields__}
        paths = _paths(folder, self.precision)
        write_pair(*paths, values, head)
        return paths[0]

    @classmethod
    def load(cls, folder: Path, precision: str) -> "Table":
        """What `save` wrote.

        Raises:
            LatencyError: missing, damaged, or edited by hand.
        """
        rows_path, head_path = _paths(folder, precision)
        rows, head = read_pair(rows_path, head_path, what=f"{precision} latency table", again=_AGAIN)
        try:
            header = msgspec.convert(head, _Header)
            entries = {
                r["key"]: Entry(
                    float(r["latency_ms"]), float(r["interval_ms"]), r["label"], r["role"], int(r["rounds"])
                )
                for r in rows
            }
        except (msgspec.ValidationError, KeyError, TypeError, ValueError) as e:
            raise LatencyError(f"{rows_path}: this latency table is of another version of nas: {e}. {_AGAIN}") from e
        return cls(**{n: getattr(header, n) for n in _Header.__struct_fields__}, entries=entries)

    def __repr__(self) -> str:
        return (
            f"Table({self.device!r}, {self.runtime} {self.runtime_version}, {self.precision}, "
            f"{len(self.entries)} blocks of {self.space!r}, {self.date})"
        )

    def _corrected(self, graph: Graph) -> float:
        if graph.key in self.unsupported:
            return float("inf")
        return self.correction.block_ms(self.entries[graph.key], graph)

    def _parts(self, network: Network) -> list[tuple[float, float]]:
        """Of each block: itself, and its border with the one before."""
        self._require([(b.graph.key, b.label) for b in network.blocks])
        of = self.correction.border_ms
        names = borders([b.graph for b in network.blocks]) if of else [None] * len(network.blocks)
        return [
            (self._corrected(b.graph), 0.0 if name is None else of.get(name, 0.0))
            for b, name in zip(network.blocks, names, strict=True)
        ]

    def _require(self, blocks: Sequence[tuple[str, str]]) -> None:
        """Every (key, label) is in the table."""
        missing = {key: label for key, label in blocks if key not in self.entries and key not in self.unsupported}
        if missing:
            first = next(iter(missing.values()))
            others = f" and {len(missing) - 1} more blocks were" if len(missing) > 1 else " was"
            raise UnmeasuredBlock(
                f"block `{first}`{others} never measured on {self.device} ({self.runtime}, {self.precision}); the "
                f"table is of space {self.space!r}. Measure this space: `nas measure`."
            )


_AGAIN = "Restore it, or measure it again: `nas measure`; in a run, `nas run EXPERIMENT --redo measure`."


def _paths(folder: Path, precision: str) -> tuple[Path, Path]:
    return Path(folder) / f"table.{precision}.csv", Path(folder) / f"table.{precision}.json"


def date_of(seconds: float) -> str:
    """A moment, in seconds since 1970, as `date` has it: ISO 8601, UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
