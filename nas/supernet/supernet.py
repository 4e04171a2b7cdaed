"""The supernet: one compiled program for every network of a space."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nas import config
from nas.ops import Block, Network, Precision, Weight
from nas.space import Position, Space
from nas.supernet.int8 import integer, observed
from nas.supernet.sharing import read, store_shapes
from nas.supernet.switch import Manner, Mode, Step, elastic

# Layers of one kind up to which each is compiled on its own, so that what it keeps for the backward pass stays where it
# is; a loop would copy it twice, which takes longer than computing it again. More layers than that are a loop, whose
# compilation takes as long for 8 as for 4.
WRITTEN_OUT = 3

LayerMode = Literal[Mode, "observe", "int8"]
Params = Mapping[str, Any]  # arrays of JAX or NumPy
Layer = Callable[[Array, Mapping[str, Array], Array], tuple[Array, dict[str, Array]]]


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
        blocks = (b for p in self.space.positions for b in p.branches if b is not None)
        return store_shapes(blocks, kernel_transform=self.space.kernel_transform)

    @functools.cached_property
    def _stages(self) -> dict[int, list[list[Position]]]:
        """For each resolution, runs of neighbouring positions that offer the same branches over the same shapes: they
        share one compiled switch."""
        return {
            resolution: [
                list(group) for _, group in itertools.groupby(self.space.at(resolution).positions, key=_signature)
            ]
            for resolution in self.space.resolutions
        }

    def init(self, seed: int) -> dict[str, np.ndarray]:
        """Trained arrays: He-normal kernels (He et al. 2015, arXiv:1502.01852), scales 1, transforms the identity, the
        rest 0, float32.

        Drawn by NumPy: in JAX every shape would be a compilation of its own.
        """
        out = {}
        for index, (name, w) in enumerate(sorted(self.weights.items())):
            if w.role == "kernel":
                gain = 1.0 if name.endswith("logits/kernel") else 2.0
                noise = np.random.default_rng([seed, index]).standard_normal(w.shape, np.float32)
                out[name] = noise * np.float32((gain / w.fan_in) ** 0.5)
            elif w.role == "transform":
                out[name] = np.eye(w.shape[0], dtype=np.float32)
            elif w.trained:
                out[name] = np.full(w.shape, w.role == "scale", np.float32)
        return out

    def apply(
        self,
        params: Params,
        branches: Array,
        images: Array,
        *,
        mode: Mode,
        key: Array | None = None,
        noise: config.Noise | None = None,
        norm_images: int | None = None,
        rematerialise: bool = False,
    ) -> tuple[Array, dict[str, Array]]:
        """Logits [n, classes], float32, of one subnet, and the batch-norm statistics it saw.

        Args:
            params: the trained arrays; with mode "infer" the statistics too. Convolutions compute in the type of their
                kernels and of `images` (nas.train.precision), norms and logits in float32.
            branches: int32 [positions], see `branches`.
            images: [n, height, width, channels]; the height says which of the space's resolutions this is.
            mode: norms use this batch's moments ("train", "calibrate") or `params` ("infer"). Only "calibrate"
                returns the moments: in the stored shapes, zero where the subnet has no channel, so that all subnets'
                have one structure.
            key: of the noise, in mode "train".
            noise: dropout, drop-path (rising linearly over the positions) and DropBlock; None: none. The rate of
                drop-path may be traced.
            norm_images: images that norms take moments over; None: the whole batch.
            rematerialise: keep only the inputs of stages for the backward pass, not what convolutions made.

        Raises:
            SpaceError: the space does not have that resolution.
        """
        noise = noise or config.Noise()
        drop_path = noise.drop_path
        if isinstance(drop_path, Array):
            noise = config.with_values(noise, {"drop_path": 1.0})  # static: that it drops; how much, the rates say
        manner = Manner(mode, norm_images, noise)
        x = images
        seen: dict[str, Array] = {}
        index, positions = 0, len(self.space.positions)
        rates = jnp.asarray(drop_path * np.linspace(0, 1, positions), jnp.float32)
        keys = jnp.zeros((positions, 2), jnp.uint32)
        if manner.noisy:
            if key is None:
                raise ValueError("a pass with noise needs a key")
            keys = jax.random.key_data(jax.random.split(key, positions))
        for group in self._stages_at(images.shape[1]):
            tapes = mode == "train" and norm_images is None and not rematerialise and len(group) <= WRITTEN_OUT
            step = elastic(group[0], self._relative(group[0]), dataclasses.replace(manner, tapes=tapes))
            mine = [self.params_of(p, params, mode) for p in group]
            stacked = jax.tree.map(lambda *a: jnp.stack(a), *mine)
            part = slice(index, index + len(group))
            xs = (branches[part], (keys[part], rates[part]), stacked)

            stage = functools.partial(_in_turn, step)
            x, stats = (jax.checkpoint(stage) if rematerialise else stage)(x, xs)
            for number, position in enumerate(group):
                seen |= {f"{position.name}/{name}": a[number] for name, a in stats.items()}
            index += len(group)
        return x.astype(jnp.float32), seen

    def layers(self, resolution: int) -> list[tuple[int, Position]]:
        """Every position of the networks of one resolution, in order, with its kind: positions of one kind are
        computed alike, by `layer(resolution, kind, mode)`.

        Raises:
            SpaceError: the space does not have that resolution.
        """
        return [(kind, position) for kind, group in enumerate(self._stages_at(resolution)) for position in group]

    def layer(self, resolution: int, kind: int, mode: LayerMode, weights_in: Precision = "float32") -> Layer:
        """One position alone, as `apply` computes it: (branch number, `params_of` the position, x) -> (y, statistics).

        A network is its layers in turn. `x` and `y` have the position's widest shapes, statistics are named below it.
        Two modes are known of layers alone. "observe" is "infer" and gives the ranges of values besides; with these
        among its arrays, "int8" computes what the int8 file will (see `nas.supernet.int8`).

        Args:
            weights_in: float32, or a precision of narrow weights (`nas.quantise.narrowed`) but in mode "int8", whose
                weights are its own.
        """
        position = self._stages_at(resolution)[kind][0]
        if mode == "observe":
            return observed(position, weights_in)
        if mode == "int8":
            return integer(position)
        step = elastic(position, self._relative(position), Manner(mode, weights_in=weights_in))
        chance = (jnp.zeros(2, jnp.uint32), jnp.zeros((), jnp.float32))
        return lambda branch, params, x: step(branch, chance, params, x)

    def _stages_at(self, resolution: int) -> list[list[Position]]:
        self.space.at(resolution)  # or an error that names what there is
        return self._stages[resolution]

    def slice(self, params: Params, network: Network) -> dict[str, Array]:
        """The weights of `network` alone (copies), statistics included if `params` has them."""
        return read(params, network.blocks)

    def branches(self, genotypes: Any) -> np.ndarray:
        """int32 [..., positions] of genotypes [..., genes], which are checked; valid at their own resolution."""
        genotypes = self.space.check(genotypes)
        sides = self.space.resolution_of(genotypes)
        out = np.zeros((*genotypes.shape[:-1], len(self.space.positions)), np.int32)
        for side in np.unique(sides):
            mine = self.space.without_resolution(genotypes[sides == side])
            out[sides == side] = self.space.at(int(side)).branches(mine)
        return out

    def _relative(self, position: Position) -> dict[str, Weight]:
        """Stored arrays of a position by their name below it."""
        prefix = position.name + "/"
        return {n.removeprefix(prefix): w for n, w in self.weights.items() if n.startswith(prefix)}

    def params_of(self, position: Position, params: Params, mode: Mode) -> dict[str, Array]:
        """The arrays of `params` that a position reads, by their name below it; statistics in mode "infer" only."""
        return {
            name: params[f"{position.name}/{name}"]
            for name, w in self._relative(position).items()
            if w.trained or mode == "infer"
        }

    def statistics_of(self, position: Position) -> dict[str, np.ndarray]:
        """Zeros for the batch-norm statistics of a position, by their name below it, in the stored shapes."""
        return {n: np.zeros(w.shape, np.float32) for n, w in self._relative(position).items() if not w.trained}


def _in_turn(step: Step, x: Array, xs: Any) -> tuple[Array, dict[str, Array]]:
    """`step` over layers of one kind, whose inputs `xs` are stacked; their statistics stacked alike."""
    if len(xs[0]) > WRITTEN_OUT:
        return lax.scan(lambda x, one: step(one[0], one[1], one[2], x), x, xs)
    seen = []
    for number in range(len(xs[0])):
        branch, chance, params = jax.tree.map(lambda a, n=number: a[n], xs)
        x, stats = step(branch, chance, params, x)  # a layer alone may change the shape
        seen.append(stats)
    return x, jax.tree.map(lambda *a: jnp.stack(a), *seen)


def _signature(position: Position) -> tuple[Any, ...]:
    def relative(block: Block | None) -> Any:
        return block and (block.name.removeprefix(position.name), block.graph.key)

    return (position.input, position.output, tuple(relative(b) for b in position.branches))
