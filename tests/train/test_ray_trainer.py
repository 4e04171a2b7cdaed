"""Training in several processes is training on several devices; what goes wrong on the way is told, not waited for."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import filesets
import jax
import numpy as np
import psutil
import pytest
import tiny

from nas import cluster, config
from nas.data import Part, load_data
from nas.data.cache import cache_folder
from nas.errors import ConfigError, DataError, ExecutorError, RunError
from nas.supernet import Supernet
from nas.train import Checkpoints, ray_trainer, train_on_ray
from nas.train import step as training_step
from nas.train.batches import batches
from nas.train.supernet import identity, state_like, trained

SETTINGS = config.Train(
    epochs=9.0,  # 36 steps
    batch_size=32,
    random_subnets=1,
    sampler="attentive_best_up",  # looks at scores, which the processes compute together
    augment=config.Augment(flip=True, shift=1, mixup=0.2),
    optimiser=config.Optimiser(learning_rate=0.05),
    ema=0.9,
    checkpoint_steps=8,
    processes=2,
)
HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}:{HERE}", "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_all_processes_make_the_batch_in_order(processes):
    part = Part(np.arange(21, dtype=np.uint8).reshape(21, 1, 1, 1), np.arange(21, dtype=np.int32))
    whole = batches(part, 8, seed=1, start=1)
    shares = [batches(part, 8, seed=1, start=1, process=(i, processes)) for i in range(processes)]
    for _ in range(5):
        images, labels = next(whole)
        rows = [next(share) for share in shares]
        assert all(len(mine[1]) == 8 // processes for mine in rows)
        np.testing.assert_array_equal(np.concatenate([mine[0] for mine in rows]), images)
        np.testing.assert_array_equal(np.concatenate([mine[1] for mine in rows]), labels)


@pytest.mark.parametrize("name", filesets.LAZY)
def test_of_images_in_files_every_process_reads_its_own_rows_alone(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = filesets.write(name, tmp_path, *filesets.pictures(60, 3, (5, 6, 3)))
    part = load_data(config.Data(source, storage="files", threads=2)).train
    whole = list(batches(part, 8, seed=1, start=1, stop=8))
    shares, read = [], []
    for index in range(2):
        noted: list[list[int]] = []
        noting = filesets.reading(part, noted.append)
        shares.append(list(batches(noting, 8, seed=1, start=1, stop=8, process=(index, 2))))
        read.append(sorted(noted))
    for (images, labels), *mine in zip(whole, *shares, strict=True):
        np.testing.assert_array_equal(np.concatenate([rows[0] for rows in mine]), images)
        np.testing.assert_array_equal(np.concatenate([rows[1] for rows in mine]), labels)
    assert read == [sorted(rows) for rows in records_of(part, 8, seed=1, start=1, stop=8)]


def records_of(part, batch_size, *, start, stop, seed=0):
    """For each of two processes, the numbers of the records that are its rows of every batch."""
    numbered = Part(np.zeros((len(part), 1, 1, 1), np.uint8), np.arange(len(part)))
    steps = {"seed": seed, "start": start, "stop": stop}
    whole = [part.images.rows[i].tolist() for _, i in batches(numbered, batch_size, **steps)]
    half = batch_size // 2
    return [rows[:half] for rows in whole], [rows[half:] for rows in whole]


@pytest.mark.parametrize(
    ("settings", "devices"),
    [({"processes": 3}, 3), ({"processes": 2, "process_gpus": 3}, 6), ({"processes": 16, "accumulate": 4}, 16)],
)
def test_a_batch_that_does_not_divide_over_all_processes_is_told_before_anything_starts(settings, devices, tmp_path):
    asked = config.Train(batch_size=32, **settings)
    with pytest.raises(ConfigError, match=f"batch_size is 32, which does not divide over {devices} devices"):
        train_on_ray(config.Data("digits"), "mixed", asked, seed=0, folder=tmp_path / "out", digests=("", ""))
    assert not (tmp_path / "out").exists()


def test_what_ray_train_needs_is_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr(ray_trainer, "_PARTS", ("numpy", "no_such_part"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(ExecutorError, match=r"Ray Train needs no_such_part: `pip install 'ray\[train\]'`"):
        ray_trainer.preflight(SETTINGS)


def test_a_process_that_stayed_alone_does_not_train():
    with pytest.raises(ExecutorError, match=r"connects 1 processes, but train\.processes is 2"):
        ray_trainer._require_connected(SETTINGS)


def test_subnets_that_differ_between_processes_are_refused(monkeypatch):
    genotypes = np.zeros((2, 3), np.uint8)
    training_step._require_same_subnets(7, genotypes)  # one process has nobody to differ from
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(training_step.multihost_utils, "process_allgather", lambda mine: np.array([mine, mine]))
    training_step._require_same_subnets(7, genotypes)
    monkeypatch.setattr(training_step.multihost_utils, "process_allgather", lambda mine: np.array([mine, mine + 1]))
    with pytest.raises(ExecutorError, match="step 7: the processes drew different subnets"):
        training_step._require_same_subnets(7, genotypes)


# with real processes

STEPS = """
import sys
import jax
index, count, port, folder, skewed = *map(int, sys.argv[1:4]), sys.argv[4], sys.argv[5] == "skewed"
if count > 1:
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, count, index, coordinator_bind_address=address)
import json, pathlib
import msgspec, numpy as np, tiny
from nas.errors import ExecutorError
from nas.supernet import Supernet
from nas.train.batches import batches
from nas.train.samplers import Draw
from nas.train.supernet import make_step
from test_ray_trainer import SETTINGS
assert (jax.process_count(), jax.device_count()) == (count, 2)
folder = pathlib.Path(folder)
data, supernet = tiny.data(folder), Supernet(tiny.space(folder))
for change in ({}, {"sampler": "sandwich", "accumulate": 2, "norm_images": 8, "precision": "float16"}):
    settings = msgspec.structs.replace(SETTINGS, **change)
    step = make_step(supernet, data, settings, seed=0)
    drawn, sampler = [], step.sampler
    def draw(number, rng, score):
        draw = sampler(number, rng, score)
        genotypes = np.roll(draw.genotypes, index, axis=0) if skewed else draw.genotypes
        drawn.append(genotypes.tolist())
        return Draw(genotypes, draw.distil)
    object.__setattr__(step, "sampler", draw)
    state = step.init(supernet.init(0))
    rows = batches(data.train, settings.batch_size, seed=0, start=0, process=(index, count))
    losses = []
    try:
        for number in range(3):
            state, metrics = step(state, number, *next(rows))
            losses.append({k: float(v) for k, v in metrics.items()})
    except ExecutorError as e:
        assert skewed and "drew different subnets" in str(e), e
        print("refused")
        break
    assert not skewed
    assert step.compiled == 3, step.compiled
    print(json.dumps([drawn, losses]))
