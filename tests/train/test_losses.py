"""Losses against their definitions, in NumPy at double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import config
from nas.errors import ConfigError
from nas.train import losses

ALPHAS = [-2.0, -1.0, -0.3, 0.0, 0.4, 0.5, 1.0, 1.7, 3.0]


def logits(seed, n=6, classes=5, spread=1.5):
    return np.random.default_rng(seed).normal(size=(n, classes), scale=spread)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def alpha_divergence(student, teacher, alpha):
    """The definition, [n], nothing clipped."""
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    q, p = np.exp(log_q), np.exp(log_p)
    if alpha == 0:
        return (q * (log_q - log_p)).sum(-1)
    if alpha == 1:
        return (p * (log_p - log_q)).sum(-1)
    return (q * ((p / q) ** alpha - 1)).sum(-1) / (alpha * (alpha - 1))


def differences(f, x, h=1e-5):
    """The gradient of sum f(x) by central differences."""
    out = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        out[i] = (f(up).sum() - f(down).sum()) / (2 * h)
    return out


# cross-entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_takes_class_numbers_or_distributions(smoothing):
    x, labels = logits(0), np.array([0, 3, 1, 4, 4, 2])
    hard = losses.cross_entropy(jnp.asarray(x), jnp.asarray(labels), smoothing=smoothing)
    soft = losses.cross_entropy(jnp.asarray(x), jnp.eye(5)[labels], smoothing=smoothing)
    targets = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
    assert hard == pytest.approx(-(targets * log_softmax(x)).sum(-1).mean(), rel=1e-5)
    assert soft == pytest.approx(float(hard), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_of_mixed_labels_is_the_mix_of_cross_entropies(smoothing):
    x, a, b = jnp.asarray(logits(1)), np.array([0, 1, 2, 3, 4, 0]), np.array([4, 4, 0, 3, 1, 2])
    mixed = losses.cross_entropy(x, 0.3 * jnp.eye(5)[a] + 0.7 * jnp.eye(5)[b], smoothing=smoothing)
    apart = [losses.cross_entropy(x, jnp.asarray(y), smoothing=smoothing) for y in (a, b)]
    assert mixed == pytest.approx(float(0.3 * apart[0] + 0.7 * apart[1]), rel=1e-5)


# the alpha-divergence


@functools.partial(jax.jit, static_argnames=("alpha", "clip"))
def value_and_gradient(student, teacher, *, alpha, clip=np.inf):
    """The value [n], and the gradient [n, classes] of each image's own."""
    value, pull = jax.vjp(lambda x: losses.alpha_divergence(x, teacher, alpha=alpha, clip=clip), student)
    return value, pull(jnp.ones_like(value))[0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_divergence_and_its_gradient_are_those_of_the_definition(alpha):
    student, teacher = logits(2), logits(3)
    value, gradient = value_and_gradient(student, teacher, alpha=alpha)
    np.testing.assert_allclose(value, alpha_divergence(student, teacher, alpha), rtol=1e-4)
    numeric = differences(lambda x: alpha_divergence(x, teacher, alpha), student)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-3 * np.abs(numeric).max())


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("side", [-0.01, 0.01])
def test_near_0_and_1_it_is_nearly_the_kl_of_either_direction(limit, side):
    student, teacher = logits(4), logits(5)
    at, near = (value_and_gradient(student, teacher, alpha=alpha) for alpha in (limit, limit + side))
    for exact, close in zip(at, near, strict=True):
        np.testing.assert_allclose(close, exact, rtol=0, atol=0.05 * np.abs(exact).max())


