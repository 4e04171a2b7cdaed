"""How well subnets do with the supernet's weights.

Batch-norm statistics do not carry over from one subnet to another: they are measured anew, on training images, for
every subnet that is scored (Yu et al. 2020, arXiv:2003.11142, sec. 3.4).

Subnets are computed layer by layer, so that what two of them have in common is computed once: they are taken in the
order of their branches, and where the next ones part, what came of all images so far is kept. The layers' programs and
their inputs are the same whether a subnet is scored alone or among others, so sharing changes no bit of the outcome.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from nas.data import Dataset, Part
from nas.evaluate.batches import calibration_batches, labelled_batches
from nas.ops import WEIGHT_BITS, Block, Graph, Precision
from nas.quantise import has_integers
from nas.space import Position
from nas.supernet import LayerMode, Supernet

CACHE_BYTES = 2 << 30
CONCURRENT = 4  # batches at most: each needs the memory of its activations

T = TypeVar("T")

_Mode = Literal[LayerMode, "measure"]  # "measure" is "calibrate" without what the layer makes
_Key = tuple[int, int, _Mode, Precision]  # of a program: resolution, kind of layer, mode, what weights are held in

Counted = Literal["float32", "int8", "mixed"]  # what subnets are computed in when their answers are counted

Statistics = list[dict[str, Array]]  # of each layer, by name below it, in the stored shapes; ranges of values likewise


@dataclasses.dataclass(frozen=True)
class _Batches:
    """What the first layers of a subnet make of all images: lists of [n, h, w, c]."""

    calibration: list[Array]
    observed: list[Array]  # of calibration images again, normalised as in inference; only where some are in int8
    validation: list[list[Array]]  # in each precision that is counted in

    def __iter__(self) -> Iterator[Array]:
        return itertools.chain(self.calibration, self.observed, *self.validation)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self)


@dataclasses.dataclass(frozen=True, eq=False)
class SubnetEvaluator:
    """Scores genotypes on the validation part of `data`; a layer is compiled once, when a subnet first has its kind.

    `cache_bytes` bounds what is kept for subnets that begin alike; with 0, each is computed from its images on. With
    `precision` "int8" a subnet is computed as its int8 file will, quantised by what its values are on the calibration
    images: `nas.quantise.calibrate` and `simulate` of all subnets in one program (`nas.supernet.int8`). With "mixed" so
    are the blocks that the space has in int8; those with narrow weights have them from the moments of norms on.

    `counts` are those in `precision` and in each that `also` names, to the bit what an evaluator of that precision
    alone counts: moments of norms are measured once for all of them.
    """

    supernet: Supernet
    params: Mapping[str, Array]
    data: Dataset
    calibration_images: int = 512
    batch_size: int = 128
    cache_bytes: int = CACHE_BYTES
    precision: Counted = "float32"
    also: tuple[Counted, ...] = ()  # float32 or int8, beside float32 or int8

    @property
    def total(self) -> int:
        """Number of validation images."""
        return len(self.data.val.labels)

    def __call__(self, genotypes: Any) -> list[int]:
        """Number of validation images that each genotype [n, genes] classifies correctly, in `precision`.

        An integer, since the last bits of a float depend on thread count and batch shape. It does not depend on the
        other genotypes, nor on their order.
        """
        return [first for first, *_ in self.counts(genotypes)]

    def counts(self, genotypes: Any) -> list[tuple[int, ...]]:
        """As a call gives it, in `precision` and in each of `also`."""
        branches = self.supernet.branches(genotypes)
        sides = self.supernet.space.resolution_of(self.supernet.space.check(genotypes))
        correct = np.zeros((len(branches), len(self._precisions)), np.int64)
        for side in np.unique(sides).tolist():
            rows = np.flatnonzero(sides == side)
            correct[rows] = self._correct(side, branches[rows])
        return [tuple(counts) for counts in correct.tolist()]

    @property
    def compiled(self) -> int:
        """Number of programs compiled so far: two for each kind of layer that subnets of a resolution had, three
        in int8."""
        return sum(program._cache_size() for program in self._programs.values())

    def with_params(self, params: Mapping[str, Array]) -> "SubnetEvaluator":
        """The same for other weights: what is compiled, and the images, are shared with this one."""
        other = dataclasses.replace(self, params=params)
        for made in ("_programs", "_inputs", "_targets", "_zeros"):
            other.__dict__[made] = getattr(self, made)
        return other

    def statistics(self, genotype: Any) -> dict[str, Array]:
        """Batch-norm statistics of one subnet, in the stored shapes."""
        side = int(self.supernet.space.resolution_of(self.supernet.space.check(genotype)))
        layers = self._layers(side)
        _, seen = self._calibrate(
            side, self.supernet.branches(genotype), 0, len(layers), self._images(side).calibration
        )
        return {f"{position.name}/{n}": a for (_, position), s in zip(layers, seen, strict=True) for n, a in s.items()}

    def _correct(self, side: int, branches: NDArray[np.int32]) -> NDArray[np.int64]:
        """Counts [n, precisions] of subnets [n, layers] of one resolution."""
        rows, row_of = np.unique(branches, axis=0, return_inverse=True)  # in order of their branches
        depth = rows.shape[1]
        shared = [*(int((a != b).argmax()) for a, b in itertools.pairwise(rows)), 0]
        correct = np.zeros((len(rows), len(self._precisions)), np.int64)
        path = [(0, self._images(side))]  # what is kept: after so many layers, of the subnet that was scored last
        for index, row in enumerate(rows):
            for stop in (*_partings(shared[index:], path[-1][0]), depth):
                start, batches = path[-1]
                if stop < depth and not self._fits(side, stop, path):
                    continue
                calibration, statistics = self._calibrate(side, row, start, stop, batches.calibration)
                observed, ranged = list[Array](), statistics
                if any(map(self._quantises, self._precisions)):
                    observed, ranges = self._observe(side, row, start, statistics, batches.observed)
                    ranged = [s | r for s, r in zip(statistics, ranges, strict=True)]
                validation = [
                    self._infer(side, row, start, ranged if self._quantises(precision) else statistics, x, precision)
                    for precision, x in zip(self._precisions, batches.validation, strict=True)
                ]
                if stop < depth:
                    path.append((stop, _Batches(calibration, observed, validation)))
                else:
                    correct[index] = [self._hits(side, logits) for logits in validation]
            path = [(stop, kept) for stop, kept in path if stop <= shared[index]]
        return correct[row_of.ravel()]

    def _hits(self, side: int, logits: list[Array]) -> int:
        """Validation images that are classified correctly."""
        return sum(int(_hits(y, labels)) for y, labels in zip(logits, self._labels(side), strict=True))

    def _calibrate(
        self, side: int, row: NDArray[np.int32], start: int, stop: int, batches: list[Array]
    ) -> tuple[list[Array], Statistics]:
        """What layers `start` to `stop` make of calibration batches, each normalised by its own moments, and the mean
        of these moments over batches. The last layer of all makes nothing but moments."""
        layers = self._layers(side)[start:stop]
        params = [self._params[position.name] for _, position in layers]
        modes: list[_Mode] = ["measure" if start + i + 1 == len(row) else "calibrate" for i in range(len(layers))]
        out, seen = self._pass(side, row, start, modes, params, batches)
        zeros = [self._zeros[position.name] for _, position in layers]
        return out, [_mean(each) if each else none for each, none in zip(seen, zeros, strict=True)]

    def _observe(
        self, side: int, row: NDArray[np.int32], start: int, statistics: Statistics, batches: list[Array]
    ) -> tuple[list[Array], Statistics]:
        """What the layers from `start` on, as many as there are statistics, make of calibration batches, normalised by
        these; and the range of each value over all of them."""
        modes: list[_Mode] = ["observe"] * len(statistics)
        out, seen = self._pass(side, row, start, modes, self._with(side, start, statistics), batches)
        return out, [_extent(each) if each else {} for each in seen]

    def _infer(
        self,
        side: int,
        row: NDArray[np.int32],
        start: int,
        statistics: Statistics,
        batches: list[Array],
        precision: Counted,
    ) -> list[Array]:
        """What the layers from `start` on, as many as there are statistics, make of each validation batch."""
        layers = self._layers(side)[start : start + len(statistics)]
        modes: list[_Mode] = [
            _deployed(position.branches[row[start + i]], precision) for i, (_, position) in enumerate(layers)
        ]
        return self._pass(side, row, start, modes, self._with(side, start, statistics), batches)[0]

    @property
    def _precisions(self) -> tuple[Counted, ...]:
        return (self.precision, *self.also)

    def _quantises(self, precision: Counted) -> bool:
        """Whether activations of some subnet are, so that their ranges must be known."""
        return precision == "int8" or (precision == "mixed" and self._has_int8)

    @functools.cached_property
    def _has_int8(self) -> bool:
        """Whether some block of the space is in int8."""
        blocks = (b for p in self.supernet.space.positions for b in p.branches if b is not None)
        return any(block.graph.precision == "int8" for block in blocks)

    def _weights_in(self, block: Block | None) -> Precision:
        """What a block's weights are held in wherever its activations are float32."""
        own: Precision = "float32" if block is None else block.graph.precision
        return own if self.precision == "mixed" and own in WEIGHT_BITS else "float32"

    def _with(self, side: int, start: int, statistics: Statistics) -> Statistics:
        """The arrays of the layers from `start` on with their statistics."""
        layers = self._layers(side)[start : start + len(statistics)]
        return [self._params[position.name] | s for (_, position), s in zip(layers, statistics, strict=True)]

    def _pass(
        self,
        side: int,
        row: NDArray[np.int32],
        start: int,
        modes: Sequence[_Mode],
        params: Statistics,
        batches: list[Array],
    ) -> tuple[list[Array], list[tuple[dict[str, Array], ...]]]:
        """What the layers from `start` on, as many as there are `params`, make of each batch; and for each layer what
        was seen in each batch, nothing if it is skipped."""
        layers = self._layers(side)[start : start + len(params)]
        present: dict[int, _Key] = {
            i: (side, kind, modes[i], self._weights_in(position.branches[row[start + i]]))
            for i, (kind, position) in enumerate(layers)
            if not _skipped(position, row[start + i])
        }

        def through(x: Array) -> tuple[Array, list[dict[str, Array]]]:
            seen = []
            for i, key in present.items():
                x, what = self._program(*key)(row[start + i], params[i], x)
                seen.append(what)
            return x, seen

        known = self._programs.keys() >= set(present.values())
        out, seen = zip(*_each(through, batches, known=known), strict=True)
        of = dict(zip(present, zip(*seen, strict=True), strict=True))
        return list(out), [of.get(i, ()) for i in range(len(layers))]

    def _fits(self, side: int, stop: int, path: list[tuple[int, _Batches]]) -> bool:
        """Whether what comes of all images after `stop` layers may be kept beside what is."""
        root = path[0][1]
        images = sum(map(len, root))
        wanted = 4 * images * int(np.prod(self._layers(side)[stop - 1][1].output))
        return wanted + sum(kept.nbytes for _, kept in path[1:]) <= self.cache_bytes

    # made once

    def _program(self, side: int, kind: int, mode: _Mode, weights_in: Precision) -> Any:
        """Makes (y, statistics)."""
        key = (side, kind, mode, weights_in)
        if key not in self._programs:
            layer = self.supernet.layer(side, kind, "calibrate" if mode == "measure" else mode, weights_in)
            measure = jax.jit(lambda *args: (None, layer(*args)[1]))
            self._programs[key] = measure if mode == "measure" else jax.jit(layer)
        return self._programs[key]

    def _layers(self, side: int) -> list[Any]:
        return self.supernet.layers(side)

    def _images(self, side: int) -> _Batches:
        if side not in self._inputs:
            height, width, _ = self.supernet.space.at(side).input
            size, batch = (height, width), self.batch_size
            part: Part = self.data.val
            calibration = calibration_batches(self.data, images=self.calibration_images, batch_size=batch, size=size)
            images, labels = labelled_batches(self.data, part, batch_size=batch, size=size)
            calibration = [*map(jnp.asarray, calibration)]
            observed = calibration if any(map(self._quantises, self._precisions)) else []
            validation = [*map(jnp.asarray, images)]
            self._inputs[side] = _Batches(calibration, observed, [validation] * len(self._precisions))
            self._targets[side] = [*map(jnp.asarray, labels)]
        return self._inputs[side]

    def _labels(self, side: int) -> list[Array]:
        self._images(side)
        return self._targets[side]

    @functools.cached_property
    def _programs(self) -> dict[_Key, Any]:
        return {}

    @functools.cached_property
    def _inputs(self) -> dict[int, _Batches]:
        return {}

    @functools.cached_property
    def _targets(self) -> dict[int, list[Array]]:
        return {}

    @functools.cached_property
    def _params(self) -> dict[str, dict[str, Array]]:
        """The trained arrays of each position, by their name below it."""
        of = self.supernet.params_of
        return {position.name: of(position, self.params, "calibrate") for position in self.supernet.space.positions}

    @functools.cached_property
    def _zeros(self) -> dict[str, dict[str, Any]]:
        """Statistics of each position before any image."""
        return {position.name: self.supernet.statistics_of(position) for position in self.supernet.space.positions}


