"""Convolutions, batch moments and channel shuffle in the forms that XLA compiles well, NHWC and HWIO throughout.

On CPU, XLA runs grouped convolutions and their gradients one to two orders of magnitude below the machine's speed.
There depthwise convolutions are C++ (`nas.native`) where that was built; without it, and for everything else, the same
sums are written as matmuls and shifted slices. Accelerators get `lax`. Each form was chosen by measurement:
`python experiments/benchmarks/kernels.py` prints run and compile times beside those of `lax`.
"""

import contextlib
import contextvars
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from nas import memory, native

memory.keep_freed()  # here, since whatever computes with JAX imports this first

IM2COL_TAPS = 9  # up to 3x3 one matmul over gathered patches beats lax.conv (1-3x); 5x5 loses 3x and compiles 4x longer
TOEPLITZ_AREA = 1.5  # pixels per tap up to which a matrix for each channel beats a sum over taps (8x8: k7 1.1x, not k5)
TILE = 16  # outputs; fewer than 16 uses of a slice would let XLA fuse it, with an index that keeps loops from vectors
TILED_TAPS = 25  # from which such tiles pay in the gradient of a kernel; of 3x3 they would only compile 1.8x longer


def on_cpu() -> bool:
    """Whether to write convolutions out for XLA on CPU. Asked at trace time; tests replace it to force a form."""
    return not _for_accelerator.get() and jax.default_backend() == "cpu"


def computed_by() -> list[str]:
    """What the last bits of a sum depend on in this process: the device and, on CPU, whose kernels these are."""
    own = on_cpu() and native.available()
    return [jax.default_backend(), jax.devices()[0].device_kind, *([native.status(), native.source()] if own else [])]


_for_accelerator = contextvars.ContextVar("for_accelerator", default=False)


@contextlib.contextmanager
def for_accelerator() -> Iterator[None]:
    """What is traced inside is written for accelerators, wherever this process computes: to compile ahead of time."""
    token = _for_accelerator.set(True)
    try:
        yield
    finally:
        _for_accelerator.reset(token)


def fuses(*operands: ArrayLike) -> bool:
    """Whether convolutions of these take batch norm and activation along (`nas.fusion`)."""
    return on_cpu() and all(jnp.result_type(a) == jnp.float32 for a in operands) and native.available()


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros (before, after) an axis for ceil(size / stride) outputs: SAME as in XLA, TensorFlow and ONNX.

    An odd total puts the extra zero after: at stride 2 a 3x3 kernel pads even sizes by (0, 1), PyTorch by (1, 1).
    """
    total = max((_outputs(size, stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def conv(x: Array, w: Array, *, stride: int = 1, groups: int = 1, portable: bool = False) -> Array:
    """SAME convolution of `x` [N, H, W, Cin] with `w` [kh, kw, Cin / groups, Cout]: [N, ceil(H/s), ceil(W/s), Cout].

    `portable` keeps to XLA's own ops, as a program that leaves this process must, and to constants no larger than `w`:
    it is for inference, image by image.

    Raises ValueError where the channels of `x`, `w` and `groups` do not fit together.
    """
    kh, kw, width, cout = w.shape
    if x.shape[-1] != width * groups or cout % groups:
        raise ValueError(
            f"conv got {x.shape[-1]} input channels, a kernel of shape {w.shape} and groups={groups}. "
            f"Give kernel.shape[2] * groups input channels, and a kernel.shape[3] that is a multiple of groups."
        )
    if not on_cpu():
        return _lax_conv(x, w, stride, groups)
    if groups > 1 and groups == x.shape[-1] == cout:
        return depthwise(x, w, stride, portable=portable)
    if groups > 1:
        # Zeros between the groups cost `groups` times the arithmetic: still 8-40x faster than a grouped lax.conv.
        blocks = w.reshape(kh, kw, 1, width, groups, -1) * jnp.eye(groups, dtype=w.dtype)[:, None, :, None]
        w = blocks.reshape(kh, kw, groups * width, cout)
    if kh * kw > IM2COL_TAPS:
        return _lax_conv(x, w, stride, 1)
    patches = _patches(x, kh, kw, stride)
    out = patches.reshape(-1, patches.shape[-1]) @ w.reshape(-1, cout)
    return out.reshape(*patches.shape[:3], cout)


def depthwise(x: Array, w: Array, stride: int = 1, *, portable: bool = False) -> Array:
    """SAME convolution of each channel of `x` [N, H, W, C] with its own kernel, `w` [kh, kw, 1, C]: [N, H', W', C].

    Any kernel size, stride and image size. Sums are kept in float32 (or wider), whatever the type of `x`.
    On CPU it differentiates in reverse mode only, any number of times; below `shard_map` with check_vma=False.
    `portable` is that of `conv`: the matrices of `_toeplitz_depthwise` would be constants as its kernels are, up to 10
    MB a layer at 8x8, read for every image. They made networks 1.1 times as slow, some 1.5 times, and far slower than
    the sum of their blocks, each of which alone finds its own in the cache.
    """
    if not on_cpu():
        return _lax_conv(x, w, stride, x.shape[-1])
    if x.dtype == w.dtype == jnp.float32 and not portable and native.available():
        return native.depthwise(x, w, stride)
    small = x.shape[1] * x.shape[2] <= TOEPLITZ_AREA * w.shape[0] * w.shape[1]
    return (_toeplitz_depthwise if small and not portable else _shifted_depthwise)(x, w, stride)


@jax.custom_vjp
def batch_moments(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance [C], float32, of `x` [..., C] over all axes but the last, in one pass over the data.

    E[y^2] - E[y]^2 loses its digits where the mean is large beside the deviation. Each channel is therefore shifted by
    its first value, which gives constant channels a variance of exactly 0; the clamp keeps rounding from making it
    negative. Only a first value thousands of deviations off still loses digits.
    """
    shift = _wide(x[(0,) * (x.ndim - 1)])
    total, squares = _channel_sums(x, x, shift, shift)
    count = x.size // x.shape[-1]
    mean = total / count
    return mean + shift, jnp.maximum(squares / count - mean * mean, 0)


