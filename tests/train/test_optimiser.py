"""Optimisers and schedules: laws over both tables, golden values, Shampoo against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import fractional_matrix_power

from nas import config
from nas.errors import ConfigError
from nas.train import Checkpoints
from nas.train.optimiser import OPTIMISERS, SCHEDULES, build, joined, schedule
from nas.train.shampoo import scale_by_shampoo

RATES = {"adadelta": 30.0, "adagrad": 0.5, "sgd": 0.02, "shampoo": 0.02}  # others: 0.05
MASK = {"a/kernel": True, "a/bias": False, "a_norm/scale": False, "logits/kernel": True}


def settings_of(name: str, **options) -> config.Optimiser:
    defaults = {"learning_rate": RATES.get(name, 0.05), "weight_decay": 0.0, "warmup": 0.0, "schedule": "constant"}
    return config.Optimiser(name=name, **defaults | options)


def parameters(seed: int = 0) -> dict[str, jax.Array]:
    shapes = {"a/kernel": (3, 3, 2, 4), "a/bias": (4,), "a_norm/scale": (4,), "logits/kernel": (6, 5)}
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


@functools.cache
def compiled(transform, gradient):
    @jax.jit
    def one(params, state):
        updates, state = transform.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    return one


def trained(transform, gradient, params, steps, state=None):
    """(params, state) after so many steps of `gradient(params)`."""
    state = jax.jit(transform.init)(params) if state is None else state
    for _ in range(steps):
        params, state = compiled(transform, gradient)(params, state)
    return params, state


def bowl(params):
    """A quadratic with its minimum at 0.3."""
    return sum(((p - 0.3) ** 2).sum() for p in params.values()) / 2


def valley(params):
    """A quadratic whose curvatures are 1 to 1/100."""
    curvatures = np.geomspace(1, 0.1, 6)[:, None] * np.geomspace(1, 0.1, 5)
    return (curvatures * params["logits/kernel"] ** 2).sum() / 2


@pytest.mark.parametrize("loss", [bowl, valley])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_descends(name, loss):
    start = parameters()
    end, _ = trained(build(settings_of(name), 100), jax.grad(loss), start, 100)
    assert loss(end) < loss(start) / 4
    assert all(np.isfinite(p).all() for p in end.values())


@pytest.mark.parametrize("name", sorted(OPTIMISERS.keys() - {"lamb", "shampoo"}))
def test_kernels_in_one_vector_are_trained_as_each_array_alone(name):
    settings = settings_of(name, weight_decay=0.1, momentum=0.9)
    alone = OPTIMISERS[name](schedule(settings, 10), settings)
    expected, _ = trained(alone, jax.grad(valley), parameters(), 10)
    got, state = trained(joined(alone), jax.grad(valley), parameters(), 10)
    for parameter, value in expected.items():
        np.testing.assert_allclose(got[parameter], value, rtol=1e-5, atol=1e-7, err_msg=parameter)
    assert max(a.size for a in jax.tree.leaves(state)) == 3 * 3 * 2 * 4 + 6 * 5


def test_networks_without_kernels_or_without_anything_else_are_joined_too():
    for only in ("a/kernel", "a/bias"):
        params = {only: parameters()[only]}
        transform = joined(optax.sgd(0.1))
        updates, _ = transform.update(params, transform.init(params), params)
        np.testing.assert_allclose(updates[only], -0.1 * params[only], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_decay_pulls_kernels_to_zero_and_spares_all_else(name):
    params = parameters()
    transform = build(settings_of(name, weight_decay=0.5), 10)
    after, _ = trained(transform, lambda p: jax.tree.map(jnp.zeros_like, p), params, 1)
    updates = {parameter: after[parameter] - params[parameter] for parameter in params}
    for parameter, decays in MASK.items():
        np.testing.assert_array_equal(np.sign(updates[parameter]), -np.sign(params[parameter]) if decays else 0)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_state_is_arrays_whose_shapes_and_types_a_step_keeps(name):
    transform, params = build(settings_of(name), 10), parameters()
    before = transform.init(params)
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(before))
    _, after = jax.eval_shape(transform.update, params, before, params)
    kinds = [jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), state) for state in (before, after)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_training_resumes_from_a_checkpoint_bit_for_bit(name, tmp_path):
    transform, gradient = build(settings_of(name, weight_decay=0.1), 24), jax.grad(valley)
    params, state = trained(transform, gradient, parameters(), 12)
    saved = {"params": params, "optimiser": state}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(12, saved)
        restored = checkpoints.restore(12, saved)
    whole = trained(transform, gradient, params, 12, state)
    again = trained(transform, gradient, restored["params"], 12, restored["optimiser"])
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def decayed(transform):
    return optax.chain(optax.add_decayed_weights(0.1, mask=MASK), transform)


PLAIN = {
    "adadelta": decayed(optax.adadelta(0.05)),
    "adagrad": decayed(optax.adagrad(0.05)),
    "adam": decayed(optax.adam(0.05)),
    "adamw": optax.adamw(0.05, weight_decay=0.1, mask=MASK),
    "lamb": optax.lamb(0.05, weight_decay=0.1, mask=MASK),
    "lion": optax.lion(0.05, weight_decay=0.1, mask=MASK),
    "rmsprop": decayed(optax.rmsprop(0.05, decay=0.9, eps=1e-3, initial_scale=1.0, momentum=0.8)),
    "sgd": decayed(optax.sgd(0.05, momentum=0.8, nesterov=True)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_an_optimiser_is_the_one_of_optax(name):
    settings = settings_of(name, learning_rate=0.05, weight_decay=0.1, momentum=0.8, clip_norm=None)
    ours, _ = trained(build(settings, 10), jax.grad(bowl), parameters(), 5)
    theirs, _ = trained(PLAIN[name], jax.grad(bowl), parameters(), 5)
    for parameter in ours:
        np.testing.assert_allclose(ours[parameter], theirs[parameter], rtol=1e-6, atol=1e-7)


def test_rmsprop_is_tensorflows():
    gradients = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    transform = build(settings_of("rmsprop", learning_rate=0.1, momentum=0.9, clip_norm=None), 6)
    p = {"a/bias": jnp.zeros(4)}
    state = transform.init(p)
    wanted, mean_square, momentum = np.zeros(4), np.ones(4), np.zeros(4)
    for g in gradients:
        p, state = trained(transform, lambda _, g=g: {"a/bias": g}, p, 1, state)
        mean_square = 0.9 * mean_square + 0.1 * g**2
        momentum = 0.9 * momentum + 0.1 * g / np.sqrt(mean_square + 1e-3)
        wanted -= momentum
    np.testing.assert_allclose(p["a/bias"], wanted, rtol=1e-5)


@pytest.mark.parametrize(("norm", "wanted"), [(50.0, 2.0), (0.5, 0.5)])
def test_long_gradients_are_cut_to_the_norm_and_short_ones_left(norm, wanted):
    transform = build(settings_of("sgd", learning_rate=1.0, momentum=0.0, clip_norm=2.0), 10)
    start = {"a/bias": jnp.zeros(3), "b/bias": jnp.zeros(1)}
    gradients = {"a/bias": np.float32([0.5, 0.5, 0.5]) * norm, "b/bias": np.float32([0.5]) * norm}
    end, _ = trained(transform, lambda _: gradients, start, 1)
    np.testing.assert_allclose(np.concatenate([end["a/bias"], end["b/bias"]]), -wanted / 2, rtol=1e-5)


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown optimiser `shampo`\. Did you mean `shampoo`"):
        build(config.Optimiser(name="shampo"), 10)
    with pytest.raises(ConfigError, match=r"unknown schedule `cosin`\. Did you mean `cosine`"):
        build(config.Optimiser(schedule="cosin"), 10)


# schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_linearly_and_then_never_rises(name):
    rate = schedule(config.Optimiser(learning_rate=2.0, warmup=0.1, schedule=name), 100)
    rates = np.asarray(jax.jit(jax.vmap(rate))(jnp.arange(101)))
    np.testing.assert_allclose(rates[:11], np.linspace(0, 2, 11), rtol=1e-6)
    assert np.all(np.diff(rates[10:]) <= 0)
    assert np.all(rates >= 0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.4])
def test_the_shortest_training_has_a_rate(name, steps, warmup):
    rate = schedule(config.Optimiser(learning_rate=2.0, warmup=warmup, schedule=name), steps)
    rates = [float(rate(s)) for s in range(steps)]
    assert max(rates) == 2.0
    assert np.isfinite(rates).all()


GOLDEN = {
    "cosine": optax.warmup_cosine_decay_schedule(0.0, 0.3, 10, 100),
    "constant": optax.warmup_constant_schedule(0.0, 0.3, 10),
    "step": optax.join_schedules(
        [optax.linear_schedule(0, 0.3, 10), optax.piecewise_constant_schedule(0.3, {40: 0.2, 65: 0.2})], [10]
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_schedule_is_the_one_of_optax(name):
    options = {"warmup": 0.1, "drops": (0.5, 0.75), "drop_factor": 0.2}
    rate = schedule(config.Optimiser(learning_rate=0.3, schedule=name, **options), 100)
    for s in (0, 5, 9, 10, 11, 49, 50, 51, 74, 75, 99, 100):
        assert float(rate(s)) == pytest.approx(float(GOLDEN[name](s)), rel=1e-5, abs=1e-7)


def test_drops_that_meet_in_a_short_training_all_count():
    settings = config.Optimiser(learning_rate=1.0, schedule="step", warmup=0.0, drops=(0.5, 0.6))
    assert [float(schedule(settings, 4)(s)) for s in range(4)] == pytest.approx([1, 1, 0.01, 0.01])


@pytest.mark.parametrize("drops", [(0.5, 0.5), (0.7, 0.2), (0.0,), (1.0,), (-0.5, 0.5), (float("nan"),), (0.05, 0.5)])
def test_drops_must_increase_between_the_warm_up_and_the_end(drops):
    settings = config.Optimiser(schedule="step", warmup=0.1, drops=drops)
    with pytest.raises(ConfigError, match="must increase, all above warmup and below 1"):
        build(settings, 100)
    build(config.Optimiser(schedule="cosine", warmup=0.1, drops=drops), 100)  # which does not use them


# Shampoo


def reference(gradients, *, every, largest_side, decay, epsilon):
    """Shampoo of matrices [rows, columns], in float64, with SciPy's matrix powers instead of ours."""
    rows, columns = gradients[0].shape
    factors = {}
    if rows <= largest_side:
        factors["rows"] = (np.zeros((rows, rows)), np.eye(rows))
    if columns <= largest_side:
        factors["columns"] = (np.zeros((columns, columns)), np.eye(columns))
    out = []
    for number, g in enumerate(gradients, start=1):
        g = g.astype(np.float64)
        d = g
        for side, (statistic, root) in factors.items():
            product = g @ g.T if side == "rows" else g.T @ g
            statistic = decay * statistic + (1 - decay) * product
            if number % every == 0:
                conditioned = statistic / np.linalg.norm(statistic, 2) + epsilon * np.eye(len(statistic))
                root = fractional_matrix_power(conditioned, -1 / (2 * len(factors)))
            factors[side] = (statistic, root)
            d = root @ d if side == "rows" else d @ root
        out.append(d * np.linalg.norm(g) / np.linalg.norm(d))
    return out


