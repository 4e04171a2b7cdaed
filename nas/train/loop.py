"""The loop that trainings share: batches in a fixed order, checkpoints, metrics, resume to the bit."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from nas.data import Part
from nas.errors import CheckpointError
from nas.train.checkpoint import Checkpoints

Progress = Callable[[int, int, dict[str, float]], None]  # (steps done, steps in all, newest metrics)
State = dict[str, Any]


def batches(part: Part, batch_size: int, *, seed: int, start: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Endless (uint8 images, int32 labels) from step `start` on. The order depends on (seed, epoch) alone.

    A set smaller than a batch is repeated; otherwise the last, incomplete batch of an epoch is left out.
    """
    n = len(part.labels)
    per_epoch = max(n // batch_size, 1)
    step = start
    while True:
        epoch, index = divmod(step, per_epoch)
        if index == 0 or step == start:
            order = np.random.default_rng([seed, epoch]).permutation(max(n, batch_size)) % n
        rows = order[index * batch_size : (index + 1) * batch_size]
        yield part.images[rows], part.labels[rows]
        step += 1


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
    folder: Path | None = None,
    checkpoint_steps: int = 100,
    log_steps: int = 10,
    progress: Progress | None = None,
) -> State:
    """Runs `step_function(state, step, images, labels) -> (state, metrics)` for `steps` steps.

    With a folder, checkpoints go to `folder`/checkpoints and metrics to `folder`/metrics.jsonl, and a training that
    was cut off goes on from its newest checkpoint to the same final state, bit for bit on one machine.

    Raises:
        CheckpointError: a damaged checkpoint, or a training that diverged to NaN.
    """
    if folder is None:
        return _loop(step_function, state, part, 0, steps, batch_size, seed, log_steps, progress, None, 0, [])
    with Checkpoints(folder / "checkpoints") as checkpoints:
        start = checkpoints.latest() or 0
        if start:
            state = checkpoints.restore(start, state)
        log = _Log(folder / "metrics.jsonl", start)
        return _loop(
            step_function, state, part, start, steps, batch_size, seed, log_steps, progress,
            checkpoints, checkpoint_steps, log,
        )  # fmt: skip


class _Log(list):
    """Metrics as JSON lines. What a run that was cut off wrote after its last checkpoint is dropped."""

    def __init__(self, path: Path, start: int):
        self.path = path
        rows = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # a torn last line
                    break
                if row["step"] <= start:
                    rows.append(row)
        super().__init__(rows)

    def flush(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self))
        os.replace(part, self.path)


def _loop(
    step_function, state, part, start, steps, batch_size, seed, log_steps, progress, checkpoints, checkpoint_steps, log
) -> State:
    began = time.perf_counter()
    for step, (images, labels) in zip(
        range(start, steps), batches(part, batch_size, seed=seed, start=start), strict=False
    ):
        state, metrics = step_function(state, step, images, labels)
        done = step + 1
        if done % log_steps == 0 or done == steps:
            values = {k: float(v) for k, v in jax.device_get(metrics).items()}
            if not all(np.isfinite(v) for v in values.values()):
                raise CheckpointError(
                    f"the training diverged at step {done}: {values}. Lower the learning rate "
                    f"(`learning_rate`) or the gradient norm (`clip_norm`) and run again."
                )
            rate = (done - start) * batch_size / (time.perf_counter() - began)
            log.append({"step": done, **values, "images_per_second": round(rate, 1)})
            if progress:
                progress(done, steps, {**values, "images/s": rate})
        if checkpoints is not None and (done % checkpoint_steps == 0 or done == steps):
            log.flush()
            checkpoints.save(done, state)
    return state
