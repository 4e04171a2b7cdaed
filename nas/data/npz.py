"""Arrays in one `.npz` file, never unpickled."""

import zipfile
from pathlib import Path

import numpy as np

from nas.config import Data
from nas.data.splits import Part, Splits
from nas.errors import DataError

PARTS = ("train", "val", "test")


def npz(path: Path, config: Data) -> Splits:
    """A .npz file with x_train [n, H, W] or [n, H, W, C] and y_train; x_val, y_val, x_test, y_test, class_names if any.

    Images are uint8 of 0..255, or floats of 0..1, which are rounded to uint8.

    Raises:
        DataError: a key is missing, an array is damaged or holds Python objects, or images have another range.
    """
    arrays = _arrays(path)
    parts = {what: part for what in PARTS if (part := _part(arrays, what, path)) is not None}
    if "train" not in parts:
        raise DataError(
            f"{path}: no x_train and y_train in it, only {', '.join(arrays) or 'nothing'}. Write them with "
            "np.savez(file, x_train=images, y_train=labels)."
        )
    return Splits(parts["train"], parts.get("val"), parts.get("test"), _names(arrays, path))


def _arrays(path: Path) -> dict[str, np.ndarray | None]:
    """What is in the file, None under keys that no data set has (they are not read)."""
    wanted = {f"{axis}_{what}" for axis in "xy" for what in PARTS} | {"class_names"}
    key = "the file"
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise zipfile.BadZipFile("its zip directory is missing")
        arrays: dict[str, np.ndarray | None] = {}
        with np.load(path) as pack:
            for key in pack.files:
                arrays[key] = pack[key] if key in wanted else None
                if isinstance(arrays[key], bytes):  # what NumPy gives for a member that is no array
                    raise ValueError("its header is not that of an array")
        return arrays
    except OSError:
        raise
    except Exception as e:  # zipfile, zlib and NumPy raise nearly anything on damaged input
        if "allow_pickle" in str(e):
            raise DataError(
                f"{path}: {key} holds Python objects (pickle), which are never loaded because they can run code. "
                "Save plain arrays: images of one shape, labels as integers, names as strings."
            ) from e
        raise DataError(
            f"{path}: {key} cannot be read as .npz ({e}): truncated or damaged. Write it again with np.savez, or "
            "download it again."
        ) from e


def _part(arrays: dict[str, np.ndarray | None], what: str, path: Path) -> Part | None:
    images, labels = arrays.get(f"x_{what}"), arrays.get(f"y_{what}")
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        there, lacking = ("y", "x") if images is None else ("x", "y")
        raise DataError(f"{path}: {there}_{what} without {lacking}_{what}. Images and labels come in pairs: add it.")
    images = _bytes(images, f"x_{what}", path)
    return Part(images[..., None] if images.ndim == 3 else images, labels)


def _bytes(images: np.ndarray, key: str, path: Path) -> np.ndarray:
    """uint8 0..255 from uint8 or from floats of 0..1."""
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise DataError(f"{path}: {key} is {images.dtype}. It must be uint8 of 0..255 or float of 0..1: convert it.")
    if not np.isfinite(images).all():
        at = np.argwhere(~np.isfinite(images))[0].tolist()
        raise DataError(f"{path}: {key}{at} is {images[tuple(at)]}. NaN and infinity are no pixels: clean the images.")
    if images.size and (images.min() < 0 or images.max() > 1):
        raise DataError(
            f"{path}: {key} is {images.dtype} from {images.min():g} to {images.max():g}. Float images must lie in "
            "0..1: divide by 255, or save uint8; do not normalise, that is done here."
        )
    return np.rint(images * 255).astype(np.uint8)


def _names(arrays: dict[str, np.ndarray | None], path: Path) -> tuple[str, ...] | None:
    names = arrays.get("class_names")
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise DataError(
            f"{path}: class_names is {names.dtype} of shape {list(names.shape)}. It must be a list of strings, one a "
            "class: np.array(['cat', 'dog'])."
        )
    return tuple(n.decode(errors="replace") if isinstance(n, bytes) else n for n in names.tolist())
