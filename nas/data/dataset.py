"""The data set of a run: three parts of one shape, and what normalises them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from nas.data.lazy import LazyImages
from nas.data.resize import resize
from nas.data.splits import Part, size

GREY_LEVEL = 1 / 255  # floor of the standard deviation: a constant channel must not be divided by zero
# Images that mean and deviation of a file-backed set are taken from. Means of single images spread by about 0.25, so
# that the mean is right to 0.25 / sqrt(2048) = 0.006, or 2 % of the deviation of pixels: far less than norms remove.
SAMPLE = 2048


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images for training, for the search (`val`), and for the one look at the end (`test`).

    Every part is in a seeded random order, so that any prefix of it is a fair sample. `mean` and `std` are float32
    [C], of the training part's values in [0, 1]; of its first 2048 images where they stay in their files.
    """

    train: Part
    val: Part
    test: Part
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    source: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width in pixels, and channels."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def digest(self) -> str:
        """sha256 of all images, labels and class names: equal digests, equal data, on every machine.

        Images that stay in their files are not decoded for it. Of them, equal digests mean the same files by name and
        size in bytes, the same records in the same order, and the same size of image: a file that was changed without
        changing its size is not noticed, and the same images in memory have another digest.
        """
        out = hashlib.sha256("\0".join(self.class_names).encode())
        for part in (self.train, self.val, self.test):
            images = part.images
            out.update(repr(images.shape).encode())
            if isinstance(images, LazyImages):
                out.update(images.records.fingerprint.encode())
                out.update(images.rows.astype("<i8").tobytes())
            else:
                out.update(np.ascontiguousarray(images).data)
            out.update(part.labels.astype("<i4").tobytes())
        return out.hexdigest()

    def normalise(self, images: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 [..., H, W, C] -> float32 with mean 0 and standard deviation 1 per channel over the training part.

        With `size` (height, width) they are resized to it first.
        """
        scaled = images.astype(np.float32) / np.float32(255)
        return ((resize(scaled, size) if size else scaled) - self.mean) / self.std

    def __repr__(self) -> str:
        return (
            f"Dataset({self.source!r}, {self.classes} classes, {size(self.train.images)}, train {len(self.train)}, "
            f"val {len(self.val)}, test {len(self.test)}, sha256 {self.digest[:12]})"
        )


def resized(part: Part, side: int) -> Part:
    """`part` with square images of `side` pixels, bilinear; itself where it is so already, as lazy images are."""
    images = part.images
    count, height, width, channels = images.shape
    if (height, width) == (side, side) or isinstance(images, LazyImages):
        return part
    out = np.empty((count, side, side, channels), np.uint8)
    for i, image in enumerate(images):
        small = Image.fromarray(image[..., 0] if channels == 1 else image).resize(
            (side, side), Image.Resampling.BILINEAR
        )
        out[i] = np.asarray(small).reshape(side, side, channels)
    return Part(out, part.labels)


def mean_and_std(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per channel, float32 [C], of values in [0, 1]. Counted, not summed: exact, and without a float copy."""
    counts = np.zeros((images.shape[3], 256), np.int64)
    for start in range(0, len(images), 1024):
        for channel, row in enumerate(counts):
            row += np.bincount(images[start : start + 1024, ..., channel].ravel(), minlength=256)
    shares, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
    return mean.astype(np.float32), np.maximum(std, GREY_LEVEL).astype(np.float32)
