"""IREE's virtual machine."""

from collections.abc import Callable
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np

from nas.errors import DeviceError, ExportError
from nas.ondevice.sessions import Images, Session

NEEDS = ("iree.runtime", "iree-base-runtime")


def version() -> str:
    """See `nas.ondevice.sessions`."""
    _library()
    return packages.version("iree-base-runtime")


def open_model(model: bytes | Path, *, threads: int = 1) -> Session:
    """See `nas.ondevice.sessions`."""
    library = _library()
    try:
        content = model if isinstance(model, bytes) else model.read_bytes()
        return _Session(library, content, threads)
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        what = "the model" if isinstance(model, bytes) else str(model)
        raise ExportError(f"IREE {version()} cannot load {what}: {e}. Export it again.") from e


class _Session:
    """See `Session`. One thread: all in the caller's; more: a pool of so many for this session."""

    def __init__(self, library: Any, content: bytes, threads: int):
        self._library = library
        if threads == 1:
            self._device = library.get_driver("local-sync").create_default_device()
        else:
            library.flags.parse_flags(f"--task_topology_group_count={threads}")
            # Not `get_driver`, which keeps the first pool of the process whatever the flag says.
            self._device = library._binding.create_hal_driver("local-task").create_default_device()
        instance = library.VmInstance()
        hal = library.create_hal_module(instance, self._device)
        module = library.VmModule.copy_buffer(instance, content)
        self._context = library.VmContext(instance, [hal, module])
        self._main = module.lookup_function("main")
        if self._main is None:
            raise ValueError("it has no function `main`")

    def __call__(self, images: Images) -> np.ndarray:
        out = []
        for image in np.asarray(images, np.float32):
            results = self._library.VmVariantList(1)
            self._context.invoke(self._main, self._arguments(image[None]), results)
            view = results.get_as_object(0, self._library.HalBufferView)
            out.append(self._library.DeviceArray(self._device, view).to_host())
        return np.concatenate(out)

    def prepare(self, images: Images) -> Callable[[int], None]:
        if len(images) != 1:
            raise DeviceError(
                f"IREE's files are compiled for one image a call, and {len(images)} were given. Set `batch = 1` in the "
                f"device, or choose another runtime."
            )
        arguments = self._arguments(np.asarray(images, np.float32))

        def inferences(n: int) -> None:
            for _ in range(n):
                self._context.invoke(self._main, arguments, self._library.VmVariantList(1))

        return inferences

    def _arguments(self, images: Images) -> Any:
        library = self._library
        view = self._device.allocator.allocate_buffer_copy(
            memory_type=library.MemoryType.DEVICE_LOCAL,
            allowed_usage=library.BufferUsage.DEFAULT,
            device=self._device,
            buffer=np.ascontiguousarray(images),
            element_type=library.HalElementType.FLOAT_32,
        )
        arguments = library.VmVariantList(1)
        arguments.push_ref(view)
        return arguments


def _library() -> Any:
    try:
        from iree import runtime  # pyright: ignore[reportAttributeAccessIssue]  it may not be installed
    except ImportError as e:
        raise DeviceError(
            "iree-base-runtime is not installed; nothing can be run or measured with it: pip install iree-base-runtime"
        ) from e
    return runtime
