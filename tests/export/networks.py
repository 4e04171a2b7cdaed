"""Graphs of every kind with weights and images. Not a test: tests of folding, quantisation and export import it."""

import functools

import jax
import numpy as np

from nas.blocks import record
from nas.catalog import list_spaces
from nas.export import RUNTIMES
from nas.fold import fold
from nas.ops import Graph, LinearAttention, Recorder, weights
from nas.quantise import Quantisation, calibrate
from nas.run import run
from nas.space import load_space


def recorded(shape, write) -> Graph:
    """What `write(net, x)` records."""
    net = Recorder(shape)
    write(net, net.input)
    return net.graph()


def _residual(net, x):
    y = net.act(net.norm(net.conv(x, "a", x.channels, kernel=3), "a_norm"), "relu")
    y = net.norm(net.conv(y, "b", x.channels, kernel=3), "b_norm")
    net.dense(net.pool(net.act(net.add(x, y), "relu")), "logits", 10)


def _everything(net, x):
    """A grouped conv that two ops read, norms that cannot be folded, windowed pools, ops in unusual order."""
    conv = net.conv(x, "conv", 32, kernel=3, groups=4)
    y = net.norm(net.add(conv, net.norm(conv, "norm")), "second_norm")
    y = net.add(net.pool(y, "max", window=3, stride=2), net.pool(y, "mean", window=3, stride=2))
    y = net.act(y, "swish")
    y = net.shuffle(net.concat(net.split(y, 0, 8), net.split(y, 8, 32)), 4)
    net.dense(net.mul(y, net.act(y, "sigmoid")), "logits", 10)


def _two_dense(net, x):
    y = net.act(net.norm(net.dense(net.pool(x, "max"), "first", 32), "norm"), "relu6")
    net.dense(y, "logits", 10)


def _rectifiers(net, x):
    conv = net.conv(x, "conv", 16, kernel=3)
    net.act(net.concat(net.act(conv, "relu"), net.act(conv, "relu6"), conv), "relu")


_BLOCKS = {
    "stem, stride 2, even": ("conv_stem", (8, 8, 3), {"width": 16, "stride": 2}),
    "stem, stride 2, odd, relu6": ("conv_stem", (7, 9, 3), {"width": 16, "stride": 2, "act": "relu6"}),
    "mbconv, relu": ("mbconv", (7, 7, 8), {"width": 8, "kernel": 5, "act": "relu"}),
    "mbconv, se, stride 2": ("mbconv", (8, 8, 8), {"width": 12, "stride": 2, "se": True}),
    "mbconv, gelu": ("mbconv", (6, 6, 8), {"width": 8, "act": "gelu"}),
    "mbconv, swish, no expansion": ("mbconv", (6, 6, 8), {"width": 8, "act": "swish", "expand": 1}),
    "shufflenet": ("shufflenet_v2", (6, 6, 16), {"width": 16}),
    "shufflenet, stride 2": ("shufflenet_v2", (7, 7, 16), {"width": 32, "stride": 2}),
    "fused mbconv, se": ("fused_mbconv", (7, 7, 8), {"width": 8, "se": True}),
    "fused mbconv, no expansion": ("fused_mbconv", (7, 7, 8), {"width": 8, "expand": 1, "act": "relu"}),
    "mbconv, low rank": ("mbconv", (6, 6, 32), {"width": 32, "expand": 4, "rank": 0.5}),
    "identity, stride 2": ("identity", (7, 7, 8), {"width": 16, "stride": 2}),
    "efficientvit": ("efficientvit", (6, 6, 16), {"width": 16, "dim": 8}),
    "efficientvit, stride 2": ("efficientvit", (7, 7, 8), {"width": 16, "stride": 2, "scale": 0, "act": "relu"}),
    "stem, pooled": ("conv_stem", (9, 9, 3), {"width": 8, "stride": 4, "pool": True}),
    "mobilenet_v3_head": ("mobilenet_v3_head", (4, 4, 16), {"width": 32, "features": 48, "classes": 10}),
    "classifier": ("classifier", (4, 4, 16), {"width": 32, "classes": 10}),
    "classifier without conv": ("classifier", (4, 4, 16), {"width": 0, "classes": 10}),
}

GRAPHS: dict[str, Graph] = {
    **{name: record(block, shape, tuple(options.items())) for name, (block, shape, options) in _BLOCKS.items()},
    "residual": recorded((9, 9, 16), _residual),
    "everything": recorded((9, 8, 16), _everything),
    "two dense": recorded((5, 7, 16), _two_dense),
    "dense over an image": recorded((4, 5, 8), lambda net, x: net.dense(net.conv(x, "conv", 8), "logits", 5)),
    "rectifiers": recorded((6, 6, 8), _rectifiers),
    "long sums": recorded((4, 4, 128), lambda net, x: net.act(net.conv(x, "conv", 16, kernel=3), "relu")),
    "attention": recorded((6, 5, 96), lambda net, x: net.dense(net.linear_attention(x, 8), "logits", 10)),
    "nothing": recorded((4, 4, 8), lambda net, x: None),
}
for _name in list_spaces():
    _space = load_space(_name, input_shape=(32, 32, 1))
    if _space.mixed:
        continue  # `test_mixed` has those
    _drawn = [_space.decode(genotype).flat() for genotype in _space.sample(np.random.default_rng(1), 64)]
    _shortest = min(_drawn, key=lambda graph: len(graph.ops))  # the fastest to compile
    if len(_shortest.ops) < 60 and max(_shortest.input) <= 32:  # the others have the same blocks, only more of them
        GRAPHS[_name] = _shortest
ATTENTION = [name for name, graph in GRAPHS.items() if any(isinstance(op, LinearAttention) for op in graph.ops)]


def params_of(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that keep activations near 1, batch-norm statistics included."""
    rng = np.random.default_rng(seed)

    def array(w):
        if w.role == "kernel":
            return rng.normal(size=w.shape) * np.sqrt(2 / w.fan_in)
        return rng.uniform(0.5, 1.5, w.shape) if w.role in ("scale", "var") else 0.2 * rng.normal(size=w.shape)

    return {w.name: array(w).astype(np.float32) for w in weights(graph)}


def images_of(graph: Graph, n: int = 32, seed: int = 1) -> np.ndarray:
    """Images on a grid of sixteenths: quantising them meets exact ties."""
    x = np.random.default_rng(seed).normal(size=(n, *graph.input))
    return (np.round(x * 16) / 16).astype(np.float32)


compiled = jax.jit(run, static_argnums=0)


@functools.cache
def reference(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Five images, and what the float network makes of them in JAX."""
    images = images_of(GRAPHS[name], 5)
    return images, np.asarray(compiled(GRAPHS[name], params_of(GRAPHS[name]), images)[0])


@functools.cache
def emitted(runtime: str, name: str, precision: str) -> tuple[bytes, Quantisation | None]:
    """A runtime's file of a graph, and the ranges of its numbers if it is int8."""
    graph = GRAPHS[name]
    folded, params = fold(graph, params_of(graph))
    quantisation = calibrate(folded, params, images_of(graph)) if precision == "int8" else None
    made = RUNTIMES[runtime]()
    return made.emit(graph, params_of(graph), precision=precision, quantisation=quantisation), quantisation
