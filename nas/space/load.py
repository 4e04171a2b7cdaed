"""TOML to `Space`. *A list is a choice, a scalar is fixed.*

    description = "..."
    resolution = [24, 28, 32]   # side that images are resized to; left out: as the data have it
    kernel_transform = true     # smaller kernels are learned transforms of larger ones, not their mere centres
    [blocks]                    # blocks of your own, by name
    ghost = "ghost.py:ghost"    # a function in a file beside this one, or "package.module:function"
    [stem]                      # one block; options as below
    block = "conv_stem"
    width = 16
    [[stage]]                   # any number of them
    block = ["mbconv", "shufflenet_v2", { mbconv = { kernel = 5, expand = 6 } }]   # a table fixes options in place
    stride = 2                  # of the stage's first layer; the others have stride 1
    depth = [1, 2, 3]           # number of layers
    width = 24                  # output channels of every layer
    precision = ["float32", "int8", "int4_weights"]   # one choice for all its layers: a name in nas.ops.PRECISIONS
    kernel = [3, 5]             # options of the blocks; chosen anew for every layer ...
    tied = ["kernel"]           # ... unless they are tied over the stage
    [head]
    block = "classifier"
    width = 128

An option that only some of a stage's blocks have is a choice only where such a block is chosen. Blocks with options
fixed in place have weights of their own; all other choices of a layer share theirs.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nas import blocks, catalog, config
from nas.errors import ConfigError, SpaceError
from nas.files import write_text
from nas.ops import PRECISIONS, Block, Precision, Shape, activations, in_precision
from nas.space.space import Choice, Position, Space

_STAGE_KEYS = ("block", "stride", "depth", "width", "precision", "tied")


class _File(msgspec.Struct, forbid_unknown_fields=True):
    stem: dict[str, Any]
    stage: list[dict[str, Any]]
    head: dict[str, Any]
    description: str = ""
    resolution: int | list[int] | None = None
    blocks: dict[str, str] = {}
    kernel_transform: bool = False


class _Source:
    """A space's text, for errors that name the line."""

    def __init__(self, path: Path, text: str):
        self.path, self.text = path, text

    def fail(self, keys: list[str], message: str) -> ConfigError:
        return ConfigError(f"{self.path}, line {config.line_of(self.text, keys)}: {message}")


def load_space(name: str, *, input_shape: Shape = (32, 32, 3), classes: int = 10) -> Space:
    """The space `name` (of `nas.list_spaces()`, or a path) over images of `input_shape` (height, width, channels).

    A space that sets `resolution` has square inputs of its own, whatever the size of the images.

    Raises:
        SpaceError: unknown name, or strides that do not fit the image.
        ConfigError: a mistake in the file, with its line.
    """
    source, file = _read(name)
    input_shape = tuple(map(int, input_shape))  # of NumPy, perhaps
    builder = _Builder(source, file, input_shape)
    builder.end("stem", file.stem, {})
    for index, stage in enumerate(file.stage):
        builder.stage(index, stage)
    builder.end("head", file.head, {"classes": classes})
    for block in builder.positions[-1].branches:
        if block is not None and block.graph.shape != (classes,):
            raise source.fail(
                ["head", "block"],
                f"block `{file.head['block']}` gives shape {block.graph.shape}, not the {classes} logits of a head. "
                f"Use one that does, such as `classifier`.",
            )
    return Space(
        name=source.path.stem,
        resolutions=tuple(height for height, _ in builder.inputs),
        input=(*max(builder.inputs), input_shape[-1]),
        classes=classes,
        choices=tuple(builder.choices),
        positions=tuple(builder.positions),
        kernel_transform=file.kernel_transform,
        description=file.description,
    )


def copy_space(name: str, folder: Path) -> None:
    """Writes `folder`/space.toml, from which the space loads again, with the files of its own blocks beside it."""
    source, file = _read(name)
    text = source.text
    for spec in file.blocks.values():
        where, _, function = spec.rpartition(":")
        if where.endswith(".py"):
            path = source.path.parent / where
            write_text(folder / path.name, path.read_text(encoding="utf-8"))
            text = text.replace(f'"{spec}"', f'"{path.name}:{function}"')
    write_text(folder / "space.toml", text)


