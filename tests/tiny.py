"""A space, a data set and an experiment small enough to compile in seconds. Not a test: other tests import it."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nas.config import Data
from nas.data import Dataset, load_data
from nas.space import Space, load_space

SPACE = """
description = "for tests"
[stem]
block = "conv_stem"
width = 4
stride = 2
[[stage]]
block = ["mbconv", "shufflenet_v2"]
depth = [1, 2]
width = [4, 8]
kernel = 3
expand = [1, 2]
act = "relu"
[head]
block = "classifier"
width = 8
"""


def write_space(folder: Path) -> Path:
    """The space as a file in `folder`."""
    path = folder / "tiny.toml"
    path.write_text(SPACE)
    return path


def space(folder: Path, shape: tuple[int, int, int] = (8, 8, 1), classes: int = 3) -> Space:
    """The space over tiny images."""
    return load_space(str(write_space(folder)), input_shape=shape, classes=classes)


ELASTIC = """
description = "for tests: every elastic dimension at once"
resolution = [6, 8]
kernel_transform = true
[stem]
block = "conv_stem"
width = [4, 6]
stride = 2
[[stage]]
block = "mbconv"
depth = [1, 2, 3]
width = [4, 8]
kernel = [3, 5]
expand = [1, 2]
se = [false, true]
act = ["relu", "hard_swish"]
tied = ["act", "se"]
[head]
block = "classifier"
width = [4, 8]
"""


def elastic_space(folder: Path, classes: int = 3) -> Space:
    """A space of two resolutions, with elastic stem and head and learned kernel transforms."""
    path = folder / "elastic.toml"
    path.write_text(ELASTIC)
    return load_space(str(path), input_shape=(8, 8, 1), classes=classes)


JOINT = """
description = "for tests: what a stage is computed in and how much of it is left away are choices"
[stem]
block = "conv_stem"
width = 4
stride = 2
[[stage]]
block = "mbconv"
depth = [1, 2]
width = 8
kernel = 3
expand = 4
act = "relu"
prune = [0.0, 0.5]
precision = ["float32", "int8"]
tied = ["prune"]
[[stage]]
block = "mbconv"
width = 8
kernel = 3
expand = 2
act = "hard_swish"
precision = ["float32", "int8"]
[head]
block = "classifier"
width = 8
"""


def write_joint_space(folder: Path, precisions: Iterable[str] = ("float32", "int8")) -> Path:
    """A space of mixed precision as a file in `folder`; what both stages choose among."""
    path = folder / "joint.toml"
    path.write_text(JOINT.replace('["float32", "int8"]', str(list(precisions))))
    return path


def joint_space(folder: Path, precisions: Iterable[str] = ("float32", "int8")) -> Space:
    """The same over tiny images."""
    return load_space(str(write_joint_space(folder, precisions)), input_shape=(8, 8, 1), classes=3)


RESOLUTIONS = """
description = "for tests: two resolutions and learned kernel transforms, and little else, since a step has all branches"
resolution = [6, 8]
kernel_transform = true
[stem]
block = "conv_stem"
width = 4
stride = 2
[[stage]]
block = "mbconv"
depth = [1, 2]
width = 4
kernel = [3, 5]
expand = [1, 2]
act = "relu"
[head]
block = "classifier"
width = 4
"""


def space_of_resolutions(folder: Path) -> Space:
    """A space of two resolutions whose training step compiles in seconds."""
    path = folder / "resolutions.toml"
    path.write_text(RESOLUTIONS)
    return load_space(str(path), input_shape=(8, 8, 1), classes=3)


def write_data(folder: Path, *, images: int = 240, classes: int = 3, seed: int = 0) -> Path:
    """An .npz of 8x8 images that a small network can learn: bright bars, the class says where."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    x = rng.integers(0, 120, (images, 8, 8, 1))
    for i, label in enumerate(labels):
        x[i, 2 * label : 2 * label + 2] += 100
    path = folder / "bars.npz"
    split = images * 3 // 4
    np.savez(
        path,
        x_train=x[:split].astype(np.uint8), y_train=labels[:split],
        x_test=x[split:].astype(np.uint8), y_test=labels[split:],
    )  # fmt: skip
    return path


def data(folder: Path) -> Dataset:
    """The same, loaded."""
    return load_data(Data(source=str(write_data(folder))))


EXPERIMENT = """
name = "tiny"
question = "Which tiny network reads bars?"
space = "tiny.toml"
objectives = [{ name = "top1" }, { name = "latency_ms", at_most = "70%" }]
[data]
source = "bars.npz"
[latency]
seconds = 0.5
min_rounds = 5
anchors = 3
holdout = 5
max_drift = 9.0  # other tests may run beside it
max_busy = 1.0
[train]
epochs = 3.0
batch_size = 32
checkpoint_steps = 4
calibration_images = 64
eval_batch_size = 45
[search]
trials = 10
population = 6
lag = 4
executor = "inline"
[finish]
winners = 2
epochs = 2.0
batch_size = 32
[verify]
seconds = 0.3
parity_images = 16
"""


def write_joint_experiment(folder: Path) -> Path:
    """The experiment in a space of mixed precision."""
    write_joint_space(folder, ("float32", "int8", "int4_weights"))
    write_data(folder)
    path = folder / "joint_experiment.toml"
    path.write_text(EXPERIMENT.replace("tiny", "joint"))
    return path


def write_experiment(folder: Path) -> Path:
    """Experiment, space and data in `folder`; the path of the experiment."""
    write_space(folder)
    write_data(folder)
    path = folder / "tiny_experiment.toml"
    path.write_text(EXPERIMENT)
    return path
