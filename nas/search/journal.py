"""The append-only record of a search: what is committed here survives any crash, and what is damaged is never believed.

A journal is a text file, one JSON object a line: `{"crc": 2868, "record": {...}}`, the CRC-32 of the record's canonical
form (sorted keys, no spaces). The first record is the header, which says what search this is; others are trials,
numbered from 0 on. One process writes at a time. A killed writer can leave a last line without its end; that is dropped
when the journal is opened. All else that is not as it was written is damage, and refused: the file stays, and `salvage`
makes a new one of what precedes. Reading needs no lock, and works on every system; writing needs one that only Linux
and macOS have.
"""

import json
import os
import shlex
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.errors import JournalError

SCHEMA = 1
SEVERAL = 2  # of journals whose records count several accuracies; all else is as in schema 1

Record = dict[str, Any]


class Journal:
    """A journal open for appending.

    Attributes:
        records: what was committed before, without the header.
    """

    def __init__(self, path: Path | str, header: Record):
        """Opens `path`, or starts it with `header`.

        Raises:
            JournalError: the journal is in use, damaged, of another search or schema, or cannot be written. The file is
                then as it was.
        """
        self.path = Path(path)
        self.records: list[Record] = []
        self._pending: list[bytes] = []
        self._file = -1
        try:
            self._open({"schema": SCHEMA, **header})
        except OSError as e:
            self._abandon()
            raise _unwritable(self.path, e) from e
        except BaseException:
            self._abandon()
            raise

    def _open(self, header: Record) -> None:
        try:
            import fcntl
        except ImportError as e:
            raise JournalError(
                f"{self.path}: this system has no file locks that a writer needs (fcntl). Search on Linux or macOS; "
                f"the journal can be read anywhere."
            ) from e
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise JournalError(
                f"{self.path}: another process is writing this journal. Wait for that search to end, or stop it."
            ) from e
        with open(self._file, "rb", closefd=False) as stream:
            data = stream.read()
        first = _line(header)
        if first.startswith(data):  # new, or killed while the header was being written
            os.ftruncate(self._file, 0)
            self._pending.append(first)
            self.commit()
            _sync_folder(self.path.parent)
        else:
            (found, *self.records), size = _parse(self.path, data)
            _compare(self.path, found, header)
            if size < len(data):
                os.ftruncate(self._file, size)  # drops a torn last line

    def append(self, record: Record) -> None:
        """Adds `record` to those that the next `commit` makes durable."""
        self._pending.append(_line(record))

    def commit(self) -> None:
        """Writes what was appended and waits until it is on the disk.

        Raises:
            JournalError: the disk is full or has failed; what was committed before is intact.
        """
        data = b"".join(self._pending)
        if not data:
            return
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
        except OSError as e:
            self._abandon()  # half a line may be there; the next to open drops it
            raise _unwritable(self.path, e) from e
        self._pending.clear()

    def close(self) -> None:
        """Commits what is pending and lets the next writer in."""
        if self._file >= 0:
            try:
                self.commit()
            finally:
                self._abandon()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _abandon(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._pending.clear()


def read(path: Path | str) -> tuple[Record, list[Record]]:
    """The header and the committed records of a journal, which may be in use; a torn last line is left out.

    Raises:
        JournalError: it cannot be read, has no header, is damaged, or is of another schema.
    """
    path = Path(path)
    (header, *records), _ = _parse(path, _bytes(path))
    return header, records


@dataclass(frozen=True)
class Salvaged:
    """What `salvage` made: the intact prefix of `source`, in a file of its own."""

    source: Path
    path: Path  # of the new file
    records: int  # in it, without the header
    size_bytes: int  # of it, which is also where the damage begins
    lost_bytes: int  # from there on, left out
    lost_lines: int

    @property
    def commands(self) -> str:
        """A shell line that puts the new file where the old one is, and keeps that."""
        aside = self.source.with_name(f"{self.source.stem}.damaged{self.source.suffix}")
        steps = (("mv", "-n", self.source, aside), ("mv", "-n", self.path, self.source))
        return " && ".join(shlex.join(map(str, step)) for step in steps)


def salvage(path: Path | str, out: Path | str | None = None) -> Salvaged:
    """Writes the intact prefix of a damaged journal, of any schema, to a new file; `path` is only read.

    Args:
        out: the new file; `journal.salvaged.jsonl` beside a `journal.jsonl` if not given.

    Raises:
        JournalError: not even the header is intact, the file cannot be read, or `out` exists or cannot be written.
    """
    path = Path(path)
    out = path.with_name(f"{path.stem}.salvaged{path.suffix}") if out is None else Path(out)
    data = _bytes(path)
    records, size, _ = _intact(data)
    if not records:
        raise JournalError(f"{path}: not even the first record is intact. Nothing can be salvaged; start anew.")
    try:
        with open(out, "xb") as file:
            file.write(data[:size])
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(out.parent)
    except FileExistsError as e:
        raise JournalError(f"{out}: exists already, and is not overwritten. Move it away, or name another file.") from e
    except OSError as e:
        raise JournalError(f"{out}: cannot write: {e.strerror}. Name another file with --out.") from e
    left = data[size:]
    return Salvaged(path, out, len(records) - 1, size, len(left), len(left.splitlines()))


def _line(record: Record) -> bytes:
    body = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f'{{"crc":{zlib.crc32(body.encode())},"record":{body}}}\n'.encode()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise JournalError(f"{path}: cannot read this journal: {e.strerror}. Check the path.") from e


def _intact(data: bytes) -> tuple[list[Record], int, bool]:
    """The records before the first bad line, their size in bytes, and whether a killed writer can leave the rest."""
    records: list[Record] = []
    position = 0
    while position < len(data):
        end = data.find(b"\n", position) + 1 or len(data)
        line = data[position:end]
        try:
            record = json.loads(line)["record"]
            good = _line(record) == line  # the canonical form: no bit of it can change unnoticed
            number = len(records) - 1  # of a trial; the header has none
            good = good and record.get("trial", number) == number  # nor a whole line be lost, doubled or moved
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            good = False
        if not good:
            return records, position, not line.endswith(b"\n")
        records.append(record)
        position = end
    return records, position, True


def _parse(path: Path, data: bytes) -> tuple[list[Record], int]:
    records, size, torn = _intact(data)
    if not records:
        raise JournalError(f"{path}: byte 0: this is not a journal, or its header is damaged. Choose another file.")
    if not torn:
        raise JournalError(
            f"{path}: damaged at byte {size}, after {len(records) - 1} intact records, and not by a crash, which can "
            f"only leave a last line without its end. Nothing was changed. `nas doctor --salvage "
            f"{shlex.quote(str(path))}` writes the intact records to a new file and says how to go on from them."
        )
    if (schema := records[0].get("schema")) not in (SCHEMA, SEVERAL):
        age = "an older" if isinstance(schema, int) and schema < SCHEMA else "another"
        raise JournalError(
            f"{path}: a journal of schema {schema}, by {age} version of nas; this one knows {SCHEMA} and {SEVERAL}. "
            f"Go on with the version that began it, or start anew in another run folder."
        )
    return records, size


def _compare(path: Path, found: Record, wanted: Record) -> None:
    wanted = json.loads(json.dumps(wanted))
    different = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if not different:
        return
    what = "; ".join(f"{key}: the journal has {found.get(key)!r}, this search {wanted.get(key)!r}" for key in different)
    advice = "Use the same settings, or another run folder."
    if found.keys() != wanted.keys():
        advice = (
            "Its header has other keys than this version of nas writes, so it is likely of another version: go on with "
            "that, or use another run folder."
        )
    elif different == ["problem"]:
        advice = (
            "That is a digest of space, data, latency table, limits and training. If none of them has changed, an "
            "older version of nas began this journal and made the digest of other things: go on with that version, or "
            "use another run folder."
        )
    raise JournalError(f"{path}: written by another search ({what}). {advice}")


def _sync_folder(folder: Path) -> None:
    """Makes a new file's name durable too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, e: OSError) -> JournalError:
    if isinstance(e, FileExistsError | NotADirectoryError | IsADirectoryError):
        return JournalError(
            f"{path}: cannot write the journal: {e.strerror}. A file is where its folder should be, or a folder where "
            f"the journal should: choose another path."
        )
    return JournalError(
        f"{path}: cannot write the journal: {e.strerror}. What was committed is intact: make room or correct the "
        f"permissions, and the same command goes on."
    )
