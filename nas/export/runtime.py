"""What a runtime is: it writes the file it deploys, and runs it as it is deployed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from nas.config import nearest
from nas.errors import ExportError
from nas.ondevice.sessions import Session
from nas.ops import Graph
from nas.quantise import Quantisation, has_integers

# What weights and most of the arithmetic are in; mixed: what each op says (`nas.ops.Graph.mixed`).
PRECISIONS = ("float32", "float16", "bfloat16", "int8", "mixed")


class Runtime(Protocol):
    """How networks reach a device. Made without arguments; importing it does not import the runtime's library."""

    precisions: ClassVar[tuple[str, ...]]  # of `PRECISIONS`, those that it has on some machine
    suffix: ClassVar[str]  # of the files it writes, with the dot
    layout: ClassVar[str]  # of images in its files: "NCHW" or "NHWC"; a `Session` takes NHWC whatever this is

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
        precision: str = "float32",
        quantisation: Quantisation | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """The model file of an unfolded graph with its batch-norm statistics.

        Equal arguments give equal bytes, unless the runtime says why not.

        Args:
            precision: one of `precisions`. Images and outputs are float32 in all of them.
            quantisation: of the folded graph (`nas.fold.fold`); for int8, for mixed where the graph is, and else not.

        Raises:
            ExportError: the graph cannot be written, the runtime does not have the precision, or `quantisation` is
                missing, not asked for, or of another graph.
            DeviceError: a library that writing needs is not installed.
        """
        ...

    def open(self, model: bytes | Path, *, threads: int = 1) -> Session:
        """The model, loaded to run on `threads` threads.

        Raises:
            ExportError: it is not a model that the runtime can run.
            DeviceError: the runtime is not installed, or would compute in another precision than the model's here.
        """
        ...

    def check(self, model: Path) -> None:
        """Nothing, if the file is valid by its format's own checker.

        Raises:
            ExportError: it is not.
        """
        ...


def check_precision(graph: Graph, precision: str, known: Sequence[str], quantisation: Quantisation | None) -> None:
    """Nothing, if `precision` is one of `known`, and `graph` comes with a quantisation in it where it needs one alone.

    Raises:
        ExportError: it is not so.
    """
    if precision not in known:
        raise ExportError(
            f"precision `{precision}`: this runtime does not have it.{nearest(precision, known, kind='precision')}"
        )
    if precision == "int8" and graph.mixed:
        raise ExportError("the ops of this network say which precision they have: ask for `mixed`, or a float one.")
    needed = has_integers(graph, precision)
    if needed and quantisation is None:
        raise ExportError(f"{precision} without a quantisation: give the ranges that `nas.quantise.calibrate` finds.")
    if not needed and quantisation is not None:
        raise ExportError(f"{precision} with a quantisation: only int8 has one. Leave it out, or ask for int8.")
