"""Runtimes: one file each that writes a model and runs it. A new one is a new file and a line here."""

from nas.export.iree import Iree
from nas.export.litert import LiteRt
from nas.export.onnxruntime import OnnxRuntime, OnnxRuntimeCuda, OnnxRuntimeTensorRt
from nas.export.openvino import OpenVino
from nas.export.runtime import PRECISIONS, Runtime
from nas.export.xla import Xla
from nas.ondevice.sessions import Session

RUNTIMES: dict[str, type[Runtime]] = {
    "onnxruntime": OnnxRuntime,
    "onnxruntime_cuda": OnnxRuntimeCuda,
    "onnxruntime_tensorrt": OnnxRuntimeTensorRt,
    "openvino": OpenVino,
    "litert": LiteRt,
    "xla": Xla,
    "iree": Iree,
}

__all__ = ["PRECISIONS", "RUNTIMES", "Runtime", "Session"]
