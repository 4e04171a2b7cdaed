"""How well subnets do with the supernet's weights.

Batch-norm statistics do not carry over from one subnet to another: they are measured anew, on training images, for
every subnet that is scored (Yu et al. 2020, arXiv:2003.11142, sec. 3.4).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nas.data import Dataset, Part
from nas.evaluate.batches import calibration_batches, labelled_batches
from nas.supernet import Supernet


@dataclasses.dataclass(frozen=True, eq=False)
class SubnetEvaluator:
    """Scores genotypes on the validation part of `data`; one program is compiled for all of one resolution."""

    supernet: Supernet
    params: Mapping[str, Array]
    data: Dataset
    calibration_images: int = 512
    batch_size: int = 128

    @property
    def total(self) -> int:
        """Number of validation images."""
        return len(self.data.val.labels)

    def __call__(self, genotypes: Any) -> list[int]:
        """Number of validation images that each genotype [n, genes] classifies correctly.

        An integer, since the last bits of a float depend on thread count and batch shape. One after the other:
        mapping over a switch with `vmap` would run every branch.
        """
        branches = self.supernet.branches(genotypes)
        sides = self.supernet.space.resolution_of(self.supernet.space.check(genotypes))
        return [
            int(self._correct(self.params, b, self._calibration(side), *self._validation(side)))
            for b, side in zip(branches, sides.tolist(), strict=True)
        ]

    @property
    def compiled(self) -> int:
        """Number of programs compiled so far to score with: one for each resolution, whatever was scored."""
        return self._correct._cache_size()

    def statistics(self, genotype: Any) -> dict[str, Array]:
        """Batch-norm statistics of one subnet, in the stored shapes."""
        side = int(self.supernet.space.resolution_of(self.supernet.space.check(genotype)))
        return self._statistics(self.params, self.supernet.branches(genotype), self._calibration(side))

    def _calibration(self, side: int) -> Array:
        if side not in self._calibrations:
            self._calibrations[side] = jnp.asarray(
                calibration_batches(
                    self.data, images=self.calibration_images, batch_size=self.batch_size, size=self._size(side)
                )
            )
        return self._calibrations[side]

    def _validation(self, side: int) -> tuple[Array, Array]:
        if side not in self._validations:
            part: Part = self.data.val
            images, labels = labelled_batches(self.data, part, batch_size=self.batch_size, size=self._size(side))
            self._validations[side] = jnp.asarray(images), jnp.asarray(labels)
        return self._validations[side]

    def _size(self, side: int) -> tuple[int, int]:
        height, width, _ = self.supernet.space.at(side).input
        return height, width

    @functools.cached_property
    def _calibrations(self) -> dict[int, Array]:
        return {}

    @functools.cached_property
    def _validations(self) -> dict[int, tuple[Array, Array]]:
        return {}

    @functools.cached_property
    def _statistics(self) -> Any:
        def measure(params: Any, branches: Array, batches: Array) -> dict[str, Array]:
            def one(_: None, images: Array) -> tuple[None, dict[str, Array]]:
                return None, self.supernet.apply(params, branches, images, mode="calibrate")[1]

            return jax.tree.map(lambda a: a.mean(0), lax.scan(one, None, batches)[1])

        return jax.jit(measure)

    @functools.cached_property
    def _correct(self) -> Any:
        @jax.jit
        def count(params: Any, branches: Array, calibration: Array, images: Array, labels: Array) -> Array:
            everything = dict(params) | self._statistics(params, branches, calibration)

            def one(total: Array, batch: tuple[Array, Array]) -> tuple[Array, None]:
                logits, _ = self.supernet.apply(everything, branches, batch[0], mode="infer")
                return total + (logits.argmax(-1) == batch[1]).sum(), None

            return lax.scan(one, jnp.zeros((), jnp.int32), (images, labels))[0]

        return count
