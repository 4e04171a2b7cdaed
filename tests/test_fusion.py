"""Convolutions that take the norm and activation before them along equal the ops one after the other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_native import CLONE_MISSING, draw, needs_library, run

from nas import config, fusion, kernels, native
from nas.blocks import BLOCKS
from nas.ops import Recorder, weights
from nas.run import ACTIVATIONS, Noisy
from nas.run import run as run_graph
from nas.space import load_space
from nas.supernet import Supernet
from nas.supernet import supernet as written

FUNCTIONS = {"none": lambda x: x} | ACTIVATIONS
GEOMETRIES = [  # images, height, width, channels, outputs, kernel, stride, room; outputs None: depthwise
    (5, 8, 8, 24, 72, 1, 1, 0),
    (3, 4, 4, 40, 17, 1, 1, 13),
    (1, 1, 1, 3, 5, 1, 1, 2),
    (70, 2, 2, 130, 33, 1, 1, 0),
    (5, 8, 7, 72, None, 3, 1, 0),
    (9, 8, 8, 40, None, 5, 2, 64),
    (6, 9, 5, 3, None, 7, 1, 5),
    (2, 33, 31, 70, None, 3, 2, 0),
    (33, 3, 2, 20, None, 7, 3, 0),
    (1, 60, 60, 20, None, 5, 1, 0),
    (3, 4, 4, 16, None, 1, 2, 0),
    (3, 8, 8, 3, 16, 3, 1, 0),
    (5, 9, 7, 24, 30, 3, 2, 7),
    (2, 4, 4, 16, 16, 5, 1, 0),
    (18, 6, 6, 8, 24, 1, 2, 0),
]


def operands(geometry, seed=0):
    n, height, width, channels, outputs, kernel, _, room = geometry
    shape = (kernel, kernel, 1, channels) if outputs is None else (kernel, kernel, channels, outputs)
    return draw(seed, (n, height * width * channels + room), shape, (channels,), (channels,), (channels,))


def how_of(geometry, activation, *, measures=True):
    _, height, width, channels, outputs, _, stride, room = geometry
    size = -(-height // stride) * -(-width // stride) * (outputs or channels)
    number = None if activation is None else native.ACTIVATIONS.index(activation)
    return native.Fused((height, width), stride, number, measures, size + room)


def written_out(geometry, activation, x, w, centre, scale, offset):
    """Result [n, ...] and moments [2, outputs] by the ops one after the other."""
    n, height, width, channels, outputs, _, stride, _ = geometry
    x = x[:, : height * width * channels].reshape(n, height, width, channels)
    if activation is not None:
        x = FUNCTIONS[activation]((x - centre) * scale + offset)
    groups = channels if outputs is None else 1
    y = lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    return y.reshape(n, -1), jnp.stack([y.mean((0, 1, 2)), y.var((0, 1, 2))])


def assert_close(actual, expected, tolerance=2e-5):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(np.abs(b).max(initial=0)), 1e-3))


EVERY = [None, *native.ACTIVATIONS]
CASES = {(g, EVERY[number % len(EVERY)]) for number, g in enumerate(GEOMETRIES)}  # each geometry, each activation
CASES |= {(g, activation) for g in (GEOMETRIES[1], GEOMETRIES[6], GEOMETRIES[12]) for activation in EVERY}


@needs_library
@pytest.mark.parametrize(("geometry", "activation"), sorted(CASES, key=str), ids=str)
def test_it_equals_the_ops_one_after_the_other_and_so_do_its_gradients(geometry, activation):
    arrays, how = operands(geometry), how_of(geometry, activation)
    (y, moments), pull = jax.vjp(lambda *a: written_out(geometry, activation, *a), *arrays)
    (ours, our_moments), our_pull = jax.vjp(lambda *a: native.fused(*a, how), *arrays)
    size = y.shape[1]
    assert_close([ours[:, :size], our_moments], [y, moments])

    g, g_moments = draw(1, y.shape, moments.shape)
    expected = pull((g, g_moments))
    found = our_pull((jnp.pad(g, [(0, 0), (0, how.room - size)], constant_values=np.nan), g_moments))
    used = math.prod(geometry[1:4])  # beyond it is room: nobody reads or writes that
    count = 2 if activation is None else 5
    assert_close([found[0][:, :used], *found[1:count]], [expected[0][:, :used], *expected[1:count]])


@needs_library
def test_without_moments_it_is_the_same_and_they_are_0():
    for geometry in GEOMETRIES:
        arrays = operands(geometry)
        y, _ = native.fused(*arrays, how_of(geometry, "relu"))
        size = how_of(geometry, "relu").room - geometry[-1]
        again, nothing = native.fused(*arrays, how_of(geometry, "relu", measures=False))
        np.testing.assert_array_equal(again[:, :size], y[:, :size])
        np.testing.assert_array_equal(nothing, np.zeros_like(nothing))


@needs_library
@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[4], GEOMETRIES[11]], ids=str)
def test_moments_keep_their_digits_far_from_zero_and_constants_have_no_variance(geometry):
    x, w, *affine = operands(geometry)
    x = np.full_like(x, 3)
    _, (_, var) = native.fused(x, np.zeros_like(w), *affine, how_of(geometry, None))
    np.testing.assert_array_equal(var, np.zeros_like(var))

    geometry = (64, 8, 8, 3, 3, 1, 1, 0)
    (x,) = draw(0, (64, 8 * 8 * 3))
    how = how_of(geometry, None)
    eye, affine = np.eye(3, dtype=np.float32)[None, None], [np.zeros(3, np.float32)] * 3
    _, (mean, var) = native.fused(x + np.float32(1e4), eye, *affine, how)
    shifted = (x + np.float32(1e4)).astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(mean, shifted.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, shifted.var(0), rtol=1e-3)


@needs_library
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_what_is_not_a_number_is_not_hidden(activation):
    x = np.array([[np.nan, -np.inf, np.inf, -100, -3, 0, 3, 100]], np.float32)
    ones = np.ones(1, np.float32)
    how = native.Fused((1, 8), 1, native.ACTIVATIONS.index(activation), False, 8)
    y, _ = native.fused(x, np.ones((1, 1, 1, 1), np.float32), 0 * ones, ones, 0 * ones, how)
    expected = FUNCTIONS[activation](x)
    np.testing.assert_allclose(y[:, [0, *range(2, 8)]], expected[:, [0, *range(2, 8)]], rtol=1e-6, atol=1e-6)
    assert activation not in ("relu", "relu6") or y[0, 1] == 0


@needs_library
def test_a_channel_does_not_depend_on_those_beside_it():
    def results(channels, outputs):
        geometry = (5, 6, 6, channels, outputs, 1 if outputs else 5, 1, 0)
        x, w, *affine = operands((5, 6, 6, 70, outputs and 70, geometry[5], 1, 0))
        x = x.reshape(5, 36, 70)[..., :channels].reshape(5, -1)
        w = w[..., :channels, :outputs] if outputs else w[..., :channels]
        y, moments = native.fused(x, w, *(a[:channels] for a in affine), how_of(geometry, "hard_swish"))
        return y.reshape(5, 36, -1), moments

    for outputs in (1, 7, 16, 37, 64):
        for part, whole in zip(results(70, outputs), results(70, 70), strict=True):
            np.testing.assert_array_equal(part, whole[..., :outputs])
        for part, whole in zip(results(outputs, None), results(70, None), strict=True):
            np.testing.assert_array_equal(part, whole[..., :outputs])


@needs_library
@pytest.mark.parametrize("closing", ["none", "norm", "swish", "shortcut"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("links", [2, 3])
def test_a_bottleneck_equals_its_convolutions_in_turn(links, stride, activation, closing):
    x, *kernels_of = draw(0, (19, 6 * 5 * 12), (1, 1, 12, 37), (3, 3, 1, 37), (1, 1, 37, 11))
    affines = [tuple(draw(c, (c,), (c,), (c,))) for c in (12, 37, 38)]
    affines[2] = tuple(a[:37] for a in affines[2])
    first = how_of((19, 6, 5, 12, 37, 1, 1, 0), activation, measures=False)
    second = how_of((19, 6, 5, 37, None, 3, stride, 0), "hard_swish", measures=False)
    third = how_of((19, *second.out_size, 37, 11, 1, 1, 0), "relu6", measures=False)
    hows = (first, second, third)[:links]
    check_chain(x, affines[:links], kernels_of[:links], hows, closing)


@needs_library
@pytest.mark.parametrize("closing", ["norm", "swish", "shortcut"])
@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if not g[-1]], ids=str)
def test_a_convolution_takes_what_comes_after_it_along(geometry, closing):
    x, w, *affine = operands(geometry)
    check_chain(x, [tuple(affine)], [w], (how_of(geometry, "relu", measures=False),), closing)


def check_chain(x, affines, kernels_of, hows, closing):
    """`native.chain` with a norm after it, with an activation or a shortcut, against the convolutions in turn."""
    channels, size = kernels_of[-1].shape[-1], hows[-1].room
    norm = None if closing == "none" else tuple(draw(1, (channels,), (channels,), (channels,)))
    (shortcut,) = draw(2, (len(x), size)) if closing == "shortcut" else (None,)
    activation = None if norm is None else native.ACTIVATIONS.index("swish" if closing == "swish" else "none")

    def written_out(x, affines, kernels_of, norm, shortcut):
        y, _ = in_turn(x, affines, kernels_of, hows)
        if norm is not None:
            centre, scale, offset = norm
            y = ((y.reshape(len(y), -1, channels) - centre) * scale + offset).reshape(len(y), -1)
            y = jax.nn.swish(y) if closing == "swish" else y
        return y if shortcut is None else y + shortcut

    arguments = x, tuple(affines), tuple(kernels_of), norm, shortcut
    y, pull = jax.vjp(written_out, *arguments)
    links = native.Links(hows, activation)
    ours, our_pull = jax.vjp(lambda *a: native.chain(*a, links)[0], *arguments)
    if norm is None:
        np.testing.assert_array_equal(ours, y)
    np.testing.assert_allclose(ours, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max()))
    for a, b in zip(jax.tree.leaves(our_pull(y)), jax.tree.leaves(pull(y)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def in_turn(x, affines, kernels_of, hows):
    moments = None
    for affine, kernel, how in zip(affines, kernels_of, hows, strict=True):
        x, moments = native.fused(x, kernel, *affine, how)
    return x, moments


@needs_library
@pytest.mark.parametrize("images", [1, 19])
def test_a_bottleneck_of_two_measures_its_result(images):
    x, *kernels_of = draw(0, (images, 6 * 5 * 12), (1, 1, 12, 37), (3, 3, 1, 37))
    arguments = x, tuple(tuple(draw(c, (c,), (c,), (c,))) for c in (12, 37)), tuple(kernels_of)
    first = how_of((images, 6, 5, 12, 37, 1, 1, 0), None, measures=False)
    hows = first, how_of((images, 6, 5, 37, None, 3, 2, 0), "relu", measures=True)
    y, pull = jax.vjp(lambda *a: in_turn(*a, hows), *arguments)
    ours, our_pull = jax.vjp(lambda *a: native.chain(*a, None, None, native.Links(hows)), *arguments)
    np.testing.assert_array_equal(ours[0], y[0])
    assert_close([ours[1]], [y[1]])
    for a, b in zip(jax.tree.leaves(our_pull(y)), jax.tree.leaves(pull(y)), strict=True):
        np.testing.assert_array_equal(a, b)


@needs_library
@pytest.mark.parametrize("activation", [None, "hard_swish"])
@pytest.mark.parametrize("room", [0, 7])
@pytest.mark.parametrize("images", [1, 130])
@pytest.mark.parametrize("mean", [0, 100])
def test_moments_of_a_pointwise_convolution_need_no_convolution(mean, images, room, activation):
    geometry = (images, 6, 5, 12, 37, 1, 1, 0)
    x, w, *affine = operands(geometry)
    x = np.pad(np.asarray(x[:, : 6 * 5 * 12]) + np.float32(mean), [(0, 0), (0, room)], constant_values=np.nan)
    w = np.concatenate([w[..., :36], np.zeros((1, 1, 12, 1), np.float32)], -1)  # one channel is constant
    how = how_of(geometry, activation)
    wide = [np.asarray(a, np.float64) for a in (x[:, : 6 * 5 * 12].reshape(-1, 12), w[0, 0], *affine)]
    read = wide[0]
    if activation:
        normed = (read - wide[2]) * wide[3] + wide[4]
        read = normed * np.clip(normed + 3, 0, 6) / 6
    made = read @ wide[1]
    ours = native.pointwise_moments(x, w, *affine, how)
    np.testing.assert_allclose(ours[0], made.mean(0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(ours[1], made.var(0), rtol=2e-5, atol=1e-6)
    assert ours[1, 36] == 0
    pulls = [
        jax.vjp(lambda x, w, f=f: f(x, w, *affine, how), x, w)[1](ours)
        for f in (native.pointwise_moments, lambda *a: native.fused(*a)[1])
    ]
    np.testing.assert_array_equal(*(dx[:, : 6 * 5 * 12] for dx, _ in pulls))
    np.testing.assert_array_equal(*(dw for _, dw in pulls))


@needs_library
def test_operands_that_do_not_fit_are_an_error():
    def ones(*shape):
        return np.ones(shape, np.float32)

    x, w, how = ones(2, 80), ones(1, 1, 5, 33), native.Fused((4, 4), 1, 0, False, 16 * 33)
    full, short = (ones(5),) * 3, (ones(5), ones(5), ones(1))
    wide, two = (ones(33),) * 3, ((ones(1, 1, 5, 33), ones(3, 3, 1, 33)))
    for call in (
        lambda: native.fused(x, w, *short, how),
        lambda: native.pointwise_moments(x, w, *short, how),
        lambda: native.chain(x, (full,), (w,), (ones(33), ones(33), ones(1)), None, native.Links((how,), 0)),
        lambda: native.chain(x, (full, short), two, None, None, native.Links((how, how))),
        lambda: native.chain(x, (short, wide), two, None, None, native.Links((how, how))),
        lambda: native.chain(x, (full, wide), two, wide, ones(2, 3), native.Links((how, how), 0)),
        lambda: native.chain(x, (full, wide), two, wide, ones(2, 528), native.Links((how, how), 1)),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="fit together"):
            jax.block_until_ready(call())


@needs_library
def test_a_norm_of_one_value_for_all_channels():
    net = Recorder((8, 6, 16))
    BLOCKS["mbconv"](net, net.input, width=24, stride=1)
    params, (x,) = parameters(net.graph(), np.random.default_rng(0)), draw(1, (20, 8, 6, 16))
    one = params | {name: a[:1] for name, a in params.items() if name.endswith("/offset")}
    many = params | {name: np.full_like(a, a[0]) for name, a in params.items() if name.endswith("/offset")}
    for kind in ({"batch_stats": True}, {"batch_stats": True, "gradients": False}, {"batch_stats": False}):
        a, b = (run_graph(net.graph(), p, x, **kind)[0] for p in (one, many))
        np.testing.assert_array_equal(a, b)


@needs_library
def test_moments_of_a_first_pixel_unlike_the_others():
    x, w = draw(0, (64, 16 * 6), (1, 1, 6, 8))
    x = (5 + 1e-3 * np.asarray(x)).astype(np.float32)
    x[0, :6] = 1
    zeros = np.zeros(6, np.float32)
    ours = native.pointwise_moments(x, w, zeros, zeros, zeros, native.Fused((4, 4), 1, None, True, 16 * 8))
    made = x.reshape(-1, 6).astype(np.float64) @ np.asarray(w, np.float64)[0, 0]
    np.testing.assert_allclose(ours[1], made.var(0), rtol=1e-2)


THREADS = """
import hashlib, sys
sys.path.insert(0, "tests")
import jax, numpy as np
from nas import native
from test_fusion import GEOMETRIES, how_of, operands

