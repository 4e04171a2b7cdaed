"""Hardware-aware neural architecture search: from data, device and budget to a verified network.

Names load what they need when they are first used, so `import nas` is quick and needs neither JAX nor Ray.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas import stages
    from nas.architecture import Architecture, load_architecture
    from nas.catalog import list_devices, list_spaces
    from nas.config import Experiment
    from nas.data import Dataset, load_data
    from nas.deliver import Winner, export_network, load_winner
    from nas.errors import NasError
    from nas.latency import Table, load_device
    from nas.ops import Network
    from nas.pipeline import load_experiment, run_experiment
    from nas.pipeline.direct import search
    from nas.pipeline.problem import make_problem
    from nas.results import Run, load_run
    from nas.search import Front, Problem, Trial
    from nas.space import Space, load_space

_HOME = {
    "Architecture": "nas.architecture",
    "Dataset": "nas.data",
    "Experiment": "nas.config",
    "Front": "nas.search",
    "NasError": "nas.errors",
    "Network": "nas.ops",
    "Problem": "nas.search",
    "Run": "nas.results",
    "Space": "nas.space",
    "Table": "nas.latency",
    "Trial": "nas.search",
    "Winner": "nas.deliver",
    "export_network": "nas.deliver",
    "list_devices": "nas.catalog",
    "list_spaces": "nas.catalog",
    "load_architecture": "nas.architecture",
    "load_data": "nas.data",
    "load_device": "nas.latency",
    "load_experiment": "nas.pipeline",
    "load_run": "nas.results",
    "load_space": "nas.space",
    "load_winner": "nas.deliver",
    "make_problem": "nas.pipeline.problem",
    "run_experiment": "nas.pipeline",
    "search": "nas.search",
    "stages": "nas.stages",
}

__all__ = [
    "Architecture",
    "Dataset",
    "Experiment",
    "Front",
    "NasError",
    "Network",
    "Problem",
    "Run",
    "Space",
    "Table",
    "Trial",
    "Winner",
    "export_network",
    "list_devices",
    "list_spaces",
    "load_architecture",
    "load_data",
    "load_device",
    "load_experiment",
    "load_run",
    "load_space",
    "load_winner",
    "make_problem",
    "run_experiment",
    "search",
    "stages",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nas' has no attribute {name!r}")
    if name in ("search", "stages"):  # modules; `search` is a function too
        return importlib.import_module(_HOME[name])
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
