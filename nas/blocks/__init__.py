"""Blocks: one function each that records its ops. A new one is a new file and a line here.

A block is called as `block(net, x, width=..., stride=..., **options)` and returns a value of `width` channels;
its keyword-only parameters, with their defaults, are the options a search space may set or leave to choice. Their
annotations (int, float, bool or a Literal) are checked; numbers are finite and never below 0.
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, Literal

from nas.blocks.classifier import classifier
from nas.blocks.conv_stem import conv_stem
from nas.blocks.efficientvit import efficientvit
from nas.blocks.fused_mbconv import fused_mbconv
from nas.blocks.identity import identity
from nas.blocks.mbconv import mbconv
from nas.blocks.mobilenet_v3_head import mobilenet_v3_head
from nas.blocks.shufflenet_v2 import shufflenet_v2
from nas.config import nearest
from nas.ops import Graph, Recorder, Shape, Value, weights

Block = Callable[..., Value]

BLOCKS: dict[str, Block] = {
    "classifier": classifier,
    "conv_stem": conv_stem,
    "efficientvit": efficientvit,
    "fused_mbconv": fused_mbconv,
    "identity": identity,
    "mbconv": mbconv,
    "mobilenet_v3_head": mobilenet_v3_head,
    "shufflenet_v2": shufflenet_v2,
}


def known() -> dict[str, Block]:
    """Blocks by name: the package's own, and those that installed packages add by the entry point `nas.blocks`."""
    return BLOCKS | _installed()


@functools.cache
def _installed() -> dict[str, Block]:
    return {point.name: point.load() for point in metadata.entry_points(group="nas.blocks")}


def options(block: str | Block) -> dict[str, Any]:
    """Keyword-only parameters of a block with their defaults (`inspect.Parameter.empty` where there is none)."""
    parameters = inspect.signature(known()[block] if isinstance(block, str) else block).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def record(block: str | Block, input_shape: Shape, arguments: tuple[tuple[str, Any], ...]) -> Graph:
    """The graph of one block, by name or function. `arguments` are (option, value) pairs.

    Raises:
        ValueError: an option is unknown, missing or of a wrong type, the options do not fit the input's shape, or the
            function does not return what it recorded last, or names two weights alike.
    """
    function = known()[block] if isinstance(block, str) else block
    _check(function, dict(arguments))  # before the cache, to which 3, 3.0 and (for 1) True are one
    return _record(function, input_shape, arguments)


@functools.lru_cache(maxsize=65536)
def _record(block: Block, input_shape: Shape, arguments: tuple[tuple[str, Any], ...]) -> Graph:
    net = Recorder(input_shape)
    out = block(net, net.input, **dict(arguments))
    graph = net.graph()
    if not isinstance(out, Value) or out.number != len(graph.ops):  # a graph gives what its last op gives
        raise ValueError("it must return what it records last: end it with `return net.act(...)` or the like")
    names = [weight.name for weight in weights(graph)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"it has the weights {twice[0]!r} twice: give every operation a name of its own")
    return graph


_signature = functools.cache(inspect.signature)
_FITS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number, 0 or more, is", lambda v: type(v) is int and v >= 0),
    float: ("a number, 0 or more, is", lambda v: type(v) in (int, float) and math.isfinite(v) and v >= 0),
    bool: ("true or false is", lambda v: type(v) is bool),
}


def _check(function: Block, arguments: Mapping[str, Any]) -> None:
    """That `arguments` are what the signature of a block asks for; an annotation of another kind is not looked at."""
    known = {p.name: p for p in _signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for name, parameter in known.items():
        if name not in arguments and parameter.default is inspect.Parameter.empty:
            raise ValueError(f"`{name}` is missing")
    for name, value in arguments.items():
        if name not in known:
            raise ValueError(f"there is no option `{name}`.{nearest(name, known, kind='option')}".rstrip("."))
        wanted = known[name].annotation
        if typing.get_origin(wanted) is Literal:
            if value not in (valid := typing.get_args(wanted)):
                hint = nearest(str(value), map(str, valid), kind="value")
                raise ValueError(f"`{name}` is {value!r}.{hint}".rstrip("."))
        elif wanted in _FITS and not _FITS[wanted][1](value):
            raise ValueError(f"`{name}` is {value!r}: {_FITS[wanted][0]} needed")
