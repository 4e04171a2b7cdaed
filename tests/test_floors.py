"""The architecture: imports run downhill, rooms of one floor do not know each other, heavy libraries enter once."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "nas"

# Highest first. A module may import from lower floors, and from its own room.
FLOORS = [
    {"cli"},
    {"doctor", "results", "stages"},
    {"deliver", "measured", "adapters"},
    {"pipeline"},
    {"report"},
    {"search", "evaluate", "compress", "measure"},
    {"train", "export", "latency", "runfolder", "console"},
    {"supernet", "architecture", "fidelity"},
    {"quantise"},
    {"data", "space", "fold", "run", "drawing"},
    {"fusion"},
    {"blocks", "kernels", "noise", "catalog", "cost", "agreement", "cluster", "words"},
    {"ops", "config", "files", "native", "memory", "ondevice"},
    {"errors"},
]
HEIGHT = {room: height for height, floor in enumerate(reversed(FLOORS)) for room in floor}

ENTERS = {
    "ray": ["cluster/__init__.py", "train/ray_trainer.py", "adapters/ray_tune_searcher.py"],
    "optuna": ["adapters/optuna_sampler.py"],
    "orbax": ["train/checkpoint.py"],
    "onnx": ["export/onnx.py"],
    "onnxruntime": ["ondevice/onnxruntime.py"],
    "openvino": ["ondevice/openvino.py"],
    "ai_edge_litert": ["export/tflite.py", "ondevice/litert.py"],
    "flatbuffers": ["export/tflite.py"],
    "iree": ["export/iree.py", "ondevice/iree.py"],
    "sklearn": ["data/digits.py"],
    "grain": ["train/batches.py"],
    "pyarrow": ["data/parquet.py"],
    "array_record": ["data/arrayrecord.py"],
    "tensorboardX": ["train/log.py"],
    "pickle": [],
    "joblib": [],
    "dill": [],
    "cloudpickle": [],
}

FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top of the file) of every import."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    out = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{a.name}" if node.module == "nas" else node.module for a in node.names]
        out += [(name, id(node) in top) for name in names]
    return out


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_room_has_a_floor():
    rooms = {room(p) for p in FILES} - {"__init__"}
    assert rooms == set(HEIGHT)


@pytest.mark.parametrize("path", [p for p in FILES if room(p) != "__init__"], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downhill(path):
    mine = room(path)
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "nas" and len(parts) > 1 and parts[1] != mine:
            assert HEIGHT[parts[1]] < HEIGHT[mine], f"{mine} imports {name}"


@pytest.mark.parametrize("library", ENTERS)
def test_a_heavy_library_enters_in_one_place_and_only_where_it_is_used(library):
    found = {str(p.relative_to(ROOT)): top for p in FILES for name, top in imports(p) if name.split(".")[0] == library}
    assert sorted(found) == sorted(ENTERS[library])
    assert not any(found.values()), f"{library} is imported at the top of {found}"