@pytest.mark.parametrize("largest_side", [8, 5])  # both sides, the shorter one alone
@pytest.mark.parametrize("every", [1, 3])
def test_shampoo_equals_a_reference_in_numpy(every, largest_side):
    rng = np.random.default_rng(0)
    scales = np.geomspace(1, 0.1, 8)[:, None] * np.geomspace(1, 0.3, 5)
    gradients = (rng.standard_normal((8, 8, 5)) * scales).astype(np.float32)
    options = {"every": every, "largest_side": largest_side, "decay": 0.9, "epsilon": 1e-3}
    transform = scale_by_shampoo(**options)
    update, state = jax.jit(transform.update), transform.init(jnp.zeros((8, 5)))
    for g, wanted in zip(gradients, reference(gradients, **options), strict=True):
        ours, state = update(jnp.asarray(g), state)
        np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-4)


def test_shampoo_of_vectors_and_of_matrices_too_large_is_adagrads_direction():
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((4, 30)).astype(np.float32)
    transform = scale_by_shampoo(every=1, largest_side=4, decay=0.9, epsilon=1e-6)
    shapes = {"vector": (30,), "matrix": (5, 6), "kernel": (1, 5, 1, 6)}
    update, state = jax.jit(transform.update), transform.init({name: jnp.zeros(s) for name, s in shapes.items()})
    squares = np.zeros(30)
    for g in gradients:
        updates, state = update({name: jnp.asarray(g.reshape(s)) for name, s in shapes.items()}, state)
        squares = 0.9 * squares + 0.1 * g**2
        d = g / np.sqrt(squares / squares.max() + 1e-6)
        wanted = d * np.linalg.norm(g) / np.linalg.norm(d)
        for name, shape in shapes.items():
            np.testing.assert_allclose(updates[name], wanted.reshape(shape), rtol=1e-4)


