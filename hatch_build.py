"""Build hook: compiles the C++ kernels of nas/native into the wheel, or beside their source for an editable install.

It never fails an installation. Without a C++ compiler, with NAS_NATIVE=0, or where compiling fails, the wheel is the
pure one, and nas/kernels.py computes the same with XLA alone; `nas.native.status()` says which it is. The headers come
from jaxlib, which is a build requirement only where there is a compiler to read them and it is not installed yet.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):
    """Adds nas/native/kernels.so where it can be compiled."""

    def dependencies(self) -> list[str]:
        """jaxlib in the versions of the project's jax, where it is missing for the compiler."""
        build = self._build()
        if build.compiler() is None or build.headers():
            return []
        return [f"jaxlib{d.removeprefix('jax')}" for d in self.metadata.core.dependencies if d[:4] in ("jax<", "jax>")]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles; a wheel that then holds a binary is tagged with its platform."""
        build = self._build()
        try:
            library = build.build()
        except (build.BuildError, OSError) as e:
            return self.app.display_warning(f"nas: without C++ kernels: {e}")
        if version == "standard":
            build_data["force_include"][str(library)] = "nas/native/kernels.so"
            build_data["pure_python"] = False
            build_data["infer_tag"] = True

    def _build(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("nas_native_build", Path(self.root) / "nas/native/build.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
