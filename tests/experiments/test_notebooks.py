"""The notebooks that need no run folder are executed, with the data and without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("nbmake")


def execute(name, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbmake", ROOT / "notebooks" / name, "-q"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.slow  # a minute
def test_the_notebook_on_nas_bench_201_runs_with_the_data(real_data):
    execute("01_search_nas_bench_201.ipynb", NAS_DATA=str(real_data))


@pytest.mark.slow  # a minute
def test_the_notebook_on_nas_bench_201_runs_without_the_data(tmp_path):
    execute("01_search_nas_bench_201.ipynb", NAS_DATA=str(tmp_path))


@pytest.mark.slow  # half a minute: it starts Ray
def test_the_notebook_on_ray_runs():
    execute("02_ray_cluster.ipynb")


def test_notebooks_keep_no_outputs_and_no_paths_of_a_machine():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        text = path.read_text()
        assert '"outputs": []' in text
        assert 'execution_count": 1' not in text
        assert "/home/" not in text
        assert "/tmp/" not in text
