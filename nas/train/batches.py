"""Training batches in a fixed order: from memory, or read ahead from files by Grain (the one place it enters)."""

import functools
import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from numpy.typing import NDArray

from nas.data import LazyImages, Part
from nas.errors import DataError

if TYPE_CHECKING:
    import grain

Batch = tuple[NDArray[np.uint8], NDArray[np.int32]]  # images [n, H, W, C], labels [n]
Process = tuple[int, int]  # (index, count): which of how many processes that share every batch

ALONE: Process = (0, 1)


def batches(
    part: Part, batch_size: int, *, seed: int, start: int, stop: int | None = None, process: Process = ALONE
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """(uint8 images, int32 labels) of the steps from `start` up to `stop`; endless without it.

    The order depends on (seed, epoch) alone, wherever the images are: the step number is all there is to remember.
    A set smaller than a batch is repeated; otherwise the last, incomplete batch of an epoch is left out. Images in
    memory are gathered when asked for, those in files are read ahead. Of each batch only the rows of `process` are
    read; those of all processes make the batch, in their order.

    Raises:
        DataError: a damaged image; Grain is not installed.
    """
    if isinstance(part.images, LazyImages):
        ahead = read_ahead(part, batch_size, seed=seed, start=start, stop=stop, process=process)
        try:
            yield from ahead
        finally:
            ahead.close()
        return
    rows = _rows(len(part), batch_size, seed, process)
    for step in itertools.count(start) if stop is None else range(start, stop):
        chosen = rows(step)
        yield part.images[chosen], part.labels[chosen]


def read_ahead(
    part: Part, batch_size: int, *, seed: int, start: int = 0, stop: int | None = None, process: Process = ALONE
) -> "grain.DatasetIterator[Batch]":
    """Grain's iterator over the batches of `part`; its state is `{"next_index": step}`.

    `part.images.threads` threads decode a batch each. At most two batches more than threads are held, which bounds
    memory.

    Raises:
        DataError: Grain is not installed.
    """
    try:
        import grain
    except ImportError as e:
        raise DataError(
            f"training images stay in their files (data.storage), which needs the package grain ({e}): "
            "`pip install grain`, or set data.storage = 'memory'."
        ) from e
    images = part.images
    assert isinstance(images, LazyImages)
    rows = _rows(len(part), batch_size, seed, process)

    def batch(step: int) -> Batch:
        chosen = rows(int(step))
        return images[chosen], part.labels[chosen]

    steps = grain.MapDataset.range(np.iinfo(np.int64).max if stop is None else stop)
    options = grain.ReadOptions(num_threads=images.threads, prefetch_buffer_size=images.threads + 2)
    iterator = iter(steps.map(batch).to_iter_dataset(options))
    iterator.set_state({"next_index": start if stop is None else min(start, stop)})
    return iterator


def _rows(n: int, batch_size: int, seed: int, process: Process) -> Any:
    """Function of a step: which of `n` images are the batch, as far as this process reads it."""
    mine, processes = process
    share = batch_size // processes
    per_epoch = max(n // batch_size, 1)

    @functools.lru_cache(maxsize=2)  # reading ahead straddles two epochs
    def order(epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([seed, epoch]).permutation(max(n, batch_size)) % n

    def rows(step: int) -> NDArray[np.int64]:
        epoch, index = divmod(step, per_epoch)
        first = index * batch_size + mine * share
        return order(epoch)[first : first + share]

    return rows


class Waits(Iterator[tuple[NDArray[Any], NDArray[Any]]]):
    """Passes batches on, and counts the seconds in which the device had to wait for them.

    JAX runs ahead of the device: waiting for a batch costs nothing while an earlier step is still being computed. So
    a wait counts in full if the newest step (`watch`) is done by the time that the batch is there, and not at all
    otherwise; the count is from above, by at most what was left to compute.

    Attributes:
        seconds: the count so far.
    """

    def __init__(self, items: Iterator[tuple[NDArray[Any], NDArray[Any]]]):
        self.seconds = 0.0
        self._items = items
        self._newest: list[Any] = []

    def watch(self, results: Any) -> None:
        """Tells what the step just begun will give: a tree of arrays."""
        self._newest = [leaf for leaf in jax.tree.leaves(results) if hasattr(leaf, "is_ready")]

    def __next__(self) -> tuple[NDArray[Any], NDArray[Any]]:
        began = time.perf_counter()
        item = next(self._items)
        if all(leaf.is_ready() for leaf in self._newest):
            self.seconds += time.perf_counter() - began
        return item
