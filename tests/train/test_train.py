"""Losses, optimisers, augmentation, batches, and the loop: interrupted or not, the end is the same."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from nas import config
from nas.data import Part
from nas.errors import CheckpointError
from nas.supernet import Supernet
from nas.train import fit, losses, train_supernet
from nas.train.augment import augment
from nas.train.batches import batches
from nas.train.loop import steps_of
from nas.train.step import Step


def test_distillation_is_zero_for_equal_logits_and_positive_otherwise():
    logits = jax.random.normal(jax.random.key(0), (5, 4))
    assert losses.distillation(logits, logits, temperature=3.0) == pytest.approx(0, abs=1e-6)
    assert losses.distillation(logits, logits[::-1]) > 0.01


def test_smoothed_cross_entropy_by_hand():
    logits = jnp.array([[2.0, 0.0]])
    log = np.log(np.exp([2.0, 0.0]) / np.exp([2.0, 0.0]).sum())
    assert losses.cross_entropy(logits, jnp.array([0])) == pytest.approx(-log[0], rel=1e-5)
    wanted = -(0.9 * log[0] + 0.1 * log[1])
    assert losses.cross_entropy(logits, jnp.array([0]), smoothing=0.2) == pytest.approx(wanted, rel=1e-5)


def test_augmentation_is_deterministic_in_the_key_and_keeps_what_it_moves():
    images = jax.random.uniform(jax.random.key(0), (16, 6, 6, 2)) + 1
    settings = config.Augment(flip=True, shift=2)
    a, b = (augment(jax.random.key(3), images, settings) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert np.any(a != augment(jax.random.key(4), images, settings))
    values = set(np.asarray(images).ravel().tolist()) | {0.0}
    assert set(np.asarray(a).ravel().tolist()) <= values
    np.testing.assert_array_equal(augment(jax.random.key(0), images, config.Augment()), images)


def test_batches_resume_anywhere_and_every_epoch_sees_every_image_once():
    part = Part(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.arange(10, dtype=np.int32))
    stream = batches(part, 5, seed=1, start=0)
    seen = [next(stream)[1] for _ in range(6)]
    for epoch in range(3):
        assert sorted(np.concatenate(seen[2 * epoch : 2 * epoch + 2])) == list(range(10))
    for start in range(6):
        np.testing.assert_array_equal(next(batches(part, 5, seed=1, start=start))[1], seen[start])
    assert len(next(batches(part, 64, seed=0, start=0))[1]) == 64  # a set smaller than a batch is repeated
    assert steps_of(part, 0.01, 5) == 1


def _failing_after(calls, function, error):
    left = [calls]

    def call(*arguments):
        if not left[0]:
            raise error
        left[0] -= 1
        return function(*arguments)

    return call


def test_a_training_that_was_cut_off_ends_bit_for_bit_like_one_that_was_not(tmp_path, monkeypatch):
    data, supernet = tiny.data(tmp_path), Supernet(tiny.space(tmp_path))
    settings = config.Train(epochs=2.0, batch_size=32, checkpoint_steps=2)
    whole = train_supernet(supernet, data, settings, seed=0, folder=tmp_path / "whole")

    class Cut(Exception):
        pass

    for limit in (3, 1, 4):
        with monkeypatch.context() as patched:
            patched.setattr(Step, "__call__", _failing_after(limit, Step.__call__, Cut))
            with pytest.raises(Cut):
                train_supernet(supernet, data, settings, seed=0, folder=tmp_path / "cut")
    again = train_supernet(supernet, data, settings, seed=0, folder=tmp_path / "cut")
    for name in whole:
        np.testing.assert_array_equal(whole[name], again[name])
    rows = [
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("whole", "cut")
    ]
    for row in (*rows[0], *rows[1]):
        del row["images_per_second"], row["waiting"]
    assert rows[0] == rows[1]


def test_a_training_that_diverges_says_so():
    part = Part(np.zeros((4, 1, 1, 1), np.uint8), np.zeros(4, np.int32))

    def step(state, number, images, labels):
        return state, {"loss": np.float32(np.nan)}

    with pytest.raises(CheckpointError, match="diverged at step 10"):
        fit(step, {}, part, steps=20, batch_size=2, seed=0)


def overflowing(folder):
    """Training images of which one in twelve is bright, so that the network's values are beyond float16."""
    data = tiny.data(folder)
    images = np.zeros_like(data.train.images[:48])
    images[::12] = 255
    part = Part(images, data.train.labels[:48])
    return dataclasses.replace(data, train=part, mean=np.zeros(1, np.float32), std=np.full(1, 1e-5, np.float32))


def test_a_step_skipped_for_its_loss_scale_is_no_divergence(tmp_path):
    data, supernet = overflowing(tmp_path), Supernet(tiny.space(tmp_path))
    settings = config.Train(precision="float16", batch_size=48, epochs=12.0, random_subnets=0)  # a step an epoch
    params = train_supernet(supernet, data, settings, seed=0, folder=tmp_path / "out")
    for name, array in supernet.init(0).items():
        np.testing.assert_array_equal(params[name], array)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["skipped"], row["gradient_norm"]) for row in rows] == [(10, 1, 0), (12, 1, 0)]
    assert not any(name.startswith("loss_") for row in rows for name in row)


def test_overflows_down_to_the_smallest_loss_scale_are_a_divergence(tmp_path):
    data, supernet = overflowing(tmp_path), Supernet(tiny.space(tmp_path))
    settings = config.Train(precision="float16", batch_size=48, epochs=40.0, random_subnets=0)
    with pytest.raises(CheckpointError, match=r"diverged at step 20: .*'skipped': 0\.0.* compute in bfloat16"):
        train_supernet(supernet, data, settings, seed=0)
