"""Convolutions with batch norm in C++ for JAX on CPU, where nas was installed with a compiler.

Installing compiles kernels.cc (hatch_build.py, 40 seconds). Without a compiler the package installs all the same:
`available()` is then False, and `nas.kernels` writes the same sums out for XLA. NAS_NATIVE=0 in the environment keeps
the library from being built, or from being used; `status()` says what is the case.

The functions here run under jit, grad (reverse mode; the depthwise ones and `channel_sums` any number of times, the
others once), vmap (one after the other), scan and switch.
Where images are sharded over devices (a mesh with automatic axes, or `shard_map` with check_vma=False), each device
computes its own, and weight gradients are summed over them.
"""

import ctypes
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nas.errors import DeviceError
from nas.native import build

_FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT, _CHANNEL_SUMS, *_FUSED = _HANDLERS = (
    "nas_depthwise_forward",
    "nas_depthwise_input_gradient",
    "nas_depthwise_weight_gradient",
    "nas_channel_sums",
    "nas_fused_forward",
    "nas_fused_backward",
    "nas_pointwise_moments",
    "nas_chain",
    "nas_blank",
)
_FUSED_FORWARD, _FUSED_BACKWARD, _MOMENTS, _CHAIN, _BLANK = _FUSED

ACTIVATIONS = ("none", "relu", "relu6", "hard_swish", "swish")  # what a fused convolution knows, by its number


def available() -> bool:
    """Whether the functions here can be used on CPU. Asked at trace time; tests replace it to force a form."""
    return not _problem()


def status() -> str:
    """Whether the library is in use, with which instructions, or why not and what would change that."""
    return _problem() or f"in use, {_library().nas_native_instructions().decode()} instructions"


def source() -> str:
    """A hash of what an `available()` library was compiled from."""
    return build.source_hash()


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x: Array, w: Array, stride: int) -> Array:
    """SAME convolution of each channel of `x` [N, H, W, C] with its own kernel, `w` [kh, kw, 1, C]: [N, H', W', C].

    float32; any size, kernel, stride and number of channels. The results do not depend on the number of threads.

    Raises:
        DeviceError: the library is not `available()`.
    """
    return _images(_FORWARD, stride, _outputs(x, stride), x, w)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def input_gradient(g: Array, w: Array, stride: int, size: tuple[int, int]) -> Array:
    """Transpose of `depthwise` in `x`, of height and width `size`: `g` [N, H', W', C] to [N, *size, C]."""
    return _images(_INPUT_GRADIENT, stride, size, g, w)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def weight_gradient(x: Array, g: Array, stride: int, kernel: tuple[int, int]) -> Array:
    """Transpose of `depthwise` in `w`: `x` [N, H, W, C] and `g` [N, H', W', C] to [*kernel, 1, C]."""
    return _weights(stride, kernel, x, g)


@jax.custom_vjp
def channel_sums(a: Array, b: Array, a_shift: Array, b_shift: Array) -> Array:
    """[2, C]: for each channel the sums over all pixels of a - a_shift, and of (a - a_shift) * (b - b_shift).

    `a` and `b` are [N, H, W, C], the shifts [C], float32; both are read once, nothing is written. The results do not
    depend on the number of threads.

    Raises:
        DeviceError: the library is not `available()`.
    """
    return sequential_vmap(_split_channels)(a, b, a_shift, b_shift)


def _sums_forward(*operands: Array) -> tuple[Array, tuple[Array, ...]]:
    return channel_sums(*operands), operands


