"""`nas doctor` and `nas list`: what this machine has, and what there is to name."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

import psutil

from nas import blocks, catalog
from nas.config import load_toml
from nas.data import FORMATS
from nas.errors import NasError
from nas.export import RUNTIMES
from nas.measure import hardware
from nas.search import STRATEGIES

# package, what it is for, the extra that brings it
_PARTS = (
    ("jax", "training and evaluation", "nas"),
    ("flax", "training", "nas"),
    ("optax", "training", "nas"),
    ("orbax-checkpoint", "checkpoints", "nas"),
    ("ray", "search on several processes or machines (without: --set search.executor=inline)", "nas"),
    ("onnx", "export", "nas"),
    ("onnxruntime", "measuring, verification", "nas"),
    ("scikit-learn", "the digits data set of the quickstart", "nas"),
    ("pandas", "front.to_frame()", "nas[notebook]"),
    ("matplotlib", "notebooks", "nas[notebook]"),
)


def diagnosis() -> Iterator[str]:
    """Lines about versions, hardware, runtimes, and what is missing for what."""
    yield f"nas {metadata.version('nas')}, Python {platform.python_version()}, {platform.platform()}"
    yield f"CPU: {hardware()}; load {os.getloadavg()[0]:.2f}"
    memory = psutil.virtual_memory()
    yield f"memory: {memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free"
    yield f"accelerators: {_accelerators()}"
    for package, purpose, extra in _PARTS:
        try:
            yield f"  ok       {package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            yield f"  missing  {package}: needed for {purpose}. {sys.executable} -m pip install '{extra}'"
    for name, runtime in RUNTIMES.items():
        try:
            made = runtime()
            yield f"runtime {name} {made.version()}: {', '.join(made.precisions)}"
        except NasError as e:
            yield f"runtime {name}: {e}"


def _accelerators() -> str:
    try:
        import jax

        devices = [d for d in jax.devices() if d.platform != "cpu"]
    except (ImportError, RuntimeError) as e:
        return f"unknown ({e})"
    return ", ".join(d.device_kind for d in devices) or "none that JAX sees (a GPU needs `pip install 'jax[cuda12]'`)"


def listing(what: str) -> Iterator[str]:
    """Lines of one kind of name, each with a word about it."""
    if what == "spaces":
        from nas.space import load_space

        for name in catalog.list_spaces():
            space = load_space(name)
            yield f"{name:<24} {space.count():>10.3g} networks  {space.description}"
    elif what == "devices":
        for name in catalog.list_devices():
            raw, _ = load_toml(catalog.folder("latency_models") / name / "device.toml", what="device")
            yield f"{name:<24} {raw.get('device', '')}"
    else:
        table = {"blocks": blocks.BLOCKS, "strategies": STRATEGIES, "runtimes": RUNTIMES, "data": FORMATS}[what]
        for name, thing in table.items():
            yield f"{name:<24} {(thing.__doc__ or '').strip().splitlines()[0]}"
