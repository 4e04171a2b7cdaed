"""The latency benchmark measures what it is asked for, or says that it cannot."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nas.errors import LatencyError
from nas.latency import Correction, Proof, Table, prove

SCRIPT = Path(__file__).parents[2] / "experiments" / "benchmarks" / "latency.py"


@pytest.fixture
def script(monkeypatch):
    """The program, without what has nothing to do with tables."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("latency_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DATA", Path("nowhere"))
    monkeypatch.setattr(module.price, "price_million_seconds", lambda number: {})
    return module


@pytest.fixture
def asked(script, monkeypatch) -> dict[str, Any]:
    """What is measured by a program that measures nothing: in `wanted`."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(script, "tables", lambda wanted, *_, **__: found.update(wanted=wanted) or ())
    return found


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--quick", {"host_onnxruntime": ("float32",)}),
        ("--quick --precision int8", {"host_onnxruntime": ("int8",)}),
        ("--devices host_litert,host_openvino --precision int8", {"host_litert": (), "host_openvino": ("int8",)}),
    ],
)
def test_what_is_asked_for_is_measured(script, asked, monkeypatch, options, wanted):
    monkeypatch.setattr(sys, "argv", ["latency.py", *options.split()])
    assert script.main() == 0
    assert asked == {"wanted": wanted}


@pytest.mark.parametrize("options", ["--quick --precision float16", "--devices host_litert --precision int8"])
def test_a_precision_that_no_device_is_measured_in_is_refused(script, monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["latency.py", *options.split()])
    with pytest.raises(SystemExit):
        script.main()
    assert "is measured in it" in capsys.readouterr().err


MEASURED = np.linspace(1.0, 2.0, 10)
WANDERED = "the anchor networks wandered while they were timed"


def proof_of(network_count: int) -> Proof:
    """Of a table that is 1 % off."""
    genotypes = np.zeros((10, 1), np.uint8)
    return prove(MEASURED * 1.01, MEASURED, genotypes=genotypes, p90_ms=MEASURED, repeat_mape=0.0, repeat_tau=1.0)


def run(script, monkeypatch, out: Path, refused: dict[str, str], *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a call in which proofs of the devices `refused` are, or their tables ("table")."""
    table = Table(
        device="d", runtime="onnxruntime", runtime_version="1", precision="float32", threads=1, batch=1, hardware="h",
        space="s", space_digest="0", input=(1, 1, 1), classes=2, date="2026-01-01", command="", entries={},
        overhead_ms=0.0, correction=Correction(), anchors=(),
    )  # fmt: skip

    def measure(space, device, precision, settings, *, seed, progress):
        if refused.get(device.runtime) == "table":
            raise LatencyError(WANDERED)
        return table, None

    def prove_again(table, space, device, settings, *, networks, seed, progress):
        if device.runtime in refused:
            raise LatencyError(WANDERED)
        return proof_of(networks)

    monkeypatch.setattr(script, "runtime_of", lambda device: None)
    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "prove_again", prove_again)
    monkeypatch.setattr(sys, "argv", ["latency.py", "--anew", "--pixels", "32", "--json", str(out), *options])
    return script.main(), json.loads(out.read_text())


def test_what_is_refused_stops_nothing_else_and_is_told_apart(script, monkeypatch, tmp_path, capsys):
    out = tmp_path / "latency.json"
    status, found = run(script, monkeypatch, out, {"onnxruntime": "proof", "openvino": "table"})
    assert status == 1
    of_refused = [f"host_{runtime}.{precision}" for runtime in ("onnxruntime", "openvino") for precision in PRECISIONS]
    assert found["refused"] == {name: {"32": WANDERED} for name in of_refused}
    assert set(found["tables"]) == {"host_litert.float32", "host_xla.float32"}
    assert found["tables"]["host_litert.float32"]["32"]["mape"] == pytest.approx(0.01)
    lines = capsys.readouterr().out.splitlines()
    for name in of_refused:
        assert sum(line.split()[:3] == [name, "32", "refused:"] and WANDERED in line for line in lines) == 1
    assert any(line.split()[:4] == ["host_xla.float32", "32", "10", "1.0%"] for line in lines)
    # Tried again alone, with another outcome: a row is a proof or refused, never both.
    status, found = run(script, monkeypatch, out, {}, "--devices", "host_onnxruntime")
    assert status == 0  # of what was asked for, nothing was refused
    assert set(found["refused"]) == {f"host_openvino.{precision}" for precision in PRECISIONS}
    assert "host_onnxruntime.float32" in found["tables"]
    status, found = run(script, monkeypatch, out, {"xla": "proof"}, "--devices", "host_xla")
    assert status == 1
    assert "host_xla.float32" in found["refused"]
    assert "host_xla.float32" not in found["tables"]


PRECISIONS = ("float32", "int8")
