"""Training of the supernet: what a step does is in `nas.train.step`, whom it trains in `nas.train.samplers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax import Array

from nas import config
from nas.data import Dataset
from nas.errors import ConfigError
from nas.supernet import Supernet
from nas.train import optimiser, precision
from nas.train.checkpoint import Identity
from nas.train.loop import Progress, fit, steps_of
from nas.train.samplers import sampler
from nas.train.step import State, Step


def train_supernet(
    supernet: Supernet,
    data: Dataset,
    settings: config.Train,
    *,
    seed: int,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Array]:
    """The trained arrays of the supernet, or their moving average (settings.ema).

    With a folder, resumes from and writes checkpoints, metrics and what else the settings ask for there.

    Raises:
        ConfigError: settings that do not fit together.
        CheckpointError: a checkpoint that is damaged or of another space, or a training that diverged.
    """
    if settings.population is not None:
        raise ConfigError("train.population is set, and this trains one supernet: call `nas.train.train_population`.")
    step = make_step(supernet, data, settings, seed=seed)
    steps = steps_of(data.train, settings.epochs, settings.batch_size)
    state = fit(
        step,
        step.init(supernet.init(seed)),
        data.train,
        steps=steps,
        batch_size=settings.batch_size,
        seed=seed,
        folder=folder,
        identity=identity(supernet, settings),
        checkpoint_steps=settings.checkpoint_steps,
        learning_rate=jax.jit(optimiser.schedule(settings.optimiser, steps)),
        tensorboard=settings.tensorboard,
        profile_steps=settings.profile_steps,
        progress=progress,
    )
    return dict(trained(state))


def make_step(supernet: Supernet, data: Dataset, settings: config.Train, *, seed: int) -> Step:
    """The step of a training of `settings.epochs` on `data`.

    Raises:
        ConfigError: unknown names, or sizes that do not divide the batch.
    """
    require_divisible(settings, devices=jax.device_count())
    return _step(supernet, data, settings, seed=seed)


def _step(supernet: Supernet, data: Dataset, settings: config.Train, *, seed: int) -> Step:
    part = settings.batch_size // settings.accumulate
    if settings.norm_images is not None and part % settings.norm_images:
        raise ConfigError(
            f"train.norm_images is {settings.norm_images}, which does not divide the {part} images that are computed "
            f"at a time (train.batch_size / train.accumulate). Choose a divisor."
        )
    steps = steps_of(data.train, settings.epochs, settings.batch_size)
    transform = optimiser.build(settings.optimiser, steps)
    at_one_size = supernet.space.at(supernet.space.resolutions[-1])
    return Step(supernet, data, settings, transform, sampler(settings, at_one_size, steps=steps), seed, steps)


def identity(supernet: Supernet, settings: config.Train) -> Identity:
    """What a checkpoint of this training is of: the space, and the settings that decide what a state holds."""
    return {
        "space": supernet.space.digest,
        "optimiser": settings.optimiser.name,
        "moving average": settings.ema > 0,
        "loss scale": precision.named(settings.precision).scaled,
    }


def require_divisible(settings: config.Train, *, devices: int) -> None:
    """That a batch divides over so many devices, of all processes together.

    Raises:
        ConfigError: it does not.
    """
    if settings.batch_size % (devices * settings.accumulate):
        raise ConfigError(
            f"train.batch_size is {settings.batch_size}, which does not divide over {devices} devices in "
            f"{settings.accumulate} parts each (accumulate). Choose a multiple of {devices * settings.accumulate}."
        )


def trained(state: State) -> Mapping[str, Any]:
    """The arrays of a state that are to be evaluated."""
    return state.get("average", state["params"])


def state_like(supernet: Supernet, data: Dataset, settings: config.Train, *, seed: int) -> State:
    """Shapes and types of a training's state, to restore a checkpoint by, whatever devices it was trained on."""
    return jax.eval_shape(_step(supernet, data, settings, seed=seed).init, supernet.init(seed))
