"""The supernet: one compiled program for every network of a space."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nas.ops import Block, Network, Weight
from nas.space import Position, Space
from nas.supernet.sharing import read, store_shapes
from nas.supernet.switch import Mode, elastic

Params = Mapping[str, Any]  # arrays of JAX or NumPy


@dataclasses.dataclass(frozen=True, eq=False)
class Supernet:
    """Shared weights over `space`. The weights themselves are a flat dict, passed to every method.

    A subnet is named by its branch numbers [positions] (`space.branches(genotype)`), a traced array: nothing is
    compiled anew for another subnet.
    """

    space: Space

    @functools.cached_property
    def weights(self) -> dict[str, Weight]:
        """Every stored array, batch-norm statistics included, by name."""
        return store_shapes(b for p in self.space.positions for b in p.branches if b is not None)

    @functools.cached_property
    def _stages(self) -> list[list[Position]]:
        """Neighbouring positions that offer the same branches over the same shapes: they share one compiled switch."""
        same = itertools.groupby(self.space.positions, key=_signature)
        return [list(group) for _, group in same]

    def init(self, seed: int) -> dict[str, np.ndarray]:
        """Trained arrays: He-normal kernels (He et al. 2015, arXiv:1502.01852), scales 1, the rest 0, float32.

        Drawn by NumPy: in JAX every shape would be a compilation of its own.
        """
        out = {}
        for index, (name, w) in enumerate(sorted(self.weights.items())):
            if w.role == "kernel":
                gain = 1.0 if name.endswith("logits/kernel") else 2.0
                noise = np.random.default_rng([seed, index]).standard_normal(w.shape, np.float32)
                out[name] = noise * np.float32((gain / w.fan_in) ** 0.5)
            elif w.trained:
                out[name] = np.full(w.shape, w.role == "scale", np.float32)
        return out

    def apply(self, params: Params, branches: Array, images: Array, *, mode: Mode) -> tuple[Array, dict[str, Array]]:
        """Logits [n, classes] of one subnet, and the batch-norm statistics it saw.

        Args:
            params: the trained arrays; with mode "infer" the statistics too.
            branches: int32 [positions].
            images: [n, height, width, channels].
            mode: norms use this batch's moments ("train", "calibrate") or `params` ("infer"). Only "calibrate"
                returns the moments: in the stored shapes, zero where the subnet has no channel, so that all subnets'
                have one structure.
        """
        x = images
        seen: dict[str, Array] = {}
        index = 0
        for group in self._stages:
            step = elastic(group[0], self._relative(group[0]), mode)
            mine = [self._params_of(p, params, mode) for p in group]
            if len(group) == 1:
                x, stats = step(branches[index], mine[0], x)
                stats = jax.tree.map(lambda a: a[None], stats)
            else:
                stacked = jax.tree.map(lambda *a: jnp.stack(a), *mine)

                def body(carry: Array, xs: Any, step: Any = step) -> tuple[Array, dict[str, Array]]:
                    return step(xs[0], xs[1], carry)

                x, stats = lax.scan(body, x, (branches[index : index + len(group)], stacked))
            for number, position in enumerate(group):
                seen |= {f"{position.name}/{name}": a[number] for name, a in stats.items()}
            index += len(group)
        return x, seen

    def slice(self, params: Params, network: Network) -> dict[str, Array]:
        """The weights of `network` alone (copies), statistics included if `params` has them."""
        return read(params, network.blocks)

    def branches(self, genotypes: Any) -> np.ndarray:
        """int32 [..., positions] of genotypes [..., genes], which are checked."""
        return self.space.branches(self.space.check(genotypes))

    def _relative(self, position: Position) -> dict[str, Weight]:
        """Stored arrays of a position by their name below it."""
        prefix = position.name + "/"
        return {n.removeprefix(prefix): w for n, w in self.weights.items() if n.startswith(prefix)}

    def _params_of(self, position: Position, params: Params, mode: Mode) -> dict[str, Array]:
        return {
            name: params[f"{position.name}/{name}"]
            for name, w in self._relative(position).items()
            if w.trained or mode == "infer"
        }


def _signature(position: Position) -> tuple[Any, ...]:
    def relative(block: Block | None) -> Any:
        return block and (block.name.removeprefix(position.name), block.graph.key)

    return (position.input, position.output, tuple(relative(b) for b in position.branches))
