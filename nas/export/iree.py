"""IREE on CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nas.errors import DeviceError, ExportError
from nas.export import stablehlo
from nas.export.runtime import check_precision
from nas.ondevice import sessions
from nas.ondevice.sessions import Session
from nas.ops import Graph
from nas.quantise import Quantisation


class Iree:
    """Networks compiled by IREE from StableHLO to code for this machine's CPU, one image a call."""

    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    suffix: ClassVar[str] = ".vmfb"
    layout: ClassVar[str] = "NHWC"

    def version(self) -> str:
        """See `Runtime`."""
        _compiler()
        return sessions.version("iree")

    def emit(
        self,
        graph: Graph,
        params: Mapping[str, np.ndarray],
        *,
        precision: str = "float32",
        quantisation: Quantisation | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """See `Runtime`. Code for the CPU of this machine and a batch of 1; the format has no place for `metadata`.

        Equal arguments give files that compute the same; IREE's compiler does not give equal bytes.
        """
        check_precision(graph, precision, self.precisions, quantisation)
        compiler = _compiler()
        program = stablehlo.to_exported(graph, params, precision=precision, batch=1).mlir_module()
        options = ["--iree-llvmcpu-target-cpu=host"]
        try:
            return compiler.compile_str(
                program, target_backends=["llvm-cpu"], input_type="stablehlo", extra_args=options
            )
        except compiler.CompilerToolError as e:
            raise ExportError(f"IREE {self.version()} cannot compile the network: {e}") from e

    def open(self, model: bytes | Path, *, threads: int = 1) -> Session:
        """See `Runtime`."""
        return sessions.open_model("iree", model, threads=threads)

    def check(self, model: Path) -> None:
        """See `Runtime`: IREE verifies the file's structure as it is loaded."""
        self.open(model)


def _compiler() -> Any:
    try:
        from iree.compiler import tools  # pyright: ignore[reportMissingImports]  it may not be installed
    except ImportError as e:
        raise DeviceError(
            "iree-base-compiler is not installed; networks cannot be written for IREE: pip install iree-base-compiler"
        ) from e
    return tools
