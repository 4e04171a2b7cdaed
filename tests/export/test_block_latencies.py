"""blocks.json: the parts of a network's predicted latency."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from nas.drawing import reach
from nas.latency import Correction, Entry, Table
from nas.pipeline.export import block_latencies


@pytest.mark.parametrize("offset_ms", [0.04, 0.0, -0.013])
def test_the_blocks_and_what_comes_once_sum_to_what_the_table_predicts(tmp_path, offset_ms):
    space = tiny.space(tmp_path)
    rng = np.random.default_rng(0)
    table = Table(
        device="made up", runtime="none", runtime_version="1", precision="float32", threads=1, batch=1, hardware="none",
        space=space.name, space_digest=space.digest, date="", command="", overhead_ms=0.0, anchors=(),
        correction=Correction(1.1, offset_ms, {"conv": 0.002}),
        entries={
            key: Entry(float(rng.uniform(0.01, 0.1)), 0.0, block.label, role, 1)
            for key, (block, role) in space.blocks().items()
        },
    )  # fmt: skip
    for genotype in space.sample(rng, 20):
        network = space.decode(genotype)
        job, made = SimpleNamespace(tables={"float32": table}), SimpleNamespace(architecture=SimpleNamespace())
        made.architecture.network = network
        rows = block_latencies(job, made)["float32"]
        assert [r["name"] for r in rows] == [*(b.name for b in network.blocks), "once"]
        parts = [r["latency_ms"] for r in rows]
        assert math.fsum(parts) == pytest.approx(table.network_ms(network), abs=1e-9)
        assert reach(parts) == pytest.approx(table.network_ms(network) - min(offset_ms, 0.0), abs=1e-9)
