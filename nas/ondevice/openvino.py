"""OpenVINO's CPU plugin."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nas.errors import DeviceError, ExportError
from nas.ondevice.sessions import Images, Session, nchw

PRECISION = "nas.precision"  # the property of a file that says what to compute in
# Always given: left alone, OpenVINO computes float32 models in bfloat16 where the CPU has that.
_HINTS = {"float32": "f32", "int8": "f32", "bfloat16": "bf16", "float16": "f16"}

NEEDS = ("openvino", "openvino")


def version() -> str:
    """See `nas.ondevice.sessions`."""
    return _library().__version__.partition("-")[0]


def open_model(model: bytes | Path, *, threads: int = 1) -> Session:
    """See `nas.ondevice.sessions`. An ONNX file of another writer is computed in float32."""
    ov = _library()
    core = ov.Core()
    try:
        network = core.read_model(model if isinstance(model, bytes) else str(model))
    except Exception as e:  # the library raises RuntimeError, TypeError and others
        what = "the model" if isinstance(model, bytes) else str(model)
        raise ExportError(f"OpenVINO {version()} cannot load {what}: {e}. Export it again.") from e
    where = ["framework", PRECISION]
    precision = str(network.get_rt_info(where).astype(str)) if network.has_rt_info(where) else "float32"
    session = _Session(ov, core, network, _HINTS.get(precision, "f32"), threads)
    got = session.precision()
    if got != _HINTS.get(precision, "f32"):
        has = ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        raise DeviceError(
            f"the model is to be computed in {precision}, and OpenVINO would compute it in {got} on this CPU, "
            f"which lacks the instructions (it has {has}). Choose another precision or another machine."
        )
    return session


class _Session:
    """See `Session`."""

    def __init__(self, ov: Any, core: Any, network: Any, hint: str, threads: int):
        self._ov, self._core, self._network = ov, core, network
        self._options = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # the process is held on its CPUs already
        }
        self._compiled = core.compile_model(network, "CPU", self._options)
        self._request = self._compiled.create_infer_request()

    def precision(self) -> str:
        """What it computes in, as OpenVINO says: f32, f16 or bf16."""
        return self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()

    def __call__(self, images: Images) -> np.ndarray:
        output = self._request.infer([nchw(images)], share_inputs=True)[0]
        return output.transpose(0, 2, 3, 1) if output.ndim == 4 else output

    def prepare(self, images: Images) -> Callable[[int], None]:
        fixed = self._network.clone()  # compiled for this batch size, as one would deploy it
        fixed.reshape([len(images), *(d.get_length() for d in list(fixed.input(0).partial_shape)[1:])])
        request = self._core.compile_model(fixed, "CPU", self._options).create_infer_request()
        request.set_input_tensor(self._ov.Tensor(nchw(images)))

        def inferences(n: int) -> None:
            for _ in range(n):
                request.start_async()  # `infer` would copy the results
                request.wait()

        return inferences


def _library() -> Any:
    # Imported, OpenVINO reports that over the network, from a process that it forks; a fork of a process that runs JAX
    # can hang. Without this package it takes a stub that does nothing, as it does where that is not installed.
    told = sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]
    try:
        import openvino
    except ImportError as e:
        raise DeviceError(
            "openvino is not installed; models cannot be run or measured with it: pip install openvino"
        ) from e
    finally:
        if told is None:
            del sys.modules["openvino_telemetry"]
    return openvino
