"""OpenVINO on CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from nas.export import onnx as writer
from nas.export.runtime import check_precision
from nas.ondevice import sessions
from nas.ondevice.openvino import PRECISION
from nas.ondevice.sessions import Session
from nas.ops import Graph
from nas.quantise import Quantisation


class OpenVino:
    """Models as ONNX, run by OpenVINO's CPU plugin."""

    precisions: ClassVar[tuple[str, ...]] = ("float32", "float16", "bfloat16", "int8")
    suffix: ClassVar[str] = ".onnx"
    layout: ClassVar[str] = "NCHW"

    def version(self) -> str:
        """See `Runtime`."""
        return sessions.version("openvino")

    def emit(
        self,
        graph: Graph,
        params: Mapping[str, np.ndarray],
        *,
        precision: str = "float32",
        quantisation: Quantisation | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """See `Runtime`. In float16 and bfloat16 the file holds float32 weights and says what to compute in."""
        check_precision(graph, precision, self.precisions, quantisation)
        properties = {**(metadata or {}), PRECISION: precision}
        return writer.to_bytes(writer.to_onnx(graph, params, quantisation, properties))

    def open(self, model: bytes | Path, *, threads: int = 1) -> Session:
        """See `Runtime`. An ONNX file of another writer is computed in float32."""
        return sessions.open_model("openvino", model, threads=threads)

    def check(self, model: Path) -> None:
        """See `Runtime`: ONNX's full check."""
        writer.check(writer.load(model))
