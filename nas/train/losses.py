"""Losses over logits [n, classes], averaged over the batch."""

import jax
import jax.numpy as jnp
import optax
from jax import Array


def cross_entropy(logits: Array, labels: Array, *, smoothing: float = 0.0) -> Array:
    """Cross-entropy with integer labels [n], optionally smoothed (Szegedy et al. 2016, arXiv:1512.00567, sec. 7)."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def distillation(logits: Array, teacher: Array, *, temperature: float = 1.0) -> Array:
    """KL(teacher || student) at a temperature, times its square (Hinton et al. 2015, arXiv:1503.02531, sec. 2)."""
    student, goal = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher))
    return jnp.sum(jnp.exp(goal) * (goal - student), -1).mean() * temperature**2
