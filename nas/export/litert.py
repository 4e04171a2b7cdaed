"""LiteRT (TensorFlow Lite) on CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from nas.export import tflite
from nas.export.runtime import check_precision
from nas.ondevice import sessions
from nas.ondevice.sessions import Session
from nas.ops import Graph
from nas.quantise import Quantisation


class LiteRt:
    """Models as .tflite, run by LiteRT's interpreter with its XNNPACK kernels."""

    # Not int8: LiteRT's integer kernels demand scales of their own (of a sigmoid 1/256, of a pool its input's) and
    # approximate hard-swish and sums, so a file could not be the network that `nas.quantise` simulates.
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    suffix: ClassVar[str] = ".tflite"
    layout: ClassVar[str] = "NHWC"

    def version(self) -> str:
        """See `Runtime`."""
        return sessions.version("litert")

    def emit(
        self,
        graph: Graph,
        params: Mapping[str, np.ndarray],
        *,
        precision: str = "float32",
        quantisation: Quantisation | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """See `Runtime`."""
        check_precision(graph, precision, self.precisions, quantisation)
        return tflite.to_bytes(graph, params, metadata)

    def open(self, model: bytes | Path, *, threads: int = 1) -> Session:
        """See `Runtime`."""
        return sessions.open_model("litert", model, threads=threads)

    def check(self, model: Path) -> None:
        """See `Runtime`: LiteRT verifies the file's structure, and that it has kernels for all its ops."""
        self.open(model)
