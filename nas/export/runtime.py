"""What a runtime is: it writes the file it deploys, and runs it as it is deployed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from nas.ops import Graph
from nas.quantise import Quantisation

Images = NDArray[np.float32]  # [n, height, width, channels]


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


class Runtime(Protocol):
    """How networks reach a device. Made without arguments; importing it does not import the runtime's library."""

    precisions: ClassVar[tuple[str, ...]]  # of "float32", "int8"
    suffix: ClassVar[str]  # of the files it writes, with the dot

    def version(self) -> str:
        """The library's version.

        Raises:
            DeviceError: it is not installed.
        """
        ...

    def emit(
        self,
        graph: Graph,
        params: Mapping[str, np.ndarray],
        *,
        quantisation: Quantisation | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """The model file of an unfolded graph with its batch-norm statistics: int8 with a `quantisation`, else float32.

        Equal arguments give equal bytes. `quantisation` is of the folded graph (`nas.fold.fold`).

        Raises:
            ExportError: the graph cannot be written, or `quantisation` is of another graph.
            DeviceError: a library that writing needs is not installed.
        """
        ...

    def open(self, model: bytes | Path, *, threads: int = 1) -> Session:
        """The model, loaded to run on `threads` threads.

        Raises:
            ExportError: it is not a model that the runtime can run.
            DeviceError: the runtime is not installed.
        """
        ...

    def check(self, model: Path) -> None:
        """Nothing, if the file is valid by its format's own checker.

        Raises:
            ExportError: it is not.
        """
        ...
