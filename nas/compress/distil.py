"""Fine-tuning of one network, from inherited weights, with the supernet's largest network as its teacher."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpy.typing import NDArray

from nas import config
from nas.data import Dataset
from nas.data.resize import resize
from nas.ops import Network
from nas.quantise import narrowed
from nas.run import run
from nas.train import losses, optimiser
from nas.train.augment import augment, mix
from nas.train.loop import Progress, State, fit, steps_of


def finetune(
    network: Network,
    params: Mapping[str, Array],
    teacher: Network,
    teacher_params: Mapping[str, Array],
    data: Dataset,
    settings: config.Finish,
    augmentation: config.Augment,
    *,
    seed: int,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Array]:
    """Trained arrays of `network` after fine-tuning; batch-norm statistics are to be measured afterwards.

    The loss is (1 - w) cross-entropy + w KL to the teacher at a temperature (Hinton et al. 2015, arXiv:1503.02531).
    The teacher runs in inference mode on the same augmented images; `teacher_params` hold its statistics. Weights that
    `network` has narrow are rounded in every step, and gradients pass as if they were not (`nas.quantise`).

    Ops in int8 are trained in float32. Training them on integers (`nas.quantise.simulate`, norms folded with frozen
    statistics) was tried and gained nothing: the smallest and the largest network of `digits_joint` with both stages in
    int8, two seeds, had 632.5 of 647 images right in int8 after 8 epochs (632.2 in float32), 632.2 after 2 more in
    float32, and 630.5 to 631.5 after 2 more on integers, with either of two learning rates and with the scales of the
    training or new ones; those 2 epochs took 1 to 1.8 times as long.
    """
    graph, teacher_graph = network.flat(), teacher.flat()
    steps = steps_of(data.train, settings.epochs, settings.batch_size)
    transform = optimiser.build(settings.optimiser, steps)
    mean, std = jnp.asarray(data.mean), jnp.asarray(data.std)
    weight = settings.distill_weight

    def loss(trained: Any, x: Array, goal: Array, targets: Array) -> tuple[Array, Array]:
        logits, _ = run(graph, narrowed(graph, trained), x, batch_stats=True)
        hard = losses.cross_entropy(logits, targets)
        soft = losses.distillation(logits, goal, temperature=settings.temperature)
        return (1 - weight) * hard + weight * soft, (logits.argmax(-1) == targets.argmax(-1)).mean()

    @jax.jit
    def compiled(
        state: State, teacher_params: Any, number: Array, images: Array, labels: Array
    ) -> tuple[State, dict[str, Array]]:
        key, mix_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        x = augment(key, images.astype(jnp.float32) / 255, augmentation, fill=mean)
        x, targets = mix(mix_key, x, jax.nn.one_hot(labels, data.classes), augmentation)
        own, teachers = ((resize(x, n.input[:2]) - mean) / std for n in (network, teacher))
        goal, _ = run(teacher_graph, teacher_params, teachers)
        (value, top1), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"], own, goal, targets)
        updates, optimiser_state = transform.update(gradient, state["optimiser"], state["params"])
        state = {"params": optax.apply_updates(state["params"], updates), "optimiser": optimiser_state}
        return state, {"loss": value, "top1": top1}

    def step(state: State, number: int, images: NDArray[Any], labels: NDArray[Any]) -> tuple[State, dict[str, Array]]:
        return compiled(state, dict(teacher_params), np.uint32(number), images, labels)

    trained = {name: jnp.asarray(a) for name, a in params.items() if not name.endswith(("/mean", "/var"))}
    return fit(
        step,
        {"params": trained, "optimiser": transform.init(trained)},
        data.train,
        steps=steps,
        batch_size=settings.batch_size,
        seed=seed,
        folder=folder,
        identity={"network": network.key, "optimiser": settings.optimiser.name},
        checkpoint_steps=max(steps // 2, 100),
        progress=progress,
    )["params"]
