"""The loop that trainings share: batches in a fixed order, checkpoints, metrics, resume to the bit."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from nas.data import Part
from nas.errors import Diverged
from nas.train.batches import Waits, batches
from nas.train.checkpoint import Checkpoints, Identity
from nas.train.log import Events, Log
from nas.train.profile import Profile

Progress = Callable[[int, int, dict[str, float]], None]  # (steps done, steps in all, newest metrics)
State = dict[str, Any]


def steps_of(part: Part, epochs: float, batch_size: int) -> int:
    """Number of steps of so many epochs, at least one."""
    return max(1, round(epochs * max(len(part.labels) // batch_size, 1)))


def fit(
    step_function: Callable[[State, int, NDArray[Any], NDArray[Any]], tuple[State, dict[str, Any]]],
    state: State,
    part: Part,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    start: int = 0,
    folder: Path | None = None,
    identity: Identity | None = None,
    checkpoint_steps: int = 100,
    log_steps: int = 10,
    learning_rate: Callable[[int], Any] | None = None,
    tensorboard: bool = False,
    profile_steps: int = 0,
    progress: Progress | None = None,
) -> State:
    """Runs `step_function(state, step, images, labels) -> (state, metrics)` for `steps` steps.

    With a folder, checkpoints go to `folder`/checkpoints and metrics to `folder`/metrics.jsonl, and a training that
    was cut off goes on from its newest checkpoint to the same final state, bit for bit on one machine. `waiting` in
    the metrics is the share of the time since the row before in which the device waited for images; of several
    processes, that of the one that waited longest, since the others wait for it.

    A metric that is not finite is the end of the training, unless the metric `skipped` is 1: that step has changed
    nothing but the scale of the loss, and leaves such metrics out of its row.

    Where JAX is connected to several processes, all of them call this, with the same folder and a state whose arrays
    are the same on all of their devices; each gives `step_function` its rows of the batch, and the first one writes the
    metrics and tells the progress.

    Args:
        start: the step that `state` is after; a newer checkpoint goes before it.
        identity: what is trained (the hash of its space, for one); a checkpoint of something else is refused.
        checkpoint_steps: steps from one checkpoint to the next; the last step has one too.
        log_steps: steps from one row of metrics to the next; the last step has one too.
        learning_rate: of a step, to be logged.
        tensorboard: write the metrics as TensorBoard events too, to `folder`/events.
        profile_steps: trace so many steps by `jax.profiler`, to `folder`/profile.

    Raises:
        DataError: an image in a file that cannot be decoded.
        CheckpointError: a checkpoint is damaged, of something else or could not be written.
        Diverged: the training did, to NaN.
        RunError: `tensorboard` without tensorboardX installed.
    """
    with contextlib.ExitStack() as opened:
        checkpoints, profile = None, None
        process = jax.process_index(), jax.process_count()
        first = process[0] == 0
        logs: list[Log | Events] = []
        if folder is not None:
            checkpoints = opened.enter_context(Checkpoints(folder / "checkpoints", identity))
            newest = int(multihost_utils.broadcast_one_to_all(np.int32(checkpoints.latest() or 0)))
            if newest > start:
                start, state = newest, checkpoints.restore(newest, state)
            if first:
                logs.append(opened.enter_context(Log(folder / "metrics.jsonl", start)))
            if first and tensorboard:
                logs.append(opened.enter_context(Events(folder / "events", start)))
            if first and profile_steps:
                profile = Profile(folder / "profile", profile_steps, start=start, stop=steps)
                opened.enter_context(profile)
        before, began, waited = start, time.perf_counter(), 0.0
        stream = Waits(batches(part, batch_size, seed=seed, start=start, stop=steps, process=process))
        for step, (images, labels) in enumerate(stream, start):
            if profile is not None:
                profile.at(step, state)
            state, metrics = step_function(state, step, images, labels)
            stream.watch(metrics)
            done = step + 1
            if done % log_steps == 0 or done == steps:
                values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                finite = {k: v for k, v in values.items() if np.isfinite(v)}
                if len(finite) < len(values) and not values.get("skipped"):
                    raise _diverged(done, values)
                values = finite
                if learning_rate is not None:
                    values["learning_rate"] = float(learning_rate(step))
                now = time.perf_counter()
                rate = (done - before) * batch_size / (now - began)
                waiting = _longest((stream.seconds - waited) / (now - began))
                before, began, waited = done, now, stream.seconds
                for log in logs:
                    log.append({"step": done, **values, "images_per_second": round(rate, 1), "waiting": waiting})
                if progress and first:
                    progress(done, steps, {**values, "images/s": rate, "waiting": waiting})
            if checkpoints is not None and (done % checkpoint_steps == 0 or done == steps):
                checkpoints.save(done, state)
        if profile is not None:
            profile.at(steps, state)
    return state


def _longest(waiting: float) -> float:
    """The largest of what all processes call this with."""
    if jax.process_count() == 1:
        return waiting
    return float(np.max(multihost_utils.process_allgather(np.float32(waiting))))


def _diverged(step: int, values: dict[str, float]) -> Diverged:
    advice = "Lower the learning rate (`learning_rate`) or the gradient norm (`clip_norm`)"
    if "skipped" in values:
        advice += ", or compute in bfloat16 (`precision`), which has the range that float16 lacks,"
    return Diverged(f"the training diverged at step {step}: {values}. {advice} and run again.")
