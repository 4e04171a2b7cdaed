"""Blocks: one function each that records its ops. A new one is a new file and a line here.

A block is called as `block(net, x, width=..., stride=..., **options)` and returns a value of `width` channels;
its keyword-only parameters, with their defaults, are the options a search space may set or leave to choice.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from nas.blocks.classifier import classifier
from nas.blocks.conv_stem import conv_stem
from nas.blocks.mbconv import mbconv
from nas.blocks.shufflenet_v2 import shufflenet_v2
from nas.ops import Graph, Recorder, Shape, Value

Block = Callable[..., Value]

BLOCKS: dict[str, Block] = {
    "classifier": classifier,
    "conv_stem": conv_stem,
    "mbconv": mbconv,
    "shufflenet_v2": shufflenet_v2,
}


def options(block: str) -> dict[str, Any]:
    """Keyword-only parameters of a block with their defaults (`inspect.Parameter.empty` where there is none)."""
    parameters = inspect.signature(BLOCKS[block]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


@functools.lru_cache(maxsize=65536)
def record(block: str, input_shape: Shape, arguments: tuple[tuple[str, Any], ...]) -> Graph:
    """The graph of one block. `arguments` are (option, value) pairs.

    Raises:
        ValueError: the options do not fit the input's shape.
    """
    net = Recorder(input_shape)
    BLOCKS[block](net, net.input, **dict(arguments))
    return net.graph()
