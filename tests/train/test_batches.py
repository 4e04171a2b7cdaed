"""Batches: the same from memory and from files, from any step on, read ahead within bounds."""

import time

import filesets
import jax
import numpy as np
import pytest
import tiny
from jax.experimental import multihost_utils

from nas import config
from nas.config import Data
from nas.data import load_data
from nas.errors import DataError
from nas.supernet import Supernet
from nas.train import fit, train_supernet
from nas.train.batches import Waits, batches, read_ahead


@pytest.fixture
def parts(tmp_path):
    """(in files, in memory) of the same 21 training images."""
    folder = filesets.write_folder(tmp_path / "set", *filesets.pictures(30, 3, (5, 6, 3)))
    sets = [load_data(Data(source=str(folder), storage=s, test=0.1, threads=2)) for s in ("files", "memory")]
    return sets[0].train, sets[1].train


def equal(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("batch_size", [4, 64])
@pytest.mark.parametrize("start", [0, 3, 5, 1000])
def test_files_and_memory_give_the_same_batches_from_any_step(parts, batch_size, start):
    files, memory = (batches(part, batch_size, seed=3, start=start) for part in parts)
    for _ in range(8):
        equal(next(files), next(memory))


def test_batches_end_where_they_are_told_to(parts):
    for part in parts:
        assert len(list(batches(part, 4, seed=0, start=2, stop=7))) == 5
        assert not list(batches(part, 4, seed=0, start=9, stop=7))


def test_the_position_is_the_step_and_a_cut_off_iteration_goes_on_from_it(parts):
    whole = list(batches(parts[0], 4, seed=0, start=0, stop=9))
    cut = read_ahead(parts[0], 4, seed=0)
    for step in range(4):
        equal(next(cut), whole[step])
    state = cut.get_state()
    cut.close()
    assert state == {"next_index": 4}
    again = read_ahead(parts[0], 4, seed=0, stop=9)
    next(again)
    again.set_state(state)
    for step, batch in enumerate(again, 4):
        equal(batch, whole[step])
    assert step == 8


def test_reading_ahead_is_bounded(parts):
    read = []
    stream = batches(filesets.reading(parts[0], read.extend), 4, seed=0, start=0)
    next(stream)
    seen = -1
    while len(read) > seen:  # until nothing more is read
        seen = len(read)
        time.sleep(0.1)
    assert seen == 4 * (1 + 2 + 2)
    stream.close()


def test_a_damaged_image_is_told_through_the_threads(tmp_path, parts):
    for file in (tmp_path / "set").rglob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DataError, match=r"png: cannot be decoded as an image"):
        next(batches(parts[0], 4, seed=0, start=0))


class Result:
    def __init__(self, ready: bool):
        self.is_ready = lambda: ready


def test_a_wait_counts_unless_the_device_is_busy():
    def slow():
        for _ in range(5):
            time.sleep(0.02)
            yield np.zeros(1), np.zeros(1)

    stream = Waits(slow())
    next(stream)
    first = stream.seconds
    assert first >= 0.02
    stream.watch({"loss": Result(True), "top1": Result(False)})
    next(stream)
    assert stream.seconds == first
    stream.watch({"loss": Result(True), "top1": 0.5})
    next(stream)
    assert stream.seconds >= first + 0.02


@pytest.mark.parametrize("slow", [True, False])
def test_the_log_has_the_share_of_time_spent_waiting(parts, slow):
    rows = []
    part = filesets.reading(parts[0], lambda rows: time.sleep(0.02 * len(rows)))

    def step(state, number, images, labels):
        time.sleep(0 if slow else 0.05)
        return state, {"loss": np.float32(number)}

    fit(
        step, {}, part if slow else parts[1], steps=6, batch_size=2, seed=0, log_steps=3,
        progress=lambda done, total, values: rows.append(values),
    )  # fmt: skip
    assert len(rows) == 2
    assert all(0.6 < row["waiting"] <= 1 if slow else row["waiting"] < 0.2 for row in rows)


def test_of_several_processes_the_log_has_the_share_of_the_one_that_waited_longest(parts, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.stack([mine, np.float32(0.75)]))
    rows = []

    def step(state, number, images, labels):
        time.sleep(0.02)
        return state, {"loss": np.float32(number)}

    fit(
        step, {}, parts[1], steps=6, batch_size=2, seed=0, log_steps=3,
        progress=lambda done, total, values: rows.append(values["waiting"]),
    )  # fmt: skip
    assert rows == [0.75, 0.75]


@pytest.mark.slow
def test_a_training_from_files_is_the_one_from_memory_bit_for_bit(tmp_path):
    data = tiny.data(tmp_path)
    images = np.concatenate([part.images for part in (data.train, data.val, data.test)])
    labels = np.concatenate([part.labels for part in (data.train, data.val, data.test)])
    folder, supernet = filesets.write_folder(tmp_path / "set", images, labels), Supernet(tiny.space(tmp_path))
    settings = config.Train(epochs=2.0, batch_size=32, checkpoint_steps=2)
    files, memory = (
        train_supernet(supernet, load_data(Data(source=str(folder), storage=s)), settings, seed=0)
        for s in ("files", "memory")
    )
    for name in memory:
        np.testing.assert_array_equal(files[name], memory[name])
