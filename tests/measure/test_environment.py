from importlib import metadata
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import tiny

from nas.config import Data, Device
from nas.data import load_data
from nas.pipeline.measure import environment
from nas.report.folder import Environment


def test_packages_that_are_not_installed_are_told_as_absent(tmp_path, monkeypatch):
    real = metadata.version

    def version(name: str) -> str:
        if name in ("ray", "flax"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    job: Any = SimpleNamespace(
        data=load_data(Data(source=str(tiny.write_data(tmp_path)))),
        space=tiny.space(tmp_path),
        device=Device(device="x", runtime="onnxruntime"),
        runtime=SimpleNamespace(version=lambda: "1.0"),
        experiment=SimpleNamespace(seed=0, device="x"),
    )
    told = msgspec.convert(msgspec.json.decode(msgspec.json.encode(environment(job, {}))), Environment)
    assert told.versions["ray"] is None
    assert told.versions["flax"] is None
    assert told.versions["numpy"] == np.__version__
