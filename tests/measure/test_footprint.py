import importlib
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from nas.cli import cli
from nas.errors import DeviceError, ExportError
from nas.export import RUNTIMES
from nas.measure import footprint
from nas.ops import Recorder, weights

SHAPE = (16, 16, 8)


def model(folder, width, name="onnxruntime"):
    """A file of two convolutions, `width` channels between them."""
    net = Recorder(SHAPE)
    x = net.act(net.conv(net.input, "a", width, kernel=3), "relu")
    net.dense(net.pool(net.conv(x, "b", 8, kernel=3)), "logits", 4)
    params = {w.name: np.full(w.shape, 0.01, np.float32) for w in weights(net.graph())}
    path = folder / f"{width}{RUNTIMES[name].suffix}"
    path.write_bytes(RUNTIMES[name]().emit(net.graph(), params))
    return path


def test_a_larger_network_takes_more_of_everything(tmp_path):
    small, large = (footprint(model(tmp_path, w), "onnxruntime", SHAPE, seconds=0.2) for w in (8, 2048))
    assert large.size_bytes > 100 * small.size_bytes / 2
    assert large.images_per_second < small.images_per_second / 4
    assert large.first_inference_ms > 0 < small.first_inference_ms  # once, so noise may have it the other way round
    if small.peak_memory_bytes is not None and large.peak_memory_bytes is not None:
        assert large.peak_memory_bytes > large.size_bytes
        assert large.peak_memory_bytes > small.peak_memory_bytes
    assert small.cold_start_ms > 0
    assert small.energy_mj is None


def test_the_command_prints_it_and_wants_a_shape(tmp_path):
    path = str(model(tmp_path, 8))
    told = CliRunner().invoke(cli, ["footprint", path, "--image", "16x16x8", "--batch", "2", "--seconds", "0.1"])
    assert told.exit_code == 0, told.output
    for word in ("file", "cold start", "first inference", "peak memory", "throughput"):
        assert re.search(rf"^{word}\s+\S", told.output, re.MULTILINE), told.output
    assert "such as 32x32x3" in CliRunner().invoke(cli, ["footprint", path, "--image", "16x16"]).output


def test_mistakes_are_named(tmp_path):
    with pytest.raises(DeviceError, match="Did you mean `onnxruntime`"):
        footprint(tmp_path / "x.onnx", "onnxruntim", SHAPE)
    with pytest.raises(ExportError, match="no such model file"):
        footprint(tmp_path / "x.onnx", "onnxruntime", SHAPE)
    (tmp_path / "x.onnx").write_text("nothing")
    with pytest.raises(ExportError, match="cannot load"):
        footprint(tmp_path / "x.onnx", "onnxruntime", SHAPE)


def test_energy_is_read_from_the_counters_of_the_packages_also_when_they_start_again(tmp_path, monkeypatch):
    module = importlib.import_module("nas.measure.footprint")  # the package has a function of that name
    monkeypatch.setattr(module, "_POWERCAP", tmp_path)
    with pytest.raises(DeviceError, match="no energy counter"):
        module.energy_counter("onnxruntime")
    zones = {
        "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0",
    }  # fmt: skip
    (tmp_path / "intel-rapl").mkdir()  # the control type itself
    for name, what in zones.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{what}\n")
        (tmp_path / name / "energy_uj").write_text("900000")
        (tmp_path / name / "max_energy_range_uj").write_text("999999")
    source, read = module.energy_counter("onnxruntime")
    assert source == "RAPL, 2 packages"
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("950000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("100000")  # it has started again
    assert read() == pytest.approx(0.05 + 0.2)
    assert read() == pytest.approx(0.25)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("949999")  # a whole turn but for one step of the counter
    assert read() == pytest.approx(0.25 + 0.999999)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_counter_that_this_user_may_not_read_says_so(tmp_path, monkeypatch):
    """Since CVE-2020-8694 energy_uj is root's alone."""
    forbidden_counter(tmp_path, monkeypatch).chmod(0)
    with pytest.raises(DeviceError, match=r"cannot be read: .*energy_uj.*let this user read"):
        importlib.import_module("nas.measure.footprint").energy_counter("onnxruntime")


def test_a_counter_that_is_not_there_says_so(tmp_path, monkeypatch):
    forbidden_counter(tmp_path, monkeypatch).unlink()
    with pytest.raises(DeviceError, match=r"cannot be read: .*energy_uj.*let this user read"):
        importlib.import_module("nas.measure.footprint").energy_counter("onnxruntime")


def forbidden_counter(folder, monkeypatch):
    """energy_uj of the only package of a machine."""
    module = importlib.import_module("nas.measure.footprint")
    monkeypatch.setattr(module, "_POWERCAP", folder)
    (folder / "intel-rapl:0").mkdir()
    for name, value in {"name": "package-0", "max_energy_range_uj": "262143328850", "energy_uj": "5"}.items():
        (folder / "intel-rapl:0" / name).write_text(f"{value}\n")
    return folder / "intel-rapl:0" / "energy_uj"


def test_the_gpus_counter_is_read_where_the_runtime_computes_on_it(monkeypatch):
    module, said, asked = importlib.import_module("nas.measure.footprint"), iter([0, 1500, 4500]), []
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=asked.append,
        nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(said),  # millijoules since the driver was loaded
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    source, read = module.energy_counter("onnxruntime_cuda")
    assert source == "NVML"
    assert (read(), read()) == (1.5, 4.5)
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8a56")
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 0
    module.energy_counter("xla")
    assert asked == [3, "GPU-8a56"]
    monkeypatch.setattr(module, "_POWERCAP", Path("/nowhere"))
    with pytest.raises(DeviceError, match="no RAPL domain"):  # on the CPU the GPU's counter says nothing
        module.energy_counter("openvino")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(DeviceError, match=r"GPU's energy counter cannot be read.*nvidia-ml-py"):
        module.energy_counter("onnxruntime_tensorrt")