"""


def steps(folder, count, *, skewed=False):
    """What each of `count` processes prints that together have two devices."""
    for index in range(count):
        (folder / str(index)).mkdir(parents=True)
    port = str(ray_trainer._free_port("127.0.0.1"))
    flags = f"--xla_force_host_platform_device_count={2 // count}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", STEPS, str(i), str(count), port, folder / str(i), "skewed" if skewed else ""],
            env={**ENVIRONMENT, "XLA_FLAGS": flags}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip
    ended = [process.communicate(timeout=600) for process in running]
    assert [p.returncode for p in running] == [0] * count, "\n".join(error[-2000:] for _, error in ended)
    return [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in ended]


@pytest.mark.slow
def test_every_process_draws_the_same_and_the_losses_are_those_of_one_process(tmp_path):
    (alone,) = steps(tmp_path / "alone", 1)
    first, second = steps(tmp_path / "two", 2)
    assert first == second  # subnets and metrics, to the bit
    for mine, wanted in zip(map(json.loads, first), map(json.loads, alone), strict=True):
        assert mine[0] == wanted[0]
        for here, there in zip(mine[1], wanted[1], strict=True):
            assert here == pytest.approx(there, rel=1e-5)


@pytest.mark.slow
def test_processes_that_draw_different_subnets_stop_at_once(tmp_path):
    assert steps(tmp_path, 2, skewed=True) == [["refused"], ["refused"]]


ALONE = """
import sys, pathlib, tiny, jax
from nas import config
from nas.data import load_data
from nas.supernet import Supernet
from nas.train import train_supernet
from test_ray_trainer import SETTINGS
assert jax.local_device_count() == 2
folder, data = pathlib.Path(sys.argv[1]), load_data(config.Data(sys.argv[2], storage="memory"))
train_supernet(Supernet(tiny.space(folder)), data, SETTINGS, seed=0, folder=folder / "out")
"""


def trained_alone(folder, source):
    """`folder` with a space, and in `out` the training of one process on two devices, all images in memory."""
    tiny.write_space(folder)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, folder, source], capture_output=True, text=True,
        env={**ENVIRONMENT, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with space and data, and the training of one process on two devices in `out`."""
    folder = tmp_path_factory.mktemp("alone")
    return trained_alone(folder, tiny.write_data(folder))


