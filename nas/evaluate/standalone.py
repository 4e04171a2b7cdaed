"""How well a network on its own does, and the batch-norm statistics it runs with."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from nas.data import Dataset, Part
from nas.evaluate.batches import calibration_batches, labelled_batches
from nas.ops import Network
from nas.quantise import narrowed
from nas.run import run


@dataclasses.dataclass(frozen=True, eq=False)
class Standalone:
    """One network over one data set; parameters are passed to every method.

    Activations are float32; weights that the network has narrow are rounded as in its file (`nas.quantise.narrowed`).
    """

    network: Network
    data: Dataset
    batch_size: int = 128

    def calibrate(self, params: Mapping[str, Array], *, images: int) -> dict[str, Array]:
        """`params` with batch-norm statistics measured on so many training images."""
        batches = calibration_batches(self.data, images=images, batch_size=self.batch_size, size=self._size)
        return dict(params) | self._statistics(params, jnp.asarray(batches))

    def logits(self, params: Mapping[str, Array], part: Part) -> NDArray[np.float32]:
        """[n, classes] over all images of `part`."""
        images, _ = labelled_batches(self.data, part, batch_size=self.batch_size, size=self._size)
        out = np.concatenate([np.asarray(self._infer(params, x)) for x in images])
        return out[: len(part.labels)]

    def correct(self, params: Mapping[str, Array], part: Part) -> int:
        """Number of images of `part` that are classified correctly."""
        return int((self.logits(params, part).argmax(-1) == part.labels).sum())

    @property
    def _size(self) -> tuple[int, int]:
        height, width, _ = self.network.input
        return height, width

    @functools.cached_property
    def _statistics(self) -> Any:
        graph = self.network.flat()

        @jax.jit
        def measure(params: Any, batches: Array) -> dict[str, Array]:
            def one(_: None, images: Array) -> tuple[None, dict[str, Array]]:
                return None, run(graph, narrowed(graph, params), images, batch_stats=True)[1]

            return jax.tree.map(lambda a: a.mean(0), lax.scan(one, None, batches)[1])

        return measure

    @functools.cached_property
    def _infer(self) -> Any:
        graph = self.network.flat()
        return jax.jit(lambda params, images: run(graph, narrowed(graph, params), images)[0])
