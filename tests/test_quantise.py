"""Scales, the rules of who has one, exact integer arithmetic, and gradients through it. Equality with the runtime is
tested in `tests/export`."""

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from export.networks import GRAPHS, images_of, params_of, recorded
from msgspec.structs import replace

from nas.errors import ExportError
from nas.fold import fold
from nas.ops import WEIGHT_BITS, Conv, Dense, in_precision
from nas.quantise import (
    Quantisation,
    Scale,
    calibrate,
    check,
    integer_weights,
    narrow_weights,
    narrowed,
    placeholder,
    simulate,
    sources,
)
from nas.quantise import _accumulate as accumulate  # exact by a hair's breadth: worth a test of its own
from nas.run import run


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0.5, 3), (-3, -0.5), (0, 0), (-1e-30, 1e-30), (-1e6, 1e-6)])
def test_a_scale_covers_its_range_and_hits_zero(low, high):
    scale = Scale.of(low, high)
    assert scale.scale == np.float32(scale.scale) > 0
    assert 0 <= scale.zero_point <= 255
    numbers = (np.arange(256) - scale.zero_point) * scale.scale
    assert 0 in numbers
    if high - low > 1e-20:
        assert numbers[0] <= min(low, 0) + scale.scale
        assert numbers[-1] >= max(high, 0) - scale.scale


def test_the_scale_of_a_relu6_never_exceeds_it():
    assert all(np.float32(Scale.of(0, h, at_most=6).scale) * np.float32(255) <= 6 for h in (6, 5.9999995, 5))


def test_moved_values_keep_their_scale_and_fused_ones_have_none():
    graph, _ = fold(GRAPHS["everything"], params_of(GRAPHS["everything"]))
    kinds = [type(op).__name__ for op in graph.ops]
    source = sources(graph)
    assert source[0] == 0
    assert source[-1] is None
    for number, kind in enumerate(kinds[:-1], 1):
        moved = kind in ("Split", "Shuffle") or getattr(graph.ops[number - 1], "reduce", "") == "max"
        assert source[number] == (source[graph.ops[number - 1].inputs[0]] if moved else number)
    residual, _ = fold(GRAPHS["residual"], params_of(GRAPHS["residual"]))
    assert [s is None for s in sources(residual)] == [False, True, False, False, True, False, False, True]


@pytest.mark.parametrize("name", ["everything", "two dense", "rectifiers"])
def test_quantisations_fit_their_graph_and_survive_json(name):
    graph, params = fold(GRAPHS[name], params_of(GRAPHS[name]))
    for quantisation in (calibrate(graph, params, images_of(graph)), placeholder(graph)):
        check(graph, quantisation)
        assert msgspec.json.decode(msgspec.json.encode(quantisation), type=Quantisation) == quantisation
        hash(quantisation)


def test_a_quantisation_of_another_graph_is_refused():
    quantisation = placeholder(fold(GRAPHS["residual"], params_of(GRAPHS["residual"]))[0])
    graph, params = fold(GRAPHS["two dense"], params_of(GRAPHS["two dense"]))
    with pytest.raises(ExportError, match="Calibrate the folded form"):
        simulate(graph, params, quantisation, images_of(graph))
    good = placeholder(graph)
    act = next(i for i, op in enumerate(graph.ops, 1) if getattr(op, "function", "") == "relu6")
    wide = Quantisation((*good.values[:act], Scale(0.1, 0), *good.values[act + 1 :]))
    with pytest.raises(ExportError, match="relu6"):
        check(graph, wide)
    with pytest.raises(ExportError, match="no images"):
        calibrate(graph, params, images_of(graph, 0))
    with pytest.raises(ExportError, match="not finite"):
        calibrate(graph, params, np.full((2, *graph.input), np.nan, np.float32))


def test_a_last_smaller_batch_counts():
    graph, params = fold(GRAPHS["classifier"], params_of(GRAPHS["classifier"]))
    images = images_of(graph, 10)
    images[-1] *= 9
    assert calibrate(graph, params, images, batch_size=4) == calibrate(graph, params, images, batch_size=64)


def test_a_large_bias_on_a_dead_channel_fits_into_32_bits():
    params = {"c/kernel": np.array([[[[1e-12, 0.5, 0]]]], np.float32), "c/bias": np.array([3, -1, 0], np.float32)}
    kernel, bias, unit = integer_weights(Conv((0,), (1, 1, 3), "c", bias=True), params, 0.02)
    assert np.abs(bias).max() <= 2**30
    np.testing.assert_allclose(bias * unit * 0.02, params["c/bias"], rtol=1e-2)
    np.testing.assert_array_equal(kernel.reshape(-1), [0, 127, 0])