@pytest.fixture(scope="module")
def pictures():
    """Images and labels in the order that image folders have them in, by class."""
    with tempfile.TemporaryDirectory() as folder:
        data = tiny.data(Path(folder))
    parts = (data.train, data.val, data.test)
    images, labels = (np.concatenate([getattr(p, what) for p in parts]) for what in ("images", "labels"))
    order = np.argsort(labels, kind="stable")
    return images[order], labels[order]


@pytest.fixture(scope="module")
def from_memory(tmp_path_factory, pictures):
    """`place`, of `pictures`."""
    folder = tmp_path_factory.mktemp("memory")
    return trained_alone(folder, filesets.write("image_folder", folder, *pictures))


@pytest.fixture(scope="module")
def two_cpus(tmp_path_factory):
    """A cluster that the trainings of this module find, use and leave running."""
    with pytest.MonkeyPatch.context() as patched, contextlib.ExitStack() as undo:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield cluster.connect("local", undo, cpus=2)


def train(place, out, settings=SETTINGS, *, data=None, digests=None, progress=None):
    data = data or config.Data(str(place / "bars.npz"))
    train_on_ray(
        data,
        str(place / "tiny.toml"),
        settings,
        seed=0,
        folder=out,
        digests=digests or (tiny.space(place).digest, load_data(data).digest),
        progress=progress,
    )


def rows(folder):
    """Metrics by step, without the times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {k: v for k, v in row.items() if k not in ("images_per_second", "waiting")} for row in found}


def same_training(place, folder):
    """That `folder` has the losses and the weights of the training of one process."""
    mine, wanted = rows(folder), rows(place / "out")
    assert list(mine) == list(wanted) == [10, 20, 30, 36]
    for step in wanted:
        assert mine[step] == pytest.approx(wanted[step], rel=1e-5), step
    like = state_like(Supernet(tiny.space(place)), tiny.data(place), SETTINGS, seed=0)
    weights = []
    for out in (folder, place / "out"):
        with Checkpoints(out / "checkpoints", identity(Supernet(tiny.space(place)), SETTINGS)) as checkpoints:
            assert checkpoints.latest() == 36
            weights.append(trained(checkpoints.restore(36, like)))
    for name, array in weights[1].items():
        assert len(array.sharding.device_set) == 1
        np.testing.assert_allclose(weights[0][name], array, rtol=1e-5, atol=1e-5, err_msg=name)


def processes_of_training():
    """This process's grandchildren that train."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_two_processes_train_like_one_with_two_devices(place, two_cpus, tmp_path):
    seen, listening = [], []

    def progress(done, total, values):
        seen.append((done, total))
        for process in processes_of_training():
            found = process.net_connections(kind="inet")
            listening.extend(c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN)
        assert len(processes_of_training()) == 2

    train(place, tmp_path / "two", progress=progress)
    assert seen == [(10, 36), (20, 36), (30, 36), (36, 36)]
    assert listening
    assert all(ip.rpartition(":")[2].startswith("127.") for ip in listening), listening
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["checkpoints", "metrics.jsonl"]
    assert {p.name for p in (tmp_path / "two" / "checkpoints").iterdir()} - {"trash"} == {"32", "36"}
    written_by = {p.name for p in (tmp_path / "two" / "checkpoints").glob("36/state/ocdbt.process_*")}
    assert written_by == {"ocdbt.process_0", "ocdbt.process_1"}  # each its part of one checkpoint
    same_training(place, tmp_path / "two")


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_and_the_same_call_goes_on(place, two_cpus, tmp_path):
    killed = []

    def kill_one(done, total, values):
        if not killed:
            killed.append(time.monotonic())
            processes_of_training()[-1].kill()

    with pytest.raises(ExecutorError, match=r"died: look for .* The same command goes on from the newest"):
        train(place, tmp_path / "out", progress=kill_one)
    assert time.monotonic() - killed[0] < 60
    deadline = time.monotonic() + 10
    while processes_of_training():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    seen = []
    train(place, tmp_path / "out", progress=lambda done, total, values: seen.append(done))
    assert seen[-1] == 36
    same_training(place, tmp_path / "out")


