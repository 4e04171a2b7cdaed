"""What happens when another program hammers every CPU while a table is measured: it is right, or it is refused."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from nas.config import Latency
from nas.errors import LatencyError
from nas.latency import load_device
from nas.measure import measure, measure_files, prepare
from nas.measured import STRICT
from nas.space import load_space

BUSY = "import time\nend = time.monotonic() + 150\nwhile time.monotonic() < end: pass"


@contextlib.contextmanager
def hammered() -> Iterator[None]:
    """A busy process for each CPU, which ends with this, and by itself."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow  # a minute and a half, and it takes the machine for itself
@pytest.mark.parametrize("strict", [True, False], ids=["nas measure", "a run"])
def test_a_table_measured_on_a_hammered_machine_is_right_or_refused(strict):
    space, device = load_space("digits_mixed", input_shape=(16, 16, 1), classes=10), load_device("host_onnxruntime")
    settings = Latency(seconds=20.0, min_rounds=40, holdout=4, patience=2.0)
    if strict:
        settings = Latency(
            seconds=20.0, min_rounds=40, holdout=4, patience=2.0, max_busy=STRICT.max_busy, max_drift=STRICT.max_drift
        )
    refused = table = None
    with hammered():
        try:
            table, _ = measure(space, device, "float32", settings, seed=0)
        except LatencyError as e:
            refused = str(e)
    if table is None:
        assert re.search(r"Using CPU meanwhile: .*\(pid \d+\) \d+ %", str(refused))
        return
    openers = {
        i: lambda a=a: prepare(space.decode(a.genotype).flat(), device, "float32") for i, a in enumerate(table.anchors)
    }
    quiet = measure_files(openers, seconds=10.0, min_rounds=40)
    quiet_ms = np.array([quiet[i].latency_ms for i in range(len(table.anchors))])
    error = quiet_ms / table.level(quiet_ms) / [a.measured_ms for a in table.anchors] - 1
    assert np.abs(error).max() <= 0.03