def _sums_backward(operands: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    def written_out(a: Array, b: Array, a_shift: Array, b_shift: Array) -> Array:
        a = a - a_shift
        return jnp.stack([a.sum((0, 1, 2)), (a * (b - b_shift)).sum((0, 1, 2))])

    return jax.vjp(written_out, *operands)[1](gradient)


channel_sums.defvjp(_sums_forward, _sums_backward)

# <depthwise(x, w), g> is linear in x, in w and in g. Each function is its derivative by one of them, so that the
# gradients of each function are the other two.


def _depthwise_backward(stride: int, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    return input_gradient(g, w, stride, x.shape[1:3]), weight_gradient(x, g, stride, w.shape[:2])


def _input_backward(stride: int, _: tuple, residuals: tuple[Array, Array], dx: Array) -> tuple[Array, Array]:
    g, w = residuals
    return depthwise(dx, w, stride), weight_gradient(dx, g, stride, w.shape[:2])


def _weight_backward(stride: int, _: tuple, residuals: tuple[Array, Array], dw: Array) -> tuple[Array, Array]:
    x, g = residuals
    return input_gradient(g, dw, stride, x.shape[1:3]), depthwise(x, dw, stride)


def _with_operands(function: Callable[..., Any]) -> Callable[..., tuple[Any, tuple[Array, Array]]]:
    return lambda a, b, *static: (function(a, b, *static), (a, b))


depthwise.defvjp(_with_operands(depthwise), _depthwise_backward)
input_gradient.defvjp(_with_operands(input_gradient), _input_backward)
weight_gradient.defvjp(_with_operands(weight_gradient), _weight_backward)


@dataclasses.dataclass(frozen=True)
class Fused:
    """What `fused` computes, beside its arrays."""

    size: tuple[int, int]  # of the images that it reads: height, width
    stride: int
    activation: int | None  # of what it reads, number in `ACTIVATIONS`; None: it is read as it is
    measures: bool  # whether anybody asks for the moments
    room: int  # values that the result has for each image, at least as many as the convolution makes

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return -(-self.size[0] // self.stride), -(-self.size[1] // self.stride)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def fused(x: Array, w: Array, centre: Array, scale: Array, offset: Array, how: Fused) -> tuple[Array, Array]:
    """A SAME convolution of act((x - centre) * scale + offset), and the mean and biased variance [2, C'] of its result.

    What lies between two convolutions is thus computed where it is read, and never written to memory; nor does batch
    norm read the result again. The convolution has one group, or one for each channel. A channel whose mean is large
    beside its deviation loses no digits: moments of parts are merged (Chan et al. 1983).

    Args:
        x: [N, >= H * W * C], the values of an image in the order [H, W, C], then room that is not read.
        w: [kh, kw, 1, C], depthwise; or [kh, kw, C, C'].
        centre, scale, offset: [C], not read where `how.activation` is None.

    Returns:
        [N, how.room]: values in the order [H', W', C'], then room that is not written; and [2, C'].

    Raises:
        DeviceError: the library is not `available()`.
    """
    return sequential_vmap(partial(_split_forward, how))(x, w, centre, scale, offset)


def _pair(*operands: Any) -> tuple[Array, Array]:
    """`fused`, of which type checkers do not know what it gives."""
    made: Any = fused(*operands)
    return made


def _fused_forward(
    x: Array, w: Array, centre: Array, scale: Array, offset: Array, how: Fused
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    y, moments = _pair(x, w, centre, scale, offset, how)
    return (y, moments), (y, moments[0], x, w, centre, scale, offset)


def fused_backward(how: Fused, residuals: tuple[Array, ...], gradients: tuple[Array, Array]) -> tuple[Array, ...]:
    """Gradients of the operands of `fused`, of (y, mean, its operands) and the gradients of its results."""
    y, mean, x, w, centre, scale, offset = residuals
    gradient, (d_mean, d_var) = gradients
    count = y.shape[0] * how.out_size[0] * how.out_size[1]
    operands = gradient, y, d_mean / count, 2 * d_var / count, mean, x, w, centre, scale, offset
    pulled = [sequential_vmap(partial(_split_backward, how, part))(*operands) for part in _parts(how, w)]
    (dx, _, (d_offset, d_scale)), (_, dw, _) = pulled[0], pulled[-1]
    return dx, dw, -scale * d_offset, d_scale, d_offset


fused.defvjp(_fused_forward, fused_backward)


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def recalled(
    y: Array, moments: Array, x: Array, w: Array, centre: Array, scale: Array, offset: Array, how: Fused
) -> tuple[Array, Array]:
    """`y` and `moments`, known to be what `fused` makes of the rest: has the gradients of that, computes nothing."""
    return y, moments


def _recalled_backward(how: Fused, residuals: tuple[Array, ...], gradients: tuple[Array, Array]) -> tuple[Array, ...]:
    return *map(jnp.zeros_like, gradients), *fused_backward(how, residuals, gradients)


recalled.defvjp(lambda y, moments, *rest: ((y, moments), (y, moments[0], *rest[:-1])), _recalled_backward)


Affine = tuple[Array, Array, Array]  # centre, scale, offset, as of `fused`


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def pointwise_moments(x: Array, w: Array, centre: Array, scale: Array, offset: Array, how: Fused) -> Array:
    """The moments [2, C'] that `fused` gives, of a 1x1 convolution that is not computed.

    They follow from the covariance of what it reads, in double precision: a channel whose deviation is below 1e-3 of
    what its inputs could make of it has fewer digits here.
    """
    return sequential_vmap(partial(_split_moments, how))(x, w, centre, scale, offset)


pointwise_moments.defvjp(
    lambda *operands: (pointwise_moments(*operands), operands[:-1]),
    lambda how, operands, gradient: jax.vjp(lambda *a: _pair(*a, how)[1], *operands)[1](gradient),
)


@dataclasses.dataclass(frozen=True)
class Links:
    """Convolutions in turn: one; or those of a bottleneck, 1x1, depthwise and 1x1, of which the last may be missing."""

    hows: tuple[Fused, ...]
    activation: int | None = None  # after them and a norm, number in `ACTIVATIONS`; None: there is no norm after them


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def chain(
    x: Array,
    affines: tuple[Affine, ...],
    kernels: tuple[Array, ...],
    closing: Affine | None,
    shortcut: Array | None,
    links: Links,
) -> tuple[Array, Array]:
    """What `fused` makes in turn, then act((y - centre) * scale + offset), then the sum with `shortcut`.

    Nothing between them leaves the cache of a core. Images are spread over the cores; for bottlenecks there should be
    many. Moments [2, C'] are had only of two convolutions with no `closing`, where the second one `measures`; else 0.

    Args:
        x: [N, H * W * C], as of `fused`; without room, as are the results.
        affines, kernels: of each convolution.
        closing: the norm after them; with none, there is no shortcut.
        shortcut: [N, H' * W' * C'], where there is no activation.
    """
    return sequential_vmap(partial(_split_chain, links, shortcut is not None))(
        x, *_operands(affines, kernels, closing), jnp.zeros((len(x), 1), jnp.float32) if shortcut is None else shortcut
    )


def _one_by_one(
    links: Links,
    x: Array,
    affines: tuple[Affine, ...],
    kernels: tuple[Array, ...],
    closing: Affine | None,
    shortcut: Array | None,
) -> tuple[Array, Array]:
    moments = jnp.zeros((2, 0), jnp.float32)
    for affine, kernel, how in zip(affines, kernels, links.hows, strict=True):
        x, moments = _pair(x, kernel, *affine, how)
    if closing is not None:  # before a depthwise convolution that changes nothing
        how = Fused(links.hows[-1].out_size, 1, links.activation, False, x.shape[1])
        x, _ = _pair(x, jnp.ones((1, 1, 1, len(closing[0])), jnp.float32), *closing, how)
    return x if shortcut is None else x + shortcut, moments


chain.defvjp(
    lambda *operands: (chain(*operands), operands[:-1]),
    lambda links, operands, gradients: jax.vjp(partial(_one_by_one, links), *operands)[1](gradients),
)


def blank(shape: tuple[int, ...]) -> Array:
    """A float32 array of any values: it is not written."""
    return _call(_BLANK, shape)


def _outputs(x: Array, stride: int) -> tuple[int, int]:
    height, width = x.shape[1:3]
    return -(-height // stride), -(-width // stride)


def _convolve(handler: str, stride: int, size: tuple[int, int], images: Array, weights: Array) -> Array:
    return _call(handler, (images.shape[0], *size, images.shape[3]), images, weights, stride=stride)


def _sum(stride: int, kernel: tuple[int, int], x: Array, g: Array) -> Array:
    return _call(_WEIGHT_GRADIENT, (*kernel, 1, x.shape[3]), x, g, stride=stride)


def _sum_channels(*operands: Array) -> Array:
    return _call(_CHANNEL_SUMS, (2, operands[0].shape[3]), *operands)


def _call(handler: str, shape: tuple[int, ...], *operands: Array, **attributes: int | Sequence[int]) -> Array:
    (result,) = _call_for_all(handler, [shape], *operands, **attributes)
    return result


def _call_for_all(
    handler: str, shapes: Sequence[tuple[int, ...]], *operands: Array, **attributes: int | Sequence[int]
) -> Any:
    """Results of these shapes, float32; attributes are 64-bit integers."""
    if _problem():
        raise DeviceError(f"The C++ kernels are {_problem()} Until then use nas.kernels, which does without them.")
    results = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    numbers = {name: np.asarray(value, np.int64)[()] for name, value in attributes.items()}
    return tuple(jax.ffi.ffi_call(handler, results)(*operands, **numbers))


def _attributes(how: Fused) -> dict[str, int]:
    return {
        "height": how.size[0],
        "width": how.size[1],
        "stride": how.stride,
        "activation": _number(how),
        "measures": int(how.measures),
    }


def _number(how: Fused) -> int:
    return -1 if how.activation is None else how.activation


def _fused(how: Fused, *operands: Array) -> tuple[Array, Array]:
    x, w = operands[:2]
    shapes = (x.shape[0], how.room), (2, w.shape[-1])
    return _call_for_all(_FUSED_FORWARD, shapes, *operands, **_attributes(how))


def _parts(how: Fused, w: Array) -> tuple[int, ...]:
    """Which calls give all gradients: for a dense convolution two, so that an unwanted one of images costs nothing."""
    depthwise, pointwise = w.shape[2] == 1, w.shape[0] * w.shape[1] * how.stride == 1
    return (0,) if depthwise or pointwise else (1, 2)


def _pulled(how: Fused, part: int, *operands: Array) -> tuple[Array, Array, Array]:
    x, w, centre = operands[5:8]
    shapes = x.shape, w.shape, (2, *centre.shape)
    return _call_for_all(_FUSED_BACKWARD, shapes, *operands, **_attributes(how), wanted=part)


def _operands(affines: tuple[Affine, ...], kernels: tuple[Array, ...], closing: Affine | None) -> list[Array]:
    nothing = jnp.zeros((1,), jnp.float32)
    missing = 3 - len(kernels)
    affines = (*affines, *[(nothing, nothing, nothing)] * missing)
    kernels = (*kernels, *[nothing.reshape(1, 1, 1, 1)] * missing)
    each = [a for affine, kernel in zip(affines, kernels, strict=True) for a in (*affine, kernel)]
    return [*each, *(closing or (nothing, nothing, nothing))]


def _through(links: Links, adds: bool, x: Array, *operands: Array) -> tuple[Array, Array]:
    hows = links.hows
    before = [*map(_number, hows), -1, -1][:3]
    numbers = {
        "height": hows[0].size[0],
        "width": hows[0].size[1],
        "stride": hows[min(1, len(hows) - 1)].stride,
        "measures": int(hows[-1].measures),
        "adds": int(adds),
        "links": len(hows),
        "activations": [*before, -1 if links.activation is None else links.activation],
    }
    shapes = (x.shape[0], hows[-1].room), (2, operands[4 * len(hows) - 1].shape[-1])
    return _call_for_all(_CHAIN, shapes, x, *operands, **numbers)


def _measured(how: Fused, x: Array, w: Array, *affine: Array) -> Array:
    (height, width), activation = how.size, _number(how)
    return _call(_MOMENTS, (2, w.shape[-1]), x, w, *affine, height=height, width=width, activation=activation)


# XLA cannot see into a foreign call: without the rules below it would gather all images on every device. They say that
# images and channels can be split, and how: the strings to JAX's partitioner (Shardy), the functions to XLA's.

_split_convolve = custom_partitioning(_convolve, static_argnums=(0, 1, 2))
_split_sum = custom_partitioning(_sum, static_argnums=(0, 1))
_split_channels = custom_partitioning(_sum_channels)
_split_forward = custom_partitioning(_fused, static_argnums=(0,))
_split_backward = custom_partitioning(_pulled, static_argnums=(0, 1))
_split_moments = custom_partitioning(_measured, static_argnums=(0,))
_split_chain = custom_partitioning(_through, static_argnums=(0, 1))


def _images(handler: str, stride: int, size: tuple[int, int], images: Array, weights: Array) -> Array:
    return sequential_vmap(partial(_split_convolve, handler, stride, size))(images, weights)


def _weights(stride: int, kernel: tuple[int, int], x: Array, g: Array) -> Array:
    return sequential_vmap(partial(_split_sum, stride, kernel))(x, g)


def _shardings(mesh: Mesh, images: Any) -> tuple[NamedSharding, NamedSharding]:
    """How images and weights are split where `images` [N, H, W, C] are: by image and by channel."""
    n, _, _, c = images.sharding.spec
    return NamedSharding(mesh, PartitionSpec(n, None, None, c)), NamedSharding(mesh, PartitionSpec(None, None, None, c))


def _partition_convolve(handler: str, stride: int, size: tuple[int, int], mesh: Mesh, operands: Any, _: Any) -> tuple:
    images, weights = _shardings(mesh, operands[0])
    return mesh, partial(_convolve, handler, stride, size), images, (images, weights)


def _partition_sum(stride: int, kernel: tuple[int, int], mesh: Mesh, operands: Any, _: Any) -> tuple:
    images, weights = _shardings(mesh, operands[0])
    devices = images.spec[0]

    def over_devices(x: Array, g: Array) -> Array:
        dw = _sum(stride, kernel, x, g)
        return dw if devices is None else lax.psum(dw, devices)

    return mesh, over_devices, weights, (images, images)


def _partition_channels(mesh: Mesh, operands: Any, _: Any) -> tuple:
    images, _ = _shardings(mesh, operands[0])
    devices, channels = images.spec[0], images.spec[3]

    def over_devices(*operands: Array) -> Array:
        sums = _sum_channels(*operands)
        return sums if devices is None else lax.psum(sums, devices)

    shift = NamedSharding(mesh, PartitionSpec(channels))
    return mesh, over_devices, _sharded_sums(mesh, operands), (images, images, shift, shift)


def _sharded_sums(mesh: Mesh, operands: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(None, _shardings(mesh, operands[0])[0].spec[3]))


_split_convolve.def_partition(
    _partition_convolve,
    infer_sharding_from_operands=lambda *a: _shardings(a[-3], a[-2][0])[0],
    sharding_rule="n h w c, i j u c -> n p q c",
    need_replication_factors=("h", "w", "i", "j", "u", "p", "q"),
)
_split_sum.def_partition(
    _partition_sum,
    infer_sharding_from_operands=lambda *a: _shardings(a[-3], a[-2][0])[1],
    sharding_rule="n h w c, n p q c -> i j u c",
    reduction_factors=("n",),
    need_replication_factors=("h", "w", "p", "q", "i", "j", "u"),
)

_split_channels.def_partition(
    _partition_channels,
    infer_sharding_from_operands=lambda mesh, operands, _: _sharded_sums(mesh, operands),
    sharding_rule="n h w c, n h w c, c, c -> k c",
    reduction_factors=("n",),
    need_replication_factors=("h", "w", "k"),
)


# Fused convolutions are split by image only: a 1x1 needs all channels.


def _by_image(mesh: Mesh, x: Any) -> tuple[NamedSharding, NamedSharding, Any]:
    """How images [N, ...] and everything else are split where `x` is, and the axis of the mesh that this is over."""
    devices = x.sharding.spec[0] if len(x.sharding.spec) else None
    return NamedSharding(mesh, PartitionSpec(devices)), NamedSharding(mesh, PartitionSpec()), devices


def _over_all(moments: Array, devices: Any) -> Array:
    """Moments [2, C] of all images, of those of each device."""
    mean = lax.pmean(moments[0], devices)
    return jnp.stack([mean, lax.pmean(moments[1] + (moments[0] - mean) ** 2, devices)])


def _partition_forward(how: Fused, mesh: Mesh, operands: Any, _: Any) -> tuple:
    images, whole, devices = _by_image(mesh, operands[0])

    def over_devices(*operands: Array) -> tuple[Array, Array]:
        y, moments = _fused(how, *operands)
        return y, moments if devices is None or not how.measures else _over_all(moments, devices)

    return mesh, over_devices, (images, whole), (images, *[whole] * 4)


def _partition_moments(how: Fused, mesh: Mesh, operands: Any, _: Any) -> tuple:
    images, whole, devices = _by_image(mesh, operands[0])

    def over_devices(*operands: Array) -> Array:
        moments = _measured(how, *operands)
        return moments if devices is None else _over_all(moments, devices)

    return mesh, over_devices, whole, (images, *[whole] * 4)


def _partition_chain(links: Links, adds: bool, mesh: Mesh, operands: Any, _: Any) -> tuple:
    images, whole, devices = _by_image(mesh, operands[0])

    def over_devices(*operands: Array) -> tuple[Array, Array]:
        y, moments = _through(links, adds, *operands)
        return y, moments if devices is None or not links.hows[-1].measures else _over_all(moments, devices)

    return mesh, over_devices, (images, whole), (images, *[whole] * 15, images)


def _partition_backward(how: Fused, part: int, mesh: Mesh, operands: Any, _: Any) -> tuple:
    images, whole, devices = _by_image(mesh, operands[0])

    def over_devices(*operands: Array) -> tuple[Array, Array, Array]:
        dx, dw, sums = _pulled(how, part, *operands)
        return (dx, dw, sums) if devices is None else (dx, lax.psum(dw, devices), lax.psum(sums, devices))

    shardings = (images, images, whole, whole, whole, images, *[whole] * 4)
    return mesh, over_devices, (images, whole, whole), shardings


def _infer_backward(how: Fused, part: int, mesh: Mesh, operands: Any, _: Any) -> tuple[NamedSharding, ...]:
    images, whole, _ = _by_image(mesh, operands[0])
    return images, whole, whole


_split_forward.def_partition(
    _partition_forward,
    infer_sharding_from_operands=lambda how, mesh, operands, _: _by_image(mesh, operands[0])[:2],
    sharding_rule="n r, i j u d, c, c, c -> n s, k d",
    need_replication_factors=tuple("rijudcsk"),
)
_split_backward.def_partition(
    _partition_backward,
    infer_sharding_from_operands=_infer_backward,
    sharding_rule="n s, n s, d, d, d, n r, i j u d, c, c, c -> n r, i j u d, k c",
    need_replication_factors=tuple("sdrijuck"),  # in the order in which they appear
)


_split_moments.def_partition(
    _partition_moments,
    infer_sharding_from_operands=lambda how, mesh, operands, _: _by_image(mesh, operands[0])[1],
    sharding_rule="n r, i j u d, c, c, c -> k d",
    reduction_factors=("n",),
    need_replication_factors=tuple("rijudck"),
)
_split_chain.def_partition(
    _partition_chain,
    infer_sharding_from_operands=lambda links, adds, mesh, operands, _: _by_image(mesh, operands[0])[:2],
    sharding_rule="n r, c, c, c, a b g e, h, h, h, i j u o, f, f, f, k l p d, q, q, q, n v -> n s, t m",
    need_replication_factors=tuple("rcabgehijuofklpdqvstm"),
)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.LIBRARY))
    library.nas_native_source.restype = library.nas_native_instructions.restype = ctypes.c_char_p
    return library


@cache
def _problem() -> str:
    """Why the library cannot be used; empty once XLA knows its handlers."""
    again = f"Install nas again: {sys.executable} -m pip install --force-reinstall --no-deps (and where it came from)."
    if os.environ.get("NAS_NATIVE") == "0":
        return "not in use: NAS_NATIVE=0 is set."
    if not build.LIBRARY.exists():
        return f"not built: there was no C++ compiler when nas was installed, or it failed. With one: {again}"
    try:
        if _library().nas_native_source().decode() != build.source_hash():
            return f"not in use: compiled from another kernels.cc than the one here. {again}"
        for handler in _HANDLERS:
            jax.ffi.register_ffi_target(handler, jax.ffi.pycapsule(getattr(_library(), handler)), platform="cpu")
    except (OSError, AttributeError, RuntimeError) as e:
        return f"not in use: {build.LIBRARY} cannot be loaded: {e}. {again}"
    return ""
