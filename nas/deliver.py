"""Winners outside their run: load them, run them, write them for a runtime."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from nas.architecture import Architecture, load_architecture, load_float32_params, load_params
from nas.config import nearest
from nas.errors import CheckpointError, ConfigError
from nas.export import RUNTIMES
from nas.files import write_bytes
from nas.pipeline.export import file_name, model_file
from nas.quantise import Quantisation, has_integers, narrowed


@dataclasses.dataclass(frozen=True, eq=False)
class Winner:
    """One finished network: its architecture and parameters."""

    architecture: Architecture
    params: dict[str, NDArray[np.float32]]
    folder: Path
    quantisation: Quantisation | None = None
    float32_params: dict[str, NDArray[np.float32]] | None = None  # of files without narrow weights, where others differ

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits [n, classes] of uint8 images [n, h, w, c], in JAX: activations in float32, weights as in its file."""
        from nas.run import run

        graph = self.architecture.network.flat()
        out, _ = run(graph, narrowed(graph, self.params), self.architecture.input.normalise(images))
        return np.asarray(out)

    def classify(self, images: NDArray[np.uint8]) -> list[str]:
        """Class names of uint8 images [n, h, w, c]."""
        return [self.architecture.classes[i] for i in self.logits(images).argmax(-1)]

    def export(self, path: str | Path, *, precision: str = "float32", runtime: str = "onnxruntime") -> Path:
        """Writes the model file; returns its path.

        Raises:
            ConfigError: unknown runtime or precision.
            CheckpointError: int8 without the ranges (quantisation.json) beside the network.
        """
        if runtime not in RUNTIMES:
            raise ConfigError(f"unknown runtime `{runtime}`.{nearest(runtime, RUNTIMES, kind='runtime')}")
        chosen = RUNTIMES[runtime]()
        if precision not in chosen.precisions:
            hint = nearest(precision, chosen.precisions, kind="precision")
            raise ConfigError(f"{runtime} has no precision `{precision}`.{hint}")
        integers = has_integers(self.architecture.network.flat(), precision)
        if integers and self.quantisation is None:
            raise CheckpointError(
                f"{self.folder}: {precision} needs the ranges that calibration found, and quantisation.json is not "
                f"there. Export the run's own winner folder, or ask for float32."
            )
        quantisation = self.quantisation if integers else None
        params = self.params if integers or self.float32_params is None else self.float32_params
        write_bytes(Path(path), model_file(chosen, self.architecture, params, precision, quantisation))
        return Path(path)

    def __repr__(self) -> str:
        return f"Winner({self.architecture!r})"


def load_winner(path: str | Path, *, params: str | Path | None = None) -> Winner:
    """A winner, from its folder or architecture.json; `params` if they lie elsewhere.

    Raises:
        ConfigError, CheckpointError: a file is missing, damaged or of another network.
    """
    architecture = load_architecture(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    arrays = load_params(params or folder / "params", architecture.network)
    plain = load_float32_params(params or folder / "params", architecture.network)
    ranges = folder / "quantisation.json"
    try:
        quantisation = msgspec.json.decode(ranges.read_bytes(), type=Quantisation) if ranges.exists() else None
    except (OSError, msgspec.DecodeError) as e:
        raise CheckpointError(f"{ranges}: cannot be read: {e}. Move it away to export float32 alone.") from e
    return Winner(architecture, arrays, folder, quantisation, plain)


def export_network(
    source: str | Path,
    *,
    params: str | Path | None = None,
    runtime: str = "onnxruntime",
    precisions: Sequence[str] = (),
    out: str | Path | None = None,
) -> Sequence[Path]:
    """Writes a file for each of `precisions`; gives the paths.

    Args:
        precisions: those of float32 and int8, or mixed, that the network and the runtime have, where none is given.
        out: the float32 file, beside which others lie, as name.int8.onnx; or the file, where one precision is given.

    Raises:
        ConfigError, CheckpointError: as `load_winner` and `Winner.export`.
        DeviceError: the precision is none that the runtime has on this machine.
    """
    winner = load_winner(source, params=params)
    chosen: Any = RUNTIMES.get(runtime)
    if not precisions and chosen:
        other = "mixed" if winner.architecture.network.flat().mixed else "int8"
        quantised = winner.quantisation is not None and other in chosen.precisions
        precisions = ("float32", other) if quantised else ("float32",)
    first = Path(out) if out else winner.folder / file_name("float32", chosen.suffix if chosen else "")
    written = []
    for precision in precisions or ("float32",):
        beside = precision != "float32" and not (out and len(precisions) == 1)
        path = first.with_suffix(f".{precision}{first.suffix}") if beside else first
        written.append(winner.export(path, precision=precision, runtime=runtime))
    return written
