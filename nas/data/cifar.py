"""CIFAR-10 and CIFAR-100 in their binary versions (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html)."""

import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nas.config import Data
from nas.data.splits import Part, Splits
from nas.errors import DataError

ARCHIVES = (".tar.gz", ".tgz")
FOLDERS = ("cifar-10-batches-bin", "cifar-100-binary")
PIXELS = 3 * 32 * 32  # bytes of an image: red, green, blue planes, row by row


@dataclass(frozen=True)
class Layout:
    """The files of one version. A record is `label_bytes` labels, of which the last counts, then the pixels."""

    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int
    classes: int

    @property
    def files(self) -> set[str]:
        return {*self.train, self.test, self.names}


LAYOUTS = (
    Layout(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", 1, 10),
    Layout(("train.bin",), "test.bin", "fine_label_names.txt", 2, 100),  # coarse label, fine label
)


def cifar(path: Path, config: Data) -> Splits:
    """CIFAR-10 or CIFAR-100, binary version: the folder of .bin files, its parent, or the .tar.gz as downloaded.

    Raises:
        DataError: a batch is missing, truncated or damaged.
    """
    files = _read_folder(path) if path.is_dir() else _read_archive(path)
    layout = max(LAYOUTS, key=lambda known: len(known.files & files.keys()))
    if missing := sorted(layout.files - files.keys()):
        raise DataError(
            f"{path}: {', '.join(missing)} missing. The binary version has {', '.join(sorted(layout.files))}: download "
            "it again (cifar-10-binary.tar.gz or cifar-100-binary.tar.gz; the Python version is pickle and not read)."
        )
    train = [_records(files[name], layout, path / name) for name in layout.train]
    test = _records(files[layout.test], layout, path / layout.test)
    names = tuple(files[layout.names].decode(errors="replace").split())
    if len(names) != layout.classes:
        raise DataError(
            f"{path / layout.names}: {len(names)} class names. It must hold {layout.classes}, one a line: download it "
            "again."
        )
    images = np.concatenate([np.asarray(part.images) for part in train])
    return Splits(Part(images, np.concatenate([part.labels for part in train])), test=test, class_names=names)


def folders(path: Path) -> list[Path]:
    """`path` or those of its folders that hold CIFAR batches."""
    candidates = [path, *(path / name for name in FOLDERS)]
    return [folder for folder in candidates if folder.is_dir() and next(folder.glob("*.bin"), None)]


def _read_folder(path: Path) -> dict[str, bytes]:
    found = folders(path)
    if len(found) > 1:
        raise DataError(
            f"{path}: batches in {' and '.join(map(str, found))}. A data set is one of them: point data.source at it."
        )
    wanted = {name for layout in LAYOUTS for name in layout.files}
    return {file.name: file.read_bytes() for folder in found for file in folder.iterdir() if file.name in wanted}


def _read_archive(path: Path) -> dict[str, bytes]:
    """The batches in a .tar.gz, read in one pass and never written to disk."""
    wanted = {name for layout in LAYOUTS for name in layout.files}
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = Path(member.name).name
                content = archive.extractfile(member) if member.isfile() and name in wanted else None
                if content is not None:
                    files[name] = content.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # the disk's or the permission's fault, not the archive's
        raise DataError(f"{path}: cannot be read as .tar.gz ({e}): truncated or damaged. Download it again.") from e
    return files


def _records(content: bytes, layout: Layout, name: Path) -> Part:
    length = layout.label_bytes + PIXELS
    if not content or len(content) % length:
        raise DataError(
            f"{name}: {len(content)} bytes. It must be whole records of {length} bytes ({layout.label_bytes} for "
            f"labels, {PIXELS} for pixels): truncated, or of another data set; download it again."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, length)
    images = records[:, layout.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Part(np.ascontiguousarray(images), records[:, layout.label_bytes - 1])
