"""What all tests share: a compilation cache, and the real data where it is present."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

# Subprocesses inherit it too. Compiling is most of what the tests do; a second run finds it done.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Two test processes with a BLAS thread a core each wait for each other: products take many times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Test processes measure beside each other: each of them has a lock of its own, whatever it has inherited.
os.environ["NAS_LOCKS"] = tempfile.mkdtemp(prefix="nas-locks-")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data beside the repository; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data are not beside the repository ({folder.name} is missing)")
    return folder


# Files that take minutes come first: two workers then end at nearly the same time.
LONG = ("pipeline/test_pipeline", "train/test_step", "supernet/", "search/", "pipeline/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders whole files, the longest first; the order within a file stays."""
    items.sort(key=lambda item: next((i for i, part in enumerate(LONG) if part in item.nodeid), len(LONG)))