def noting(job):
    """What a process does, with the records that it reads for training noted in a file beside the run's folder."""
    from nas.train import loop

    def noted(part, *arguments, process, **options):
        notes = open(Path(job["folder"]).parent / f"read_{process[0]}", "a", buffering=1)  # noqa: SIM115
        noting = filesets.reading(part, lambda records: notes.write(f"{json.dumps(records)}\n"))
        return plain(noting, *arguments, process=process, **options)

    plain, loop.batches = loop.batches, noted
    ray_trainer._train(job)


def noted(folder):
    """What the processes have noted, a list of batches for each; the notes are gone then."""
    notes = [folder / f"read_{index}" for index in range(2)]
    found = [sorted(map(json.loads, file.read_text().splitlines())) for file in notes]
    for file in notes:
        file.unlink()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", filesets.LAZY)
def test_two_processes_train_from_files_like_one_from_memory_and_go_on_where_they_were_killed(
    name, from_memory, pictures, two_cpus, tmp_path, monkeypatch
):
    data = config.Data(filesets.write(name, tmp_path, *pictures), storage="files", threads=2)
    loaded, out = load_data(data), tmp_path / "out"
    part, digests = loaded.train, (tiny.space(from_memory).digest, loaded.digest)
    shutil.rmtree(cache_folder(), ignore_errors=True)  # both processes now want to make what it has of these files
    monkeypatch.setattr(ray_trainer, "_train", noting)

    def kill_one(done, total, values):
        for process in processes_of_training()[-1:]:
            process.kill()

    with pytest.raises(ExecutorError, match="The same command goes on from the newest"):
        train(from_memory, out, data=data, digests=digests, progress=kill_one)
    assert name == "image_folder" or len([p for p in cache_folder().iterdir() if p.suffix in (".arrow", ".npz")]) == 1
    begun = records_of(part, SETTINGS.batch_size, start=0, stop=36)
    for read, rows in zip(noted(tmp_path), begun, strict=True):
        assert len(read) >= 10
        assert all(records in rows for records in read)
    position = max(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    train(from_memory, out, data=data)
    assert position >= 8
    left = records_of(part, SETTINGS.batch_size, start=position, stop=36)
    assert noted(tmp_path) == [sorted(rows) for rows in left]
    same_training(from_memory, out)


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_all_and_is_named(from_memory, pictures, two_cpus, tmp_path):
    data = config.Data(filesets.write("image_folder", tmp_path, *pictures), storage="files", threads=1)
    images = load_data(data).train.images
    damaged = images.records.name(images.rows[0])
    began = []

    def damage(done, total, values):
        if not began:
            Path(damaged).write_bytes(b"no image")
        began.append(time.monotonic())

    with pytest.raises(DataError, match=f"{damaged}: cannot be decoded as an image"):
        train(from_memory, tmp_path / "out", data=data, progress=damage)
    assert time.monotonic() - began[-1] < 60


@pytest.mark.slow
def test_no_room_and_other_files_are_errors(place, two_cpus, tmp_path, monkeypatch):
    import msgspec

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    four = msgspec.structs.replace(SETTINGS, processes=4)
    with pytest.raises(ExecutorError, match=r"did not place 4 processes of 1 CPU within 3 s; it has 2 CPUs"):
        train(place, tmp_path / "out", four)
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"The data that training process . finds on .* is another one"):
        train(place, tmp_path / "out", digests=(tiny.space(place).digest, "0" * 64))


DRIVER = """
import signal, sys, pathlib
from test_ray_trainer import train
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
train(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_ended_leaves_no_process_behind(place, tmp_path, how):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, place, tmp_path / "out"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (tmp_path / "out" / "checkpoints" / "8").exists():
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.communicate()[1]
        time.sleep(0.05)
    family = psutil.Process(driver.pid).children(recursive=True)
    assert len(family) > 5
    driver.send_signal(how)
    output, errors = driver.communicate(timeout=30)
    assert output == ""
    assert how == signal.SIGKILL or "KeyboardInterrupt" in errors
    deadline = time.monotonic() + 15
    while left := [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, [(p.pid, p.cmdline()) for p in left]
        time.sleep(0.2)
