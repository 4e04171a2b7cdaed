"""A trace of some steps by `jax.profiler`: what the host and the devices do when."""

from pathlib import Path
from typing import Any

import jax

WARMUP_STEPS = 10  # of a process, which compile (several resolutions, one after the other) and are not traced


class Profile:
    """Traces some steps of a training into `folder`. Use it by `with`.

    TensorBoard (with the plug-in xprof) shows the folder; ui.perfetto.dev opens its *.trace.json.gz.

    Args:
        count: how many steps.
        start: the first step of this process; the trace begins `WARMUP_STEPS` later, or earlier where the rest of the
            training would be too short for it.
        stop: the step at which the training ends.
    """

    def __init__(self, folder: Path, count: int, *, start: int, stop: int):
        first = max(min(start + WARMUP_STEPS, stop - count), start)
        self.folder = folder
        self.steps = range(first, min(first + count, stop))
        self._traces = False

    def at(self, step: int, state: Any) -> None:
        """To be called with the state before every step, and after the last."""
        if self._traces and step == self.steps.stop:
            jax.block_until_ready(state)  # steps run behind the host's back; only the traced ones belong in the trace
            self.__exit__()
        elif self.steps and step == self.steps.start:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self._traces = True

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._traces:
            self._traces = False
            jax.profiler.stop_trace()
