"""Tables that nobody measured, for tests of what is made of tables. Not a test: other tests import it."""

import numpy as np

from nas.latency import Correction, Entry, Table
from nas.space import Space


def a_table(space: Space, seed: int) -> Table:
    """Of a device that is somewhat like those of other seeds."""
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(99)  # what blocks cost everywhere
    entries = {
        key: Entry(float(base.lognormal(-5, 1) * rng.lognormal(0, 0.4)), 0.01, block.label, role, 15)
        for key, (block, role) in space.blocks().items()
    }
    return Table(
        device=f"device {seed}", runtime="onnxruntime", runtime_version="1", precision="float32", threads=1, batch=1,
        hardware="none", space=space.name, space_digest=space.digest, date="2026-01-01T00:00:00+00:00",
        command="nas measure", overhead_ms=0.005, correction=Correction(), anchors=(), entries=entries,
    )  # fmt: skip


def write_device(space: Space, name: str, seed: int) -> Table:
    """`a_table` as device `name` in latency_models/ of the current folder."""
    from pathlib import Path

    table = a_table(space, seed)
    folder = Path("latency_models") / name
    table.save(folder / space.name)
    (folder / "device.toml").write_text(f'device = "{name}"\nruntime = "onnxruntime"\nhardware = "{name}"\n')
    return table
