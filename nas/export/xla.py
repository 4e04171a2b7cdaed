"""XLA, on the CPU, GPU or TPU that JAX uses in this process."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from nas.errors import DeviceError
from nas.export import stablehlo
from nas.export.runtime import check_precision
from nas.ondevice import sessions
from nas.ondevice.sessions import Session
from nas.ondevice.xla import platform
from nas.ops import Graph
from nas.quantise import Quantisation


class Xla:
    """Networks as StableHLO of `jax.export`, compiled by XLA for JAX's device in this process."""

    precisions: ClassVar[tuple[str, ...]] = ("float32", "float16", "bfloat16")
    suffix: ClassVar[str] = ".stablehlo"
    layout: ClassVar[str] = "NHWC"

    def version(self) -> str:
        """See `Runtime`."""
        return sessions.version("xla")

    def emit(
        self,
        graph: Graph,
        params: Mapping[str, np.ndarray],
        *,
        precision: str = "float32",
        quantisation: Quantisation | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """See `Runtime`. The file is for the platform of this process; the format has no place for `metadata`.

        Raises:
            DeviceError: float16 on CPU.
        """
        check_precision(graph, precision, self.precisions, quantisation)
        if precision == "float16" and platform() == "cpu":
            raise DeviceError(
                "float16 with XLA is for GPUs: on CPU every operation would convert it to float32 and back. "
                "Choose float32 or bfloat16, or let JAX see a GPU."
            )
        exported = stablehlo.to_exported(graph, params, precision=precision, platform=platform(), written_out=True)
        return bytes(exported.serialize())

    def open(self, model: bytes | Path, *, threads: int = 1) -> Session:
        """See `Runtime`. `threads` is of CPUs alone, and only prepared inferences hold to it (see `_honour`)."""
        return sessions.open_model("xla", model, threads=threads)

    def check(self, model: Path) -> None:
        """See `Runtime`: StableHLO's verifier, which runs as the file is read."""
        self.open(model)
