"""Counts of earlier evaluations, found again by content: the same network, weights and images are not evaluated twice.

A cache is a folder with one text file for each meaning, which is what decides a count beside genotype and images:
weights, data, settings. A line is one count, or a list of them where several accuracies are counted, `[genotype,
images, correct, CRC-32 of these]`, appended by whoever made it; several searches may do so at once. A damaged line is
left out and its network evaluated again: a cache may forget, and may be deleted any time.
"""

import hashlib
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Self

from nas.errors import RunError
from nas.search.executor import Count
from nas.search.strategy import Genotype

logger = logging.getLogger(__name__)


class Cache:
    """The counts of one meaning that were known when it was opened; `put` writes for later searches.

    Args:
        folder: made when there is something to write.
        meaning: in any words; what another meaning knows is not found.

    Raises:
        RunError: it cannot be read.
    """

    def __init__(self, folder: Path | str, meaning: str):
        self.path = Path(folder) / f"{hashlib.sha256(meaning.encode()).hexdigest()[:32]}.jsonl"
        self._counts: dict[tuple[bytes, int], Count] = {}
        self._file = -1
        self._writable = True
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as e:
            raise RunError(f"{self.path}: cannot read the cache of counts: {e.strerror}. Check the folder.") from e
        self._torn = bool(data) and not data.endswith(b"\n")  # a writer was killed
        bad = 0
        for line in data.splitlines():
            try:
                genotype, images, correct, _ = json.loads(line)
                if _line(bytes(genotype), images, correct) != line:
                    raise ValueError(line)
                self._counts[bytes(genotype), images] = tuple(correct) if isinstance(correct, list) else correct
            except (ValueError, TypeError):
                bad += 1
        if bad:
            logger.warning("%s: %d of its lines are damaged and left out.", self.path, bad)

    def __len__(self) -> int:
        return len(self._counts)

    def get(self, genotype: Genotype, images: int) -> Count | None:
        """The count of a canonical genotype on `images` images, if it was known."""
        return self._counts.get((genotype.tobytes(), images))

    def put(self, genotype: Genotype, images: int, correct: Count) -> None:
        """Writes a count, unless it was known. Where that is impossible, it says so once and writes no more."""
        if not self._writable or (genotype.tobytes(), images) in self._counts:
            return
        try:
            if self._file < 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(self._file, b"\n" * self._torn + _line(genotype.tobytes(), images, correct) + b"\n")
            self._torn = False
        except OSError as e:
            self._writable = False
            logger.warning("%s: cannot write the cache of counts: %s. The search needs none.", self.path, e.strerror)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the writing; may be called twice."""
        self._writable = False
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _line(genotype: bytes, images: int, correct: Count) -> bytes:
    body = json.dumps([list(genotype), images, correct], separators=(",", ":"))
    return f"{body[:-1]},{zlib.crc32(body.encode())}]".encode()
