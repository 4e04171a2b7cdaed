"""One set of weights for every network of a space."""

from nas.supernet.sharing import share, store_shapes
from nas.supernet.supernet import LayerMode, Supernet

__all__ = ["LayerMode", "Supernet", "share", "store_shapes"]
