"""Optimisers by name, from optax, each behind warm-up + cosine and a weight-decay mask."""

from collections.abc import Callable
from typing import Any

import optax

from nas import config
from nas.errors import ConfigError


def _sgd(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    # decay enters the momentum, as in the papers whose recipes this is
    return optax.chain(optax.add_decayed_weights(decay, mask=is_kernel), optax.sgd(rate, momentum=0.9, nesterov=True))


def _adamw(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=decay, mask=is_kernel)


def _lion(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax.lion(rate, weight_decay=decay, mask=is_kernel)


OPTIMISERS: dict[str, Callable[[optax.Schedule, float], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "sgd": _sgd,
}


def schedule(settings: config.Optimiser, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to 0 (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    warmup = min(round(settings.warmup * steps), max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, warmup, max(steps, 1))


def build(settings: config.Optimiser, steps: int) -> optax.GradientTransformation:
    """The optimiser for a training of `steps` steps. Decay spares norms and biases.

    Raises:
        ConfigError: an unknown name.
    """
    if settings.name not in OPTIMISERS:
        hint = config.nearest(settings.name, OPTIMISERS, kind="optimiser")
        raise ConfigError(f"unknown optimiser `{settings.name}`.{hint}")
    clip = optax.identity() if settings.clip_norm is None else optax.clip_by_global_norm(settings.clip_norm)
    return optax.chain(clip, OPTIMISERS[settings.name](schedule(settings, steps), settings.weight_decay))


def is_kernel(params: dict[str, Any]) -> dict[str, bool]:
    """The weight-decay mask of a flat dict of parameters."""
    return {name: name.endswith("/kernel") for name in params}
