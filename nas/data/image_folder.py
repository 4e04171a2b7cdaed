"""Image files in one folder a class."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from nas.config import Data
from nas.data.splits import Part, Splits
from nas.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
GREY = ("1", "L", "LA")
GREY_16_BIT = ("I", "I;16", "I;16L", "I;16B")


def image_folder(path: Path, config: Data) -> Splits:
    """A folder of class folders of .png, .jpg or .jpeg files, with or without train/, val/ and test/ above them.

    Classes are sorted by name. Images are grey (C = 1) if all files are, else RGB; alpha is dropped, EXIF orientation
    applied. With `config.image_size` they are resized on reading, so that they may come in different sizes.

    Raises:
        DataError: a class without images, an unknown class, sizes that differ, a file that is not an image.
    """
    roots = _roots(path)
    names = [folder.name for folder in _folders(roots["train"])]
    files = {what: _files(root, names, required=what == "train") for what, root in roots.items()}
    flat = [file for pairs in files.values() for file, _ in pairs]
    with ThreadPoolExecutor(4) as pool:  # Pillow decodes outside the interpreter lock
        images = list(pool.map(lambda file: _decode(file, config.image_size), flat))
    _check_sizes(flat, images)
    if len({image.shape[2] for image in images}) == 2:
        images = [np.broadcast_to(image, (*image.shape[:2], 3)) for image in images]
    parts, start = {}, 0
    for what, pairs in files.items():
        if not pairs:
            raise DataError(f"{roots[what]}: no image in it. Put class folders of images in it, or remove the folder.")
        labels = np.array([label for _, label in pairs])
        parts[what] = Part(np.stack(images[start : start + len(pairs)]), labels)
        start += len(pairs)
    return Splits(parts["train"], parts.get("val"), parts.get("test"), tuple(names))


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


def _decode(file: Path, side: int | None) -> np.ndarray:
    """uint8 [H, W, 1] if the file is grey, else [H, W, 3]."""
    try:
        with Image.open(file) as raw:
            image = ImageOps.exif_transpose(raw)
            if image.mode in GREY_16_BIT:
                levels = (np.asarray(image).astype(np.int64) + 128) // 257  # convert("L") would clip at 255
                image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
            if "transparency" in image.info and image.mode == "P":
                image = image.convert("RGBA")  # Pillow warns if this goes to RGB at once
            image = image.convert("L" if image.mode in GREY else "RGB")
            if side is not None:
                image = image.resize((side, side), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)
    except PermissionError:
        raise
    except Exception as e:  # decoders raise nearly anything on damaged input
        raise DataError(
            f"{file}: cannot be decoded as an image ({e}). It is truncated, damaged or of another type: replace or "
            "delete it."
        ) from e
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _check_sizes(files: list[Path], images: list[np.ndarray]) -> None:
    for file, image in zip(files, images, strict=True):
        if image.shape[:2] != images[0].shape[:2]:
            sizes = " and ".join(f"{f} is {i.shape[1]}x{i.shape[0]}" for f, i in ((files[0], images[0]), (file, image)))
            raise DataError(
                f"{sizes} pixels. All images of a data set must be of one size: set data.image_size (side in pixels) "
                "to resize them."
            )
