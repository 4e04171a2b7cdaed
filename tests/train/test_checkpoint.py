"""Checkpoints: written behind the loop's back, whole or not at all, and of one training only."""

import asyncio
import errno
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from orbax.checkpoint._src.serialization import serialization

from nas import config
from nas.errors import CheckpointError
from nas.supernet import Supernet
from nas.train import Checkpoints, train_supernet
from nas.train.supernet import identity, make_step

WRITE = "async_serialize_from_host"  # what Orbax calls in the background to write one array


@pytest.fixture
def held(monkeypatch):
    """Holds the background write of every array until the event is set."""
    go, write = threading.Event(), getattr(serialization, WRITE)

    async def when_it_may(*arguments, **options):
        while not go.is_set():
            await asyncio.sleep(0.001)
        return await write(*arguments, **options)

    monkeypatch.setattr(serialization, WRITE, when_it_may)
    yield go
    go.set()


async def fails(*arguments, **options):
    """A background write on a disk that is full."""
    raise OSError(errno.ENOSPC, "No space left on device")


def state(value: float = 0.0) -> dict:
    return {
        "params": {"a": jnp.full((64, 3), float(value)), "b": jnp.full(5, float(value))},
        "optimiser": (jnp.int32(value),),
    }


@jax.jit
def _plus_one(tree):
    return jax.tree.map(lambda a: a + 1, tree)


step = jax.jit(_plus_one, donate_argnums=0)


def equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_steps_that_donate_the_state_while_it_is_written_do_not_change_what_is_written(tmp_path, held):
    with Checkpoints(tmp_path) as checkpoints:
        trained = step(state())
        checkpoints.save(1, trained)
        for _ in range(20):
            trained = step(trained)
        jax.block_until_ready(trained)
        assert "1" not in names(tmp_path)  # nothing of it is written yet
        held.set()
        assert checkpoints.latest() == 1
        assert equal(checkpoints.restore(1, state()), state(1.0))
        assert equal(trained, state(21.0))


def test_a_save_that_a_kill_cut_off_is_not_seen_and_the_training_goes_on_from_the_step_before(tmp_path, held):
    held.set()
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state(1.0))
        checkpoints.latest()
        held.clear()
        checkpoints.save(2, state(2.0))
        killed = tmp_path / "killed"
        shutil.copytree(tmp_path / "run", killed)  # what is on the disk now is what a kill leaves
        held.set()
    (killed / "trash" / "0").mkdir(parents=True)  # half deleted
    assert any(name.startswith("2.") for name in names(killed))
    with Checkpoints(killed) as checkpoints:
        assert checkpoints.latest() == 1
        assert equal(checkpoints.restore(1, state()), state(1.0))
        checkpoints.save(2, state(3.0))
        assert equal(checkpoints.restore(2, state()), state(3.0))
    assert names(killed) == ["1", "2"]


def test_the_newest_two_are_kept_and_the_others_do_not_pile_up(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for number in range(1, 7):
            checkpoints.save(number, state(number))
        assert checkpoints.latest() == 6
        assert set(names(tmp_path)) - {"trash"} == {"5", "6"}
        assert len(names(tmp_path / "trash")) == 1
        checkpoints.save(6, state(9.0))  # is there already
        assert equal(checkpoints.restore(6, state()), state(6.0))
    assert names(tmp_path) == ["5", "6"]


def test_scalars_of_numpy_are_restored(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"n": np.int32(3), "x": np.float32(0.5)})
        assert equal(
            checkpoints.restore(1, {"n": np.int32(0), "x": np.float32(0)}), {"n": np.int32(3), "x": np.float32(0.5)}
        )


def test_a_write_that_fails_is_told_at_the_next_save_and_the_step_before_stays(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1.0))
    with monkeypatch.context() as patched, Checkpoints(tmp_path) as checkpoints:
        patched.setattr(serialization, WRITE, fails)
        checkpoints.save(2, state(2.0))
        with pytest.raises(CheckpointError, match=r"step 2 could not be written.*No space left.*Free some space"):
            checkpoints.save(3, state(3.0))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        assert equal(checkpoints.restore(1, state()), state(1.0))


def test_the_last_write_is_waited_for_and_its_failure_told_unless_something_else_failed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, WRITE, fails)
    with pytest.raises(CheckpointError, match=r"step 1 could not be written"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state())
    with pytest.raises(KeyError), Checkpoints(tmp_path) as checkpoints:  # noqa: PT012
        checkpoints.save(2, state())
        raise KeyError


def test_a_checkpoint_of_something_else_is_refused_before_its_arrays_are_read(tmp_path):
    with Checkpoints(tmp_path, {"space": "1111aaaa", "optimiser": "sgd"}) as checkpoints:
        checkpoints.save(1, state())
    shutil.rmtree(tmp_path / "1" / "state")
    with Checkpoints(tmp_path, {"space": "2222bbbb", "optimiser": "sgd"}) as checkpoints:
        with pytest.raises(CheckpointError, match=r"space '1111aaaa', here '2222bbbb'\..*--out") as told:
            checkpoints.restore(1, state())
        assert "optimiser" not in str(told.value)
    with (
        Checkpoints(tmp_path, {"space": "1111aaaa", "optimiser": "sgd"}) as checkpoints,
        pytest.raises(CheckpointError, match=r"arrays '\w{16}', here '\w{16}'"),
    ):
        checkpoints.restore(1, state() | {"average": jnp.zeros(3)})


@pytest.mark.parametrize("layout", ["of an older version", "without identity", "damaged identity"])
def test_a_checkpoint_that_does_not_say_what_it_is_of_is_refused(tmp_path, layout):
    if layout == "of an older version":
        with ocp.CheckpointManager(tmp_path) as manager:
            manager.save(1, args=ocp.args.StandardSave(state()))
    else:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state())
        if layout == "without identity":
            shutil.rmtree(tmp_path / "1" / "identity")
        else:
            (tmp_path / "1" / "identity" / "metadata").write_text("{")
    message = r"cannot be restored: it does not say what it is of.*--redo train"
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(1, state())
    assert (tmp_path / "1").is_dir()


def test_a_training_refuses_the_checkpoint_of_another_space_and_of_another_optimiser(tmp_path):
    data, settings = tiny.data(tmp_path), config.Train(epochs=2.0, batch_size=32)
    mine, other = Supernet(tiny.space(tmp_path)), Supernet(tiny.elastic_space(tmp_path))
    params = jax.tree.map(jnp.asarray, mine.init(0))
    with Checkpoints(tmp_path / "run" / "checkpoints", identity(mine, settings)) as checkpoints:
        checkpoints.save(2, make_step(mine, data, settings, seed=0).init(params))
    with pytest.raises(CheckpointError) as told:
        train_supernet(other, data, settings, seed=0, folder=tmp_path / "run")
    assert f"space '{mine.space.digest}', here '{other.space.digest}'" in str(told.value)
    adam = config.Train(epochs=2.0, batch_size=32, optimiser=config.Optimiser(name="adam"), ema=0.9)
    with pytest.raises(CheckpointError, match=r"moving average False, here True; optimiser 'sgd', here 'adam'"):
        train_supernet(mine, data, adam, seed=0, folder=tmp_path / "run")
