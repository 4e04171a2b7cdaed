"""ONNX Runtime's CUDA provider."""

from pathlib import Path

from nas.ondevice import onnxruntime
from nas.ondevice.sessions import Session

NEEDS = ("onnxruntime", "onnxruntime-gpu")


def version() -> str:
    """See `nas.ondevice.sessions`."""
    return onnxruntime.version_with(onnxruntime.CUDA)


def open_model(model: bytes | Path, *, threads: int = 1) -> Session:
    """See `nas.ondevice.sessions`. `threads` is of CPUs."""
    return onnxruntime.open_on(onnxruntime.CUDA, model, threads=threads)
