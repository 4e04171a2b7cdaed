"""The idx files of MNIST and its relatives (LeCun et al. 1998; format: http://yann.lecun.com/exdb/mnist)."""

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from nas.config import Data
from nas.data.splits import Part, Splits
from nas.errors import DataError

IMAGES = re.compile(r"-images[-.]idx3-ubyte(\.gz)?$")


def idx(path: Path, config: Data) -> Splits:
    """A folder with MNIST's train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k, .gz or not.

    Raises:
        DataError: a file is missing, truncated, or not what its name says.
    """
    train, test = _part(path, "train"), _part(path, "t10k")
    if train is None:
        raise DataError(
            f"{path}: no train-images-idx3-ubyte and train-labels-idx1-ubyte (or .gz) in it. Both are needed, under "
            "these names: rename or download them."
        )
    return Splits(train, test=test)


def _part(path: Path, what: str) -> Part | None:
    images, labels = (_find(path, f"{what}-{kind}") for kind in ("images{}idx3-ubyte", "labels{}idx1-ubyte"))
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        raise DataError(
            f"{path}: the {'images' if labels is None else 'labels'} of {what} are there alone. Images and labels come "
            f"in pairs: add {what}-{'images-idx3' if images is None else 'labels-idx1'}-ubyte."
        )
    return Part(_array(images, dims=3)[..., None], _array(labels, dims=1))


def _find(path: Path, pattern: str) -> Path | None:
    candidates = (path / (pattern.format(dot) + end) for dot in "-." for end in ("", ".gz"))
    return next((p for p in candidates if p.exists()), None)


def _array(file: Path, *, dims: int) -> np.ndarray:
    """uint8 of `dims` axes: magic 0x0000 08 dims, one big-endian uint32 an axis, then the bytes."""
    content = file.read_bytes()
    if file.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as e:
            raise DataError(f"{file}: cannot be unzipped ({e}): truncated or damaged. Download it again.") from e
    header = 4 + 4 * dims
    if len(content) < header or content[:4] != bytes([0, 0, 8, dims]):
        raise DataError(
            f"{file}: starts with {content[:4].hex(' ') or 'nothing'}. An idx file of {dims} axes of bytes must start "
            f"with 00 00 08 {dims:02x} and {dims} sizes: damaged or another file under this name; download it again."
        )
    shape = [int(n) for n in np.frombuffer(content, ">u4", dims, offset=4)]
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise DataError(
            f"{file}: {len(content)} bytes, but its header says {shape}, which is {expected} bytes. Truncated or "
            "damaged: download it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