@pytest.mark.parametrize(
    "op",
    [
        Conv((0,), (4, 4, 3), "w", kernel=3),
        Conv((0,), (4, 4, 6), "w", kernel=3, groups=2),
        Conv((0,), (4, 4, 128), "w", kernel=7, groups=128),
        Dense((0,), (3,), "w"),
    ],
    ids=["conv", "grouped", "depthwise", "dense"],
)
def test_the_longest_sums_of_the_largest_numbers_are_exact(op):
    q = np.full((1, 4, 4, 128), 255.0, np.float32)
    q[..., ::7] = -254
    groups, kernel = getattr(op, "groups", 1), getattr(op, "kernel", 0)
    shape = (kernel, kernel, 128 // groups, op.shape[-1]) if kernel else (16 * 128, op.shape[-1])
    w = np.full(shape, 127, np.float32)
    w[..., ::5, :] = 126
    if isinstance(op, Dense):
        exact = q.reshape(1, -1).astype(np.int64) @ w.astype(np.int64)
    else:
        half = kernel // 2
        padded = (
            np.pad(q, ((0, 0), (half, half), (half, half), (0, 0)))
            .astype(np.int64)
            .reshape(1, 4 + 2 * half, -1, groups, shape[2])
        )
        per_group = w.astype(np.int64).reshape(kernel, kernel, shape[2], groups, -1)
        taps = ((i, j) for i in range(kernel) for j in range(kernel))
        exact = sum(np.einsum("nhwgc,cgo->nhwgo", padded[:, i : i + 4, j : j + 4], per_group[i, j]) for i, j in taps)
        exact = exact.reshape(1, *op.shape)
    np.testing.assert_array_equal(jax.jit(lambda q, w: accumulate(op, q, w))(q, w), exact.astype(np.float32))


@pytest.mark.parametrize("name", ["classifier", "residual"])
def test_gradients_pass_straight_through_the_rounding(name):
    graph, params = fold(GRAPHS[name], params_of(GRAPHS[name]))
    images = images_of(graph)
    quantisation = calibrate(graph, params, images)
    probe = np.random.default_rng(3).normal(size=(len(images), *graph.shape))

    def gradient(forward):
        return jax.jit(jax.grad(lambda p: (forward(p) * probe).sum()))(params)

    exact = gradient(lambda p: run(graph, p, images)[0])
    straight = gradient(lambda p: simulate(graph, p, quantisation, images))
    for key in exact:
        a, b = np.ravel(exact[key]), np.ravel(straight[key])
        assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.95, key


@pytest.mark.parametrize("name", ["residual", "two dense"])
def test_weights_in_numpy_are_weights_in_jax(name):
    graph, params = fold(GRAPHS[name], params_of(GRAPHS[name]))
    for op in graph.ops:
        if isinstance(op, Conv | Dense):
            arrays = {k: jnp.asarray(v) for k, v in params.items()}
            pairs = zip(integer_weights(op, params, 0.013), integer_weights(op, arrays, 0.013), strict=True)
            assert all((a == b).all() for a, b in pairs)
            for precision in WEIGHT_BITS:
                narrow = replace(op, precision=precision)
                pairs = zip(narrow_weights(narrow, params), narrow_weights(narrow, arrays), strict=True)
                assert all((a == b).all() for a, b in pairs)


def test_jit_changes_nothing():
    graph, params = fold(GRAPHS["classifier"], params_of(GRAPHS["classifier"]))
    images, quantisation = images_of(graph), placeholder(graph)
    compiled = jax.jit(simulate, static_argnums=(0, 2))(graph, params, quantisation, images)
    np.testing.assert_array_equal(simulate(graph, params, quantisation, images), compiled)


def test_weights_are_read_by_name():
    graph = recorded((2, 2, 1), lambda net, x: net.dense(x, "d", 2))
    params = {"d/kernel": np.ones((4, 2), np.float32), "d/bias": np.zeros(2, np.float32)}
    quantisation = Quantisation((Scale(0.5, 0), None))
    images = np.full((1, 2, 2, 1), 1.5, np.float32)
    np.testing.assert_allclose(simulate(graph, params, quantisation, images), [[6, 6]], rtol=1e-6)


@pytest.mark.parametrize("precision", WEIGHT_BITS)
def test_narrow_weights_are_the_same_before_and_after_norms_are_folded(precision):
    graph, params = in_precision(GRAPHS["residual"], precision), params_of(GRAPHS["residual"])
    params |= {n: -a for n, a in params.items() if n.endswith("/scale")}  # a norm may turn signs
    before, (folded, arrays) = fold(graph, narrowed(graph, params))[1], fold(graph, params)
    after = narrowed(folded, arrays)
    assert before.keys() == after.keys()
    for name in after:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-6)
    assert any(np.abs(after[n] - arrays[n]).max() > 1e-3 for n in after)


@pytest.mark.parametrize("precision", WEIGHT_BITS)
def test_gradients_pass_narrow_weights_as_if_they_were_not_rounded(precision):
    graph, params = in_precision(GRAPHS["residual"], precision), params_of(GRAPHS["residual"])
    images = images_of(graph)

    def loss(params):
        return (run(graph, params, images)[0] ** 2).sum()

    rounded = {name: jnp.asarray(a) for name, a in narrowed(graph, params).items()}
    arrays = {name: jnp.asarray(a) for name, a in params.items()}
    through, there = jax.grad(lambda p: loss(narrowed(graph, p)))(arrays), jax.grad(loss)(rounded)
    for name, gradient in there.items():
        np.testing.assert_allclose(through[name], gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max())
