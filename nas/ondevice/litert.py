"""LiteRT's interpreter."""

from collections.abc import Callable
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np

from nas.errors import DeviceError, ExportError
from nas.ondevice.sessions import Images, Session

NEEDS = ("ai_edge_litert", "ai-edge-litert")


def version() -> str:
    """See `nas.ondevice.sessions`."""
    _library()
    return packages.version("ai-edge-litert")


def open_model(model: bytes | Path, *, threads: int = 1) -> Session:
    """See `nas.ondevice.sessions`."""
    interpreter = _library().Interpreter
    try:
        content = model if isinstance(model, bytes) else model.read_bytes()
        return _Session(lambda: interpreter(model_content=content, num_threads=threads))
    except (OSError, ValueError, RuntimeError) as e:
        what = "the model" if isinstance(model, bytes) else str(model)
        raise ExportError(f"LiteRT {version()} cannot load {what}: {e}. Export it again.") from e


class _Session:
    """See `Session`. An interpreter has the memory of one batch size; a prepared inference has one of its own."""

    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self._batch, self._interpreter = 1, make()
        self._interpreter.allocate_tensors()

    def __call__(self, images: Images) -> np.ndarray:
        if len(images) != self._batch:
            self._interpreter = self._sized(len(images))
            self._batch = len(images)
        self._place(self._interpreter, images)
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._interpreter.get_output_details()[0]["index"])

    def prepare(self, images: Images) -> Callable[[int], None]:
        interpreter = self._sized(len(images))
        self._place(interpreter, images)

        def inferences(n: int) -> None:
            for _ in range(n):
                interpreter.invoke()

        return inferences

    def _sized(self, batch: int) -> Any:
        """An interpreter for `batch` images."""
        interpreter = self._make()
        images = interpreter.get_input_details()[0]
        interpreter.resize_tensor_input(images["index"], [batch, *images["shape"][1:]])
        interpreter.allocate_tensors()
        return interpreter

    @staticmethod
    def _place(interpreter: Any, images: Images) -> None:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], np.asarray(images, np.float32))


def _library() -> Any:
    try:
        from ai_edge_litert import interpreter
    except ImportError as e:
        raise DeviceError(
            "ai-edge-litert is not installed; models cannot be run or measured with it: pip install ai-edge-litert"
        ) from e
    return interpreter
