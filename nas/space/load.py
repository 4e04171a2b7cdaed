"""TOML to `Space`. *A list is a choice, a scalar is fixed.*

    description = "..."
    [stem]                      # one block; options as below, all fixed
    block = "conv_stem"
    width = 16
    [[stage]]                   # any number of them
    block = ["mbconv", "shufflenet_v2"]
    stride = 2                  # of the stage's first layer; the others have stride 1
    depth = [1, 2, 3]           # number of layers
    width = 24                  # output channels of every layer
    kernel = [3, 5]             # options of the blocks; chosen anew for every layer ...
    tied = ["kernel"]           # ... unless they are tied over the stage
    [head]
    block = "classifier"
    width = 128

An option that only some of a stage's blocks have is a choice only where such a block is chosen.
"""

import dataclasses
import inspect
import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nas import blocks, catalog, config
from nas.errors import ConfigError, SpaceError
from nas.ops import Block, Shape
from nas.space.space import Choice, Position, Space

_STAGE_KEYS = ("block", "stride", "depth", "width", "tied")


class _File(msgspec.Struct, forbid_unknown_fields=True):
    stem: dict[str, Any]
    stage: list[dict[str, Any]]
    head: dict[str, Any]
    description: str = ""


class _Source:
    """A space's text, for errors that name the line."""

    def __init__(self, path: Path, text: str):
        self.path, self.text = path, text

    def fail(self, keys: list[str], message: str) -> ConfigError:
        return ConfigError(f"{self.path}, line {config.line_of(self.text, keys)}: {message}")


def load_space(name: str, *, input_shape: Shape = (32, 32, 3), classes: int = 10) -> Space:
    """The space `name` (of `nas.list_spaces()`, or a path) over images of `input_shape` (height, width, channels).

    Raises:
        SpaceError: unknown name, or strides that do not fit the image.
        ConfigError: a mistake in the file, with its line.
    """
    path = space_file(name)
    raw, text = config.load_toml(path, what="search space")
    source = _Source(path, text)
    file = config.convert(raw, _File, path=path, text=text)
    builder = _Builder(source, input_shape, classes)
    builder.fixed("stem", file.stem, {})
    for index, stage in enumerate(file.stage):
        builder.stage(index, stage)
    builder.fixed("head", file.head, {"classes": classes})
    for block in builder.positions[-1].branches:
        if block is not None and block.graph.shape != (classes,):
            raise source.fail(
                ["head", "block"],
                f"block `{file.head['block']}` gives shape {block.graph.shape}, not the {classes} logits of a head. "
                f"Use one that does, such as `classifier`.",
            )
    return Space(path.stem, input_shape, classes, tuple(builder.choices), tuple(builder.positions), file.description)


@dataclasses.dataclass(frozen=True)
class _Stage:
    """One [[stage]] as it was read; a gene is None where there is nothing to choose."""

    keys: list[str]  # where it stands in the file
    name: str
    names: tuple[str, ...]  # of blocks
    options: dict[str, tuple[Any, ...]]
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    depth_gene: int | None
    width_gene: int | None

    def present(self, layer: int) -> tuple[Any, ...]:
        """The condition under which a layer exists; none if it always does."""
        deep = tuple(i for i, d in enumerate(self.depths) if d >= layer)
        return () if self.depth_gene is None or len(deep) == len(self.depths) else ((self.depth_gene, deep),)


def space_file(name: str) -> Path:
    """The TOML file of a space given by name or path.

    Raises:
        SpaceError: there is none; names the nearest known one.
    """
    return catalog.find(name, kind="space", file="space.toml", known=catalog.list_spaces(), error=SpaceError)


