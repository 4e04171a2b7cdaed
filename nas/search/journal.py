"""The append-only record of a search: what is committed here survives any crash, and what is damaged is never believed.

A journal is a text file, one JSON object a line: `{"crc": 2868, "record": {...}}`, the CRC-32 of the record's canonical
form (sorted keys, no spaces). The first record is the header, which says what search this is. One process writes at a
time. Only the last line can be torn by a crash; it is dropped when the journal is opened. Damage elsewhere is refused.
Reading needs no lock, and works on every system; writing needs one that only Linux and macOS have.
"""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

from nas.errors import JournalError

SCHEMA = 1

Record = dict[str, Any]


class Journal:
    """A journal open for appending.

    Attributes:
        records: what was committed before, without the header.
    """

    def __init__(self, path: Path | str, header: Record):
        """Opens `path`, or starts it with `header`.

        Raises:
            JournalError: the journal is in use, damaged, of another search, or cannot be written.
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
        JournalError: it cannot be read, has no header, or is damaged before its last line.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise JournalError(f"{path}: cannot read this journal: {e.strerror}. Check the path.") from e
    (header, *records), _ = _parse(Path(path), data)
    return header, records


def recover(path: Path | str) -> int:
    """Cuts a damaged journal back to its intact prefix, keeps the whole as `<path>.damaged`; returns the records left.

    Raises:
        JournalError: not even the header is intact, or the file cannot be written.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        records, size, _ = _intact(data)
        if not records:
            raise JournalError(f"{path}: not even the first record is intact. Nothing can be recovered; start anew.")
        shutil.copy2(path, path.with_name(path.name + ".damaged"))
        os.truncate(path, size)
    except OSError as e:
        raise _unwritable(path, e) from e
    return len(records) - 1


def _line(record: Record) -> bytes:
    body = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f'{{"crc":{zlib.crc32(body.encode())},"record":{body}}}\n'.encode()


def _intact(data: bytes) -> tuple[list[Record], int, bool]:
    """The records before the first bad line, their size in bytes, and whether that line (if any) is the last one."""
    records: list[Record] = []
    position = 0
    while position < len(data):
        end = data.find(b"\n", position) + 1 or len(data)
        line = data[position:end]
        try:
            record = json.loads(line)["record"]
            good = _line(record) == line  # the canonical form: no bit of it can change unnoticed
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            return records, position, end == len(data)
        records.append(record)
        position = end
    return records, position, True


def _parse(path: Path, data: bytes) -> tuple[list[Record], int]:
    records, size, at_tail = _intact(data)
    if not records:
        raise JournalError(f"{path}: byte 0: this is not a journal, or its header is damaged. Choose another file.")
    if not at_tail:
        raise JournalError(
            f"{path}: damaged at byte {size}, after {len(records) - 1} intact records, and not by a crash, which can "
            f"only tear the last line. The intact prefix can be recovered: `nas.search.journal.recover({str(path)!r})` "
            f"cuts the journal there and keeps a copy; the search then goes on from it."
        )
    return records, size


def _compare(path: Path, found: Record, wanted: Record) -> None:
    wanted = json.loads(json.dumps(wanted))
    different = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if different:
        what = "; ".join(
            f"{key}: the journal has {found.get(key)!r}, this search {wanted.get(key)!r}" for key in different
        )
        raise JournalError(f"{path}: written by another search ({what}). Use the same settings, or another run folder.")


def _sync_folder(folder: Path) -> None:
    """Makes a new file's name durable too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, e: OSError) -> JournalError:
    return JournalError(
        f"{path}: cannot write the journal: {e.strerror}. What was committed is intact: make room or correct the "
        f"permissions, and the same command goes on."
    )
