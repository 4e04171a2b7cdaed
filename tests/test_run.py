"""The JAX back-end, where blocks and networks do not test it: attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas.ops import ATTENTION_EPSILON
from nas.run import linear_attention


def quadratic_attention(qkv, dim):
    """Every pixel to every pixel, in float64."""
    n, height, width, channels = qkv.shape
    parts = np.asarray(qkv, np.float64).reshape(n, height * width, channels // (3 * dim), 3, dim)
    q, k, v = np.maximum(parts[..., 0, :], 0), np.maximum(parts[..., 1, :], 0), parts[..., 2, :]
    weights = np.einsum("nihd,njhd->nhij", q, k)
    weights = weights / (weights.sum(-1, keepdims=True) + ATTENTION_EPSILON)
    return np.einsum("nhij,njhd->nihd", weights, v).reshape(n, height, width, -1)


@pytest.mark.parametrize(("size", "heads", "dim"), [((4, 5), 2, 8), ((1, 1), 1, 4), ((3, 2), 3, 1)])
def test_linear_attention_is_attention(size, heads, dim):
    qkv = np.random.default_rng(0).normal(size=(2, *size, heads * 3 * dim)).astype(np.float32)
    np.testing.assert_allclose(linear_attention(qkv, dim), quadratic_attention(qkv, dim), rtol=1e-4, atol=1e-5)


def test_where_no_query_or_key_is_positive_the_result_is_0_and_its_gradients_are_finite():
    gradient_of = jax.jit(jax.grad(lambda x: (linear_attention(x, 8) ** 2).sum()))
    qkv = np.random.default_rng(1).normal(size=(1, 3, 3, 24)).astype(np.float32)
    for start in (0, 8):  # of queries, of keys
        dead = qkv.copy()
        dead[..., start : start + 8] = -1
        assert not np.any(linear_attention(dead, 8))
        assert np.isfinite(gradient_of(dead)).all()


@pytest.mark.parametrize("kind", [jnp.float16, jnp.bfloat16])
def test_sums_over_all_pixels_do_not_leave_the_range_of_a_short_type(kind):
    qkv = jnp.full((1, 32, 32, 48), 16, kind)  # the sum of 32 * 32 * 16 products of 256 is beyond float16
    y = linear_attention(qkv, 16)
    assert y.dtype == kind
    np.testing.assert_array_equal(y, np.full((1, 32, 32, 16), 16, np.float32))
