"""ONNX Runtime's TensorRT provider; what that does not have, CUDA computes."""

from pathlib import Path

from nas.ondevice import onnxruntime
from nas.ondevice.sessions import Session

NEEDS = ("onnxruntime", "onnxruntime-gpu")


def version() -> str:
    """See `nas.ondevice.sessions`."""
    return onnxruntime.version_with(onnxruntime.TENSORRT)


def open_model(model: bytes | Path, *, threads: int = 1) -> Session:
    """See `nas.ondevice.sessions`. `threads` is of CPUs."""
    return onnxruntime.open_on(onnxruntime.TENSORRT, model, threads=threads)
