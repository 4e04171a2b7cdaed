"""Noise inside the network: identity at rate 0, expectations kept, and what is dropped has the shape it should have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas.errors import ConfigError
from nas.noise import drop_block, drop_path, dropout

KINDS = {"drop_path": drop_path, "dropout": dropout, "drop_block": functools.partial(drop_block, size=3)}
SHAPES = [(16, 7, 7, 4), (16, 12, 5, 3), (16, 2, 2, 8), (16, 1, 1, 8)]
QUICKLY = {"xla_backend_optimization_level": 0}


def compiled(kind):
    return jax.jit(lambda *arguments: KINDS[kind](*arguments), compiler_options=QUICKLY)  # a cache of its own


@pytest.mark.parametrize("kind", KINDS)
def test_rate_zero_is_the_identity(kind):
    x = jax.random.normal(jax.random.key(0), (16, 7, 6, 4))
    assert KINDS[kind](jax.random.key(1), x, 0.0) is x
    np.testing.assert_array_equal(compiled(kind)(jax.random.key(1), x, jnp.float32(0)), x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_noise_depends_on_the_key_alone_and_is_compiled_once_for_all_rates(kind, shape):
    x = jnp.ones(shape)
    function = compiled(kind)
    first, again, other = (np.asarray(function(jax.random.key(k), x, 0.4)) for k in (1, 1, 2))
    function(jax.random.key(3), x, 0.1)
    assert function._cache_size() == 1
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert np.any(first != first[:1])  # each image its own
    assert len(np.unique(first)) <= 2  # nothing, or the scaled value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_type_is_kept_with_python_and_with_traced_rates(kind, dtype):
    x = jax.ShapeDtypeStruct((4, 6, 6, 2), dtype)
    key = jax.random.key(0)
    for rate in (0.0, 0.3):
        assert jax.eval_shape(lambda x, rate=rate: KINDS[kind](key, x, rate), x).dtype == dtype
    assert jax.eval_shape(lambda x, rate: KINDS[kind](key, x, rate), x, jnp.float32(0.3)).dtype == dtype


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["drop_path", "dropout"])
def test_expectations_are_kept(kind, rate):
    x = jnp.asarray([[[[1.0, -2.0]]], [[[3.0, 0.5]]]])
    keys = jax.random.split(jax.random.key(0), 20_000)
    out = np.asarray(jax.jit(jax.vmap(lambda key: KINDS[kind](key, x, rate)))(keys))
    deviation = np.abs(np.asarray(x)) * (rate / (1 - rate) / len(keys)) ** 0.5
    assert np.all(np.abs(out.mean(0) - x) < 4 * deviation)
    assert (out == 0).mean() == pytest.approx(rate, abs=0.02)


def test_drop_path_drops_whole_images():
    out = np.asarray(drop_path(jax.random.key(0), jnp.ones((4000, 3, 3, 2)), 0.25)).reshape(4000, -1)
    assert np.all((out == 0).all(1) | np.isclose(out, 1 / 0.75).all(1))
    assert (out[:, 0] == 0).mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("shape", "size"), [((64, 12, 9, 4), 3), ((64, 12, 9, 4), 1), ((64, 4, 3, 4), 7)])
def test_drop_block_drops_squares_and_rescales_by_what_it_keeps(shape, size):
    rate = 0.1
    out = np.asarray(drop_block(jax.random.key(0), jnp.ones(shape), rate, size))
    dropped = out == 0
    assert np.any(dropped != dropped[..., :1])  # channels on their own
    assert out.mean() == pytest.approx(1, rel=1e-5)
    tall, wide = min(size, shape[1]), min(size, shape[2])
    rows, columns = shape[1] - tall + 1, shape[2] - wide + 1
    covered = np.zeros_like(dropped)
    for top in range(rows):
        for left in range(columns):
            box = (slice(None), slice(top, top + tall), slice(left, left + wide))
            covered[box] |= dropped[box].all((1, 2), keepdims=True)
    np.testing.assert_array_equal(covered, dropped)  # nothing is dropped but whole squares
    overlap = 0 if size == 1 else 0.02  # squares that meet drop less
    assert rate - 0.01 - overlap < dropped.mean() < rate + 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_where_values_do_even_if_all_is_dropped(kind):
    for rate in (0.3, 0.999):
        x = jnp.ones((2, 2, 2, 1))
        out, pull = jax.vjp(lambda x, rate=rate: KINDS[kind](jax.random.key(0), x, rate), x)
        np.testing.assert_allclose(pull(jnp.ones_like(x))[0], out, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [-0.1, 1.0, 2])
def test_a_rate_that_is_no_probability_is_told(kind, rate):
    with pytest.raises(ConfigError, match="below 1"):
        KINDS[kind](jax.random.key(0), jnp.ones((1, 2, 2, 1)), rate)


def test_a_square_without_pixels_is_told():
    with pytest.raises(ConfigError, match="at least 1 pixel"):
        drop_block(jax.random.key(0), jnp.ones((1, 2, 2, 1)), 0.1, 0)
