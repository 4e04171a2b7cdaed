"""A training that is killed again and again, wherever it happens to be, ends like one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from nas import config
from nas.supernet import Supernet
from nas.train import Checkpoints
from nas.train.supernet import identity, state_like

KILLS = 30
EPOCHS = 50.0  # of 4 steps each
SETTINGS = {"epochs": EPOCHS, "batch_size": 32, "random_subnets": 0}
NO_TIMES = {"images_per_second": 0, "waiting": 0}  # in place of what differs between runs

# The training of one process: argv has the folder of the tests, that of the data, that of the run and checkpoint_steps.
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import numpy as np
import tiny
from nas import config
from nas.data import load_data
from nas.space import load_space
from nas.supernet import Supernet
from nas.train import train_supernet

place, run = Path(sys.argv[2]), Path(sys.argv[3])
data = load_data(config.Data(source=str(place / "bars.npz")))
space = load_space(str(place / "tiny.toml"), input_shape=data.image_shape, classes=data.classes)
settings = config.Train(checkpoint_steps=int(sys.argv[4]), **{settings})
params = train_supernet(Supernet(space), data, settings, seed=0, folder=run)
np.savez(run / "params.npz", **params)
""".replace("{settings}", repr(SETTINGS))


class Life:
    """A process that trains, in a group of its own, until it ends or is killed."""

    def __init__(self, place: Path, run: Path, checkpoint_steps: int = 1):
        arguments = (Path(__file__).parents[1], place, run, checkpoint_steps)
        # compiled once: a kill must not leave half of a compiled program behind either
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(place / "compiled"), "JAX_PLATFORMS": "cpu"}
        self.errors = open(place / "errors.txt", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *map(str, arguments)],
            cwd=Path(__file__).parents[2], env=environment, stderr=self.errors, start_new_session=True,
        )  # fmt: skip

    def killed(self) -> bool:
        """Kills it; whether it was still alive."""
        if self.process.poll() is None:  # its number is still its own
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.ended() == -signal.SIGKILL

    def ended(self) -> int:
        """Its exit status, once it ends."""
        return self.process.wait(timeout=600)

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *_: object) -> None:
        self.killed()
        self.errors.seek(0)
        print(self.errors.read()[-2000:])  # shown if the test fails
        self.errors.close()


def steps_in(run: Path) -> list[int]:
    """The whole checkpoints of a run."""
    return sorted(int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit())


def wait_for_a_step_after(run: Path, step: int, life: Life) -> None:
    while max(steps_in(run), default=0) <= step and life.process.poll() is None:
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_30_random_moments_a_training_ends_with_the_same_parameters_bit_for_bit(tmp_path):
    tiny.write_space(tmp_path)
    data, supernet = tiny.data(tmp_path), Supernet(tiny.space(tmp_path))
    settings = config.Train(**SETTINGS)
    like, of = state_like(supernet, data, settings, seed=0), identity(supernet, settings)
    whole, run = tmp_path / "whole", tmp_path / "run"
    began = time.monotonic()
    with Life(tmp_path, whole, checkpoint_steps=100) as life:
        assert life.ended() == 0
    seconds = time.monotonic() - began

    rng = random.Random(0)
    kills = saving = deleting = newest = 0  # the last: a step that a checkpoint was seen of
    began = time.monotonic()
    while kills < KILLS:
        with Life(tmp_path, run) as life:
            if kills % 5 == 0:  # anywhere, importing and restoring included
                time.sleep(rng.uniform(0.0, 4.0))
            else:  # anywhere in the training
                wait_for_a_step_after(run, newest, life)
                time.sleep(rng.uniform(0.0, 1.0))
            if not life.killed():
                assert life.process.returncode == 0
                shutil.rmtree(run)  # a fast machine came to the end before the last kill: from the start again
                newest = 0
                continue
        kills += 1
        if not (run / "checkpoints").is_dir():
            continue
        saving += any((run / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        deleting += any((run / "checkpoints" / "trash").glob("*"))
        steps = steps_in(run)
        assert max(steps, default=0) >= newest
        newest = max(steps, default=0)
        shutil.rmtree(tmp_path / "look", ignore_errors=True)
        shutil.copytree(run / "checkpoints", tmp_path / "look")  # the next life must find what this one left
        with Checkpoints(tmp_path / "look", of) as checkpoints:
            assert (checkpoints.latest() or 0) == newest
            for step in steps:
                restored = checkpoints.restore(step, like)
                assert all(np.isfinite(a).all() for a in jax.tree.leaves(restored))
    with Life(tmp_path, run) as life:
        assert life.ended() == 0
    figures = {
        "kills": kills, "while saving": saving, "with a step in the trash": deleting, "steps at the last kill": newest,
        "seconds": round(time.monotonic() - began, 1), "seconds uninterrupted": round(seconds, 1),
    }  # fmt: skip
    print(json.dumps(figures))

    wanted, got = np.load(whole / "params.npz"), np.load(run / "params.npz")
    assert set(got) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)
    lines = [
        [json.loads(line) | NO_TIMES for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, run)
    ]
    assert lines[0] == lines[1]
    assert saving >= KILLS // 3
