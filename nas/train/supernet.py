"""Supernet training: the sandwich rule with in-place distillation.

Each step trains the largest network on the labels, and the smallest and a few random ones on the largest's soft labels
(Yu & Huang 2019, arXiv:1903.05134, sec. 3; Yu et al. 2020, arXiv:2003.11142, sec. 3.1).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from numpy.typing import NDArray

from nas import config
from nas.data import Dataset
from nas.supernet import Supernet
from nas.train import losses, optimiser
from nas.train.augment import augment
from nas.train.loop import Progress, State, fit, steps_of


def sandwich(supernet: Supernet, settings: config.Train, *, seed: int) -> Callable[[int], NDArray[np.int32]]:
    """step number -> branch numbers [2 + random_subnets, positions]: the largest network, the smallest, random ones."""
    space = supernet.space
    ends = np.stack([space.largest(), space.smallest()])

    def pick(step: int) -> NDArray[np.int32]:
        drawn = space.sample(np.random.default_rng([seed, step, 1]), settings.random_subnets)
        return space.branches(np.concatenate([ends, drawn]))

    return pick


def train_supernet(
    supernet: Supernet,
    data: Dataset,
    settings: config.Train,
    *,
    seed: int,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Array]:
    """The trained arrays of the supernet. With a folder, resumes from and writes checkpoints there."""
    steps = steps_of(data.train, settings.epochs, settings.batch_size)
    transform = optimiser.build(settings.optimiser, steps)
    step_function = make_step(supernet, data, settings, transform, seed=seed)
    params = jax.tree.map(jnp.asarray, supernet.init(seed))
    pick = sandwich(supernet, settings, seed=seed)

    def step(state: State, number: int, images: NDArray[Any], labels: NDArray[Any]) -> tuple[State, dict[str, Any]]:
        return step_function(state, np.uint32(number), pick(number), images, labels)

    state = {"params": params, "optimiser": transform.init(params)}
    state = fit(
        step,
        state,
        data.train,
        steps=steps,
        batch_size=settings.batch_size,
        seed=seed,
        folder=folder,
        checkpoint_steps=settings.checkpoint_steps,
        progress=progress,
    )
    return state["params"]


def make_step(
    supernet: Supernet,
    data: Dataset,
    settings: config.Train,
    transform: optax.GradientTransformation,
    *,
    seed: int,
) -> Any:
    """The compiled step (state, step number, branches [subnets, positions], images, labels) -> (state, metrics).

    The subnets are a `lax.scan`, so one forward and backward pass is compiled, however many there are.
    """
    mean, std = jnp.asarray(data.mean), jnp.asarray(data.std)

    def loss(params: Any, branches: Array, first: Array, teacher: Array, images: Array, labels: Array):
        logits, _ = supernet.apply(params, branches, images, mode="train")
        hard = losses.cross_entropy(logits, labels, smoothing=settings.label_smoothing)
        soft = losses.distillation(logits, teacher)
        return jnp.where(first, hard, soft), (logits, hard)

    @jax.jit
    def step(state: State, number: Array, branches: Array, images: Array, labels: Array):
        key = jax.random.fold_in(jax.random.key(seed), number)
        x = augment(key, (images.astype(jnp.float32) / 255 - mean) / std, settings.augment)
        params = state["params"]

        def one(carry: Any, xs: Any):
            gradients, teacher = carry
            picked, first = xs
            (_, (logits, hard)), gradient = jax.value_and_grad(loss, has_aux=True)(
                params, picked, first, teacher, x, labels
            )
            teacher = jnp.where(first, lax.stop_gradient(logits), teacher)
            correct = (logits.argmax(-1) == labels).mean()
            return (jax.tree.map(jnp.add, gradients, gradient), teacher), (hard, correct)

        n = branches.shape[0]
        zero = (jax.tree.map(jnp.zeros_like, params), jnp.zeros((x.shape[0], supernet.space.classes)))
        (gradients, _), (hard, correct) = lax.scan(one, zero, (branches, jnp.arange(n) == 0))
        updates, optimiser_state = transform.update(gradients, state["optimiser"], params)
        metrics = {"loss_largest": hard[0], "loss_smallest": hard[1], "top1_largest": correct[0]}
        metrics |= {"top1_smallest": correct[1], "gradient_norm": optax.tree.norm(gradients)}
        if n > 2:
            metrics |= {"loss_random": hard[2:].mean(), "top1_random": correct[2:].mean()}
        return {"params": optax.apply_updates(params, updates), "optimiser": optimiser_state}, metrics

    return step
