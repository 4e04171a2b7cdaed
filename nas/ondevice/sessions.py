"""Models loaded for inference, one file for each runtime; none of them imports its library before it is used."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nas.errors import DeviceError

Images = NDArray[np.float32]  # [n, height, width, channels]

# Each module has `open_model(model, *, threads) -> Session`, `version() -> str`, and NEEDS: the module that it imports
# and the package that brings it.
SESSIONS: dict[str, str] = {
    "iree": "nas.ondevice.iree",
    "litert": "nas.ondevice.litert",
    "onnxruntime": "nas.ondevice.onnxruntime",
    "onnxruntime_cuda": "nas.ondevice.onnxruntime_cuda",
    "onnxruntime_tensorrt": "nas.ondevice.onnxruntime_tensorrt",
    "openvino": "nas.ondevice.openvino",
    "xla": "nas.ondevice.xla",
}


class Session(Protocol):
    """A model loaded for inference."""

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """The graph's output for images [n, height, width, channels]: logits [n, classes], or [n, h, w, c]."""
        ...

    def prepare(self, images: Images) -> Callable[[int], None]:
        """A function of n: it runs n inferences on `images`, one after another, and returns when the last has finished.

        It does nothing else: the images are in place, in the model's layout, and the results stay where they are. An
        accelerator may be given all n at once, so that it does not wait for the host between them.
        """
        ...


def open_model(runtime: str, model: bytes | Path, *, threads: int = 1) -> Session:
    """The model, loaded to run on `threads` threads.

    Raises:
        ExportError: it is not a model that the runtime can run.
        DeviceError: the runtime is unknown or not installed.
    """
    return _module(runtime).open_model(model, threads=threads)


def version(runtime: str) -> str:
    """Of the runtime's library.

    Raises:
        DeviceError: it is unknown or not installed.
    """
    return _module(runtime).version()


def needs(runtime: str) -> tuple[str, str]:
    """The module that a runtime's library is imported by, and the package that brings it.

    Raises:
        DeviceError: it is unknown.
    """
    return _module(runtime).NEEDS


def nchw(images: Images) -> Images:
    """Images [n, h, w, c] as [n, c, h, w]; what has no channels stays."""
    images = np.asarray(images, np.float32)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if images.ndim == 4 else images)


def _module(runtime: str) -> ModuleType:
    if runtime not in SESSIONS:
        raise DeviceError(f"unknown runtime `{runtime}`; known are {', '.join(sorted(SESSIONS))}.")
    return importlib.import_module(SESSIONS[runtime])