class _Builder:
    """Collects choices and positions, stage by stage."""

    def __init__(self, source: _Source, input_shape: Shape, classes: int):
        self.source, self.classes = source, classes
        self.choices: list[Choice] = []
        self.positions: list[Position] = []
        self.size: tuple[int, ...] = input_shape[:2]
        self.width_gene: int | None = None  # the gene that decides how wide the chain is here
        self.widths: tuple[int, ...] = (input_shape[-1],)

    def fixed(self, name: str, table: dict[str, Any], extra: dict[str, Any]) -> None:
        """The stem or the head: one block, nothing to choose."""
        keys = [name]
        block = self._blocks(keys, table)[0]
        arguments = {k: v for k, v in table.items() if k != "block"}
        for key, value in arguments.items():
            if isinstance(value, list):
                raise self.source.fail([*keys, key], f"`{name}.{key}` is a list; in [{name}] every value is fixed.")
        self._check_options(keys, [block], list(arguments))
        arguments |= {k: v for k, v in extra.items() if k in blocks.options(block)}
        genes = () if self.width_gene is None else (self.width_gene,)
        made = [self._block(keys, f"{name}/{block}", block, width, arguments) for width in self.widths]
        picks = itertools.product(*(range(len(self.widths)) for _ in genes))
        self._add(name, genes, dict(zip(picks, made, strict=True)))
        self.width_gene, self.widths = None, (made[0].graph.shape[-1],)
        self.size = made[0].graph.shape[:2]

    def stage(self, index: int, table: dict[str, Any]) -> None:
        """One [[stage]]: its choices, and a position for every layer it can have."""
        keys, name = ["stage", str(index)], f"stage{index + 1}"
        names = self._blocks(keys, table)
        options = {k: self._values(keys, table, k, None) for k in table if k not in _STAGE_KEYS}
        self._check_options(keys, names, list(options))
        if isinstance(table.get("stride"), list):
            raise self.source.fail([*keys, "stride"], f"`{name}.stride` is a list; a stride cannot be chosen.")
        stride: int = self._values(keys, table, "stride", 1, kind=int)[0]
        if min(self.size) < stride:
            raise SpaceError(
                f"{self.source.path}: at {name} the image is {self.size[0]}x{self.size[1]}, too small for stride "
                f"{stride}. Use larger images (data.image_size) or fewer strides."
            )
        tied = set(self._values(keys, table, "tied", None, kind=str) if table.get("tied", []) != [] else ())
        if unknown := sorted(tied - {"block", *options}):
            hint = config.nearest(unknown[0], ["block", *options], kind="option")
            raise self.source.fail([*keys, "tied"], f"`tied` names `{unknown[0]}`, which the stage does not set.{hint}")
        depths = self._values(keys, table, "depth", 1, kind=int)
        widths = self._values(keys, table, "width", None, kind=int)
        stage = _Stage(
            keys, name, names, options, depths, widths, self._choose(f"{name}/depth", depths),
            self._choose(f"{name}/width", widths),
        )  # fmt: skip

        shared: dict[str, int | None] = {}
        for layer in range(1, max(depths) + 1):
            genes: dict[str, int | None] = {}
            for option, values in {"block": names, **options}.items():
                scope = name if option in tied else f"{name}/layer{layer}"
                conditions = () if option in tied else stage.present(layer)
                owners = tuple(i for i, b in enumerate(names) if option == "block" or option in blocks.options(b))
                if genes.get("block") is not None and len(owners) < len(names):
                    conditions = (*conditions, (genes["block"], owners))
                if option not in tied or layer == 1:
                    shared[option] = self._choose(f"{scope}/{option}", values, conditions)
                genes[option] = shared[option]
            self._layer(stage, layer, genes, stride if layer == 1 else 1)
            if layer == 1:
                self.width_gene, self.widths = stage.width_gene, widths
                self.size = tuple(-(-s // stride) for s in self.size)

    def _layer(self, stage: "_Stage", layer: int, genes: dict[str, int | None], stride: int) -> None:
        """The position of one layer: every combination of the genes it reads, and the block of each."""
        name = f"{stage.name}/layer{layer}"
        axes: dict[int, int] = {}  # gene -> number of values, in the order of the axes
        depth_gene = stage.depth_gene if layer > min(stage.depths) else None
        for gene in (depth_gene, self.width_gene, stage.width_gene, *genes.values()):
            if gene is not None:
                axes.setdefault(gene, len(self.choices[gene].values))

        def pick(values: tuple[Any, ...], gene: int | None, value: dict[int, int]) -> Any:
            return values[0] if gene is None else values[value[gene]]

        made: dict[tuple[int, ...], Block | None] = {}
        for picked in itertools.product(*(range(n) for n in axes.values())):
            value = dict(zip(axes, picked, strict=True))
            if depth_gene is not None and pick(stage.depths, depth_gene, value) < layer:
                made[picked] = None
                continue
            block = pick(stage.names, genes["block"], value)
            arguments = {"width": pick(stage.widths, stage.width_gene, value), "stride": stride}
            for option, values in stage.options.items():
                if option in blocks.options(block):
                    arguments[option] = pick(values, genes[option], value)
            width = pick(self.widths, self.width_gene, value)
            made[picked] = self._block(stage.keys, f"{name}/{block}", block, width, arguments)
        self._add(name, tuple(axes), made)

    def _add(self, name: str, genes: tuple[int, ...], made: dict[tuple[int, ...], Block | None]) -> None:
        """A position; equal blocks become one branch, a skipped position is branch 0."""
        number: dict[Any, int] = {}
        branches: list[Block | None] = []
        shape = tuple(len(self.choices[g].values) for g in genes)
        branch_of = np.zeros(shape, np.int32)
        for picked, block in sorted(made.items(), key=lambda item: item[1] is not None):
            key = block and (block.name, block.graph.key)
            if key not in number:
                number[key] = len(branches)
                branches.append(block)
            branch_of[picked] = number[key]
        real = [b for b in branches if b is not None]
        widest_in = max((b.graph.input for b in real), key=lambda s: s[-1])
        widest_out = max((b.graph.shape for b in real), key=lambda s: s[-1])
        self.positions.append(Position(name, genes, branch_of, tuple(branches), widest_in, widest_out))

    def _choose(self, name: str, values: tuple[Any, ...], conditions: tuple[Any, ...] = ()) -> int | None:
        """The number of a new gene; None where there is only one value."""
        if len(values) == 1:
            return None
        self.choices.append(Choice(name, values, conditions))
        return len(self.choices) - 1

    def _block(self, keys: list[str], name: str, block: str, width: int, arguments: dict[str, Any]) -> Block:
        defaults = {k: v for k, v in blocks.options(block).items() if v is not inspect.Parameter.empty}
        try:
            graph = blocks.record(block, (*self.size, width), tuple(sorted(arguments.items())))
        except (TypeError, ValueError, ArithmeticError) as e:
            raise self.source.fail(keys, f"block `{block}` with {arguments} over {width} channels: {e}.") from e
        told = {k: v for k, v in {**defaults, **arguments}.items() if k not in ("width", "stride", "classes")}
        words = (f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in sorted(told.items()))
        return Block(name, " ".join([block, *words]), graph)

    def _blocks(self, keys: list[str], table: dict[str, Any]) -> tuple[str, ...]:
        names = self._values(keys, table, "block", None, kind=str)
        for block in names:
            if block not in blocks.BLOCKS:
                hint = config.nearest(block, blocks.BLOCKS, kind="block")
                raise self.source.fail([*keys, "block"], f"unknown block `{block}`.{hint}")
        return names

    def _check_options(self, keys: list[str], names: Any, options: list[str]) -> None:
        given = {"width", "stride", "classes"}
        known = {o for b in names for o in blocks.options(b)} - (given if keys[0] == "stage" else {"classes"})
        for option in options:
            if option not in known:
                hint = config.nearest(option, {*known, *(_STAGE_KEYS if keys[0] == "stage" else ())}, kind="key")
                raise self.source.fail([*keys, option], f"unknown key `{option}`.{hint}")

    def _values(
        self, keys: list[str], table: dict[str, Any], key: str, default: Any, *, kind: type | None = None
    ) -> tuple[Any, ...]:
        """A scalar as a tuple of one, a list as the tuple of its values."""
        if key not in table and default is None:
            raise self.source.fail(keys, f"`{key}` is missing.")
        value = table.get(key, default)
        values = tuple(value) if isinstance(value, list) else (value,)
        where = [*keys, key]
        if any(type(v) not in (bool, int, float, str) for v in values):
            raise self.source.fail(where, f"`{key}` is {value}: one value, or a list of values, is needed.")
        if not values or len(set(values)) < len(values):
            raise self.source.fail(where, f"`{key}` is {value}: at least one value, and none twice, is needed.")
        if kind is not None and any(type(v) is not kind or (kind is int and v < 1) for v in values):
            wanted = "positive whole numbers" if kind is int else "names"
            raise self.source.fail(where, f"`{key}` is {value}: {wanted} are needed.")
        if len(values) > 255:
            raise self.source.fail(where, f"`{key}` has {len(values)} values; a choice has at most 255.")
        return values
