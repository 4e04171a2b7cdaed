"""ONNX Runtime on a GPU, with a library that has none behind it: never silently the CPU."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nas.errors import DeviceError, ExportError
from nas.export import RUNTIMES
from nas.latency import load_device
from nas.measure import runtime_of
from nas.ondevice import machine, onnxruntime
from nas.ondevice.sessions import open_model

GPUS = {"onnxruntime_cuda": onnxruntime.CUDA, "onnxruntime_tensorrt": onnxruntime.TENSORRT}


class Library:
    """ONNX Runtime as far as a session goes: it has `has`, of which `starts` can be used."""

    __version__ = "9.9"
    GraphOptimizationLevel = SimpleNamespace(ORT_ENABLE_ALL=99)

    def __init__(self, has: list[str], starts: list[str]):
        self.has, self.starts, self.config, self.asked = has, starts, {}, None
        self.OrtValue = SimpleNamespace(ortvalue_from_numpy=lambda array, memory, number: (array.shape, memory, number))

    def get_available_providers(self) -> list[str]:
        return self.has

    def SessionOptions(self) -> Any:
        return SimpleNamespace(add_session_config_entry=self.config.__setitem__)

    def InferenceSession(self, model, options, *, providers, enable_fallback) -> Any:
        self.asked = (providers, enable_fallback)
        if model == b"half of it runs":
            raise RuntimeError("This session contains graph nodes that are assigned to the default CPU EP")
        bound = []
        return SimpleNamespace(
            get_providers=lambda: [name for name, _ in providers if name in self.starts] + [onnxruntime.CPU],
            get_inputs=lambda: [SimpleNamespace(name="images")],
            get_outputs=lambda: [SimpleNamespace(name="logits", shape=["n", 10])],
            io_binding=lambda: SimpleNamespace(
                bind_ortvalue_input=lambda *what: bound.append(what), bind_ortvalue_output=lambda *w: bound.append(w)
            ),
            run_with_iobinding=lambda binding: None,
            bound=bound,
        )


@pytest.fixture
def library(monkeypatch):
    """Takes the library's place."""

    def replace(has: list[str], starts: list[str]) -> Library:
        made = Library(has, starts)
        monkeypatch.setattr(onnxruntime, "_library", lambda: made)
        return made

    return replace


@pytest.mark.parametrize(("name", "provider"), GPUS.items())
def test_a_library_without_the_provider_says_what_to_install(library, name, provider, tmp_path):
    library([onnxruntime.CPU], [])
    (tmp_path / "device.toml").write_text(f'device = "a GPU"\nruntime = "{name}"\n')
    device = load_device(str(tmp_path))
    with pytest.raises(DeviceError, match=f"has no {provider}.*pip install onnxruntime-gpu"):
        runtime_of(device)
    with pytest.raises(DeviceError, match=f"has no {provider}"):
        open_model(name, b"model")


@pytest.mark.parametrize(("name", "provider"), GPUS.items())
def test_a_provider_that_does_not_start_is_not_replaced_by_the_cpu(library, name, provider):
    library([provider, onnxruntime.CPU], starts=[])
    assert RUNTIMES[name]().version() == "9.9"
    with pytest.raises(DeviceError, match=f"cannot start {provider} .* would compute with CPUExecutionProvider"):
        open_model(name, b"model")


@pytest.mark.parametrize(("name", "provider"), GPUS.items())
def test_operations_that_the_provider_lacks_are_not_given_to_the_cpu(library, name, provider):
    made = library([provider, onnxruntime.CPU], starts=[provider])
    with pytest.raises(ExportError, match="assigned to the default CPU EP"):
        open_model(name, b"half of it runs")
    session: Any = open_model(name, b"model")
    providers, enable_fallback = made.asked
    assert enable_fallback == 0
    assert providers[0][0] == provider
    assert onnxruntime.CPU not in dict(providers)
    assert dict(providers)[onnxruntime.CUDA] == {"use_tf32": "0"}
    assert made.config["session.disable_cpu_ep_fallback"] == "1"
    session.prepare(np.zeros((2, 8, 8, 3), np.float32))(1)
    assert session._session.bound == [("images", ((2, 3, 8, 8), "cuda", 0)), ("logits", ((2, 10), "cuda", 0))]


def test_the_gpu_is_part_of_the_hardware(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_NVIDIA", tmp_path)
    without = machine.hardware()
    (tmp_path / "0000:04:00.0").mkdir()
    (tmp_path / "0000:04:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t 33\n")
    assert machine.hardware() == f"{without}, NVIDIA H200"
