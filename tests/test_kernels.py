"""Each kernel computes what `lax` computes, values and gradients, wherever JAX lets a function be used."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from nas import kernels, native

TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}  # of the largest value; bfloat16 keeps 8 bits
QUICKLY = {"xla_backend_optimization_level": 0}  # nearly all the time of these tests is spent compiling


@pytest.fixture(params=["xla", "native"])
def form(request, monkeypatch):
    """The test that asks for it runs for both forms of a depthwise convolution on CPU."""
    if request.param == "native" and not native.available():
        pytest.skip(native.status())
    monkeypatch.setattr(native, "available", lambda: request.param == "native")
    return request.param


def reference(x, w, stride, groups):
    """The convolution as XLA does it."""
    spec = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=spec, feature_group_count=groups)


def draw(seed, *shapes, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def assert_close(actual, expected, tolerance):
    """Within `tolerance` of the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-3))


def assert_all_close(actual, expected, tolerance=2e-6):
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, tolerance)


def with_gradients(function):
    def run(x, w, g):
        out, pull = jax.vjp(function, x, w)
        return out, *pull(g)

    return jax.jit(run, compiler_options=QUICKLY)


def assert_same_convolution(function, x, w, stride, groups):
    """`function(x, w)` and both its gradients equal those of the reference in float64."""
    shape = jax.eval_shape(lambda x, w: reference(x, w, stride, groups), x, w).shape
    (g,) = draw(7, shape, dtype=x.dtype)
    ours = with_gradients(function)(x, w, g)
    assert [a.dtype for a in ours] == [x.dtype] * 3
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in (x, w, g)]
        theirs = with_gradients(lambda x, w: reference(x, w, stride, groups))(*wide)
    assert_all_close(ours, theirs, TOLERANCE[str(x.dtype)])


