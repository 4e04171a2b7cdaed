"""ONNX Runtime on CPU."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nas.errors import DeviceError, ExportError
from nas.export import onnx as writer
from nas.export.runtime import Images, Session, check_precision
from nas.ops import Graph
from nas.quantise import Quantisation


class OnnxRuntime:
    """Models as ONNX, run by ONNX Runtime's CPU provider."""

    precisions: ClassVar[tuple[str, ...]] = ("float32", "int8")
    suffix: ClassVar[str] = ".onnx"
    layout: ClassVar[str] = "NCHW"

    def version(self) -> str:
        """See `Runtime`."""
        return _library().__version__

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
        check_precision(precision, self.precisions, quantisation)
        return writer.to_bytes(writer.to_onnx(graph, params, quantisation, metadata))

    def open(self, model: bytes | Path, *, threads: int = 1) -> Session:
        """See `Runtime`."""
        ort = _library()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors
        # Threads of idle sessions would spin on the cores that the measured session runs on.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Where the CPU has no VNNI, u8 x s8 kernels saturate at 16 bits; this makes such CPUs, and only them, use
        # u8 x u8 kernels, so that one file computes the same everywhere.
        options.add_session_config_entry("session.x64quantprecision", "1")
        source = model if isinstance(model, bytes) else str(model)
        try:
            session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # the library's own exceptions have no common base
            what = "the model" if isinstance(model, bytes) else str(model)
            raise ExportError(f"ONNX Runtime {ort.__version__} cannot load {what}: {e}. Export it again.") from e
        return _Session(ort, session)

    def check(self, model: Path) -> None:
        """See `Runtime`: ONNX's full check."""
        writer.check(writer.load(model))


class _Session:
    """See `Session`."""

    def __init__(self, ort: Any, session: Any):
        self._ort, self._session = ort, session

    def __call__(self, images: Images) -> np.ndarray:
        (output,) = self._session.run(None, {writer.INPUT: writer.nchw(images)})
        return output.transpose(0, 2, 3, 1) if output.ndim == 4 else output

    def prepare(self, images: Images) -> Callable[[int], None]:
        place = self._ort.OrtValue.ortvalue_from_numpy
        output = self._session.get_outputs()[0]
        shape = (len(images), *output.shape[1:])
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(writer.INPUT, place(writer.nchw(images)))
        binding.bind_ortvalue_output(output.name, place(np.empty(shape, np.float32)))
        run = self._session.run_with_iobinding

        def inferences(n: int) -> None:
            for _ in range(n):
                run(binding)

        return inferences


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as e:
        raise DeviceError(
            "onnxruntime is not installed; models cannot be run or measured with it: pip install onnxruntime"
        ) from e
    return onnxruntime
