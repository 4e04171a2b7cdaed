"""Optimisers and learning-rate schedules by name, behind clipping and a weight-decay mask.

Weight decay is *coupled* where it is added to the gradient (L2 regularisation, which the optimiser then rescales as it
does the gradient), and *decoupled* where it is added to the finished step, times the learning rate: each optimiser has
it as its paper does, and says so. Norms and biases are always spared.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

from nas import config
from nas.errors import ConfigError
from nas.train.shampoo import scale_by_shampoo

T = TypeVar("T")


def build(settings: config.Optimiser, steps: int) -> optax.GradientTransformation:
    """The optimiser for a training of `steps` steps: clip by the global norm, then the optimiser with its decay.

    Raises:
        ConfigError: an unknown optimiser or schedule, or drops that are no increasing shares.
    """
    make = _named(settings.name, OPTIMISERS, kind="optimiser")
    clip = optax.identity() if settings.clip_norm is None else clip_by_global_norm(settings.clip_norm)
    transform = optax.chain(clip, make(schedule(settings, steps), settings))
    return transform if settings.name in _BY_ARRAY else joined(transform)


def joined(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transform`, shown all kernels as one vector and all other parameters as another.

    For what treats every number alike, but for the mask of `is_kernel`. A supernet has some hundred arrays, and two
    small programs for each of them take longer than their numbers do.
    """

    def init(params: Any) -> Any:
        return transform.init(_join(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        together: Any
        together, state = transform.update(_join(updates), state, None if params is None else _join(params))
        return _part(together, updates), state

    return optax.GradientTransformation(init, update)


def _join(tree: Mapping[str, Any]) -> dict[str, Array]:
    """A flat dict of arrays as two vectors, whose names `is_kernel` understands; one where there is but one kind."""
    kinds: dict[str, list[Array]] = {}
    for name, array in tree.items():
        kinds.setdefault(_kind(name), []).append(jnp.ravel(array))
    return {kind: jnp.concatenate(arrays) for kind, arrays in kinds.items()}


def _part(vectors: Mapping[str, Array], like: Mapping[str, Any]) -> dict[str, Array]:
    """What `_join` made one of, again in the shapes of `like`."""
    used, out = dict.fromkeys(vectors, 0), {}
    for name, array in like.items():
        kind = _kind(name)
        begin, used[kind] = used[kind], used[kind] + array.size
        out[name] = vectors[kind][begin : used[kind]].reshape(array.shape)
    return out


def _kind(name: str) -> str:
    return "joined/kernel" if name.endswith("/kernel") else "joined/other"


def schedule(settings: config.Optimiser, steps: int) -> optax.Schedule:
    """Step number -> learning rate: linear from 0 over the warm-up, then what `SCHEDULES` names.

    Raises:
        ConfigError: an unknown name, or drops that are no increasing shares.
    """
    make = _named(settings.schedule, SCHEDULES, kind="schedule")
    steps = max(steps, 1)
    warmup = min(round(settings.warmup * steps), steps - 1)
    after = make(settings, steps, warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, settings.learning_rate, warmup), after], [warmup])


def global_norm(tree: Any) -> Array:
    """Euclidean norm of all arrays of `tree` together.

    One product of one vector: XLA on CPU makes three programs of each array's own sum, most of an update's time.
    """
    flat = jnp.concatenate([a.ravel() for a in jax.tree.leaves(tree)])
    return jnp.sqrt(jnp.vdot(flat, flat, precision="highest"))


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Scales gradients whose `global_norm` is beyond `largest` down to it (Pascanu et al. 2013, arXiv:1211.5063)."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = global_norm(updates)
        share = jnp.where(norm > largest, largest / norm, 1.0)
        return jax.tree.map(lambda g: g * share.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def is_kernel(params: dict[str, Any]) -> dict[str, bool]:
    """The weight-decay mask of a flat dict of parameters."""
    return {name: name.endswith("/kernel") for name in params}


def sgd(rate: optax.Schedule, settings: config.Optimiser) -> optax.GradientTransformation:
    """SGD with Nesterov momentum (Sutskever et al. 2013, ICML, sec. 2). Decay coupled: it enters the momentum."""
    return _coupled(settings, optax.sgd(rate, momentum=settings.momentum, nesterov=True))


def rmsprop(rate: optax.Schedule, settings: config.Optimiser) -> optax.GradientTransformation:
    """RMSProp as TensorFlow has it and MnasNet and EfficientNet use it. Decay coupled.

    Mean squares start at 1 and decay by 0.9, epsilon 1e-3 is inside the root, and the learning rate inside the
    momentum (Tan & Le 2019, arXiv:1905.11946, sec. 5.2; epsilon from the code published with it).
    """
    plain = optax.rmsprop(
        rate, decay=0.9, eps=1e-3, eps_in_sqrt=True, initial_scale=1.0, momentum=settings.momentum, nesterov=False
    )
    return _coupled(settings, plain)


def adam(rate: optax.Schedule, settings: config.Optimiser) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1). Decay coupled, as L2 was used with it before AdamW."""
    return _coupled(settings, optax.adam(rate))


def adamw(rate: optax.Schedule, settings: config.Optimiser) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2). Decay decoupled."""
    return optax.adamw(rate, weight_decay=settings.weight_decay, mask=is_kernel)