def test_shampoo_of_a_convolution_is_that_of_its_matrix():
    gradients = np.random.default_rng(0).standard_normal((4, 3, 3, 2, 4)).astype(np.float32)
    transform = scale_by_shampoo(every=2)
    update, states = jax.jit(transform.update), [transform.init(jnp.zeros(shape)) for shape in ((3, 3, 2, 4), (18, 4))]
    for g in gradients:
        a, states[0] = update(jnp.asarray(g), states[0])
        b, states[1] = update(jnp.asarray(g.reshape(18, 4)), states[1])
        np.testing.assert_array_equal(a.reshape(18, 4), b)


def test_shampoo_steps_are_those_of_sgd_until_the_first_roots():
    transform, params = scale_by_shampoo(every=3), parameters()
    update, state = jax.jit(transform.update), transform.init(params)
    for number in range(1, 5):
        gradients = parameters(number)
        updates, state = update(gradients, state)
        same = [np.allclose(updates[name], gradients[name], rtol=1e-5) for name in params]
        assert all(same) if number < 3 else not any(same)


def test_shampoo_does_not_touch_what_no_gradient_reaches_and_moves_it_as_soon_as_one_does():
    transform = scale_by_shampoo(every=1)
    zeros = {"kernel": np.zeros((3, 2), np.float32), "scale": np.zeros(3, np.float32)}
    update, state = jax.jit(transform.update), transform.init(zeros)
    for value in (0.0, 1.0):
        updates, state = update(jax.tree.map(lambda a, value=value: a + np.float32(value), zeros), state)
        for u in jax.tree.leaves(updates):
            np.testing.assert_allclose(u, value, rtol=1e-5)


def test_shampoo_learns_from_correlated_inputs_what_sgd_does_not():
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.standard_normal((8, 8)))
    spread = np.float32(rotation * np.geomspace(1, 0.03, 8))  # eigenvalues of the inputs' covariance: 1 to 1/1000
    wanted = np.float32(rng.standard_normal((8, 4)))

    def error(name):
        transform = build(settings_of(name, learning_rate=0.1, schedule="cosine"), 200)

        def step(carry, key):
            x = jax.random.normal(key, (16, 8)) @ spread.T
            gradients = {"kernel": x.T @ (x @ (carry[0]["kernel"] - wanted)) / 16}
            updates, state = transform.update(gradients, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        start = {"kernel": jnp.zeros((8, 4))}
        keys = jax.random.split(jax.random.key(0), 200)
        (end, _), _ = jax.jit(lambda: jax.lax.scan(step, (start, transform.init(start)), keys))()
        return np.linalg.norm(spread.T @ (end["kernel"] - wanted))

    assert error("shampoo") < error("sgd") / 2