digest = hashlib.sha256()
for geometry in GEOMETRIES:
    how = how_of(geometry, "swish")
    (y, moments), pull = jax.vjp(lambda *a: native.fused(*a, how), *operands(geometry))
    size, used = how.room - geometry[-1], geometry[1] * geometry[2] * geometry[3]
    dx, *rest = pull((np.cos(y), np.sin(moments)))
    for array in (y[:, :size], moments, dx[:, :used], *rest):
        digest.update(np.asarray(array).tobytes())
    if geometry[4] and geometry[5] == geometry[6] == 1:
        digest.update(np.asarray(native.pointwise_moments(*operands(geometry), how)).tobytes())
print(digest.hexdigest())
"""


@needs_library
def test_the_bits_do_not_depend_on_the_number_of_threads():
    assert len({run(THREADS, NPROC=str(threads)) for threads in (1, 2, 5)}) == 1


CLONE = """
import sys
sys.path.insert(0, "tests")
import jax, numpy as np
from nas import native
from test_fusion import GEOMETRIES, assert_close, how_of, operands, written_out

assert native.status() == "in use, {clone} instructions", native.status()
for geometry in GEOMETRIES[:1] + GEOMETRIES[5:7] + GEOMETRIES[12:13]:
    for activation in ("swish",):
        arrays, how = operands(geometry), how_of(geometry, activation)
        (y, moments), pull = jax.vjp(lambda *a: written_out(geometry, activation, *a), *arrays)
        (ours, our_moments), our_pull = jax.vjp(lambda *a: native.fused(*a, how), *arrays)
        assert_close([ours[:, : y.shape[1]], our_moments], [y, moments])
        if geometry[4] and geometry[5] == geometry[6] == 1:
            assert_close([native.pointwise_moments(*arrays, how)], [moments])
        pad = np.pad(np.cos(y), [(0, 0), (0, how.room - y.shape[1])])
        assert_close(our_pull((pad, np.sin(moments)))[1:2], pull((np.cos(y), np.sin(moments)))[1:2])
