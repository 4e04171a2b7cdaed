"""What is cast and what is not; loss scaling against the same rules in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import kernels
from nas.blocks import record
from nas.errors import ConfigError
from nas.ops import weights
from nas.run import run
from nas.train import precision
from nas.train.precision import PRECISIONS, compute_params

BLOCKS = {
    "conv_stem": {"width": 8, "stride": 2},
    "mbconv": {"width": 8, "expand": 2, "se": True},
    "shufflenet_v2": {"width": 8, "stride": 2},
}


def state_of(scale: float, good_steps: int = 0) -> precision.ScaleState:
    return {"scale": jnp.float32(scale), "good_steps": jnp.int32(good_steps)}


def arrays(graph) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {f"x/{w.name}": jnp.asarray(rng.standard_normal(w.shape), jnp.float32) for w in weights(graph) if w.trained}


def local(params) -> dict[str, jax.Array]:
    return {name.removeprefix("x/"): p for name, p in params.items()}


def test_only_float16_has_too_small_a_range_to_do_without_scaling():
    for name, p in PRECISIONS.items():
        assert p.dtype == jnp.dtype(name)
        assert p.scaled == (jnp.finfo(p.dtype).maxexp < jnp.finfo(jnp.float32).maxexp)
        assert precision.named(name) is p


def test_an_unknown_precision_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown precision `bfloat`\. Did you mean `bfloat16`"):
        precision.named("bfloat")


@pytest.mark.parametrize("name", PRECISIONS)
def test_convolutions_are_cast_and_norms_and_dense_layers_are_not(name):
    dtype = PRECISIONS[name].dtype
    graph = record("mbconv", (4, 4, 8), (("width", 8), ("expand", 2), ("se", True)))
    head = record("classifier", (4, 4, 8), (("width", 8), ("classes", 3)))
    params = arrays(graph) | {f"head/{n}": p for n, p in local(arrays(head)).items()}
    cast = compute_params(params, dtype)
    assert {n: p.shape for n, p in cast.items()} == {n: p.shape for n, p in params.items()}
    kept = {n for n, p in cast.items() if p.dtype == jnp.float32}
    if dtype != jnp.float32:
        assert kept == {n for n in params if "norm/" in n or "logits/" in n}
        assert cast["x/se_reduce/bias"].dtype == dtype


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cpu", [True, False])
def test_activations_stay_in_the_compute_type(block, name, cpu, monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", lambda: cpu)
    dtype = PRECISIONS[name].dtype
    graph = record(block, (8, 8, 8), tuple(BLOCKS[block].items()))

    def forward(params, x):
        return run(graph, local(compute_params(params, dtype)), x.astype(dtype), batch_stats=True)

    y, moments = jax.eval_shape(forward, arrays(graph), jnp.zeros((2, 8, 8, 8)))
    assert y.dtype == dtype
    assert {m.dtype for m in moments.values()} == {jnp.dtype(jnp.float32)}


def test_logits_and_gradients_are_float32_and_near_those_of_float32():
    graph = record("classifier", (4, 4, 8), (("width", 16), ("classes", 3)))
    params, x = arrays(graph), np.random.default_rng(1).standard_normal((16, 4, 4, 8)).astype(np.float32)

    def loss(params, dtype):
        logits, _ = run(graph, local(compute_params(params, dtype)), x.astype(dtype), batch_stats=True)
        return jax.nn.logsumexp(logits, -1).mean(), logits

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    wanted, _ = grad(params, jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float16):
        ours, logits = grad(params, dtype)
        assert {a.dtype for a in (logits, *ours.values())} == {jnp.dtype(jnp.float32)}
        for n in params:
            error = np.linalg.norm(ours[n] - wanted[n]) / np.linalg.norm(wanted[n])
            assert 0 < error < 20 * jnp.finfo(dtype).eps, n


def test_scaling_saves_gradients_that_float16_cannot_hold():
    def loss(w, state):
        return precision.scaled((w.astype(jnp.float16).astype(jnp.float32) * 1e-8).sum(), state)

    grad = jax.jit(lambda state: precision.unscale(jax.grad(loss)(jnp.ones(3), state), state))
    assert not np.any(grad(state_of(1.0)))
    np.testing.assert_allclose(grad(precision.initial_scale()), 1e-8, rtol=2e-3)


def test_unscaling_undoes_scaling_to_the_bit():
    def gradient(state):
        w = np.random.default_rng(0).standard_normal(100).astype(np.float32)
        return precision.unscale(jax.grad(lambda w: precision.scaled((w**3).sum(), state))(w), state)

    np.testing.assert_array_equal(jax.jit(gradient)(state_of(2.0**15)), jax.jit(gradient)(state_of(1.0)))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_bad_number_anywhere_makes_a_tree_not_finite(bad):
    finite = jax.jit(precision.all_finite)
    for last, wanted in ((0.0, True), (bad, False)):
        assert finite({"a": np.ones((2, 3)), "b": (np.int32(3), np.array([1.0, last]))}) == wanted
    assert precision.all_finite({})


def test_the_scale_halves_on_overflow_and_doubles_after_2000_good_steps():
    rng = np.random.default_rng(0)
    finite = np.concatenate([rng.random(300) < 0.9, np.ones(5000, bool), np.zeros(60, bool), np.ones(2000, bool)])
    finite = np.concatenate([finite, np.ones(30 * 2000, bool)])

    def one(state, finite):
        state = precision.adjust(state, finite)
        return state, state["scale"]

    end, scales = jax.jit(lambda: jax.lax.scan(one, precision.initial_scale(), jnp.asarray(finite)))()
    wanted, scale, good = [], 2.0**15, 0
    for ok in finite:
        good = good + 1 if ok else 0
        scale = scale if ok else max(scale / 2, 1.0)
        if good == 2000:
            scale, good = min(scale * 2, 2.0**24), 0
        wanted.append(scale)
    np.testing.assert_array_equal(scales, wanted)
    assert {1.0, 2.0**24} <= set(wanted)
    assert end["good_steps"] == good
    assert {k: a.dtype for k, a in end.items()} == {k: a.dtype for k, a in precision.initial_scale().items()}


def test_a_step_is_skipped_where_it_overflows_and_a_smaller_scale_is_left():
    for scale, finite, wanted in ((2.0, False, True), (2.0, True, False), (1.0, False, False), (1.0, True, False)):
        assert bool(precision.skipped(state_of(scale), jnp.bool_(finite))) == wanted


def test_a_step_that_overflowed_changes_nothing():
    old = {"a": jnp.arange(3.0), "count": jnp.int32(4)}
    new = {"a": jnp.full(3, jnp.nan), "count": jnp.int32(5)}
    jax.tree.map(np.testing.assert_array_equal, precision.keep_if(jnp.bool_(False), new, old), old)
    jax.tree.map(np.testing.assert_array_equal, precision.keep_if(jnp.bool_(True), old, new), old)
