"""The bundled example: scikit-learn's copy of the UCI optical digits."""

from pathlib import Path

import numpy as np

from nas.config import Data
from nas.data.splits import Part, Splits
from nas.errors import DataError


def digits(path: Path, config: Data) -> Splits:
    """The word "digits": 1,797 handwritten digits of 8x8 that come with scikit-learn.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise DataError(
            "data.source = 'digits' comes with scikit-learn, which is not installed: `pip install scikit-learn`, or "
            "point data.source at your own images."
        ) from e
    values, labels = map(np.asarray, load_digits(return_X_y=True))  # [n, 64] of 0..16, [n]
    images = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return Splits(Part(images, labels), class_names=tuple("0123456789"))
