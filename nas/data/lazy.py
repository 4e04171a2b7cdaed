"""Images that stay encoded in their files and are decoded when they are asked for."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.data.decode import Encoded, decode
from nas.errors import DataError

STORAGE = ("auto", "memory", "files")
CHUNK = 64  # images that a thread decodes in one go where many are wanted
MANY = 1024  # images; fewer, such as a batch that is read ahead, are decoded by the thread that asks for them


@dataclass(frozen=True, eq=False)
class Records:
    """Encoded images with random access, safe to be read by several threads.

    Attributes:
        read: the encoded images of some records; many at once cost less than one by one where files are compressed.
        name: what messages call a record: its file, and where in it.
        sizes: int32 [n, 3], height, width and channels of every record once it is decoded.
        fingerprint: sha256 of the files' names and sizes in bytes, in the order of the records.
    """

    read: Callable[[Sequence[int]], Iterable[Encoded]]
    name: Callable[[int], str]
    sizes: NDArray[np.int32]
    fingerprint: str


@dataclass(frozen=True, eq=False)
class LazyImages:
    """What `Part.images` is where the images stay in their files: indexing decodes, and gives uint8 arrays.

    Attributes:
        records: where the images are.
        rows: int64 [n], which of them these are.
        shape: (n, H, W, C), as an array would have it. Images of other sizes are resized if `resize`, otherwise
            refused; grey ones become colour where C is 3.
        threads: how many decode at once where many images are wanted.
    """

    records: Records
    rows: NDArray[np.int64]
    shape: tuple[int, int, int, int]
    resize: bool
    threads: int

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        """The images at `index`, a number, slice or array as NumPy takes it along the first axis.

        Raises:
            DataError: one of them is truncated or damaged, or its file has changed.
        """
        rows = self.rows[index]
        images = self._read(rows.ravel().tolist(), together=rows.size >= MANY)
        return images.reshape(*rows.shape, *self.shape[1:])

    def take(self, indices: NDArray[Any]) -> "LazyImages":
        """The images at `indices`, in that order; nothing is decoded."""
        rows = self.rows[indices]
        return replace(self, rows=rows, shape=(len(rows), *self.shape[1:]))

    def decoded(self) -> NDArray[np.uint8]:
        """All of them, in memory."""
        return self._read(self.rows.tolist(), together=True)

    @property
    def nbytes(self) -> int:
        """Bytes that they would take in memory."""
        return int(np.prod(self.shape))

    def _read(self, rows: list[int], *, together: bool) -> NDArray[np.uint8]:
        """The images [n, H, W, C] of records, decoded by one thread or by all of them together."""
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)

        def fill(part: slice) -> None:
            wanted = rows[part]
            for pixels, row, encoded in zip(out[part], wanted, self.records.read(wanted), strict=True):
                pixels[...] = self._decoded(encoded, row)

        if together:
            in_threads(fill, [slice(i, i + CHUNK) for i in range(0, len(rows), CHUNK)], self.threads)
        else:
            fill(slice(None))
        return out

    def _decoded(self, encoded: Encoded, row: int) -> NDArray[np.uint8]:
        """[H, W, 1] or [H, W, C]."""
        name = self.records.name(row)
        image = decode(encoded, name, self.shape[1] if self.resize else None)
        if image.shape[:2] != self.shape[1:3] or image.shape[2] not in (1, self.shape[3]):
            raise DataError(
                f"{name}: {'x'.join(map(str, image.shape))} pixels (height x width x channels) once decoded, but "
                f"{'x'.join(map(str, self.shape[1:]))} by its header. The file has changed since it was looked at, or "
                "turns the image behind its pixels: start again, or write it again."
            )
        return image


def in_threads(function: Callable[[Any], Any], items: Iterable[Any], threads: int) -> list[Any]:
    """`function` of every item, in their order. Pillow decodes, and files are read, outside the interpreter lock."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def shape_of(records: Records, side: int | None) -> tuple[int, int, int]:
    """Height, width and channels of images that are resized to `side`: grey if all of them are.

    Raises:
        DataError: they come in different sizes, and `side` is None.
    """
    sizes = records.sizes
    channels = int(sizes[:, 2].max())
    if side is not None:
        return side, side, channels
    other = np.flatnonzero((sizes[:, :2] != sizes[0, :2]).any(1))
    if len(other):
        found = " and ".join(f"{records.name(i)} is {sizes[i, 1]}x{sizes[i, 0]}" for i in (0, int(other[0])))
        raise DataError(
            f"{found} pixels. All images of a data set must be of one size: set data.image_size (side in pixels) to "
            "resize them."
        )
    return int(sizes[0, 0]), int(sizes[0, 1]), channels


class Ranges:
    """Where the records of several files lie in one numbering: file after file, `counts` records each."""

    def __init__(self, counts: Sequence[int]):
        self.starts = np.array([0, *itertools.accumulate(counts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def find(self, row: int) -> tuple[int, int]:
        """(file, record in it) of a row."""
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        return file, row - int(self.starts[file])


def require(module: str, package: str, what: str) -> None:
    """Raises:
    DataError: the library that `what` needs is not installed.
    """
    if find_spec(module) is None:
        raise DataError(
            f"{what} needs the package {package}, which is not installed: `pip install {package}` (in a checkout: `pip "
            "install --editable '.[files]'`)."
        )