"""


@needs_library
@pytest.mark.parametrize("clone", ["baseline", "avx2"])
def test_narrower_clones_compute_the_same(clone):
    if clone in CLONE_MISSING:
        pytest.skip(f"this machine has no {clone}")
    run(CLONE.format(clone=clone), NAS_NATIVE=clone)


SHARDED = """
import sys
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from nas import native
from test_fusion import assert_close, draw, how_of, operands

mesh = Mesh(np.array(jax.devices()).reshape(4), ("data",))
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
for geometry in [(8, 6, 5, 12, 20, 1, 1, 4), (8, 6, 5, 12, None, 3, 2, 0), (8, 6, 5, 12, 20, 3, 1, 0)]:
    how = how_of(geometry, "relu")
    size = how.room - geometry[-1]

    def loss(*arrays):
        y, moments = native.fused(*arrays, how)
        return (y[:, :size] ** 2).sum() + (moments ** 3).sum()

    step, (x, *rest) = jax.value_and_grad(loss, (0, 1, 2, 3, 4)), operands(geometry)
    arrays = jax.device_put(x, split), *(jax.device_put(a, whole) for a in rest)
    program = jax.jit(step).lower(*arrays).compile()
    assert "all-gather" not in program.as_text()
    value, gradients = program(*arrays)
    expected_value, expected = step(x, *rest)
    used = 6 * 5 * 12
    assert_close([value, gradients[0][:, :used]], [expected_value, expected[0][:, :used]])
    assert_close(gradients[1:], expected[1:])

