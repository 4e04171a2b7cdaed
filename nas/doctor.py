"""`nas doctor` and `nas list`: what this machine has, what there is to name, and what is left of a damaged journal.

The doctor is called when something is missing, so nothing but the standard library is taken for granted here.
"""

import importlib
import os
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from nas import catalog
from nas.errors import NasError
from nas.ops import PRECISIONS

# module, its package, what it is for, the extra of this project that brings it
_PARTS = (
    ("numpy", "numpy", "everything", ""),
    ("scipy", "scipy", "measuring", ""),
    ("jax", "jax", "training and evaluation", ""),
    ("optax", "optax", "training", ""),
    ("orbax.checkpoint", "orbax-checkpoint", "checkpoints", ""),
    ("safetensors", "safetensors", "parameters of finished networks", ""),
    ("ray", "ray", "search on several processes or machines (without: --set search.executor=inline)", ""),
    ("onnx", "onnx", "export", ""),
    ("onnxruntime", "onnxruntime", "measuring, verification", ""),
    ("PIL", "pillow", "image folders, resizing", ""),
    ("sklearn", "scikit-learn", "the digits data set of the quickstart", ""),
    ("plotly", "plotly", "the report", ""),
    ("jinja2", "jinja2", "the report", ""),
    ("psutil", "psutil", "measuring, search on Ray", ""),
    ("grain", "grain", "training images that stay in files, ArrayRecord", "files"),
    ("pyarrow", "pyarrow", "Parquet", "files"),
    ("tensorboardX", "tensorboardx", "TensorBoard events of a training (train.tensorboard)", "tensorboard"),
    ("pydantic", "pydantic", "training in several processes (train.processes)", "processes"),
    ("pandas", "pandas", "front.to_frame()", "notebook"),
    ("matplotlib", "matplotlib", "notebooks", "notebook"),
)

# runtime -> its package; the extra of the runtime's name brings it
_RUNTIME_PACKAGES = {"openvino": "openvino", "litert": "ai-edge-litert", "iree": "iree-base-compiler"}


def diagnosis() -> Iterator[str]:
    """Lines about versions, hardware, runtimes, and what is missing for what."""
    yield f"nas {_version('nas') or '(not installed)'}, Python {platform.python_version()}, {platform.platform()}"
    yield f"CPU: {_attempt(_cpu)}"
    yield f"memory: {_attempt(_memory)}"
    yield f"accelerators: {_attempt(_accelerators)}"
    yield f"C++ kernels: {_attempt(_native)}"
    for module, package, purpose, extra in _PARTS:
        why = _import(module)
        if why is None:
            yield f"  ok       {package} {_version(package) or ''}".rstrip()
        else:
            yield f"  missing  {package} ({why}): needed for {purpose}. {install_line(package, extra)}"
    yield from _runtimes()


def salvage(path: Path, out: Path | None = None) -> Iterator[str]:
    """Lines about a damaged journal, whose intact records are in a new file afterwards; `path` may be its folder.

    Raises:
        JournalError: nothing of it can be salvaged, or the new file cannot be written.
    """
    from nas.search import journal

    source = path
    if path.is_dir():  # of a run, or of a search by a function
        alone = path / "journal.jsonl"
        source = alone if alone.exists() else path / "search" / "journal.jsonl"
    found = journal.salvage(source, out)
    yield f"{found.records} records, bytes 0 to {found.size_bytes}, are intact and in {found.path}."
    if not found.lost_bytes:
        yield f"{source} has nothing beyond them: it is whole, and the new file a copy."
        return
    yield f"Left out: {found.lost_lines} lines of {found.lost_bytes} bytes from there on. {source} is as it was."
    yield f"To go on from them, and then with the command that began the search:\n  {found.commands}"


def install_line(package: str, extra: str = "") -> str:
    """The command that brings `package`: in a checkout that of the whole project, so that versions fit together.

    Elsewhere it installs the package itself, in the versions that this project asks for.
    """
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        what = ["--editable", f"{checkout}[{extra}]" if extra else str(checkout)]
    else:
        what = [_requirement(package)]
    return shlex.join([sys.executable, "-m", "pip", "install", *what])


def _requirement(package: str) -> str:
    """`package` with the versions that this project asks for."""
    try:
        asked = metadata.requires("nas") or []
    except metadata.PackageNotFoundError:
        asked = []
    for line in asked:
        requirement = line.partition(";")[0].strip()
        name = re.match(r"[\w.-]+", requirement)
        if name and re.sub(r"[-_.]+", "-", name[0]).lower() == package:
            return requirement
    return package


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _import(module: str) -> str | None:
    """Why `module` cannot be imported, in a line; None if it can. A package can be there and still be broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except ModuleNotFoundError as e:
        missing = e.name or module
        return "not installed" if module.split(".")[0] == missing.split(".")[0] else f"it needs {missing}"
    except Exception as e:  # whatever a broken installation raises
        return f"broken: {' '.join(str(e).split()) or type(e).__name__}"
    return None


def _attempt(tell: Callable[[], str]) -> str:
    try:
        return tell()
    except Exception as e:  # a doctor does not fall ill: whatever is broken is told
        return f"unknown ({' '.join(str(e).split()) or type(e).__name__})"


def _cpu() -> str:
    busy = f"; load {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    try:
        from nas.measure import hardware

        return hardware() + busy
    except ImportError:  # the measuring needs more than this line does
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores{busy}"


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free"


def _native() -> str:
    from nas import native

    return native.status()


def _accelerators() -> str:
    import jax

    devices = [d for d in jax.devices() if d.platform != "cpu"]
    return ", ".join(d.device_kind for d in devices) or "none that JAX sees (a GPU needs `pip install 'jax[cuda12]'`)"


def _runtimes() -> Iterator[str]:
    try:
        from nas.export import RUNTIMES
    except ImportError as e:
        yield f"runtimes: unknown ({e})"
        return
    for name, runtime in RUNTIMES.items():
        try:
            made = runtime()
            yield f"runtime {name} {made.version()}: {', '.join(made.precisions)}"
        except NasError as e:
            package, reason = _RUNTIME_PACKAGES.get(name), str(e).partition(";")[0]
            yield f"runtime {name}: {reason}. {install_line(package, name)}" if package else f"runtime {name}: {e}"


def listing(what: str) -> Iterator[str]:
    """Lines of one kind of name, each with a word about it."""
    if what == "spaces":
        from nas.space import load_space

        for name in catalog.list_spaces():
            space = load_space(name)
            yield f"{name:<24} {space.count():>10.3g} networks  {space.description}"
    elif what == "devices":
        from nas.config import load_toml

        for name in catalog.list_devices():
            path = catalog.find(name, kind="device", file="device.toml", known=[name], error=NasError)
            raw, _ = load_toml(path, what="device")
            yield f"{name:<24} {raw.get('device', '')}"
    elif what == "precisions":
        for name, meaning in PRECISIONS.items():
            yield f"{name:<24} of a stage: {meaning}"
    else:
        module, table = {
            "blocks": ("nas.blocks", "BLOCKS"),
            "strategies": ("nas.search", "STRATEGIES"),
            "runtimes": ("nas.export", "RUNTIMES"),
            "data": ("nas.data", "FORMATS"),
        }[what]
        for name, thing in getattr(importlib.import_module(module), table).items():
            yield f"{name:<24} {(thing.__doc__ or '').strip().splitlines()[0]}"