def _read(name: str) -> tuple[_Source, _File]:
    path = space_file(name)
    raw, text = config.load_toml(path, what="search space")
    return _Source(path, text), config.convert(raw, _File, path=path, text=text)


def space_file(name: str) -> Path:
    """The TOML file of a space given by name or path.

    Raises:
        SpaceError: there is none; names the nearest known one.
    """
    return catalog.find(name, kind="space", file="space.toml", known=catalog.list_spaces(), error=SpaceError)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """An entry of `block`: a block, some of whose options may be fixed in place."""

    label: str  # its value in a genotype: "mbconv", or "mbconv kernel=5 expand=6"
    scope: str  # names its weights below the layer
    block: str
    function: blocks.Block
    fixed: dict[str, Any]

    def takes(self, option: str) -> bool:
        """Whether the stage decides this option."""
        return option in blocks.options(self.function) and option not in self.fixed


@dataclasses.dataclass(frozen=True)
class _Stage:
    """One [[stage]] as it was read; a gene is None where there is nothing to choose."""

    keys: list[str]  # where it stands in the file
    name: str
    kinds: tuple[_Kind, ...]
    options: dict[str, tuple[Any, ...]]
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    precisions: tuple[Precision, ...]
    depth_gene: int | None
    width_gene: int | None
    precision_gene: int | None

    def present(self, layer: int) -> tuple[Any, ...]:
        """The condition under which a layer exists; none if it always does."""
        deep = tuple(i for i, d in enumerate(self.depths) if d >= layer)
        return () if self.depth_gene is None or len(deep) == len(self.depths) else ((self.depth_gene, deep),)