@pytest.mark.parametrize(
    ("kernel", "stride", "dtype"),
    [*itertools.product((1, 3, 5, 7), (1, 2), ["float32"]), (3, 1, "bfloat16"), (5, 2, "bfloat16")],
)
def test_depthwise_equals_lax(kernel, stride, dtype, form):
    x, w = draw(kernel, (3, 9, 6, 5), (kernel, kernel, 1, 5), dtype=dtype)
    assert_same_convolution(lambda x, w: kernels.depthwise(x, w, stride), x, w, stride, 5)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.integers(1, 3),
    channels=st.integers(1, 4),
    batch=st.integers(1, 3),
)
def test_depthwise_takes_any_size_kernel_and_stride(form, height, width, kernel, stride, channels, batch):
    x, w = draw(0, (batch, height, width, channels), (*kernel, 1, channels))
    assert_same_convolution(lambda x, w: kernels.depthwise(x, w, stride), x, w, stride, channels)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dtype"),
    [
        ((8, 8), 5, 1, "float32"),  # two whole tiles of outputs
        ((17, 9), 5, 1, "float32"),  # the last tile sticks out
        ((7, 37), 7, 1, "float32"),  # tiles beside each other
        ((19, 18), 5, 2, "float32"),
        ((23, 11), 5, 3, "bfloat16"),
        ((33, 1), 5, 1, "float32"),  # one column; most taps see only zeros
    ],
)
def test_depthwise_of_tiles_equals_lax(size, kernel, stride, dtype, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    x, w = draw(1, (2, *size, 3), (kernel, kernel, 1, 3), dtype=dtype)
    assert_same_convolution(lambda x, w: kernels.depthwise(x, w, stride), x, w, stride, 3)


@pytest.mark.parametrize("size", [4, 9])
def test_depthwise_has_second_derivatives(size, form):
    x, w, dx = draw(13, (2, size, size, 2), (5, 5, 1, 2), (2, size, size, 2))

    def second(convolve):
        loss = lambda x, w: (jnp.sin(convolve(x, w)) * x).sum()  # noqa: E731
        return jax.grad(lambda x, w: (jax.grad(loss)(x, w) * dx).sum(), (0, 1))

    ours = jax.jit(second(lambda x, w: kernels.depthwise(x, w, 1)), compiler_options=QUICKLY)(x, w)
    theirs = jax.jit(second(lambda x, w: reference(x, w, 1, 2)), compiler_options=QUICKLY)(x, w)
    assert_all_close(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("kernel", "stride", "cin", "cout", "groups", "dtype"),
    [
        (1, 1, 6, 10, 1, "float32"),
        (1, 2, 6, 10, 1, "bfloat16"),
        (1, 3, 4, 6, 2, "float32"),
        (3, 1, 1, 16, 1, "float32"),
        (3, 1, 2, 4, 1, "bfloat16"),
        (3, 2, 3, 16, 1, "float32"),
        (3, 2, 8, 12, 4, "float32"),
        (5, 1, 3, 8, 1, "float32"),
        (7, 2, 4, 8, 2, "float32"),
        (3, 1, 6, 6, 6, "float32"),
        (3, 1, 4, 8, 4, "float32"),
        (1, 1, 1, 1, 1, "float32"),
    ],
)
def test_conv_equals_lax(kernel, stride, cin, cout, groups, dtype, form):
    x, w = draw(kernel, (2, 9, 6, cin), (kernel, kernel, cin // groups, cout), dtype=dtype)
    assert_same_convolution(lambda x, w: kernels.conv(x, w, stride=stride, groups=groups), x, w, stride, groups)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_accelerators_get_lax(groups, monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    x, w = draw(2, (2, 8, 8, 4), (3, 3, 4 // groups, 4))
    program = str(jax.make_jaxpr(lambda x, w: kernels.conv(x, w, stride=2, groups=groups))(x, w))
    assert "conv_general_dilated" in program
    assert_same_convolution(lambda x, w: kernels.conv(x, w, stride=2, groups=groups), x, w, 2, groups)


def test_the_cpu_forms_hold_no_grouped_convolution(form):
    for groups, kernel in ((4, 3), (2, 1)):
        x, w = draw(3, (2, 8, 8, 4), (kernel, kernel, 4 // groups, 4))
        loss = jax.grad(lambda x, w, g=groups: kernels.conv(x, w, groups=g).sum(), argnums=(0, 1))
        assert "conv_general_dilated" not in str(jax.make_jaxpr(loss)(x, w))


def test_conv_refuses_channels_that_do_not_fit():
    x, w = draw(4, (1, 4, 4, 6), (3, 3, 4, 8))
    with pytest.raises(ValueError, match="6 input channels"):
        kernels.conv(x, w)
    with pytest.raises(ValueError, match="multiple of groups"):
        kernels.conv(x, jnp.zeros((3, 3, 3, 7)), groups=2)


@pytest.mark.parametrize("kernel", range(1, 9))
def test_same_padding_is_that_of_xla(kernel):
    for size in range(1, 12):
        for stride in range(1, 5):
            expected = lax.padtype_to_pads((size,), (kernel,), (stride,), "SAME")[0]
            assert kernels.same_padding(size, kernel, stride) == expected


@pytest.fixture
def loss(form):
    return lambda x, w: (kernels.depthwise(x, w, 2) ** 2).sum()  # a new one: JAX keeps what it traced of the other form


def gradients(function):
    return jax.jit(jax.grad(function, (0, 1)), compiler_options=QUICKLY)


def test_depthwise_needs_no_jit(loss):
    x, w = draw(5, (1, 4, 3, 2), (2, 2, 1, 2))
    assert_all_close(jax.grad(loss, (0, 1))(x, w), gradients(loss)(x, w))


def test_depthwise_under_checkpoint(loss):
    x, w = draw(5, (2, 7, 8, 3), (3, 3, 1, 3))
    assert_all_close(gradients(jax.checkpoint(loss))(x, w), gradients(loss)(x, w))


def test_depthwise_under_vmap(loss):
    x, w = draw(5, (3, 2, 7, 8, 3), (3, 3, 3, 1, 3))
    dx, dw = jax.jit(jax.vmap(jax.grad(loss, (0, 1))), compiler_options=QUICKLY)(x, w)
    for i in range(3):
        assert_all_close((dx[i], dw[i]), gradients(loss)(x[i], w[i]))


def test_depthwise_under_switch(form):
    x, w = draw(5, (2, 7, 8, 3), (5, 5, 1, 3))
    branches = [lambda x, w, k=k: (kernels.depthwise(x, w[:k, :k]) ** 2).sum() for k in (1, 3, 5)]
    switched = jax.jit(jax.grad(lambda x, w, i: lax.switch(i, branches, x, w), (0, 1)), compiler_options=QUICKLY)
    for i, branch in enumerate(branches):
        assert_all_close(switched(x, w, i), gradients(branch)(x, w))


def test_depthwise_under_scan(form):
    x, w = draw(5, (2, 7, 8, 3), (3, 3, 3, 1, 3))

    def scanned(x, w):
        return (lax.scan(lambda x, w: (kernels.depthwise(x, w), None), x, w)[0] ** 2).sum()

    def unrolled(x, w):
        for kernel in w:
            x = reference(x, kernel, 1, 3)
        return (x**2).sum()

    assert_all_close(gradients(scanned)(x, w), gradients(unrolled)(x, w))


def test_depthwise_keeps_bfloat16_sums_in_float32():
    ones = jnp.ones((8, 16, 16, 2), jnp.bfloat16)
    dw = jax.grad(lambda w: kernels.depthwise(ones, w).astype(jnp.float32).sum())(jnp.ones((1, 1, 1, 2), jnp.bfloat16))
    np.testing.assert_array_equal(dw.astype(jnp.float32), 2048)  # a bfloat16 sum of ones stops at 256


def test_depthwise_lets_nan_and_infinity_stay_in_their_channel(form):
    for size in (3, 12):  # a matrix for each channel, and a sum over taps, where they stay near too
        x, w = draw(6, (2, size, size, 3), (3, 3, 1, 3))
        out = kernels.depthwise(x.at[0, 2, 2].set(jnp.array([jnp.nan, jnp.inf, 0])), w)
        assert np.isnan(out[0, 1:4, 1:4, 0]).all()
        assert not np.isfinite(out[0, 1:4, 1:4, 1]).any()
        assert np.isfinite(out[..., 2]).all()
        assert np.isfinite(out[1]).all()  # nor do they reach another image
    assert np.isfinite(out[0, 5:]).all()


@pytest.mark.parametrize("shape", [(3,), (5, 3), (4, 5, 6, 3)])
def test_batch_moments_equal_mean_and_variance(shape):
    (x,) = draw(8, shape)

    def ours(x):
        mean, var = kernels.batch_moments(x)
        return (jnp.sin(mean) + jnp.cos(var)).sum()

    def numpy_like(x):
        x = x.reshape(-1, 3)
        return (jnp.sin(x.mean(0)) + jnp.cos(x.var(0))).sum()

    mean, var = kernels.batch_moments(x)
    np.testing.assert_allclose(mean, np.asarray(x, np.float64).reshape(-1, 3).mean(0), atol=3e-6)
    np.testing.assert_allclose(var, np.asarray(x, np.float64).reshape(-1, 3).var(0), atol=3e-6)
    assert_close(jax.jit(jax.grad(ours))(x), jax.grad(numpy_like)(x), 1e-5)


def test_batch_moments_keep_their_digits_far_from_zero():
    (x,) = draw(9, (16, 8, 8, 4))
    _, var = kernels.batch_moments(x + 1e4)
    expected = np.asarray(x + 1e4, np.float64).var((0, 1, 2))
    np.testing.assert_allclose(var, expected, rtol=1e-4)  # unshifted moments give 0 to 16 here


def test_batch_moments_of_constant_channels_have_no_variance_and_a_finite_gradient():
    x = jnp.full((4, 3, 3, 2), 0.1)
    mean, var = kernels.batch_moments(x)
    np.testing.assert_allclose(mean, 0.1, rtol=1e-6)
    np.testing.assert_array_equal(var, 0)
    gradient = jax.grad(lambda x: lax.rsqrt(kernels.batch_moments(x)[1] + 1e-5).sum())(x)
    assert np.isfinite(gradient).all()


def test_batch_moments_of_bfloat16_are_float32():
    (x,) = draw(10, (64, 8, 8, 2), dtype="bfloat16")
    mean, var = kernels.batch_moments(x)
    assert mean.dtype == var.dtype == jnp.float32
    assert_close(mean, np.asarray(x, np.float64).mean((0, 1, 2)), 1e-5)
    assert_close(var, np.asarray(x, np.float64).var((0, 1, 2)), 1e-5)
    assert jax.grad(lambda x: kernels.batch_moments(x)[1].sum())(x).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(5, 3), (4, 5, 6, 3)])
@pytest.mark.parametrize("form", ["c++", "xla", "lax"])
def test_normalise_and_its_gradients_are_those_of_the_formula(shape, form, monkeypatch):
    if form == "lax":
        monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    elif form == "xla":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip(native.status())
    x, g = draw(11, shape, shape)
    mean, scale, offset = draw(12, (3,), (3,), (3,))

    def formula(x, mean, scale, offset):
        return (x - mean) * scale + offset

    def batch_norm(x, scale, offset):
        mean, var = kernels.batch_moments(x)
        return kernels.normalise(x, mean, scale * lax.rsqrt(var + 1e-5), offset)

    def batch_norm_formula(x, scale, offset):
        rows = x.reshape(-1, 3)
        return formula(x, rows.mean(0), scale * lax.rsqrt(rows.var(0) + 1e-5), offset)

    for ours, theirs, operands in (
        (kernels.normalise, formula, (x, mean, scale, offset)),
        (batch_norm, batch_norm_formula, (x, scale, offset)),
    ):
        (y, pull), (expected, pull_formula) = jax.vjp(ours, *operands), jax.vjp(theirs, *operands)
        for a, b in zip([y, *pull(g)], [expected, *pull_formula(g)], strict=True):
            assert_close(a, b, 1e-5)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_shuffle_deals_channels_and_its_gradient_collects_them(groups):
    x = jnp.arange(24.0).reshape(2, 2, 6)
    order = np.arange(6).reshape(groups, -1).T.ravel()
    np.testing.assert_array_equal(kernels.shuffle(x, groups), x[..., order])
    _, pull = jax.vjp(lambda x: kernels.shuffle(x, groups), x)
    np.testing.assert_array_equal(pull(kernels.shuffle(x, groups))[0], x)
    np.testing.assert_array_equal(kernels.shuffle(kernels.shuffle(x, groups), 6 // groups), x)
