"""ONNX Runtime, by its CPU provider; by those for NVIDIA's GPUs in `onnxruntime_cuda` and `onnxruntime_tensorrt`.

A session runs on the provider that was asked for, or not at all: left alone, ONNX Runtime computes what a provider
cannot, or everything where it cannot be loaded, on the CPU, and says so in a log at most.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nas.errors import DeviceError, ExportError
from nas.ondevice.sessions import Images, Session, nchw

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"

# Provider -> those that a session is given, with their options. What TensorRT does not have, CUDA computes.
_CUDA_OPTIONS = {"use_tf32": "0"}  # float32 is float32
_PROVIDERS: dict[str, list[tuple[str, dict[str, str]]]] = {
    CPU: [(CPU, {})],
    CUDA: [(CUDA, _CUDA_OPTIONS)],
    TENSORRT: [(TENSORRT, {}), (CUDA, _CUDA_OPTIONS)],
}

NEEDS = ("onnxruntime", "onnxruntime")


def version() -> str:
    """See `nas.ondevice.sessions`."""
    return _library().__version__


def open_model(model: bytes | Path, *, threads: int = 1) -> Session:
    """See `nas.ondevice.sessions`."""
    return open_on(CPU, model, threads=threads)


def version_with(provider: str) -> str:
    """Of a library that has `provider`.

    Raises:
        DeviceError: it is not installed, or does not have it.
    """
    ort = _library()
    if provider not in ort.get_available_providers():
        has = ", ".join(ort.get_available_providers())
        raise DeviceError(
            f"the onnxruntime {ort.__version__} that is installed has no {provider} (it has {has}). On a machine with "
            f"such a GPU: pip uninstall onnxruntime, pip install onnxruntime-gpu"
        )
    return ort.__version__


def open_on(provider: str, model: bytes | Path, *, threads: int = 1) -> Session:
    """The model, loaded to run on `provider`, all of it.

    Raises:
        ExportError: it is not a model that the provider can run whole.
        DeviceError: the library is not installed, or the provider does not start here.
    """
    ort = _library()
    if provider != CPU:
        version_with(provider)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    # Threads of idle sessions would spin on the cores that the measured session runs on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Where the CPU has no VNNI, u8 x s8 kernels saturate at 16 bits; this makes such CPUs, and only them, use
    # u8 x u8 kernels, so that one file computes the same everywhere.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # for single operations
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(source, options, providers=_PROVIDERS[provider], enable_fallback=0)
    except Exception as e:  # the library's own exceptions have no common base
        what = "the model" if isinstance(model, bytes) else str(model)
        raise ExportError(f"ONNX Runtime {ort.__version__} cannot load {what}: {e}. Export it again.") from e
    if provider not in (got := session.get_providers()):
        raise DeviceError(
            f"ONNX Runtime {ort.__version__} cannot start {provider} on this machine and would compute with "
            f"{', '.join(got)}. Is there a GPU, and do its driver, CUDA and cuDNN fit this version? Its own words come "
            f"with a first session at log level 0."
        )
    return _Session(ort, session, "cpu" if provider == CPU else "cuda")


class _Session:
    """See `Session`."""

    def __init__(self, ort: Any, session: Any, memory: str):
        self._ort, self._session, self._memory = ort, session, memory
        self._input, self._output = session.get_inputs()[0].name, session.get_outputs()[0]

    def __call__(self, images: Images) -> np.ndarray:
        (output,) = self._session.run(None, {self._input: nchw(images)})
        return output.transpose(0, 2, 3, 1) if output.ndim == 4 else output

    def prepare(self, images: Images) -> Callable[[int], None]:

        def place(array: np.ndarray) -> Any:
            return self._ort.OrtValue.ortvalue_from_numpy(array, self._memory, 0)

        shape = (len(images), *self._output.shape[1:])
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input, place(nchw(images)))
        binding.bind_ortvalue_output(self._output.name, place(np.empty(shape, np.float32)))
        run = self._session.run_with_iobinding

        def inferences(n: int) -> None:
            for _ in range(n):
                run(binding)

        return inferences


def _library() -> Any:
    """The imported library.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as e:
        raise DeviceError(
            "onnxruntime is not installed; models cannot be run or measured with it: pip install onnxruntime"
        ) from e
    return onnxruntime
