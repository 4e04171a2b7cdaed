"""Image files in one folder a class."""

from pathlib import Path

import numpy as np

from nas.config import Data
from nas.data.cache import cached, damaged, fingerprint, stamp
from nas.data.decode import header
from nas.data.lazy import Records, in_threads
from nas.data.shards import SPLITS
from nas.data.splits import Splits, encoded_splits
from nas.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg")
MANY = 10_000  # files whose sizes are kept in the cache folder: reading so many headers takes about a second
VERSION = "1"  # of what is kept


def image_folder(path: Path, config: Data) -> Splits:
    """A folder of class folders of .png, .jpg or .jpeg files, with or without train/, val/ and test/ above them.

    Classes are sorted by name. Images are grey (C = 1) if all files are, else RGB; alpha is dropped, EXIF orientation
    applied. With `config.image_size` they are resized on reading, so that they may come in different sizes. The
    headers of all files are read first, once and for all where there are many.

    Raises:
        DataError: a class without images, an unknown class, sizes that differ, a file that is not an image.
    """
    roots = _roots(path)
    names = [folder.name for folder in _folders(roots["train"])]
    found = {what: _files(root, names, required=what == "train") for what, root in roots.items()}
    for what, pairs in found.items():
        if not pairs:
            raise DataError(f"{roots[what]}: no image in it. Put class folders of images in it, or remove the folder.")
    files = [file for pairs in found.values() for file, _ in pairs]
    labels = np.array([label for pairs in found.values() for _, label in pairs])
    sizes = _sizes(files, config.threads)
    records = Records(
        lambda rows: (files[row] for row in rows), lambda row: str(files[row]), sizes, fingerprint(path, files)
    )
    return encoded_splits(records, labels, {what: len(pairs) for what, pairs in found.items()}, config, tuple(names))


def _sizes(files: list[Path], threads: int) -> np.ndarray:
    """int32 [n, 3], height, width and channels of every file."""

    def read() -> np.ndarray:
        return np.array(in_threads(lambda file: header(file, str(file)), files, threads), np.int32)

    def write(target: Path) -> None:
        with target.open("wb") as file:
            np.save(file, read())

    if len(files) < MANY:
        return read()
    made = cached(f"{stamp(files, VERSION)}.npy", write)
    try:
        return np.load(made)
    except (OSError, ValueError, EOFError) as e:
        raise damaged(made, e) from e


def _folders(path: Path) -> list[Path]:
    return sorted((p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)


def _roots(path: Path) -> dict[str, Path]:
    """The folder of each split. Split folders count only if train/ has class folders: "train" may be a class."""
    roots: dict[str, Path] = {}
    for folder in _folders(path):
        what = SPLITS.get(folder.name.lower())
        if what in roots:
            raise DataError(f"{path}: both {roots[what].name}/ and {folder.name}/ are {what} sets. Keep one of them.")
        if what:
            roots[what] = folder
    classes = {folder.name for folder in _folders(roots["train"])} if "train" in roots else set()
    if not classes:
        return {"train": path}
    for folder in _folders(path):
        if folder not in roots.values() and classes & {inner.name for inner in _folders(folder)}:
            raise DataError(
                f"{folder}: has the training set's classes, but is called neither train, val nor test, so it would "
                "be left out unnoticed. Rename it, or move it away."
            )
    return roots


def _files(root: Path, names: list[str], *, required: bool) -> list[tuple[Path, int]]:
    """(file, label) of every image under `root`, sorted; `required`: each class must have one."""
    label_of, out = {name: label for label, name in enumerate(names)}, []
    for folder in _folders(root):
        if folder.name not in label_of:
            raise DataError(
                f"{folder}: {folder.name!r} is no class of the training set ({', '.join(names)}). Every set has the "
                "training set's classes: rename or remove this folder."
            )
        entries = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
        images = [p for p in entries if p.suffix.lower() in SUFFIXES and p.is_file()]
        if required and not images:
            found = ", ".join(p.name for p in entries[:3]) or "nothing"
            raise DataError(
                f"{folder}: no {', '.join(SUFFIXES)} file in it, but {found}. Each class folder holds its images "
                "itself, sets are called train, val and test: convert, move or remove this folder."
            )
        out += [(image, label_of[folder.name]) for image in images]
    return out