def test_at_1_it_is_the_divergence_of_distillation():
    student, teacher = jnp.asarray(logits(6)), jnp.asarray(logits(7))
    kl, gradient = jax.jit(jax.value_and_grad(losses.distillation))(student, teacher)
    value, each = value_and_gradient(student, teacher, alpha=1.0)
    assert value.mean() == pytest.approx(float(kl), rel=1e-5)
    np.testing.assert_allclose(each / len(each), gradient, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_exchanging_student_and_teacher_turns_alpha_into_its_complement(alpha):
    a, b = logits(8), logits(9)
    forth, back = value_and_gradient(a, b, alpha=alpha)[0], value_and_gradient(b, a, alpha=1 - alpha)[0]
    np.testing.assert_allclose(forth, back, rtol=1e-3)


@pytest.mark.parametrize(("alpha", "clip"), [*((a, np.inf) for a in ALPHAS), *((a, 5.0) for a in ALPHAS if a <= 1)])
def test_alpha_divergence_is_never_negative(alpha, clip):
    spread = np.repeat([0.1, 1.0, 4.0], 200)[:, None]
    student, teacher = spread * logits(10, n=600), spread * logits(11, n=600)
    value = value_and_gradient(student, teacher, alpha=alpha, clip=clip)[0]
    assert (value >= -1e-4).all()
    assert (value.reshape(3, 200).mean(1) > 1e-3).all()


@pytest.mark.parametrize("alpha", [-2.0, -1.0, 1.5, 3.0])
def test_the_clipped_gradient_is_the_sum_over_cut_importance_weights(alpha):
    student, teacher, clip = logits(12, spread=3.0), logits(13, spread=3.0), 5.0
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    q, importance = np.exp(log_q), np.exp(alpha * (log_p - log_q))
    assert (importance > clip).any()
    weights = q * np.minimum(importance, clip)
    value, gradient = value_and_gradient(student, teacher, alpha=alpha, clip=clip)
    np.testing.assert_allclose(value, (weights.sum(-1) - 1) / (alpha * (alpha - 1)), rtol=1e-3, atol=1e-5)
    # the derivative of log q_c by logit j is [c = j] - q_j
    wanted = -(weights - weights.sum(-1, keepdims=True) * q) / alpha
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_from_0_to_1_nothing_is_cut(alpha):
    student, teacher = logits(14, spread=5.0), logits(15, spread=5.0)
    whole, cut = (value_and_gradient(student, teacher, alpha=alpha, clip=clip) for clip in (np.inf, 2.0))
    np.testing.assert_allclose(cut[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(cut[1], whole[1], rtol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_certain_teachers_and_students_give_finite_gradients(alpha):
    student = jnp.asarray([[200.0, 0, 0], [0, 0, 0], [0, 200.0, 0]])
    teacher = jnp.asarray([[0, 200.0, 0], [200.0, 0, 0], [0, 200.0, 0]])
    value, gradient = value_and_gradient(student, teacher, alpha=alpha, clip=5.0)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()


# the table


def test_the_adaptive_divergence_takes_the_greater_one_of_each_image():
    # image 0: the student believes what the teacher rules out; image 1: it misses what the teacher believes
    student, teacher = jnp.asarray([[0.0, 0, 0], [6.0, 0, 0]]), jnp.asarray([[6.0, 0, 0], [0.0, 0, 0]])
    (low, low_gradient), (high, high_gradient) = (
        value_and_gradient(student, teacher, alpha=alpha, clip=5.0) for alpha in (-1.0, 1.0)
    )
    assert low[0] > high[0]
    assert high[1] > low[1]
    settings = config.Distillation(divergence="alpha", alpha_min=-1.0, alpha_max=1.0, clip=5.0)
    value, gradient = jax.jit(jax.value_and_grad(losses.divergence(settings)))(student, teacher)
    assert value == pytest.approx(float(low[0] + high[1]) / 2, rel=1e-5)
    np.testing.assert_allclose(2 * gradient, [low_gradient[0], high_gradient[1]], rtol=1e-5, atol=1e-6)


def test_kl_follows_its_temperature():
    student, teacher = jnp.asarray(logits(16)), jnp.asarray(logits(17))
    warm = losses.divergence(config.Distillation(divergence="kl", temperature=3.0))
    assert warm(student, teacher) == pytest.approx(float(losses.distillation(student, teacher, temperature=3.0)))


@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_every_divergence_is_0_at_equality_and_descends_to_it_without_moving_the_teacher(name):
    of = losses.divergence(config.Distillation(divergence=name))
    student, teacher = jnp.asarray(logits(18)), jnp.asarray(logits(19))
    gradients = jax.jit(jax.value_and_grad(of, argnums=(0, 1)))
    value, (gradient, moved) = gradients(teacher, teacher)
    assert value == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)

    start, (_, moved) = gradients(student, teacher)
    assert value < start
    np.testing.assert_array_equal(moved, 0)
    for _ in range(300):
        student = student - 2.0 * gradients(student, teacher)[1][0]
    assert gradients(student, teacher)[0] < 0.02 * start
    np.testing.assert_allclose(jax.nn.softmax(student), jax.nn.softmax(teacher), atol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "alfa"}, "unknown divergence `alfa`. Did you mean `alpha`"),
        ({"divergence": "kl", "temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"divergence": "alpha", "alpha_min": 1.0, "alpha_max": -1.0}, "alpha_min is 1.0 and alpha_max -1.0"),
        ({"divergence": "alpha", "clip": 1.0}, "clip is 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        losses.divergence(config.Distillation(**settings))
