"""The moving average against TensorFlow's rule, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas.train import ema

UPDATE = jax.jit(ema.update, static_argnums=2)  # the decay is a setting, the step is traced


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
def test_the_average_is_tensorflows(decay):
    weights = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    average, wanted = {"w": jnp.asarray(weights[0])}, weights[0].astype(np.float64)
    for step, w in enumerate(weights):
        average = UPDATE(average, {"w": jnp.asarray(w)}, decay, np.uint32(step))
        d = min(decay, (1 + step) / (10 + step))
        wanted = wanted - (1 - d) * (wanted - w)
        np.testing.assert_allclose(average["w"], wanted, rtol=1e-5, atol=1e-6)


def test_compiled_or_not_with_traced_or_plain_numbers_the_average_is_the_same():
    average, params = {"w": jnp.arange(3.0)}, {"w": jnp.array([2.0, -1.0, 5.0])}
    plain = ema.update(average, params, 0.9, 100)
    traced = jax.jit(ema.update)(average, params, jnp.float32(0.9), jnp.int32(100))
    np.testing.assert_allclose(plain["w"], traced["w"], rtol=1e-6)
    assert plain["w"].dtype == traced["w"].dtype == jnp.float32


def test_weights_that_stand_still_are_their_own_average():
    params = {"w": np.random.default_rng(0).standard_normal(50).astype(np.float32)}
    average = params
    for step in range(20):
        average = UPDATE(average, params, 0.999, step)
    np.testing.assert_array_equal(average["w"], params["w"])


def test_the_random_first_weights_are_soon_forgotten():
    average = {"w": jnp.float32(1.0)}
    for step in range(100):
        average = UPDATE(average, {"w": jnp.float32(0.0)}, 0.9999, step)
    assert 0 < average["w"] < 1e-8  # without warm-up: 0.9999^100 = 0.99
