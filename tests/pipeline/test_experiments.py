"""The shipped experiments on slices of the real data, an image folder made of real data, and the notebook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nas

ROOT = Path(__file__).resolve().parents[2]


def smoke(name: str, source: Path, out: Path, *more: str) -> nas.Run:
    """The run of an experiment's smoke overlay on data at `source`."""
    overrides = [f"data.source={source}", *more]
    experiment = nas.load_experiment(ROOT / "experiments" / f"{name}.toml", smoke=True, overrides=overrides)
    return nas.load_run(nas.run_experiment(experiment, out))


def check(run: nas.Run, classes: int, shape: tuple[int, int, int]) -> None:
    """What any finished run must have."""
    assert len(run.winner.architecture.classes) == classes
    assert run.winner.architecture.input.shape == shape
    for name in ("winner_1", "smallest", "largest", "handmade"):
        assert all(v["passed"] for v in run.verified(name).values())
    assert (run.path / "report.html").stat().st_size > 1e5


@pytest.mark.slow
def test_fashion_mnist_smoke_on_a_slice_of_the_real_data(real_data, tmp_path):
    check(smoke("fashion_mnist", real_data / "fashion_mnist.npz", tmp_path / "run"), 10, (28, 28, 1))


@pytest.mark.slow
def test_cifar10_smoke_on_a_slice_of_the_real_data_in_the_binary_layout(real_data, tmp_path):
    unpack = real_data / "unpack_cifar10.py"
    subprocess.run([sys.executable, unpack, tmp_path], check=True, capture_output=True)
    check(smoke("cifar10", tmp_path / "cifar-10-batches-bin", tmp_path / "run"), 10, (32, 32, 3))


@pytest.mark.slow
def test_an_image_folder_made_of_real_images_runs_too(real_data, tmp_path):
    stored = np.load(real_data / "fashion_mnist.npz")
    for part, count in (("train", 400), ("test", 100)):
        for i in range(count):
            folder = tmp_path / "images" / part / f"class_{stored[f'y_{part}'][i]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(stored[f"x_{part}"][i]).save(folder / f"{i}.png")
    run = smoke("fashion_mnist", tmp_path / "images", tmp_path / "run", "space=digits_mixed")  # compiles sooner
    check(run, 10, (28, 28, 1))


@pytest.mark.slow  # two minutes; `make smoke` has it
def test_the_quickstart_smoke_runs_on_ray_and_the_notebook_reads_it(tmp_path):
    experiment = nas.load_experiment(ROOT / "experiments" / "quickstart.toml", smoke=True)
    run = nas.load_run(nas.run_experiment(experiment, tmp_path / "run"))
    check(run, 10, (16, 16, 1))
    assert json.loads((run.path / "environment.json").read_text())["data"]["source"] == "digits"
    notebook = ROOT / "notebooks" / "00_first_run.ipynb"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbmake", notebook, "-q"],
        env={**os.environ, "NAS_RUN": str(run.path)}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
