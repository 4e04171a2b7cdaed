"""The latency benchmark measures what it is asked for, or says that it cannot."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "benchmarks" / "latency.py"


@pytest.fixture
def script(monkeypatch):
    """The program, which measures nothing; what it would have measured is in `wanted`."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("latency_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DATA", Path("nowhere"))
    monkeypatch.setattr(module.price, "price_million_seconds", lambda number: {})
    monkeypatch.setattr(module, "tables", lambda wanted, *_, **__: module.__dict__.update(wanted=wanted) or ())
    return module


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--quick", {"host_onnxruntime": ("float32",)}),
        ("--quick --precision int8", {"host_onnxruntime": ("int8",)}),
        ("--devices host_litert,host_openvino --precision int8", {"host_litert": (), "host_openvino": ("int8",)}),
    ],
)
def test_what_is_asked_for_is_measured(script, monkeypatch, options, wanted):
    monkeypatch.setattr(sys, "argv", ["latency.py", *options.split()])
    script.main()
    assert script.wanted == wanted


@pytest.mark.parametrize("options", ["--quick --precision float16", "--devices host_litert --precision int8"])
def test_a_precision_that_no_device_is_measured_in_is_refused(script, monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["latency.py", *options.split()])
    with pytest.raises(SystemExit):
        script.main()
    assert "is measured in it" in capsys.readouterr().err
