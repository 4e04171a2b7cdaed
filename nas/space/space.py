"""A space of networks: choices, genotypes, and the exact arithmetic of additive costs over all of them.

A network is a chain of *positions*; at each, the genotype picks one *branch* (a block, or nothing). Everything that
adds up over positions (latency from a table, MACs, parameters) is therefore a sum of array look-ups, and its smallest
and largest value over the whole space is found exactly, without sampling.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from nas import catalog, cost
from nas.config import nearest
from nas.errors import SpaceError
from nas.ops import Block, Graph, Network, Shape, in_precision

Genotypes = NDArray[np.uint8]

Factor = tuple[tuple[int, ...], NDArray[np.float64]]  # genes, and a table with one axis each

_PART = 8192  # genotypes at a time: what is made of them at one position stays in cache


@dataclasses.dataclass(frozen=True)
class Choice:
    """One decision. It matters only while every gene in `conditions` has one of the listed values."""

    name: str  # "stage1/layer2/kernel"
    values: tuple[Any, ...]
    conditions: tuple[tuple[int, tuple[int, ...]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Position:
    """One place in the chain. Branch `branch_of[g0, g1, ...]` is taken when the genes `genes` have those values."""

    name: str  # "stage1/layer2"
    genes: tuple[int, ...]
    branch_of: NDArray[np.int32]  # one axis per gene
    branches: tuple[Block | None, ...]  # None: the position is skipped

    @functools.cached_property
    def input(self) -> Shape:
        """Of the widest input, at the largest resolution; channels of narrower ones come first."""
        return max((b.graph.input for b in self.branches if b is not None), key=lambda s: s[::-1])

    @functools.cached_property
    def output(self) -> Shape:
        """Of the widest output, likewise."""
        return max((b.graph.shape for b in self.branches if b is not None), key=lambda s: s[::-1])

    @functools.cached_property
    def computed(self) -> tuple[tuple[Block | None, ...], NDArray[np.int32]]:
        """The distinct branches, precisions aside, and which of them each branch is [branches]: what weights know."""
        number: dict[Any, int] = {}
        distinct: list[Block | None] = []
        which = []
        for block in self.branches:
            plain = block and replace(block, graph=in_precision(block.graph, "float32"))
            key = plain and (plain.name, plain.graph.key)
            if key not in number:
                number[key] = len(distinct)
                distinct.append(plain)
            which.append(number[key])
        return tuple(distinct), np.array(which, np.int32)

    def index(self, columns: Genotypes) -> NDArray[np.unsignedinteger]:
        """Where in the flat `branch_of` genotypes are that are given by column, [genes, n] -> [n].

        In the smallest integers that hold it: with int64 the same arithmetic takes twice as long.
        """
        out = np.zeros(columns.shape[1], np.min_scalar_type(max([self.branch_of.size - 1, *self.branch_of.shape])))
        for gene, size in zip(self.genes, self.branch_of.shape, strict=True):
            out *= size
            out += columns[gene]
        return out

    def at(self, index: int) -> "Position":
        """The position at resolution number `index`, which is its first gene."""
        used, branch_of = np.unique(self.branch_of[index], return_inverse=True)
        branches = tuple(self.branches[b] for b in used)
        genes = tuple(g - 1 for g in self.genes[1:])
        return Position(self.name, genes, branch_of.reshape(self.branch_of.shape[1:]).astype(np.int32), branches)


@dataclasses.dataclass(frozen=True, eq=False)
class Between:
    """What it costs that one block follows another, by the way in which the first ends (`Space.between`).

    Way 0 is that no block came before; a skipped position, and a block without ops, leave it as it is.
    """

    ways: int
    cost: tuple[NDArray[np.float64], ...]  # for each position [ways, branches]
    after: tuple[NDArray[np.intp], ...]  # the way that comes out, likewise


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """All networks. Genotypes are uint8 arrays [genes], one value number per choice."""

    name: str
    input: Shape  # at the largest resolution
    classes: int
    choices: tuple[Choice, ...]
    positions: tuple[Position, ...]
    resolutions: tuple[int, ...]  # heights of the input, ascending; if there are several, the first gene picks one
    kernel_transform: bool = False  # smaller kernels are learned transforms of larger ones (nas.supernet.sharing)
    description: str = ""

    @classmethod
    def of_choices(cls, choices: Mapping[str, Sequence[Any]]) -> "Space":
        """A space of choices that build no network: for tabulated benchmarks, and what else has genotypes.

        Raises:
            SpaceError: a choice has no value, or more than 256.
        """
        for name, values in choices.items():
            if not 1 <= len(values) <= 256:
                raise SpaceError(f"choice {name!r} has {len(values)} values: 1 to 256 are needed.")
        made = tuple(Choice(name, tuple(values)) for name, values in choices.items())
        return cls("choices", (0, 0, 0), 0, made, (), (0,))

    @property
    def argument(self) -> str:
        """As commands take it: "tiny.toml --image 24x24x3 --classes 10". Where a file lies is not known."""
        name = self.name if self.name in catalog.list_spaces() else f"{self.name}.toml"
        return f"{name} --image {'x'.join(map(str, self.input))} --classes {self.classes}"

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each choice."""
        return tuple(len(c.values) for c in self.choices)

    @functools.cached_property
    def digest(self) -> str:
        """Hash of everything that gives a genotype its meaning."""
        meaning = [[c.name, c.values, c.conditions] for c in self.choices]
        keys = [
            [p.name, p.genes, p.branch_of.tolist(), [b and [b.name, b.graph.key] for b in p.branches]]
            for p in self.positions
        ]
        everything = [meaning, keys, self.input, self.classes, self.resolutions, self.kernel_transform]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]

    @functools.cached_property
    def mixed(self) -> bool:
        """Whether some blocks are in another precision than float32: files of its networks are of mixed precision."""
        return any(b is not None and b.graph.mixed for p in self.positions for b in p.branches)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.input))
        size = f"{len(self.choices)} choices, {self.count():.3g} networks"
        return f"Space({self.name!r}, {shape} -> {self.classes}, {size})"

    # resolutions

    def at(self, resolution: int) -> "Space":
        """The networks of one resolution: their genotypes are those of this space without the resolution's gene.

        Raises:
            SpaceError: the space does not have that resolution.
        """
        if resolution not in self._at:
            raise SpaceError(
                f"space {self.name!r} has no networks for images of height {resolution}; its resolutions are "
                f"{', '.join(map(str, self.resolutions))}. Resize the images, or choose another space."
            )
        return self._at[resolution]

    def resolution_of(self, genotypes: Genotypes) -> NDArray[np.int64]:
        """Heights [...] of the inputs of genotypes [..., genes]."""
        if len(self.resolutions) == 1:
            return np.full(genotypes.shape[:-1], self.resolutions[0])
        return np.asarray(self.resolutions)[genotypes[..., 0]]

    def without_resolution(self, genotypes: Genotypes) -> Genotypes:
        """Genotypes [..., genes] as those of `at(resolution)`."""
        return genotypes if len(self.resolutions) == 1 else genotypes[..., 1:]

    @functools.cached_property
    def _at(self) -> dict[int, "Space"]:
        if len(self.resolutions) == 1:
            return {self.resolutions[0]: self}
        choices = tuple(
            dataclasses.replace(c, conditions=tuple((g - 1, values) for g, values in c.conditions))
            for c in self.choices[1:]
        )
        return {
            resolution: dataclasses.replace(
                self,
                input=self.positions[0].at(index).input,
                choices=choices,
                positions=tuple(p.at(index) for p in self.positions),
                resolutions=(resolution,),
            )
            for index, resolution in enumerate(self.resolutions)
        }

    # genotypes

    def check(self, genotypes: Any) -> Genotypes:
        """`genotypes` as uint8 [..., genes].

        Raises:
            SpaceError: wrong length or a value out of range.
        """
        array = np.asarray(genotypes)
        if array.shape[-1:] != (len(self.sizes),):
            raise SpaceError(
                f"a genotype of space {self.name!r} has {len(self.sizes)} values, this one has shape {array.shape}. "
                f"Is it of another space?"
            )
        rows = _rows(array)
        low = 0 if array.dtype.kind == "u" else rows.min(0, initial=0)
        wrong = np.less(low, 0) | (rows.max(0, initial=0) >= np.asarray(self.sizes))
        if wrong.any():
            gene = int(wrong.argmax())
            values = rows[:, gene]
            value = values[(values < 0) | (values >= self.sizes[gene])][0]
            raise SpaceError(
                f"gene {gene} ({self.choices[gene].name}) of a genotype is {value}; in space {self.name!r} it "
                f"must be 0..{self.sizes[gene] - 1}. Is it of another space?"
            )
        return array.astype(np.uint8, copy=False)

    def sample(self, rng: np.random.Generator, n: int) -> Genotypes:
        """`n` genotypes [n, genes], every gene uniform, in canonical form."""
        return self.canonical(rng.integers(0, self.sizes, size=(n, len(self.sizes)), dtype=np.uint8))

    def canonical(self, genotypes: Genotypes) -> Genotypes:
        """Genes that do not matter set to 0, so that one network has one genotype. [..., genes] -> the same."""
        out = np.array(genotypes, np.uint8, order="C")  # so that its rows are views
        for rows, columns in _parts(out):
            for gene, other, matters in self._conditions:
                columns[gene] *= matters.take(columns[other], mode="clip")
            rows[...] = columns.T
        return out

    @functools.cached_property
    def _conditions(self) -> list[tuple[int, int, NDArray[np.uint8]]]:
        """(gene, the earlier gene that it depends on, 1 for each value of that with which it matters)."""
        return [
            (gene, other, np.isin(np.arange(self.sizes[other]), values).astype(np.uint8))
            for gene, choice in enumerate(self.choices)
            for other, values in choice.conditions
        ]

    def branches(self, genotypes: Any) -> NDArray[np.int32]:
        """Branch numbers [..., positions] of genotypes [..., genes].

        Raises:
            SpaceError: they are of another space.
        """
        genotypes = self.check(genotypes)
        out = np.empty((*genotypes.shape[:-1], len(self.positions)), np.int32)
        for (_, columns), part in zip(_parts(genotypes), _split(_rows(out)), strict=True):
            for number, position in enumerate(self.positions):
                part[:, number] = position.branch_of.take(position.index(columns), mode="clip")
        return out

    def branches_of(self, network: Network) -> NDArray[np.int32]:
        """Branch numbers [positions] of a network of this space.

        Raises:
            SpaceError: one of its blocks is not of this space.
        """
        out = np.array([p.branches.index(None) if None in p.branches else -1 for p in self.positions], np.int32)
        for block in network.blocks:
            if (found := self._places.get((block.name, block.graph.key))) is None:
                raise SpaceError(f"block {block.name} (`{block.label}`) is none of space {self.name!r}'s.")
            out[found[0]] = found[1]
        if (out < 0).any():
            raise SpaceError(f"a network of space {self.name!r} has a block at {self.positions[out.argmin()].name}.")
        return out

    @functools.cached_property
    def _places(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(name and key of a block) -> (position, branch)."""
        return {
            (block.name, block.graph.key): (number, branch)
            for number, position in enumerate(self.positions)
            for branch, block in enumerate(position.branches)
            if block is not None
        }

    def decode(self, genotype: Any) -> Network:
        """The network of one genotype [genes]."""
        taken = self.branches(genotype)
        blocks = (p.branches[b] for p, b in zip(self.positions, taken, strict=True))
        return Network(tuple(b for b in blocks if b is not None))

    def only(self, genotype: Any) -> "Space":
        """The space of this one network: nothing is left to choose, so its one genotype has no genes.

        Raises:
            SpaceError: the genotype is of another space.
        """
        genes = self.check(genotype)
        network = self.decode(genes)
        taken = [(p, p.branches[b]) for p, b in zip(self.positions, self.branches(genes), strict=True)]
        return dataclasses.replace(
            self,
            input=network.input,
            choices=(),
            positions=tuple(
                Position(p.name, (), np.zeros((), np.int32), (block,)) for p, block in taken if block is not None
            ),
            resolutions=(network.input[0],),
            kernel_transform=False,
        )

    def describe(self, genotype: Any) -> dict[str, Any]:
        """Choice name -> value, for the choices that matter."""
        genes = self.canonical(self.check(genotype))
        return {
            c.name: c.values[g]
            for c, g in zip(self.choices, genes, strict=True)
            if all(genes[other] in values for other, values in c.conditions)
        }

    def encode(self, values: Mapping[str, Any]) -> Genotypes:
        """The canonical genotype [genes] of what `describe` gave. Choices that are left out take their first value.

        Raises:
            SpaceError: an unknown choice or value.
        """
        known = {c.name: (i, c.values) for i, c in enumerate(self.choices)}
        genes = np.zeros(len(self.choices), np.uint8)
        for name, value in values.items():
            if name not in known:
                raise SpaceError(f"space {self.name!r} has no choice `{name}`.{nearest(name, known, kind='choice')}")
            index, options = known[name]
            if value not in options:
                raise SpaceError(f"choice `{name}` of space {self.name!r} is one of {options}, not {value!r}.")
            genes[index] = options.index(value)
        return self.canonical(genes)

    def uniform(self, **options: Callable[[tuple[Any, ...]], Any]) -> Genotypes:
        """A hand-made genotype: each option takes the value picked by its function (others: the first value).

        `space.uniform(depth=max, kernel=min)` has every stage at its greatest depth and every kernel at its smallest.
        """
        values = {}
        for choice in self.choices:
            pick = options.get(choice.name.rpartition("/")[2])
            if pick is not None:
                values[choice.name] = pick(choice.values)
        return self.encode(values)

    # additive costs

    def blocks(self) -> dict[str, tuple[Block, str]]:
        """Every distinct block: key -> (block, role), role being first, middle or last in the chain."""
        out: dict[str, tuple[Block, str]] = {}
        for index, position in enumerate(self.positions):
            role = "first" if index == 0 else "last" if index == len(self.positions) - 1 else "middle"
            for block in position.branches:
                if block is not None:
                    out.setdefault(block.graph.key, (block, role))
        return out

    def costs(self, of: Callable[[Graph], float]) -> list[NDArray[np.float64]]:
        """For each position, the cost [branches] of each branch; a skipped position costs nothing."""
        return [np.array([0.0 if b is None else of(b.graph) for b in p.branches], np.float64) for p in self.positions]

    def between(
        self,
        ends: Callable[[Graph], str | None],
        begins: Callable[[Graph], str | None],
        of: Callable[[str, str], float],
    ) -> Between:
        """The cost `of` each block's end and the beginning of the block that follows it; None: a block without ops."""
        blocks = {key: block.graph for key, (block, _) in self.blocks().items()}
        end_of = {key: ends(graph) for key, graph in blocks.items()}
        begin_of = {key: begins(graph) for key, graph in blocks.items()}
        ways = ["", *sorted({end for end in end_of.values() if end is not None})]
        cost, after = [], []
        for position in self.positions:
            keys = ["" if b is None else b.graph.key for b in position.branches]
            cost.append(
                np.array(
                    [[of(way, begin) if way and (begin := begin_of.get(k)) else 0.0 for k in keys] for way in ways],
                    np.float64,
                )
            )
            after.append(
                np.array([[ways.index(end) if (end := end_of.get(k)) else i for k in keys] for i in range(len(ways))])
            )
        return Between(len(ways), tuple(cost), tuple(after))

    def price(
        self, genotypes: Any, costs: Sequence[NDArray[np.float64]], between: Between | None = None
    ) -> NDArray[np.float64]:
        """Sum of `costs` over positions, [..., genes] -> [...], and of what is `between` blocks.

        Added in order of position, each block with its border, so that the sum over one network's blocks is equal to
        the last bit.

        Raises:
            SpaceError: the genotypes are of another space.
        """
        genotypes = self.check(genotypes)
        if between is not None:
            return self._price_between(genotypes, costs, between)
        flat = [cost_of[p.branch_of].ravel() for p, cost_of in zip(self.positions, costs, strict=True)]
        out = np.zeros(genotypes.shape[:-1])
        looked_up = np.empty(_PART)
        for (_, columns), total in zip(_parts(genotypes), _split(out.reshape(-1)), strict=True):
            for position, cost_of in zip(self.positions, flat, strict=True):
                # clip: every index is in range, and so it is not checked again
                total += np.take(cost_of, position.index(columns), out=looked_up[: len(total)], mode="clip")
        return out

    def _price_between(
        self, genotypes: Genotypes, costs: Sequence[NDArray[np.float64]], between: Between
    ) -> NDArray[np.float64]:
        """`price`, carrying along how the last block of each network ended."""
        sums = [c + of for c, of in zip(costs, between.cost, strict=True)]
        flat = [
            (p, p.branch_of.size, sum_of[:, p.branch_of].ravel(), after[:, p.branch_of].ravel())
            for p, sum_of, after in zip(self.positions, sums, between.after, strict=True)
        ]
        out = np.zeros(genotypes.shape[:-1])
        for (_, columns), total in zip(_parts(genotypes), _split(out.reshape(-1)), strict=True):
            way = np.zeros(len(total), np.intp)
            for position, size, sum_of, after in flat:
                index = way * size + position.index(columns)
                total += sum_of.take(index, mode="clip")
                way = after.take(index, mode="clip")
        return out

    def extreme(
        self, costs: Sequence[NDArray[np.float64]], between: Between | None = None, *, largest: bool
    ) -> tuple[Genotypes, float]:
        """The genotype of the smallest or largest finite sum of `costs` and `between`, exactly, and that sum.

        Bucket elimination (Dechter 1999, Artificial Intelligence 113, sec. 4): each gene is minimised out of the
        positions that read it. Genes that only one position reads go first, so the tables stay small. With `between`,
        the way in which the chain ends before each position is one more variable, that two positions read.
        """
        sign = -1.0 if largest else 1.0
        finite = [np.where(np.isinf(c), np.inf, sign * c) for c in costs]
        sizes = self.sizes
        if between is None:
            factors = [(p.genes, c[p.branch_of]) for p, c in zip(self.positions, finite, strict=True)]
        else:
            sizes = (*sizes, *[between.ways] * (len(self.positions) + 1))
            factors = [self._factor(number, c, between, sign) for number, c in enumerate(finite)]
        genotype = self._eliminated(factors, sizes, np.add)
        return genotype, float(self.price(genotype, costs, between))

    def highest(
        self, genotypes: Any, costs: Sequence[NDArray[np.float64]], beside: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The largest of `costs` over positions, [..., genes] -> [...], and of `beside` [resolutions] what is theirs.

        Raises:
            SpaceError: the genotypes are of another space.
        """
        taken = self.branches(genotypes)
        each = np.stack([c[taken[..., i]] for i, c in enumerate(costs)])
        sides = np.searchsorted(self.resolutions, self.resolution_of(self.check(genotypes)))
        return each.max(axis=0) + beside[sides]

    def extreme_highest(
        self, costs: Sequence[NDArray[np.float64]], beside: NDArray[np.float64], *, largest: bool
    ) -> tuple[Genotypes, float]:
        """The genotype of the smallest or largest finite `highest`, exactly, and its value.

        As `extreme`, since the largest of several distributes over the smallest of several as sums do.
        """
        alone = len(self.resolutions) == 1
        factors = []
        for p, c in zip(self.positions, costs, strict=True):  # the resolution is the first gene of every position
            table = c[p.branch_of]
            table = table + (beside[0] if alone else beside.reshape(-1, *[1] * (table.ndim - 1)))
            factors.append((p.genes, np.where(np.isinf(table), np.inf, -table) if largest else table))
        genotype = self._eliminated(factors, self.sizes, _least_of_finite if largest else np.maximum)
        return genotype, float(self.highest(genotype, costs, beside))

    def _eliminated(self, factors: list[Factor], sizes: tuple[int, ...], joined: Callable[..., Any]) -> Genotypes:
        """The canonical genotype whose entries of all `factors`, `joined`, are least."""
        readers = [sum(g in genes for genes, _ in factors) for g in range(len(sizes))]
        decisions: list[tuple[int, tuple[int, ...], NDArray[np.intp]]] = []
        factors = [f for f in factors if f[0]]
        for gene in sorted(range(len(sizes)), key=lambda g: readers[g]):
            mine = [f for f in factors if gene in f[0]]
            if not mine:
                decisions.append((gene, (), np.zeros((), np.intp)))
                continue
            scope = tuple(sorted({g for genes, _ in mine for g in genes} - {gene}))
            joint = functools.reduce(joined, [_aligned(table, genes, (*scope, gene), sizes) for genes, table in mine])
            decisions.append((gene, scope, joint.argmin(-1)))
            factors = [f for f in factors if gene not in f[0]]
            if scope:
                factors.append((scope, joint.min(-1)))
        values = np.zeros(len(sizes), np.uint8)
        for gene, scope, best in reversed(decisions):
            values[gene] = best[tuple(values[list(scope)])] if scope else best
        return self.canonical(values[: len(self.sizes)])

    def _factor(
        self, number: int, cost_of: NDArray[np.float64], between: Between, sign: float
    ) -> tuple[tuple[int, ...], NDArray[np.float64]]:
        """Position `number` as a table over its genes and, before and after them, how the chain ends."""
        position, first = self.positions[number], len(self.sizes) + number
        total = cost_of + sign * between.cost[number]
        reached = between.after[number][..., None] == np.arange(between.ways)
        table = np.where(reached, total[..., None], np.inf)[:, position.branch_of]
        if number == 0:
            return (*position.genes, first + 1), table[0]
        return (first, *position.genes, first + 1), table

    def smallest(self) -> Genotypes:
        """The genotype with the fewest MACs."""
        return self.extreme(self.costs(cost.macs), largest=False)[0]

    def largest(self) -> Genotypes:
        """The genotype with the most MACs."""
        return self.extreme(self.costs(cost.macs), largest=True)[0]

    def count(self) -> int:
        """Number of canonical genotypes: the distinct ways to choose.

        Genes are counted from the last to the first: how many ways the genes from g on can be set depends only on the
        earlier genes that their conditions name, which are few.
        """
        sizes, choices = self.sizes, self.choices
        needed: list[tuple[int, ...]] = []  # for each gene, the earlier genes that it or a later one asks about
        for gene in range(len(choices)):
            asked = {o for later in choices[gene:] for o, _ in later.conditions if o < gene}
            needed.append(tuple(sorted(asked)))

        @functools.cache
        def ways(gene: int, known: tuple[int, ...]) -> int:
            if gene == len(choices):
                return 1
            state = dict(zip(needed[gene], known, strict=True))
            active = all(state[o] in values for o, values in choices[gene].conditions)
            total = 0
            for value in range(sizes[gene] if active else 1):
                then = {**state, gene: value}
                rest = needed[gene + 1] if gene + 1 < len(choices) else ()
                total += ways(gene + 1, tuple(then[g] for g in rest))
            return total

        return ways(0, ())


def _least_of_finite(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smaller of two; infinite where one of them is."""
    return np.where(np.isinf(a) | np.isinf(b), np.inf, np.minimum(a, b))


def _aligned(
    table: NDArray[np.float64], genes: tuple[int, ...], scope: tuple[int, ...], sizes: tuple[int, ...]
) -> NDArray[np.float64]:
    """`table` over `genes`, broadcast to axes `scope`."""
    order = sorted(range(len(genes)), key=lambda i: scope.index(genes[i]))
    shape = [sizes[g] if g in genes else 1 for g in scope]
    full = table.transpose(order).reshape(shape)
    return np.broadcast_to(full, [sizes[g] for g in scope])


def _rows(array: NDArray[Any]) -> NDArray[Any]:
    """[..., k] as a view [n, k]."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def _split(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Views of an array [n, ...], `_PART` rows each."""
    return (array[start : start + _PART] for start in range(0, len(array), _PART))


def _parts(genotypes: Genotypes) -> Iterator[tuple[Genotypes, Genotypes]]:
    """For every `_PART` of genotypes [..., genes]: a view [part, genes] of them, and a copy by column [genes, part]."""
    return ((rows, rows.T.copy()) for rows in _split(_rows(genotypes)))
