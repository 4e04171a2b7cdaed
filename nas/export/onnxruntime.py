"""ONNX Runtime on CPU, and on NVIDIA's GPUs."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from nas.export import onnx as writer
from nas.export.runtime import check_precision
from nas.ondevice import sessions
from nas.ondevice.sessions import Session
from nas.ops import Graph
from nas.quantise import Quantisation


class OnnxRuntime:
    """Models as ONNX, run by ONNX Runtime's CPU provider."""

    precisions: ClassVar[tuple[str, ...]] = ("float32", "int8", "mixed")
    suffix: ClassVar[str] = ".onnx"
    layout: ClassVar[str] = "NCHW"
    _name: ClassVar[str] = "onnxruntime"

    def version(self) -> str:
        """See `Runtime`."""
        return sessions.version(self._name)

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
        return writer.to_bytes(writer.to_onnx(graph, params, quantisation, metadata))

    def open(self, model: bytes | Path, *, threads: int = 1) -> Session:
        """See `Runtime`."""
        return sessions.open_model(self._name, model, threads=threads)

    def check(self, model: Path) -> None:
        """See `Runtime`: ONNX's full check."""
        writer.check(writer.load(model))


class OnnxRuntimeCuda(OnnxRuntime):
    """Models as ONNX, run by ONNX Runtime's CUDA provider."""

    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    _name: ClassVar[str] = "onnxruntime_cuda"


class OnnxRuntimeTensorRt(OnnxRuntime):
    """Models as ONNX, run by ONNX Runtime's TensorRT provider, which may multiply in TF32."""

    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    _name: ClassVar[str] = "onnxruntime_tensorrt"
