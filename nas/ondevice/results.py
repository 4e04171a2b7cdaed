"""The file of results: lines of JSON behind a checksum, so that a half-written last one is noticed and dropped."""

import dataclasses
import json
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.errors import LatencyError
from nas.ondevice.timing import Round, Samples

SCHEMA = 2  # 1 timed networks before they had settled (nas.ondevice.timing)
RESULTS = "results.jsonl"

_SYNC_SECONDS = 1.0  # between writes that wait for the disk: a power cut costs no more than that


@dataclasses.dataclass(frozen=True)
class Failure:
    """A call that failed, or that ended the process, while other models were open: the model need not be to blame."""

    name: str
    why: str
    timing: bool  # after all models had been opened and tried


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a file of results holds."""

    manifest: dict[str, Any]
    starts: tuple[dict[str, Any], ...]  # of each process that has timed: hardware, version, when
    rounds: tuple[Round, ...]
    seconds: float  # that the rounds took
    unsupported: dict[str, str]  # name of a call -> why it cannot run
    others: tuple[float, ...]  # of each round: share of our CPUs' time that other processes took; NaN if not known
    busiest: str  # other processes, when they took most
    complete: bool
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()  # what else to know, where another program than ours has timed

    @property
    def names(self) -> tuple[str, ...]:
        """Of the calls that were timed, in the order of the manifest."""
        return tuple(c["name"] for c in self.manifest["calls"] if c["name"] not in self.unsupported)

    def samples(self) -> Samples[str]:
        """The samples of all rounds.

        Raises:
            LatencyError: nothing was timed.
        """
        if not self.rounds or not self.names:
            why = "; ".join(f"{name}: {said}" for name, said in list(self.unsupported.items())[:1])
            raise LatencyError(f"nothing was timed{f' ({why})' if why else ''}. Run the measuring program to its end.")
        every = [c["name"] for c in self.manifest["calls"]]
        kept = {every.index(name): number for number, name in enumerate(self.names)}
        timed = []
        for ran in self.rounds:
            pairs = [(kept[i], ms) for i, ms in zip(ran.order, ran.times_ms, strict=True) if i in kept]
            timed.append(Round(tuple(i for i, _ in pairs), tuple(ms for _, ms in pairs)))
        return Samples.of(self.names, timed)


def read(path: Path) -> Recording:
    """The results in `path`.

    Raises:
        LatencyError: the file is missing, not one of results, or damaged before its last line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise LatencyError(f"{path}: cannot read these results: {e}. Run the measuring program first.") from e
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut off
        record = _decoded(line)
        if record is None and not records:
            break
        if record is None:
            raise LatencyError(
                f"{path}, line {number}: damaged (its checksum does not fit). Bring the file anew from the device, or "
                f"delete it and measure again."
            )
        records.append(record)
    if records and records[0].get("kind") == "manifest" and records[0]["manifest"].get("schema") != SCHEMA:
        raise LatencyError(
            f"{path}: these results are of another version's measuring program (schema "
            f"{records[0]['manifest'].get('schema')}; this one reads {SCHEMA}), which times in another way. Make the "
            f"bundle anew and measure again."
        )
    if not records or records[0].get("kind") != "manifest":
        raise LatencyError(
            f"{path}: these are no results of this version's measuring program (schema {SCHEMA}), or their "
            f"first line is damaged. It writes {RESULTS} in the folder of the bundle: bring that."
        )
    kinds = ("start", "round", "failed", "unsupported", "end")
    of = {kind: [r for r in records if r["kind"] == kind] for kind in kinds}
    others = [float("nan") if r["others"] is None else r["others"] for r in of["round"]]
    seen = [(share, r["busiest"]) for share, r in zip(others, of["round"], strict=True) if r.get("busiest")]
    return Recording(
        manifest=records[0]["manifest"],
        starts=tuple(of["start"]),
        rounds=tuple(Round(tuple(r["order"]), tuple(r["times_ms"])) for r in of["round"]),
        seconds=sum(r["seconds"] for r in of["round"]),
        unsupported={r["name"]: r["why"] for r in of["unsupported"]},
        others=tuple(others),
        busiest=max(seen)[1] if seen else "",
        complete=bool(of["end"]),
        failures=tuple(Failure(r["name"], r["why"], r["timing"]) for r in of["failed"]),
    )


class Results:
    """The file of results, open for appending by one process."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]):
        self.path, self._synced = path, 0.0
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self.append({"kind": "manifest", "manifest": manifest})
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):  # the line that a kill cut off
            with open(path, "r+b") as f:
                f.truncate(end)
        if end == 0:
            self.append({"kind": "manifest", "manifest": manifest})
        self.before = read(path)
        if self.before.manifest["digest"] != manifest["digest"]:
            raise LatencyError(
                f"{path}: these results are of another bundle ({self.before.manifest['digest']}, this one is "
                f"{manifest['digest']}). Move them away, or name another file with --out."
            )

    def failed(self, failure: Failure) -> None:
        """Appends a failure."""
        self.append({"kind": "failed", **dataclasses.asdict(failure)})

    def unsupported(self, name: str, why: str) -> None:
        """Appends that a call cannot run."""
        self.append({"kind": "unsupported", "name": name, "why": why})

    def append(self, record: Mapping[str, Any]) -> None:
        """One line: whatever becomes of this process, it is there; after a power cut, all but the last second's are."""
        text = json.dumps(record, separators=(",", ":")).encode()
        with open(self.path, "ab") as f:
            f.write(b"%08x %s\n" % (zlib.crc32(text), text))
            f.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(f.fileno())
                self._synced = time.monotonic()


def _decoded(line: bytes) -> dict[str, Any] | None:
    crc, _, text = line.partition(b" ")
    try:
        return json.loads(text) if int(crc, 16) == zlib.crc32(text) else None
    except ValueError:
        return None
