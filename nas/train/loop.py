"""The loop that trainings share: batches in a fixed order, checkpoints, metrics, resume to the bit."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from nas.data import Part
from nas.errors import CheckpointError
from nas.train.batches import Waits, batches
from nas.train.checkpoint import Checkpoints

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
    folder: Path | None = None,
    checkpoint_steps: int = 100,
    log_steps: int = 10,
    progress: Progress | None = None,
) -> State:
    """Runs `step_function(state, step, images, labels) -> (state, metrics)` for `steps` steps.

    With a folder, checkpoints go to `folder`/checkpoints and metrics to `folder`/metrics.jsonl, and a training that
    was cut off goes on from its newest checkpoint to the same final state, bit for bit on one machine. `waiting` in
    the metrics is the share of the time since the row before in which the device waited for images.

    Where JAX is connected to several processes, all of them call this, with the same folder and a state whose arrays
    are the same on all of their devices; each gives `step_function` its rows of the batch, and the first one writes the
    metrics and tells the progress.

    Raises:
        CheckpointError: a damaged checkpoint, or a training that diverged to NaN.
        DataError: an image in a file that cannot be decoded.
    """
    if folder is None:
        return _loop(step_function, state, part, 0, steps, batch_size, seed, log_steps, progress, None, 0, [])
    with Checkpoints(folder / "checkpoints") as checkpoints:
        start = int(multihost_utils.broadcast_one_to_all(np.int32(checkpoints.latest() or 0)))
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
        if jax.process_index():
            return
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self))
        os.replace(part, self.path)


def _loop(
    step_function, state, part, start, steps, batch_size, seed, log_steps, progress, checkpoints, checkpoint_steps, log
) -> State:
    began = told = time.perf_counter()
    process = jax.process_index(), jax.process_count()
    stream, waited = Waits(batches(part, batch_size, seed=seed, start=start, stop=steps, process=process)), 0.0
    for step, (images, labels) in enumerate(stream, start):
        state, metrics = step_function(state, step, images, labels)
        stream.watch(metrics)
        done = step + 1
        if done % log_steps == 0 or done == steps:
            values = {k: float(v) for k, v in jax.device_get(metrics).items()}
            if not all(np.isfinite(v) for v in values.values()):
                raise CheckpointError(
                    f"the training diverged at step {done}: {values}. Lower the learning rate "
                    f"(`learning_rate`) or the gradient norm (`clip_norm`) and run again."
                )
            now = time.perf_counter()
            rate, waiting = (done - start) * batch_size / (now - began), (stream.seconds - waited) / (now - told)
            told, waited = now, stream.seconds
            log.append({"step": done, **values, "images_per_second": round(rate, 1), "waiting": round(waiting, 4)})
            if progress and process[0] == 0:
                progress(done, steps, {**values, "images/s": rate, "waiting": waiting})
        if checkpoints is not None and (done % checkpoint_steps == 0 or done == steps):
            log.flush()
            checkpoints.save(done, state)
    return state