class _Builder:
    """Collects choices and positions, stage by stage."""

    def __init__(self, source: _Source, file: _File, input_shape: Shape):
        self.source = source
        self.choices: list[Choice] = []
        self.positions: list[Position] = []
        self.known = blocks.known() | {name: _function(source, name, spec) for name, spec in file.blocks.items()}
        table = {} if file.resolution is None else {"resolution": file.resolution}
        sides = self._values([], table, "resolution", input_shape[0], kind=int)
        self.inputs = [(s, s) for s in sorted(sides)] if table else [(input_shape[0], input_shape[1])]
        self.resolution_gene = self._choose("resolution", tuple(sorted(sides)))
        self.sizes: list[tuple[int, ...]] = list(self.inputs)  # of the chain here, for each resolution
        self.width_gene: int | None = None  # the gene that decides how wide the chain is here
        self.widths: tuple[int, ...] = (input_shape[-1],)
        self.precision_gene: int | None = None  # likewise for what it is computed in
        self.precisions: tuple[Precision, ...] = ("float32",)

    def end(self, name: str, table: dict[str, Any], extra: dict[str, Any]) -> None:
        """The stem or the head: one layer of one block, whose options may be choices."""
        keys = [name]
        kind, *others = self._kinds(keys, table)
        if others:
            raise self.source.fail([*keys, "block"], f"`{name}.block` is a list; [{name}] is one block.")
        options = {k: self._values(keys, table, k, None) for k in table if k != "block"}
        if len(options.get("stride", ())) > 1:
            raise self.source.fail([*keys, "stride"], f"`{name}.stride` is a list; a stride cannot be chosen.")
        self._check_options(keys, (kind,), list(options))
        genes = {option: self._choose(f"{name}/{option}", values) for option, values in options.items()}
        fixed = {k: v for k, v in extra.items() if k in blocks.options(kind.function)}

        def block_of(value: dict[int | None, int], size: tuple[int, ...], width: int) -> Block:
            arguments = {option: values[value.get(genes[option], 0)] for option, values in options.items()}
            before = self.precisions[value.get(self.precision_gene, 0)]
            return self._block(keys, name, kind, (*size, width), arguments | fixed, "float32", before)

        made = self._combine((self.width_gene, self.precision_gene, *genes.values()), block_of)
        self._add(name, *made)
        one = made[1][(0,) * len(made[0])]
        assert one is not None
        self.width_gene, self.widths = genes.get("width"), options.get("width", (one.graph.shape[-1],))
        if name == "stem":
            default = blocks.options(kind.function).get("stride", 1)
            self._shrink(keys, name, options.get("stride", (default,))[0])

    def stage(self, index: int, table: dict[str, Any]) -> None:
        """One [[stage]]: its choices, and a position for every layer it can have."""
        keys, name = ["stage", str(index)], f"stage{index + 1}"
        kinds = self._kinds(keys, table)
        options = {k: self._values(keys, table, k, None) for k in table if k not in _STAGE_KEYS}
        self._check_options(keys, kinds, list(options))
        if isinstance(table.get("stride"), list):
            raise self.source.fail([*keys, "stride"], f"`{name}.stride` is a list; a stride cannot be chosen.")
        stride: int = self._values(keys, table, "stride", 1, kind=int)[0]
        tied = set(self._values(keys, table, "tied", None, kind=str) if table.get("tied", []) != [] else ())
        if unknown := sorted(tied - {"block", *options}):
            hint = config.nearest(unknown[0], ["block", *options], kind="option")
            raise self.source.fail([*keys, "tied"], f"`tied` names `{unknown[0]}`, which the stage does not set.{hint}")
        depths = self._values(keys, table, "depth", 1, kind=int)
        widths = self._values(keys, table, "width", None, kind=int)
        precisions = self._values(keys, table, "precision", "float32", kind=str)
        if unknown := [p for p in precisions if p not in PRECISIONS]:
            hint = config.nearest(unknown[0], PRECISIONS, kind="precision")
            raise self.source.fail([*keys, "precision"], f"unknown precision `{unknown[0]}`.{hint}")
        stage = _Stage(
            keys, name, kinds, options, depths, widths, precisions, self._choose(f"{name}/depth", depths),
            self._choose(f"{name}/width", widths), self._choose(f"{name}/precision", precisions),
        )  # fmt: skip

        labels = tuple(k.label for k in kinds)
        shared: dict[str, int | None] = {}
        for layer in range(1, max(depths) + 1):
            genes: dict[str, int | None] = {}
            for option, values in {"block": labels, **options}.items():
                scope = name if option in tied else f"{name}/layer{layer}"
                conditions = () if option in tied else stage.present(layer)
                owners = tuple(i for i, kind in enumerate(kinds) if option == "block" or kind.takes(option))
                block_gene = genes.get("block")
                if block_gene is not None and len(owners) < len(kinds) and (option not in tied or "block" in tied):
                    conditions = (*conditions, (block_gene, owners))
                if option not in tied or layer == 1:
                    shared[option] = self._choose(f"{scope}/{option}", values, conditions)
                genes[option] = shared[option]
            self._layer(stage, layer, genes, stride if layer == 1 else 1)
            if layer == 1:
                self.width_gene, self.widths = stage.width_gene, widths
                self.precision_gene, self.precisions = stage.precision_gene, precisions
                self._shrink(keys, name, stride)

    def _layer(self, stage: _Stage, layer: int, genes: dict[str, int | None], stride: int) -> None:
        """The position of one layer: every combination of the genes it reads, and the block of each."""
        name = f"{stage.name}/layer{layer}"
        depth_gene = stage.depth_gene if layer > min(stage.depths) else None

        def block_of(value: dict[int | None, int], size: tuple[int, ...], width: int) -> Block | None:
            if depth_gene is not None and stage.depths[value[depth_gene]] < layer:
                return None
            kind = stage.kinds[value.get(genes["block"], 0)]
            arguments = {"width": stage.widths[value.get(stage.width_gene, 0)], "stride": stride, **kind.fixed}
            for option, values in stage.options.items():
                if kind.takes(option):
                    arguments[option] = values[value.get(genes[option], 0)]
            precision = stage.precisions[value.get(stage.precision_gene, 0)]
            before = self.precisions[value.get(self.precision_gene, 0)]
            return self._block(stage.keys, name, kind, (*size, width), arguments, precision, before)

        decided = (depth_gene, self.width_gene, stage.width_gene, self.precision_gene, stage.precision_gene)
        self._add(name, *self._combine((*decided, *genes.values()), block_of))

    def _combine(self, genes: tuple[int | None, ...], block_of: Any) -> tuple[tuple[int, ...], dict[Any, Block | None]]:
        """The axes (genes, resolution first) and the block of every combination of their values."""
        axes = tuple(dict.fromkeys(g for g in (self.resolution_gene, *genes) if g is not None))
        made: dict[tuple[int, ...], Block | None] = {}
        for picked in itertools.product(*(range(len(self.choices[g].values)) for g in axes)):
            value: dict[int | None, int] = dict(zip(axes, picked, strict=True))
            size = self.sizes[value.get(self.resolution_gene, 0)]
            made[picked] = block_of(value, size, self.widths[value.get(self.width_gene, 0)])
        return axes, made

    def _shrink(self, keys: list[str], name: str, stride: int) -> None:
        """The chain's sizes after a layer of that stride."""
        smallest = min(min(size) for size in self.sizes)
        if smallest < stride:
            raise SpaceError(
                f"{self.source.path}, line {config.line_of(self.source.text, keys)}: at {name} the image is only "
                f"{smallest} pixels wide, too small for stride {stride}. Use larger images (data.image_size, or "
                f"`resolution` of the space) or fewer strides."
            )
        self.sizes = [tuple(-(-s // stride) for s in size) for size in self.sizes]

    def _add(self, name: str, genes: tuple[int, ...], made: dict[tuple[int, ...], Block | None]) -> None:
        """A position; equal blocks become one branch, a skipped position is branch 0."""
        number: dict[Any, int] = {}
        branches: list[Block | None] = []
        branch_of = np.zeros(tuple(len(self.choices[g].values) for g in genes), np.int32)
        for picked, block in sorted(made.items(), key=lambda item: item[1] is not None):
            key = block and (block.name, block.graph.key)
            if key not in number:
                number[key] = len(branches)
                branches.append(block)
            branch_of[picked] = number[key]
        self.positions.append(Position(name, genes, branch_of, tuple(branches)))

    def _choose(self, name: str, values: tuple[Any, ...], conditions: tuple[Any, ...] = ()) -> int | None:
        """The number of a new gene; None where there is only one value."""
        if len(values) == 1:
            return None
        self.choices.append(Choice(name, values, conditions))
        return len(self.choices) - 1

    def _block(
        self,
        keys: list[str],
        layer: str,
        kind: _Kind,
        input_shape: tuple[int, ...],
        arguments: dict[str, Any],
        precision: Precision,
        before: Precision,
    ) -> Block:
        """One block in `precision`; what it reads was made by a block in `before`."""
        defaults = {k: v for k, v in blocks.options(kind.function).items() if v is not inspect.Parameter.empty}
        given = {**defaults, **arguments}
        what = f"block `{kind.block}` with {arguments} over {input_shape[-1]} channels"
        try:
            graph = blocks.record(kind.function, input_shape, tuple(sorted(arguments.items())))
        except Exception as e:  # whatever the user's code raises
            kind_of = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
            raise self.source.fail(keys, f"{what}: {kind_of}{e}.") from e
        stride, width = given.get("stride", 1), given.get("width") or graph.shape[-1]  # a default may leave it open
        if type(stride) is not int or stride < 1:
            raise self.source.fail(keys, f"{what}: stride is {stride!r}: a whole number from 1 on is needed.")
        wanted = (*(-(-side // stride) for side in input_shape[:-1]), width)
        if layer != "head" and graph.shape != wanted:
            raise self.source.fail(keys, f"{what}: {_wrong_shape(kind, graph.shape, wanted, given)}")
        told = {k: v for k, v in given.items() if k not in ("width", "stride", "classes")}
        words = [f"{k}={_word(v)}" for k, v in sorted(told.items())]
        before = activations(before)
        if (precision, before) != ("float32", "float32"):
            if not graph.ops:
                raise self.source.fail(
                    keys,
                    f"block `{kind.block}` may leave its input as it is, and so has no precision. Leave out either.",
                )
            graph = in_precision(graph, precision, before)
            words += [f"precision={precision}"] + [f"after={before}"] * (before != activations(precision))
        return Block(f"{layer}/{kind.scope}", " ".join([kind.block, *words]), graph)

    def _kinds(self, keys: list[str], table: dict[str, Any]) -> tuple[_Kind, ...]:
        """The entries of `block`."""
        where = [*keys, "block"]
        if "block" not in table:
            raise self.source.fail(keys, "`block` is missing.")
        entries = table["block"] if isinstance(table["block"], list) else [table["block"]]
        kinds: list[_Kind] = []
        for entry in entries:
            fixed: dict[str, Any] = {}
            if isinstance(entry, dict) and len(entry) == 1 and isinstance(next(iter(entry.values())), dict):
                ((entry, fixed),) = entry.items()
            if not isinstance(entry, str):
                raise self.source.fail(
                    where,
                    f"`block` has {entry!r}: a name is needed, or a table such as {{ mbconv = {{ kernel = 5 }} }}.",
                )
            if entry not in self.known:
                hint = config.nearest(entry, self.known, kind="block")
                raise self.source.fail(where, f"unknown block `{entry}`.{hint}")
            function = self.known[entry]
            if wrong := sorted(
                set(fixed) - set(blocks.options(function)) | set(fixed) & {"width", "stride", "classes"}
            ):
                hint = config.nearest(wrong[0], set(blocks.options(function)) - {"width", "stride"}, kind="option")
                raise self.source.fail(where, f"block `{entry}` has no option `{wrong[0]}` to fix here.{hint}")
            same = sum(k.block == entry and bool(k.fixed) for k in kinds) + 1
            label = " ".join([entry, *(f"{k}={_word(v)}" for k, v in fixed.items())])
            kinds.append(_Kind(label, f"{entry}_{same}" if fixed else entry, entry, function, fixed))
        if not kinds or len({k.label for k in kinds}) < len(kinds):
            raise self.source.fail(
                where, f"`block` is {table['block']}: at least one block, and none twice, is needed."
            )
        return tuple(kinds)

    def _check_options(self, keys: list[str], kinds: tuple[_Kind, ...], options: list[str]) -> None:
        given = {"width", "stride", "classes"}
        is_stage = keys[0] == "stage"
        known = {o for k in kinds for o in blocks.options(k.function)} - (given if is_stage else {"classes"})
        for option in options:
            if option not in known:
                hint = config.nearest(option, {*known, *(_STAGE_KEYS if is_stage else ())}, kind="key")
                raise self.source.fail([*keys, option], f"unknown key `{option}`.{hint}")
            if not any(k.takes(option) for k in kinds):
                raise self.source.fail([*keys, option], f"`{option}` is fixed in every entry of `block`; leave it out.")

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


def _wrong_shape(kind: _Kind, shape: tuple[int, ...], wanted: tuple[int, ...], given: Mapping[str, Any]) -> str:
    """What is wrong with a block that gives `shape`, and what to do; `given` are its options, defaults among them."""
    text = f"it gives shape {shape}, but {wanted} is needed"
    if shape[-1] != wanted[-1]:
        return f"{text}: `width` channels. Let its last op give so many."
    if "stride" in given:
        return (
            f"{text}: the image `stride` ({given['stride']}) times smaller, rounded up. Let the one convolution or "
            f"pool that makes the image smaller do so by `stride`, whatever that is."
        )
    return (
        f"{text}: the image as large as it was, since its function has no keyword `stride`. Give it one, "
        f"`def {kind.block}(net, x, *, ..., stride=2)`, and hand it to the convolution or pool that makes "
        f"the image smaller: by it the space knows how large the image is behind this block."
    )


def _word(value: Any) -> str:
    """A value as labels have it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _function(source: _Source, name: str, spec: str) -> blocks.Block:
    """A user's block: a function in a file beside the space's, or in an installed module."""
    where, colon, attribute = spec.rpartition(":")
    keys = ["blocks", name]
    if not colon:
        raise source.fail(keys, f'`blocks.{name}` is "{spec}": "file.py:function" or "module:function" is needed.')
    try:
        if where.endswith(".py"):
            path = source.path.parent / where
            code = path.read_bytes()
            found = importlib.util.spec_from_file_location(f"nas_user_{hashlib.sha256(code).hexdigest()[:12]}", path)
            assert found is not None
            assert found.loader is not None
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        function = getattr(module, attribute)
    except Exception as e:  # whatever the user's code raises
        raise source.fail(keys, f"`blocks.{name}`: cannot load {spec}: {type(e).__name__}: {e}.") from e
    if not (inspect.isfunction(function) and "width" in blocks.options(function)):
        raise source.fail(
            keys, f"`blocks.{name}`: {spec} is not a block: a function (net, x, *, width, ...) is needed."
        )
    return function
