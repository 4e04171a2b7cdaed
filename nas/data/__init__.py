"""Images in, a `Dataset` out: recognise the format, check, split, resize, measure mean and std. No JAX.

A new format is one function `(path, config) -> Splits` in a file of its own, and one line in `FORMATS`.
"""

import difflib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nas.config import Data, nearest
from nas.data import arrayrecord as _arrayrecord
from nas.data import cifar as _cifar
from nas.data import idx as _idx
from nas.data import parquet as _parquet
from nas.data.arrayrecord import arrayrecord
from nas.data.cifar import cifar
from nas.data.dataset import SAMPLE, Dataset, mean_and_std, resized
from nas.data.digits import digits
from nas.data.idx import idx
from nas.data.image_folder import image_folder
from nas.data.lazy import STORAGE, LazyImages, require
from nas.data.npz import npz
from nas.data.parquet import parquet
from nas.data.shards import find
from nas.data.splits import Part, Splits, checked, stratified
from nas.errors import DataError

__all__ = ["FORMATS", "STORAGE", "Dataset", "LazyImages", "Part", "Splits", "load_data", "recognise"]

# The first line of a function's docstring describes the format to users.
FORMATS: dict[str, Callable[[Path, Data], Splits]] = {
    "digits": digits,
    "npz": npz,
    "image_folder": image_folder,
    "cifar": cifar,
    "idx": idx,
    "parquet": parquet,
    "arrayrecord": arrayrecord,
}

# Decoded images of a part beyond this stay in their files with storage = "auto". The run and each search worker hold
# them, so that 2 GiB become 6 with two workers, what a machine of 16 GiB can spare. A fixed number, not a share of
# this machine's memory: the same config must give the same data everywhere.
FILES_ABOVE_BYTES = 2 * 2**30


def load_data(config: Data) -> Dataset:
    """The data set that `config` describes; the same config and files give the same arrays on every machine.

    Raises:
        DataError: the source is missing, of no known format, damaged, or cannot be split as asked.

    Example:
        >>> load_data(Data(source="digits")).image_shape
        (8, 8, 1)
    """
    path = Path(config.source).expanduser()
    try:
        name = config.format or recognise(path)
        if config.storage not in STORAGE:
            known = nearest(config.storage, STORAGE, kind="name")
            raise DataError(f"data.storage = {config.storage!r} is unknown.{known}")
        if name not in FORMATS:
            raise DataError(f"data.format = {name!r} is unknown.{nearest(name, FORMATS, kind='format')}")
        if name != "digits" and not path.exists():
            raise DataError(_missing(path))
        splits = checked(FORMATS[name](path, config), config.source, same_size=config.image_size is None)
    except OSError as e:
        raise DataError(
            f"{e.filename or path}: cannot be read: {e.strerror or e}. The files must be readable by this user, and "
            "the path must be what data.format says: check both."
        ) from e
    return _dataset(splits, config)


def recognise(path: Path) -> str:
    """The name in `FORMATS` of what lies at `path`.

    Raises:
        DataError: nothing is there, or nothing that any format knows.
    """
    if str(path) == "digits":
        return "digits"
    if not path.exists():
        raise DataError(_missing(path))
    if find(path, _parquet.NAMES):
        return "parquet"
    if find(path, _arrayrecord.NAMES):
        return "arrayrecord"
    if path.is_dir():
        if _cifar.folders(path):
            return "cifar"
        entries = sorted(e for e in path.iterdir() if not e.name.startswith("."))
        if any(_idx.IMAGES.search(e.name) for e in entries):
            return "idx"
        if any(e.is_dir() for e in entries):
            return "image_folder"
        found = f"a folder with {', '.join(e.name for e in entries[:5]) or 'nothing'}"
        found += f" and {len(entries) - 5} more" if len(entries) > 5 else " in it"
    elif path.suffix.lower() == ".npz":
        return "npz"
    elif path.name.lower().endswith(_cifar.ARCHIVES):
        return "cifar"
    else:
        found = f"a file that ends in {path.suffix!r}"
    formats = "; ".join(f"{name} ({_summary(read)})" for name, read in FORMATS.items())
    raise DataError(
        f"{path}: format not recognised: this is {found}. It must be one of {formats}. Point data.source at one of "
        "these (an idx or image folder, not a file in it; other archives unpacked), or set data.format."
    )