def _deployed(block: Block | None, precision: Counted) -> _Mode:
    """How a block is computed where answers are counted."""
    graph = Graph(()) if block is None else block.graph
    integers = has_integers(graph, precision) and graph.precision not in WEIGHT_BITS
    return "int8" if integers else "infer"


def _skipped(position: Position, branch: int) -> bool:
    """Whether a branch leaves its input as it is: no program need copy it, nor measure it."""
    return position.branches[branch] is None and position.input == position.output


def _partings(shared: list[int], known: int) -> list[int]:
    """Depths beyond `known`, ascending, at which a subnet parts from later ones.

    `shared[i]`: how many first layers subnet i of a sorted list has in common with the next one.
    """
    depths: set[int] = set()
    nearest = shared[0]
    for length in shared:
        nearest = min(nearest, length)
        if nearest <= known:
            break
        depths.add(nearest)
    return sorted(depths)


def _each(work: Callable[[Array], T], batches: list[Array], *, known: bool) -> list[T]:
    """`work` of every batch, in their order; unless its programs are `known`, the first batch compiles them for all.

    On CPU a few at a time: an op seldom has work for all cores from its beginning to its end, and a program, which runs
    in the thread that calls it, cannot run while Python looks for the next one.
    """
    threads = min(len(batches), _cores(), CONCURRENT) if jax.default_backend() == "cpu" else 1
    if threads == 1:
        return [work(x) for x in batches]
    first = [] if known else [work(batches[0])]
    with ThreadPoolExecutor(threads) as pool:
        return first + list(pool.map(work, batches[len(first) :]))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@jax.jit
def _mean(each: tuple[dict[str, Array], ...]) -> dict[str, Array]:
    return jax.tree.map(lambda *values: sum(values) / len(values), *each)


@jax.jit
def _extent(each: tuple[dict[str, Array], ...]) -> dict[str, Array]:
    """The ranges [values, 2] that cover those of each."""

    def cover(*ranges: Array) -> Array:
        every = jnp.stack(ranges)
        return jnp.stack([every[..., 0].min(0), every[..., 1].max(0)], -1)

    return jax.tree.map(cover, *each)


@jax.jit
def _hits(logits: Array, labels: Array) -> Array:
    return (logits.argmax(-1) == labels).sum()
