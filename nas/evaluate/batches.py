"""Images in equal batches, so that one compiled program serves all of them."""

import numpy as np
from numpy.typing import NDArray

from nas.data import Dataset, Part


def calibration_batches(
    data: Dataset, *, images: int, batch_size: int, size: tuple[int, int], seed: int = 0
) -> NDArray[np.float32]:
    """Normalised training images [batches, batch_size, *size, c] that batch-norm statistics are measured on.

    At least one batch; the same images for every subnet. A training set smaller than a batch gives a smaller batch.
    """
    n = len(data.train.labels)
    batch_size = min(batch_size, n)
    count = max(1, min(images, n) // batch_size)
    rows = np.random.default_rng([seed, 2]).permutation(n)[: count * batch_size]
    return data.normalise(data.train.images[rows], size).reshape(count, batch_size, *size, -1)


def labelled_batches(
    data: Dataset, part: Part, *, batch_size: int, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """All of `part`: images [batches, batch_size, *size, c] and labels [batches, batch_size], filled up with -1."""
    n = len(part.labels)
    batch_size = min(batch_size, n)
    count = -(-n // batch_size)
    rows = np.arange(count * batch_size)
    labels = np.where(rows < n, part.labels[rows % n], -1).astype(np.int32)
    images = data.normalise(part.images[rows % n], size)
    return images.reshape(count, batch_size, *size, -1), labels.reshape(count, batch_size)