def lamb(rate: optax.Schedule, settings: config.Optimiser) -> optax.GradientTransformation:
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2). Decay joins Adam's step before the trust ratio."""
    return optax.lamb(rate, weight_decay=settings.weight_decay, mask=is_kernel)


def adagrad(rate: optax.Schedule, settings: config.Optimiser) -> optax.GradientTransformation:
    """Diagonal Adagrad (Duchi et al. 2011, JMLR 12, sec. 1.1); sums start at 0.1. Decay coupled."""
    return _coupled(settings, optax.adagrad(rate))


def adadelta(rate: optax.Schedule, settings: config.Optimiser) -> optax.GradientTransformation:
    """Adadelta (Zeiler 2012, arXiv:1212.5701, algorithm 1), whose learning rate is 1. Decay coupled."""
    return _coupled(settings, optax.adadelta(rate))


def lion(rate: optax.Schedule, settings: config.Optimiser) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2). Decay decoupled."""
    return optax.lion(rate, weight_decay=settings.weight_decay, mask=is_kernel)


def shampoo(rate: optax.Schedule, settings: config.Optimiser) -> optax.GradientTransformation:
    """Shampoo (see `nas.train.shampoo`) with the learning rate and the Nesterov momentum of SGD.

    Decay joins the preconditioned gradient before the momentum, as in the code of Anil et al. 2020, arXiv:2002.09018:
    it is no part of the statistics.
    """
    return optax.chain(
        scale_by_shampoo(),
        optax.add_decayed_weights(settings.weight_decay, mask=is_kernel),
        optax.sgd(rate, momentum=settings.momentum, nesterov=True),
    )


OPTIMISERS: dict[str, Callable[[optax.Schedule, config.Optimiser], optax.GradientTransformation]] = {
    "adadelta": adadelta,
    "adagrad": adagrad,
    "adam": adam,
    "adamw": adamw,
    "lamb": lamb,
    "lion": lion,
    "rmsprop": rmsprop,
    "sgd": sgd,
    "shampoo": shampoo,
}


def cosine(settings: config.Optimiser, steps: int, warmup: int) -> optax.Schedule:
    """Half a cosine to 0 at the last step (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5)."""
    return optax.cosine_decay_schedule(settings.learning_rate, steps - warmup)


def step(settings: config.Optimiser, steps: int, warmup: int) -> optax.Schedule:
    """Times `drop_factor` at each of `drops`, shares of all steps (He et al. 2016, arXiv:1512.03385, sec. 4.2)."""
    drops = settings.drops
    if drops and not all(a < b for a, b in pairwise((settings.warmup, *drops, 1.0))):
        raise ConfigError(
            f"drops = {list(drops)} with warmup = {settings.warmup}: drops are the shares of the steps at which the "
            "learning rate falls, so they must increase, all above warmup and below 1. Write, for example, "
            "drops = [0.5, 0.75]."
        )
    boundaries = jnp.asarray([max(round(share * steps) - warmup, 1) for share in drops])  # one step at the peak
    return lambda count: settings.learning_rate * settings.drop_factor ** jnp.sum(count >= boundaries)


def constant(settings: config.Optimiser, steps: int, warmup: int) -> optax.Schedule:
    """The peak to the end."""
    return optax.constant_schedule(settings.learning_rate)


_BY_ARRAY = ("lamb", "shampoo")  # whose steps depend on which numbers make one array

# (settings, steps in all, steps of the warm-up) -> the schedule after the warm-up, whose step 0 is the warm-up's end.
SCHEDULES: dict[str, Callable[[config.Optimiser, int, int], optax.Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "step": step,
}


def _coupled(settings: config.Optimiser, transform: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(settings.weight_decay, mask=is_kernel), transform)


def _named(name: str, table: Mapping[str, T], *, kind: str) -> T:
    if name not in table:
        raise ConfigError(f"unknown {kind} `{name}`.{config.nearest(name, table, kind=kind)}")
    return table[name]