x, w, k, shortcut = draw(0, (8, 6 * 5 * 4), (1, 1, 4, 12), (3, 3, 1, 12), (8, 6 * 5 * 12))
cases = ((8, 6, 5, 4, 12, 1, 1, 0), None), ((8, 6, 5, 12, None, 3, 1, 0), "relu")
affines = tuple(tuple(draw(c, (c,), (c,), (c,))) for c in (4, 12))
for measures in (False, True):
    hows = tuple(how_of(*case, measures=measures) for case in cases)
    closing = () if measures else (affines[1], shortcut)

    @jax.jit
    def forward(x, *closing):
        links = native.Links(hows, 0 if closing else None)
        made = native.chain(x, affines, (w, k), *(closing or (None, None)), links)
        return *made, native.pointwise_moments(x, w, *affines[0], hows[0])

    arrays = jax.device_put((x, *closing[1:]), split)
    program = forward.lower(arrays[0], *closing[:1], *arrays[1:]).compile()
    assert "all-gather" not in program.as_text()
    ours, expected = program(arrays[0], *closing[:1], *arrays[1:]), forward(x, *closing)
    np.testing.assert_array_equal(ours[0], expected[0])
    assert_close(ours[1:] if measures else ours[2:], expected[1:] if measures else expected[2:])
