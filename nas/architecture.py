"""architecture.json: one network, complete. It rebuilds the network without the space that it came from.

The file is canonical JSON of `Architecture`; its JSON Schema is nas/schemas/architecture.v2.schema.json. Version 2 is
version 1 with ops that say what precision they are in; networks all in float32 are written as version 1.
"""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from nas.data.resize import resize
from nas.errors import CheckpointError, ConfigError, SpaceError
from nas.files import write_bytes
from nas.ops import Block, Network, output_shape, weights

SCHEMA, MIXED = "nas.architecture/1", "nas.architecture/2"


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the network is fed: (pixel / 255 - mean) / std, pixels 0..255."""

    shape: tuple[int, int, int]  # height, width, channels
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]  # per channel

    def normalise(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """uint8 images [..., h, w, c] as the network wants them; of another size, they are resized (bilinear)."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled = resize(np.asarray(images, np.float32) / np.float32(255), self.shape[:2])
        return ((scaled - mean) / std).astype(np.float32)


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The space a network was found in."""

    name: str
    digest: str


class Architecture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One network with what is needed to use it."""

    schema: Literal["nas.architecture/1", "nas.architecture/2"]
    name: str
    network: Network
    input: Input
    classes: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    space: Origin | None = None
    genotype: tuple[int, ...] = ()
    choices: dict[str, int | float | bool | str] = {}

    def to_json(self) -> bytes:
        """The file's bytes; equal architectures give equal bytes."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    def save(self, path: Path) -> None:
        """Writes the file, atomically."""
        write_bytes(path, self.to_json())

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.input.shape))
        blocks = "\n".join(f"  {b.name:<40} {b.label}" for b in self.network.blocks)
        return f"Architecture({self.name!r}, {shape} -> {len(self.classes)} classes)\n{blocks}"


def schema_of(network: Network) -> Literal["nas.architecture/1", "nas.architecture/2"]:
    """The version that a network is written in."""
    return MIXED if network.flat().mixed else SCHEMA


def json_schema() -> str:
    """The JSON Schema of architecture.json, as published."""
    schema = msgspec.json.schema(Architecture)
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": MIXED, **schema}
    return json.dumps(schema, indent=1) + "\n"


def load_architecture(path: str | Path) -> Architecture:
    """The network in an architecture.json, or in a winner's folder.

    Raises:
        ConfigError: unreadable, not an architecture, or of a schema version that this program does not know.
        SpaceError: the ops in it do not fit together.
    """
    path = Path(path)
    path = path / "architecture.json" if path.is_dir() else path
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data).get("schema")
    except (OSError, msgspec.DecodeError, AttributeError) as e:
        raise ConfigError(f"{path}: cannot read this architecture: {e}. A winner's architecture.json is needed.") from e
    if version not in (SCHEMA, MIXED):
        raise ConfigError(f"{path}: its schema is {version!r}; this version of nas reads {SCHEMA!r} and {MIXED!r}.")
    try:
        architecture = msgspec.json.decode(data, type=Architecture)
    except msgspec.DecodeError as e:
        raise ConfigError(f"{path}: not a valid architecture: {e}. See nas/schemas/ for what must stand there.") from e
    _check(architecture, path)
    return architecture


def _check(architecture: Architecture, path: Path) -> None:
    """What the schema cannot say: every op gives the shape that is written, blocks fit, classes and channels agree."""

    def fail(what: str) -> SpaceError:
        return SpaceError(f"{path}: {what}. The file was edited or damaged; take it from the run's folder again.")

    blocks, spec = architecture.network.blocks, architecture.input
    if not blocks:
        raise fail("the network has no block")
    if blocks[0].graph.input != spec.shape or min(spec.shape) < 1:
        raise fail(f"the image shape is {spec.shape}, but the network reads {blocks[0].graph.input}")
    for before, after in itertools.pairwise(blocks):
        if before.graph.shape != after.graph.input:
            raise fail(f"block {after.name} reads {after.graph.input}, but {before.name} gives {before.graph.shape}")
    for block in blocks:
        try:
            _check_ops(block)
        except ValueError as e:
            raise fail(f"block {block.name}: {e}") from e
    if architecture.schema != schema_of(architecture.network):
        raise fail(f"the schema is {architecture.schema!r}, but its ops are of {schema_of(architecture.network)!r}")
    held = ["float32", *(block.graph.activations for block in blocks)]
    for block, before in zip(blocks, held, strict=False):
        if block.graph.source != before or len({op.precision for op in block.graph.ops}) > 1:
            raise fail(f"block {block.name} is of two precisions, or reads another than what is before it gives")
    names = [w.name for w in weights(architecture.network.flat())]
    if twice := [name for name, other in itertools.pairwise(sorted(names)) if name == other]:
        raise fail(f"two ops have the weights {twice[0]}")
    if blocks[-1].graph.shape != (len(architecture.classes),):
        raise fail(f"the number of classes is {len(architecture.classes)}, but the network gives shape "
                   f"{blocks[-1].graph.shape}")  # fmt: skip
    for what, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) != spec.shape[-1] or not np.isfinite(values).all():
            raise fail(f"{what} is {values}: {spec.shape[-1]} numbers, one a channel, are needed")
    if min(spec.std) <= 0:
        raise fail(f"std is {spec.std}: images are divided by it, so it must be above 0")


def _check_ops(block: Block) -> None:
    """That the ops of a block read values that exist and give the shapes that are written; ValueError if not."""
    graph = block.graph
    for index, op in enumerate(graph.ops):
        if not op.inputs or not all(0 <= v <= index for v in op.inputs):
            raise ValueError(f"op {index} reads values {op.inputs}, which do not exist yet")
        shape = output_shape(op, [graph.shape_of(v) for v in op.inputs])
        if shape != op.shape:
            raise ValueError(f"op {index} ({type(op).__name__.lower()}) gives shape {shape}, but {op.shape} is written")


def save_params(folder: Path, params: dict[str, Any]) -> None:
    """Writes `folder`/params.safetensors: every array of a network by name, statistics included."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(np.asarray(a, np.float32)) for name, a in sorted(params.items())}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "params.safetensors", save(arrays))


def save_float32_params(folder: Path, params: dict[str, Any]) -> None:
    """Writes `folder`/float32/params.safetensors: those of the files that hold no narrow weights, where others do."""
    save_params(folder / "float32", params)


def load_float32_params(path: str | Path, network: Network) -> dict[str, NDArray[np.float32]] | None:
    """The arrays for files without narrow weights from `save_float32_params`' folder; None: `load_params` has them.

    Raises:
        CheckpointError: damaged, or of another network.
    """
    folder = Path(path) / "float32"
    return load_params(folder, network) if folder.is_dir() else None


def load_params(path: str | Path, network: Network) -> dict[str, NDArray[np.float32]]:
    """The arrays of `network` from a file, or from a folder with params.safetensors.

    Raises:
        CheckpointError: missing, damaged, or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = Path(path)
    path = path / "params.safetensors" if path.is_dir() else path
    try:
        arrays = load(path.read_bytes())
    except (OSError, SafetensorError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot read these parameters: {e}. Take the winner's params anew.") from e
    wanted = {w.name: w.shape for w in weights(network.flat())}
    wrong = [n for n, shape in wanted.items() if n not in arrays or arrays[n].shape != shape]
    if wrong or len(arrays) != len(wanted):
        raise CheckpointError(
            f"{path}: these are the parameters of another network ({len(wrong)} arrays of {len(wanted)} are missing or "
            f"of another shape{', first ' + wrong[0] if wrong else ''}). Use the params beside the architecture.json."
        )
    return arrays
