"""Losses over logits [n, classes], averaged over the batch."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from nas import config
from nas.errors import ConfigError

Divergence = Callable[[Array, Array], Array]  # (student's logits, teacher's logits), both [n, classes] -> mean loss


def cross_entropy(logits: Array, labels: Array, *, smoothing: float = 0.0) -> Array:
    """Cross-entropy, optionally with smoothed labels (Szegedy et al. 2016, arXiv:1512.00567, sec. 7).

    Args:
        logits: [n, classes].
        labels: class numbers, whole numbers [n]; or a distribution over the classes, [n, classes], as Mixup gives.
        smoothing: the share of each label that is spread evenly over all classes.
    """
    targets = labels if labels.ndim == logits.ndim else jax.nn.one_hot(labels, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing)).mean()


def distillation(logits: Array, teacher: Array, *, temperature: float = 1.0) -> Array:
    """KL(teacher || student) at a temperature, times its square (Hinton et al. 2015, arXiv:1503.02531, sec. 2)."""
    student, goal = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher))
    return jnp.sum(jnp.exp(goal) * (goal - student), -1).mean() * temperature**2


def alpha_divergence(logits: Array, teacher: Array, *, alpha: float, clip: float = math.inf) -> Array:
    """The alpha-divergence [n] of the student q from the teacher p, with the clipped gradient of AlphaNet.

    D = sum q ((p/q)^alpha - 1) / (alpha (alpha - 1)), the limits being KL(q || p) at 0 and KL(p || q) at 1 (Wang et al.
    2021, arXiv:2102.07954, sec. 3). For alpha < 0 it is large where the student believes what the teacher rules out
    (its uncertainty is too high), for alpha > 0 where it misses what the teacher believes (too low). Its gradient is

        -1/alpha sum q (p/q)^alpha grad log q,

    in which, and in D, the importance weights (p/q)^alpha are cut off at `clip` if alpha < 0 or alpha > 1. They stay
    whole from 0 to 1 (as at 1 in the authors' code): q (p/q)^alpha cannot exceed 1 there, and to cut would take the
    gradient away where a student misses most; that is the price of it above 1.

    Where something was cut, the gradient with respect to `logits` is therefore not that of the returned value. The
    value is never negative if nothing was cut, or if alpha < 0 and `clip` >= 1 - alpha.
    """
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher)
    log_q_fixed, log_ratio = lax.stop_gradient((log_q, log_p - log_q))
    if abs(alpha) < _LIMIT:
        # (p/q)^alpha / alpha goes to 1/alpha + log p/q, and sum q grad log q is 0: the constant has no part in this
        weights = jnp.exp(log_q_fixed) * log_ratio
        value = -weights.sum(-1)
    elif abs(alpha - 1) < _LIMIT:
        weights = lax.stop_gradient(jnp.exp(log_p))
        value = (weights * log_ratio).sum(-1)
    else:
        most = math.inf if 0 < alpha < 1 else math.log(clip)
        weights = jnp.exp(log_q_fixed + jnp.minimum(alpha * log_ratio, most))  # q (p/q)^alpha, by logs: no overflow
        value = (weights.sum(-1) - 1) / (alpha * (alpha - 1))
        weights = weights / alpha
    descended = -(weights * log_q).sum(-1)  # a function of the student with the gradient above
    return lax.stop_gradient(value) + (descended - lax.stop_gradient(descended))


_LIMIT = 1e-3  # nearer to 0 or 1 than this the limits are used: the quotient would have lost its digits


def _kl(settings: config.Distillation) -> Divergence:
    """KL(teacher || student) at `temperature`."""
    if not isinstance(settings.temperature, Array) and settings.temperature <= 0:
        raise ConfigError(f"distillation.temperature is {settings.temperature}; it must be above 0. 1.0 is usual.")
    return lambda student, teacher: distillation(student, teacher, temperature=settings.temperature)


def _adaptive_alpha(settings: config.Distillation) -> Divergence:
    """For each image the greater of the two alpha-divergences (Wang et al. 2021, arXiv:2102.07954, sec. 3)."""
    low, high, clip = settings.alpha_min, settings.alpha_max, settings.clip
    if low > high:
        raise ConfigError(
            f"distillation.alpha_min is {low} and alpha_max {high}; the first must not be the greater. Exchange them."
        )
    if clip <= 1:
        raise ConfigError(f"distillation.clip is {clip}; weights are 1 at agreement: it must be above. 5.0 is usual.")

    def greater(student: Array, teacher: Array) -> Array:
        both = (alpha_divergence(student, teacher, alpha=a, clip=clip) for a in (low, high))
        return jnp.maximum(*both).mean()

    return greater


DIVERGENCES: dict[str, Callable[[config.Distillation], Divergence]] = {
    "alpha": _adaptive_alpha,
    "kl": _kl,
}


def divergence(settings: config.Distillation) -> Divergence:
    """How far a student is from its teacher, by `settings.divergence`; nothing flows back into the teacher.

    Raises:
        ConfigError: an unknown name, or settings that it cannot work with.
    """
    if settings.divergence not in DIVERGENCES:
        hint = config.nearest(settings.divergence, DIVERGENCES, kind="divergence")
        raise ConfigError(f"unknown divergence `{settings.divergence}`.{hint}")
    of = DIVERGENCES[settings.divergence](settings)
    return lambda student, teacher: of(student, lax.stop_gradient(teacher))
