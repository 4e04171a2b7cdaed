"""One set of weights for every network of a space."""

from nas.supernet.sharing import share, store_shapes
from nas.supernet.supernet import Supernet

__all__ = ["Supernet", "share", "store_shapes"]