def _summary(read: Callable[..., Splits]) -> str:
    return (read.__doc__ or "").partition("\n")[0].rstrip(".")


def _missing(path: Path) -> str:
    """Says which part of `path` does not exist, and what is there that looks like it."""
    there = next(p for p in path.resolve().parents if p.exists())
    absent = path.resolve().relative_to(there).parts[0]
    siblings = sorted(p.name for p in there.iterdir() if not p.name.startswith("."))
    close = difflib.get_close_matches(absent, siblings, n=1, cutoff=0.5)
    hint = f"Did you mean {there / close[0]}? " if close else ""
    return f"{path}: no such file or folder: {there} has no {absent!r}. {hint}Correct data.source, or get the data."


def _dataset(splits: Splits, config: Data) -> Dataset:
    """Splits what is not split yet, then takes as many images as asked for; each step has its own random stream."""

    def stream(step: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([config.seed, step]))

    def shuffled(part: Part, step: int, limit: int | None) -> Part:
        return part.take(stream(step).permutation(len(part))[:limit])

    train, val, test = splits.train, splits.val, splits.test
    if test is None:
        kept, held = stratified(train.labels, config.test, stream(0))
        train, test = train.take(kept), train.take(held)
    train, test = shuffled(train, 1, config.train_images), shuffled(test, 2, config.test_images)
    if val is None:
        kept, held = stratified(train.labels, config.validation, stream(3))
        train, val = train.take(kept), train.take(held)
    else:
        val = shuffled(val, 4, None)
    for key, part, whole in (("validation", val, len(train) + len(val)), ("test", test, len(splits.train))):
        if not len(part):
            raise DataError(
                f"{config.source}: data.{key} = {getattr(config, key)} leaves no {key} image of {whole} images. At "
                f"least one is needed, and the last image of a class stays in training: raise data.{key}, or give "
                "more images."
            )
    if len(np.unique(train.labels)) < 2:
        raise DataError(
            f"{config.source}: the {len(train)} training images left after splitting are of only one class. A "
            "classifier needs at least two: raise data.train_images, or lower data.validation and data.test."
        )
    if config.image_size is not None:  # last, so that only images in use are resized
        train, val, test = (resized(part, config.image_size) for part in (train, val, test))
    assert splits.class_names is not None  # checked() names every class
    train, val, test = _stored(train, config), _held(val, config), _held(test, config)
    images = train.images
    if isinstance(images, LazyImages):
        images = images.take(np.arange(len(images))[:SAMPLE]).decoded()
    mean, std = mean_and_std(images)
    return Dataset(train, val, test, splits.class_names, mean, std, config.source)


def _stored(train: Part, config: Data) -> Part:
    """The training part where `config.storage` wants it."""
    if not isinstance(train.images, LazyImages):
        if config.storage == "files":
            raise DataError(
                f"{config.source}: data.storage = 'files' needs images that are files or records of their own: "
                "image_folder, parquet or arrayrecord. This format is read into memory as a whole: leave storage out, "
                "or convert the data."
            )
        return train
    if config.storage != "files" and _fits(train, config):
        return train.in_memory()
    require("grain", "grain", f"{config.source}: training from files (data.storage = {config.storage!r})")
    return train


def _held(part: Part, config: Data) -> Part:
    """A validation or test part, in memory if it fits: it is looked at as a whole, and often."""
    return part.in_memory() if _fits(part, config) else part


def _fits(part: Part, config: Data) -> bool:
    """Whether a part may be decoded into memory."""
    images = part.images
    return not isinstance(images, LazyImages) or config.storage == "memory" or images.nbytes <= FILES_ABOVE_BYTES