print("done")
"""


@needs_library
def test_each_device_computes_its_own_images():
    assert run(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=4").endswith("done\n")


def graphs() -> list:
    """One graph of each block that a network has inside, once with stride and once without."""
    out = []
    for name, block in BLOCKS.items():
        net = Recorder((8, 6, 16))
        try:
            y = block(net, net.input, width=24, stride=2)
            block(net.under("second"), y, width=24, stride=1)
        except (TypeError, ValueError):
            continue
        out.append(pytest.param(net.graph(), id=name))
    return out


def chains() -> list:
    """Convolutions that more than one bottleneck could claim."""
    narrow = Recorder((8, 6, 16))
    x = BLOCKS["mbconv"](narrow.under("first"), narrow.input, width=24, stride=1, expand=3)
    BLOCKS["mbconv"](narrow.under("second"), x, width=32, stride=1, expand=1)
    separable = Recorder((8, 6, 16))
    y = separable.input
    for number in range(4):
        y = separable.conv(y, f"depthwise{number}", y.channels, kernel=3, groups=y.channels)
        y = separable.act(separable.norm(y, f"depthwise_norm{number}"), "relu")
        y = separable.norm(separable.conv(y, f"pointwise{number}", 24), f"norm{number}")
    return [pytest.param(narrow.graph(), id="narrow"), pytest.param(separable.graph(), id="separable")]


def parameters(graph, rng):
    return {
        w.name: rng.uniform(0.5, 1.5, w.shape).astype(np.float32)
        if w.role in ("scale", "var")
        else rng.normal(size=w.shape).astype(np.float32) * np.float32(1 / w.fan_in**0.5)
        for w in weights(graph)
    }


@needs_library
@pytest.mark.parametrize("graph", graphs() + chains())
@pytest.mark.parametrize(
    ("batch_stats", "gradients"), [(True, True), (True, False), (False, True)], ids=["batch", "calibrate", "known"]
)
def test_a_graph_computes_the_same_whether_convolutions_are_fused(graph, batch_stats, gradients, monkeypatch):
    rng = np.random.default_rng(0)
    params, (x,) = parameters(graph, rng), draw(1, (fusion.CHAIN_IMAGES + 3, *graph.input))

    def loss(params, x):
        y, moments = run_graph(graph, params, x, batch_stats=batch_stats, gradients=gradients)
        return (jnp.sin(y) * jnp.arange(y.shape[-1])).mean(), moments

    outcomes = []
    for fuses in (kernels.fuses, lambda *operands: False):
        monkeypatch.setattr(kernels, "fuses", fuses)
        outcomes.append(jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x))
    for a, b in zip(*map(jax.tree.leaves, outcomes), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * max(float(jnp.abs(b).max()), 1e-3))


@needs_library
def test_no_images_and_low_statistics_are_as_without():
    (graph,) = [case.values[0] for case in chains() if case.id == "narrow"]
    params, (x,) = parameters(graph, np.random.default_rng(0)), draw(1, (17, *graph.input))
    assert run_graph(graph, params, x[:0])[0].shape == (0, *graph.shape)
    low = {n: jnp.asarray(a, jnp.bfloat16) if n.endswith(("mean", "offset")) else a for n, a in params.items()}
    np.testing.assert_allclose(run_graph(graph, low, x)[0], run_graph(graph, params, x)[0], rtol=0, atol=0.1)


@pytest.mark.parametrize("fuses", [pytest.param(True, marks=needs_library), False], ids=["fused", "written-out"])
def test_gradients_from_a_tape_are_those_of_the_pass_that_made_it(fuses, monkeypatch):
    if not fuses:
        monkeypatch.setattr(kernels, "fuses", lambda *operands: False)
        monkeypatch.setattr(native, "available", lambda: False)
    net = Recorder((8, 6, 16))
    BLOCKS["mbconv"](net, net.input, width=16, stride=1, expand=3, kernel=5, se=True)
    wider = Recorder((8, 6, 16))
    BLOCKS["mbconv"](wider, wider.input, width=16, stride=1, expand=6, kernel=5)
    graph, others = net.graph(), [net.graph(), wider.graph()]
    params, (x, g) = parameters(graph, np.random.default_rng(0)), draw(1, (3, 8, 6, 16), (3, 8, 6, 16))

    def passes(tape):
        return lambda params, x: run_graph(graph, params, x, batch_stats=True, tape=tape)[0]

    expected, pull = jax.vjp(passes(None), params, x)
    tape = fusion.Tape.of(others)
    np.testing.assert_array_equal(passes(tape)(params, x), expected)
    slots = tape.slots(len(x), x.dtype)
    assert [values.shape for values, _ in slots] == [(3, 8 * 6 * 96), (3, 8 * 6 * 96), (3, 8 * 6 * 16)]
    _, from_tape = jax.vjp(passes(fusion.Tape.of(others, slots)), params, x)
    for a, b in zip(jax.tree.leaves(from_tape(g)), jax.tree.leaves(pull(g)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(float(jnp.abs(b).max()), 1e-3))


def test_a_tape_does_not_compute_convolutions_again():
    net = Recorder((8, 6, 16))
    BLOCKS["mbconv"](net, net.input, width=16, stride=1, expand=3)
    graph = net.graph()
    params, (x,) = parameters(graph, np.random.default_rng(0)), draw(1, (3, 8, 6, 16))
    first = fusion.Tape.of([graph])
    run_graph(graph, params, x, batch_stats=True, tape=first)

    def gradient(known, params, x):
        def loss(params, x):
            tape = None if known is None else fusion.Tape.of([graph], known)
            return run_graph(graph, params, x, batch_stats=True, tape=tape)[0].sum()

        return jax.grad(loss, (0, 1))(params, x)

    def flops(known):
        cost = jax.jit(gradient).lower(known, params, x).compile().as_text()
        return cost.count("nas_fused_forward") + cost.count(" dot(")

    assert flops(first.slots(3, x.dtype)) < flops(None)


@pytest.mark.parametrize("length", [2, 5])
def test_a_loop_over_layers_and_layers_written_out_are_one(length, monkeypatch, tmp_path):
    path = tmp_path / "space.toml"
    path.write_text(
        f"""
