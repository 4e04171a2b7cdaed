"""Runtimes: one file each that writes a model and runs it. A new one is a new file and a line here."""

from nas.export.onnxruntime import OnnxRuntime
from nas.export.runtime import PRECISIONS, Runtime
from nas.ondevice.sessions import Session

RUNTIMES: dict[str, type[Runtime]] = {
    "onnxruntime": OnnxRuntime,
}

__all__ = ["PRECISIONS", "RUNTIMES", "Runtime", "Session"]
