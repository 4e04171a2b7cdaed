"""Encoded images (PNG, JPEG, whatever Pillow reads) to uint8 arrays, and what their headers say."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nas.errors import DataError

Encoded = Path | bytes | memoryview  # a file, or its content
GREY = ("1", "L", "LA")
GREY_16_BIT = ("I", "I;16", "I;16L", "I;16B")
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 turn by 90 degrees


def header(encoded: Encoded, name: str) -> tuple[int, int, int]:
    """Height, width and channels (1 or 3) that `decode` will give, from the header alone.

    Raises:
        DataError: no image; `name` is what the message calls it.
    """
    with _opened(encoded, name) as image:
        width, height = image.size
        # Pillow turns the size of a TIFF itself, and decodes a whole PNG to look for EXIF behind its pixels, where no
        # camera writes it
        turns = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        turned = turns and image.getexif().get(ORIENTATION, 1) >= 5
        channels = 1 if image.mode in GREY + GREY_16_BIT else 3
    return (width, height, channels) if turned else (height, width, channels)


def decode(encoded: Encoded, name: str, side: int | None = None) -> NDArray[np.uint8]:
    """[H, W, 1] of a grey image, [H, W, 3] of any other; EXIF orientation applied, alpha dropped.

    Args:
        name: what messages call the image.
        side: pixels to resize to, bilinear, height and width alike; None: as it is.

    Raises:
        DataError: truncated, damaged, or no image.
    """
    with _opened(encoded, name) as raw:
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
    return pixels[..., None] if pixels.ndim == 2 else pixels


@contextmanager
def _opened(encoded: Encoded, name: str) -> Iterator[Any]:
    """The image, not yet decoded; what goes wrong with it while it is open is a DataError."""
    try:
        with Image.open(encoded if isinstance(encoded, Path) else io.BytesIO(encoded)) as image:
            yield image
    except Exception as e:  # decoders raise nearly anything on damaged input
        if isinstance(e, OSError) and e.errno is not None:  # the disk's or the permission's fault, not the image's
            raise DataError(
                f"{name}: cannot be read: {e.strerror}. The files of a data set must stay as they are, and be readable "
                "by this user, while it is in use: bring it back."
            ) from e
        raise DataError(
            f"{name}: cannot be decoded as an image ({e}). It is truncated, damaged or of another type: replace or "
            "delete it."
        ) from e