[stem]
block = "conv_stem"
width = 8
[[stage]]
block = "mbconv"
width = 8
depth = {list(range(1, length + 1))}
kernel = [3, 5]
expand = [2, 3]
[head]
block = "classifier"
width = 16
"""
    )
    space = load_space(str(path), input_shape=(8, 8, 3), classes=3)
    params, (x,) = Supernet(space).init(0), draw(0, (4, 8, 8, 3))
    genotype = space.sample(np.random.default_rng(0), 1)[0]

    def gradient(most):
        monkeypatch.setattr(written, "WRITTEN_OUT", most)
        net = Supernet(space)
        branches = net.branches(genotype)
        return jax.value_and_grad(lambda p: jnp.sin(net.apply(p, branches, x, mode="train")[0]).sum())(params)

    looped, out = gradient(1), gradient(length)
    for a, b in zip(jax.tree.leaves(looped), jax.tree.leaves(out), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(float(np.abs(b).max()), 1e-3))


@needs_library
def test_a_shortcut_may_be_dropped_where_moments_are_known():
    net = Recorder((8, 6, 16))
    BLOCKS["mbconv"](net, net.input, width=16, stride=1)
    params, (x,) = parameters(net.graph(), np.random.default_rng(0)), draw(1, (20, 8, 6, 16))
    noisy = Noisy(config.Noise(drop_path=0.5), jax.random.key(0), 0.5)
    y, _ = run_graph(net.graph(), params, x, noisy=noisy)
    kept = np.asarray(jnp.abs(y - x).max((1, 2, 3)) > 0)
    assert 0 < kept.sum() < 20
    whole, _ = run_graph(net.graph(), params, x)
    np.testing.assert_allclose((y - x)[kept], 2 * (whole - x)[kept], rtol=1e-4, atol=1e-4)
