"""Laws of a training step: what it adds up, in which precision, on how many devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
import tiny

from nas import config
from nas.errors import ConfigError
from nas.supernet import Supernet
from nas.train import train_supernet
from nas.train.samplers import SAMPLERS, sampler
from nas.train.supernet import make_step

BASE = config.Train(batch_size=16, random_subnets=1, optimiser=config.Optimiser(learning_rate=0.05, warmup=0.0))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    return tiny.data(folder), Supernet(tiny.space(folder))


def stepped(place, settings, steps=1, seed=0):
    """State and metrics after some steps from the initial weights."""
    data, supernet = place
    step = make_step(supernet, data, settings, seed=seed)
    state, metrics = step.init(jax.tree.map(jnp.asarray, supernet.init(0))), {}
    n = settings.batch_size
    for number in range(steps):
        state, metrics = step(state, number, data.train.images[:n], data.train.labels[:n])
    return state, jax.device_get(metrics)


def close(a, b, rtol, atol):
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=atol, err_msg=name)


def with_(**changes):
    return msgspec.structs.replace(BASE, **changes)


def test_accumulated_gradients_equal_those_of_the_large_batch_over_equal_norms(place):
    whole, metrics = stepped(place, with_(norm_images=4))
    parts, accumulated = stepped(place, with_(accumulate=4))
    close(parts["params"], whole["params"], rtol=1e-5, atol=1e-6)
    for name in metrics:
        assert accumulated[name] == pytest.approx(metrics[name], rel=1e-5)
    other, _ = stepped(place, BASE)  # norms over the whole batch: another training
    assert any(np.any(np.abs(other["params"][n] - whole["params"][n]) > 1e-4) for n in whole["params"])


def test_rematerialisation_changes_memory_not_gradients(place):
    plain, _ = stepped(place, BASE)
    again, _ = stepped(place, with_(rematerialise=True))
    close(again["params"], plain["params"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_keeps_float32_weights_and_nearly_the_same_step(place, precision):
    wide, _ = stepped(place, BASE)
    narrow, metrics = stepped(place, with_(precision=precision))
    assert all(a.dtype == jnp.float32 for a in narrow["params"].values())
    start = place[1].init(0)
    moved = sum(np.abs(wide["params"][n] - start[n]).sum() for n in start)
    apart = sum(np.abs(wide["params"][n] - narrow["params"][n]).sum() for n in start)
    assert 0 < apart < 0.3 * moved
    assert np.isfinite(metrics["loss_largest"])


def test_a_step_that_overflows_in_float16_is_skipped_and_the_scale_halved(place):
    data, supernet = place
    step = make_step(supernet, data, with_(precision="float16"), seed=0)
    state = step.init(jax.tree.map(jnp.asarray, supernet.init(0)))
    state["loss_scale"]["scale"] = jnp.float32(2.0**127)
    before = jax.device_get(state)
    after, _ = step(state, 0, data.train.images[:16], data.train.labels[:16])
    for name, array in before["params"].items():
        np.testing.assert_array_equal(after["params"][name], array)
    assert after["loss_scale"]["scale"] < before["loss_scale"]["scale"]


def test_noise_is_deterministic_and_does_something(place):
    settings = with_(noise=config.Noise(dropout=0.3, drop_path=0.3, drop_block=0.1))
    one, _ = stepped(place, settings)
    two, _ = stepped(place, settings)
    none, _ = stepped(place, BASE)
    for name in one["params"]:
        np.testing.assert_array_equal(one["params"][name], two["params"][name])
    assert any(np.any(one["params"][n] != none["params"][n]) for n in none["params"])


def test_the_moving_average_is_what_a_training_returns(place):
    data, supernet = place
    plain = train_supernet(supernet, data, with_(epochs=0.5), seed=0)
    average = train_supernet(supernet, data, with_(epochs=0.5, ema=0.5), seed=0)
    assert any(np.any(np.abs(plain[n] - average[n]) > 1e-6) for n in plain)


def test_every_sampler_trains_with_the_programs_of_the_first(place):
    data, supernet = place
    step = make_step(supernet, data, BASE, seed=0)
    state = step.init(jax.tree.map(jnp.asarray, supernet.init(0)))
    for name in SAMPLERS:
        settings = with_(sampler=name)
        object.__setattr__(step, "sampler", sampler(settings, supernet.space, steps=4))
        for number in range(2):
            state, metrics = step(state, number, data.train.images[:16], data.train.labels[:16])
        assert np.isfinite(float(metrics["gradient_norm"])), name
    assert step.compiled == 3


def test_a_space_of_several_resolutions_compiles_once_for_each(tmp_path):
    data, supernet = tiny.data(tmp_path), Supernet(tiny.space_of_resolutions(tmp_path))
    step = make_step(supernet, data, BASE, seed=0)
    state = step.init(jax.tree.map(jnp.asarray, supernet.init(0)))
    for number in range(10):
        state, _ = step(state, number, data.train.images[:16], data.train.labels[:16])
    assert step.compiled == 2 + 2 + 1
    moved = supernet.init(0)
    assert all(np.any(state["params"][n] != moved[n]) for n in moved if "_to_" in n)  # transforms learn


def test_sizes_that_do_not_divide_are_told(place):
    for change, message in (({"accumulate": 3}, "train.batch_size is 16"), ({"norm_images": 3}, "norm_images is 3")):
        with pytest.raises(ConfigError, match=message):
            make_step(place[1], place[0], with_(**change), seed=0)


EIGHT = """
import jax, sys, pathlib
sys.path.insert(0, {tests!r})
import numpy as np, tiny
from test_step import BASE, stepped
from nas.supernet import Supernet
folder = pathlib.Path({folder!r})
assert jax.local_device_count() == {devices}
state, metrics = stepped((tiny.data(folder), Supernet(tiny.space(folder))), BASE)
if {devices} > 1:
    assert len(state["params"]["stem/conv_stem/conv/kernel"].sharding.device_set) == {devices}
np.savez(folder / "state{devices}.npz", **{{n: np.asarray(a) for n, a in state["params"].items()}}, **metrics)
"""


def test_eight_devices_make_the_step_of_one(tmp_path):
    here = Path(__file__).parent
    for devices in (1, 8):
        code = EIGHT.format(tests=str(here), folder=str(tmp_path), devices=devices)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=here.parent,
            env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                 "PYTHONPATH": f"{here.parents[1]}:{here.parent}:{here}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    one, eight = (np.load(tmp_path / f"state{n}.npz") for n in (1, 8))
    for name in one:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_batch_that_does_not_divide_over_the_devices_is_told(place, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match="over 3 devices"):
        make_step(place[1], place[0], BASE, seed=0)