@jax.custom_vjp
def normalise(x: Array, mean: Array, scale: Array, offset: Array) -> Array:
    """`(x - mean) * scale + offset` of `x` [..., C] and float32 [C], in the type of `x`."""
    return ((x - mean) * scale + offset).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def recalled_conv(y: Array, x: Array, w: Array, stride: int, groups: int) -> Array:
    """`y`, which is known to be `conv(x, w)`: has the gradients of that, and computes nothing."""
    return y


@jax.custom_vjp
def recalled_moments(moments: Array, x: Array) -> tuple[Array, Array]:
    """`moments` [2, C], which are known to be `batch_moments(x)`: has the gradients of that, and computes nothing."""
    return moments[0], moments[1]


def blank(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """An array that nobody will read; where that is possible it is not written either."""
    if on_cpu() and dtype == jnp.float32 and native.available():
        return native.blank(shape)
    return jnp.zeros(shape, dtype)


def shuffle(x: Array, groups: int) -> Array:
    """`x` [..., C] with its channels dealt out as in ShuffleNet: channel i of group g goes to i * groups + g.

    Stacked, not indexed: the gradient of `take` is a scatter, 5-9x slower.
    """
    return jnp.stack(jnp.split(x, groups, axis=-1), axis=-1).reshape(x.shape)


def _moments_forward(x: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    mean, var = batch_moments(x)
    return (mean, var), (x, mean)


def _moments_backward(residuals: tuple[Array, Array], gradients: tuple[Array, Array]) -> tuple[Array]:
    # Written out because autodiff would also differentiate through the shift, which cancels, and through the clamp.
    x, mean = residuals
    d_mean, d_var = gradients
    dx = (d_mean + 2 * d_var * (x.astype(jnp.float32) - mean)) / (x.size // x.shape[-1])
    return (dx.astype(x.dtype),)


batch_moments.defvjp(_moments_forward, _moments_backward)


def _recalled_conv_backward(
    stride: int, groups: int, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    x, w = residuals
    return jnp.zeros_like(gradient), *jax.vjp(lambda x, w: conv(x, w, stride=stride, groups=groups), x, w)[1](gradient)


recalled_conv.defvjp(lambda y, x, w, stride, groups: (y, (x, w)), _recalled_conv_backward)
recalled_moments.defvjp(
    lambda moments, x: ((moments[0], moments[1]), (x, moments[0])),
    lambda residuals, gradients: (jnp.zeros_like(jnp.stack(gradients)), *_moments_backward(residuals, gradients)),
)


def _normalise_forward(x: Array, mean: Array, scale: Array, offset: Array) -> tuple[Array, tuple[Array, ...]]:
    return normalise(x, mean, scale, offset), (x, mean, scale)


def _normalise_backward(residuals: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    # Written out because autodiff would take the two sums one after the other, each from memory.
    x, mean, scale = residuals
    d_offset, d_scale = _channel_sums(gradient, x, jnp.zeros_like(mean), mean)
    per_channel = (a.astype(scale.dtype) for a in (-scale * d_offset, d_scale, d_offset))
    return (gradient * scale).astype(x.dtype), *per_channel


normalise.defvjp(_normalise_forward, _normalise_backward)


def _channel_sums(a: Array, b: Array, a_shift: Array, b_shift: Array) -> Sequence[Array]:
    """Two of [C], float32 or wider: the sums over all axes but the last of a - a_shift, and of it times b - b_shift."""
    if on_cpu() and a.dtype == b.dtype == jnp.float32 and a.ndim == 4 and native.available():
        return tuple(native.channel_sums(a, b, a_shift, b_shift))
    y = _wide(a) - a_shift
    terms = [y, y * (_wide(b) - b_shift)]
    if on_cpu() and a.ndim > 2:
        # One loop for both sums, in which the shift disappears; a library call would have it written to memory first.
        terms = _sums(terms, axes=(a.ndim - 2,))
    return [t.sum(tuple(range(t.ndim - 1))) for t in terms]


def _outputs(size: int, stride: int) -> int:
    return -(-size // stride)


def _lax_conv(x: Array, w: Array, stride: int, groups: int) -> Array:
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def _padded(x: Array, pad_h: tuple[int, int], pad_w: tuple[int, int]) -> Array:
    """`x` [N, H, W, C] with zeros around it, in memory.

    The barrier keeps the padding out of the loop that reads it, where each tap would test its bounds (up to 2x slower).
    """
    if not any(pad_h + pad_w):
        return x
    return lax.optimization_barrier(jnp.pad(x, ((0, 0), pad_h, pad_w, (0, 0))))


def _taps(x: Array, kh: int, kw: int, stride: int) -> list[list[Array]]:
    """For each kernel row, for each kernel column, the pixels of `x` that it meets: [kh][kw] of [N, H', W', C]."""
    n, h, w, c = x.shape
    x = _padded(x, same_padding(h, kh, stride), same_padding(w, kw, stride))
    h, w = (_outputs(h, stride) - 1) * stride + 1, (_outputs(w, stride) - 1) * stride + 1
    return [
        [lax.slice(x, (0, i, j, 0), (n, i + h, j + w, c), (1, stride, stride, 1)) for j in range(kw)] for i in range(kh)
    ]


def _patches(x: Array, kh: int, kw: int, stride: int) -> Array:
    """What each output sees of `x` [N, H, W, C], in the order of a kernel: [N, H', W', kh * kw * C]."""
    taps = [tap for row in _taps(x, kh, kw, stride) for tap in row]
    return taps[0] if len(taps) == 1 else jnp.concatenate(taps, axis=-1)


def _toeplitz_depthwise(x: Array, w: Array, stride: int) -> Array:
    """Each channel as one matrix [H' * W', H * W], applied to all images: a batched matmul forward and backward.

    On a small image most taps of a large kernel fall on padding, and the matrix is hardly larger than their number. It
    compiles in a third of the time of a 7x7 sum over taps, which is 49 slices, and as many again in each gradient.
    """
    n, height, width, c = x.shape
    rows, columns = (_bands(size, k, stride) for size, k in zip((height, width), w.shape[:2], strict=True))
    bands = jnp.einsum("klc,lpj->kpjc", _wide(w)[:, :, 0], columns)
    matrices = jnp.einsum("koi,kpjc->copij", rows, bands).reshape(c, -1, height * width)
    y = jnp.einsum("coi,nic->cno", matrices, _wide(x).reshape(n, height * width, c))
    return y.transpose(1, 2, 0).reshape(n, rows.shape[1], columns.shape[1], c).astype(x.dtype)


def _bands(size: int, kernel: int, stride: int) -> np.ndarray:
    """[kernel, outputs, size] float32: 1 where a tap of an output meets a pixel."""
    taps, outputs, pixels = np.ogrid[:kernel, : _outputs(size, stride), :size]
    return (outputs * stride + taps - same_padding(size, kernel, stride)[0] == pixels).astype(np.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted_depthwise(x: Array, w: Array, stride: int) -> Array:
    kh, kw = w.shape[:2]
    taps = _taps(_wide(x), kh, kw, stride)
    weights = _wide(w)
    return _sum([taps[i][j] * weights[i, j, 0] for i in range(kh) for j in range(kw)]).astype(x.dtype)


def _depthwise_forward(x: Array, w: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _shifted_depthwise(x, w, stride), (x, w)


def _depthwise_backward(stride: int, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, w = residuals
    g = _wide(gradient)
    dx = _input_gradient(g, _wide(w), x.shape[1], x.shape[2], stride)
    return dx.astype(x.dtype), _weight_gradient(_wide(x), g, w.shape[0], w.shape[1], stride).astype(w.dtype)


_shifted_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _input_gradient(g: Array, w: Array, height: int, width: int, stride: int) -> Array:
    """Transpose of the forward sum, `g` [N, H', W', C] to [N, height, width, C].

    Pixels that agree modulo the stride meet the same taps: each such phase is a small stride-1 convolution of `g`, and
    the phases are interleaved. Spreading `g` with zeros instead would multiply mostly zeros (2-4x slower at 7x7).
    """
    n, out_h, out_w, c = g.shape
    rows = _phases(w.shape[0], stride, same_padding(height, w.shape[0], stride)[0])
    columns = _phases(w.shape[1], stride, same_padding(width, w.shape[1], stride)[0])
    (top, bottom), (left, right) = _reach(rows), _reach(columns)
    g = _padded(g, (top, bottom), (left, right))

    def phase(row: list[tuple[int, int]], column: list[tuple[int, int]]) -> Array:
        terms = [
            lax.slice(g, (0, top + dy, left + dx, 0), (n, top + dy + out_h, left + dx + out_w, c)) * w[i, j, 0]
            for i, dy in row
            for j, dx in column
        ]
        return _sum(terms) if terms else jnp.zeros((n, out_h, out_w, c), g.dtype)  # no taps: stride > kernel

    if stride == 1:
        return _stored(lambda: phase(rows[0], columns[0]))
    interleaved = jnp.stack([jnp.stack([phase(r, c) for c in columns], axis=3) for r in rows], axis=2)
    return interleaved.reshape(n, out_h * stride, out_w * stride, c)[:, :height, :width]


def _phases(kernel: int, stride: int, before: int) -> list[list[tuple[int, int]]]:
    """For each phase p, the taps t that pixel q * stride + p meets, each with the d of the output q + d it meets."""
    return [
        [(t, (p + before - t) // stride) for t in range(kernel) if (p + before - t) % stride == 0]
        for p in range(stride)
    ]


def _reach(phases: list[list[tuple[int, int]]]) -> tuple[int, int]:
    """How far the offsets of all phases lead (before, after) the outputs."""
    offsets = [offset for phase in phases for _, offset in phase]
    return max(0, -min(offsets)), max(0, max(offsets))


def _weight_gradient(x: Array, g: Array, kh: int, kw: int, stride: int) -> Array:
    """Sum over images and outputs of each tap of `x` times `g` [N, H', W', C]: [kh, kw, 1, C]."""
    tiled = kh * kw >= TILED_TAPS and g.shape[1] * g.shape[2] >= 2 * TILE
    return (_tiled_tap_sums if tiled else _tap_sums)(x, g, kh, kw, stride).reshape(kh, kw, 1, -1)


def _tiled_tap_sums(x: Array, g: Array, kh: int, kw: int, stride: int) -> Array:
    """`_tap_sums` in tiles of about `TILE` outputs: what each of them adds, to all taps at once, is it times the window
    of `x` that it sees.

    That sum has the channels in its inner loop, where a reduction has pixels: vectors instead of scalars, 1.4-2.5 times
    faster from 8x8 outputs on. Below, too little is summed before it is stored.
    """
    (n, _, _, c), (_, height, width, _) = x.shape, g.shape
    across = -(-width // TILE)
    columns = -(-width // across)
    rows = min(-(-TILE // columns), height)
    down = -(-height // rows)
    g = _extended(g, (0, 0), down * rows, across * columns)
    top, left = same_padding(x.shape[1], kh, stride)[0], same_padding(x.shape[2], kw, stride)[0]
    x = _extended(x, (top, left), (down * rows - 1) * stride + kh, (across * columns - 1) * stride + kw)
    window = (n, (rows - 1) * stride + kh, (columns - 1) * stride + kw, c)

    def add(tile: Array, sums: Array) -> Array:
        row, column = lax.div(tile, across) * rows, lax.rem(tile, across) * columns
        inputs = lax.dynamic_slice(x, (0, row * stride, column * stride, 0), window)
        outputs = lax.dynamic_slice(g, (0, row, column, 0), (n, rows, columns, c))
        terms = []
        for i, j in itertools.product(range(rows), range(columns)):
            start = (0, i * stride, j * stride, 0)
            seen = lax.slice(inputs, start, (n, start[1] + kh, start[2] + kw, c))
            terms.append(seen * lax.slice(outputs, (0, i, j, 0), (n, i + 1, j + 1, c)))
        return sums + _sum(terms)

    return lax.fori_loop(0, down * across, add, jnp.zeros((n, kh, kw, c), x.dtype)).sum(0)


def _extended(x: Array, before: tuple[int, int], height: int, width: int) -> Array:
    """`x` [N, H, W, C] with so many zeros above and to the left, then cut or filled with zeros to height and width."""
    (top, left), zero = before, jnp.zeros((), x.dtype)
    after = height - top - x.shape[1], width - left - x.shape[2]
    return lax.pad(x, zero, ((0, 0, 0), (top, after[0], 0), (left, after[1], 0), (0, 0, 0)))


def _tap_sums(x: Array, g: Array, kh: int, kw: int, stride: int) -> Array:
    """[kh * kw * C]. XLA turns a plain sum into a library call that first writes out the product, as large as `g`; a
    reduction of several operands it compiles into one loop that reads `g` once for all of them. The taps of a kernel
    row share such a loop: 49 sums would spill registers. What is left is one sum, or each would be compiled.
    """
    partials = [p for row in _taps(x, kh, kw, stride) for p in _sums([tap * g for tap in row], axes=(2,))]
    return jnp.concatenate(partials, axis=-1).sum((0, 1))


def _stored(compute: Callable[[], Array]) -> Array:
    """What `compute` returns, in memory.

    XLA otherwise computes a sum over taps again in each loop that reads it, and where that takes the sums of a batch
    norm's backward pass, one scalar after the other (with the norm: k7 3 times slower, k3 1.4). It fuses nothing out of
    a branch. An `optimization_barrier` hides which one is taken; around the sum it would be gone before loops are made.
    """
    out = jax.eval_shape(compute)
    return lax.cond(lax.optimization_barrier(True), compute, lambda: jnp.zeros(out.shape, out.dtype))


def _sums(operands: Sequence[Array], axes: tuple[int, ...]) -> Sequence[Array]:
    """Sums of equally shaped `operands` over `axes`, in one loop."""
    zeros = tuple(np.zeros((), x.dtype) for x in operands)
    return lax.reduce(tuple(operands), zeros, lambda a, b: tuple(map(operator.add, a, b)), axes)


def _sum(terms: Sequence[Array]) -> Array:
    return reduce(operator.add, terms)


def _wide(x: Array) -> Array:
    """`x` in a type that sums may be kept in: float32, or its own where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
