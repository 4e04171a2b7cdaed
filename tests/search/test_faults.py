"""Whatever is killed, wherever: nothing is lost, nothing is doubled, and the end is that of a search left alone."""

import contextlib
import importlib.util
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import search_toy as toy
from test_driver import go

from nas.search import RayExecutor
from nas.search.journal import read

TRIALS = 80

# A search whose evaluations take a while, in a process of its own: `ray` or `inline`, the journal, and where Ray is.
DRIVER = f"""
import sys
import search_toy as toy
from nas.errors import ExecutorError
from nas.search import InlineExecutor, RayExecutor
from test_driver import go
executor, path, address, delay_seconds, workers = sys.argv[1:]
kwargs = {{"delay_seconds": float(delay_seconds)}}
chosen = (
    RayExecutor("search_toy:evaluator", kwargs, workers=int(workers), address=address)
    if executor == "ray"
    else InlineExecutor(toy.evaluator, kwargs)
)
print("begun", flush=True)
try:
    go(path, executor=chosen, trials={TRIALS})
except ExecutorError as e:
    sys.exit(f"error: {{e}}")
"""


def start(executor, path, address="local", delay_seconds=0.02, workers=2, **environment):
    """A driver that has imported all it needs."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, executor, path, address, str(delay_seconds), str(workers)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "begun\n", driver.communicate()[1]
    return driver


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The trials of the search that nobody disturbs."""
    return go(tmp_path_factory.mktemp("whole") / "journal", trials=TRIALS)


def committed(path):
    """The whole lines of a journal, and that trials are in it once each, in order."""
    if not path.exists() or b"\n" not in (data := path.read_bytes()):
        return b""
    assert [record["trial"] for record in read(path)[1]] == list(range(len(read(path)[1])))
    return data[: data.rindex(b"\n") + 1]


def wait_for(path, lines, driver, seconds=60):
    """Until the journal has so many lines; False if the driver has ended by itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return True
        if driver.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError(f"no {lines} lines within {seconds} s")


def kill_drivers(path, executor, kills, delay_seconds, seed):
    """Kills one driver after the other, each some trials and milliseconds after where the last one was."""
    rng, done, killed = random.Random(seed), b"", 0
    while killed < kills:
        driver = start(executor, path, delay_seconds=delay_seconds)
        lines = min(TRIALS - 5, done.count(b"\n") + rng.randrange(1 + 2 * TRIALS // kills))
        if wait_for(path, lines, driver):
            time.sleep(rng.random() * 3 * delay_seconds)
        driver.send_signal(signal.SIGKILL)
        if driver.wait() != -signal.SIGKILL or b'"trial":%d' % (TRIALS - 5) in committed(path):
            assert committed(path).startswith(done)
            path.unlink()  # it has come to the end: from the beginning again
            done = b""
            continue
        killed += 1
        assert committed(path).startswith(done)  # nothing that was committed is lost
        done = committed(path)


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_driver_killed_at_random_points(tmp_path, whole, kills):
    path = tmp_path / "journal"
    kill_drivers(path, "inline", kills, 0.005, seed=kills)
    done = committed(path)
    assert go(path, trials=TRIALS) == whole
    assert committed(path).startswith(done)


@pytest.mark.slow
def test_a_driver_on_ray_killed_at_random_points(tmp_path, whole):
    path = tmp_path / "journal"
    kill_drivers(path, "ray", 20, 0.05, seed=20)
    assert go(path, trials=TRIALS) == whole
    committed(path)


def kill_workers(path, kills, stop, seed):
    """Kills evaluating workers of this process's cluster, some trials apart: nobody can tell a candidate that is hit
    three times from one that crashes its worker. Returns how many."""
    rng, killed, lines = random.Random(seed), 0, 1
    while killed < kills and not stop.wait(rng.uniform(0.05, 0.2)):
        if not path.exists() or path.read_bytes().count(b"\n") < lines:
            continue
        workers = [p for p in psutil.Process().children(recursive=True) if is_worker(p, "ray::Worker.evaluate")]
        if workers:
            rng.choice(workers).kill()
            killed += 1
            lines = path.read_bytes().count(b"\n") + rng.randrange(1, 4)
    return killed


def is_worker(process, title="ray::Worker"):
    try:
        return process.cmdline()[0].startswith(title)
    except (psutil.Error, IndexError):
        return False


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_workers_killed_at_random_points(tmp_path, whole, kills):
    path, stop, found = tmp_path / "journal", threading.Event(), []
    thread = threading.Thread(target=lambda: found.append(kill_workers(path, kills, stop, seed=kills)))
    executor = RayExecutor("search_toy:evaluator", {"delay_seconds": 0.2}, workers=2)
    thread.start()
    try:
        assert go(path, executor=executor, trials=TRIALS) == whole
    finally:
        stop.set()
        thread.join()
    assert found == [kills]
    committed(path)


def test_a_search_completes_whatever_its_candidates_do(tmp_path):
    """They crash, hang, run out of memory politely or not, and count in NaN."""
    log = tmp_path / "log"
    executor = RayExecutor("search_toy:wild_evaluator", {"log": str(log)}, workers=2, timeout_seconds=4.0)
    first = [np.array([gene, *[0] * 9], np.uint8) for gene in range(7)]
    problem = toy.problem((7,) * 10)
    trials = go(tmp_path / "wild", executor=executor, trials=10, strategy="random", problem=problem, initial=first)
    assert len(trials) == 10
    seen = {t.genotype[0]: t.failure for t in trials}
    assert seen[0] is None
    assert {first: seen[first] for first in range(1, 7)} == {
        1: "crashed the worker 3 times",  # SIGKILL, as the system's killer of those out of memory does
        2: "MemoryError: ",
        3: "TypeError: 'float' object cannot be interpreted as an integer",
        4: "gave no answer within 4 s 3 times",
        5: "crashed the worker 3 times",  # a segmentation fault
        6: "crashed the worker 3 times",  # sys.exit
    }
    good = [t for t in trials if t.failure is None]
    assert all(t.correct == toy.correct(np.array(t.genotype)) for t in good)
    calls = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
    alone = {g: len({pid for pid, other in calls if other == g}) for _, g in calls}
    assert max(alone.values()) <= 4  # three, and one where the blame fell on the answer before


# `ray`, for nodes that join each other on loopback, which Ray takes for a mistake.
RAY = """
from ray._private import ray_constants, services
ray_constants.ENABLE_RAY_CLUSTER = True
services.get_node_ip_address = lambda address=None: "127.0.0.1"
from ray.scripts.scripts import main
main()
"""


class Cluster:
    """A head without CPUs and nodes of two each, on loopback behind a token: each is a family of processes."""

    def __init__(self, dashboard_port=None):
        self.folder = Path(tempfile.mkdtemp(prefix="nas-"))
        self.settings = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: loopback
        }
        self.nodes = []
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        board = ["--include-dashboard=false"]
        if dashboard_port is not None:
            board = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
        self.head = self._start("--head", f"--port={port}", "--num-cpus=0", f"--temp-dir={self.folder}", *board)
        self.wait(lambda: "Ray runtime started" in (self.folder / "said").read_text())

    def _start(self, *arguments):
        command = [sys.executable, "-c", RAY, "start", "--block", "--node-ip-address=127.0.0.1"]
        with (self.folder / "said").open("a") as said:
            return subprocess.Popen(
                [*command, f"--object-store-memory={2**27}", *arguments],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **self.settings},
                stdout=said,
                stderr=said,
            )

    def wait(self, condition, seconds=90):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.folder / "said").read_text()
            time.sleep(0.1)

    def add(self):
        self.nodes.append(self._start(f"--address={self.address}", "--num-cpus=2"))

    def kill(self, node):
        """Its whole family at once, as by a pulled plug."""
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()
        psutil.wait_procs(family, timeout=10)

    def workers(self):
        """Of all nodes, those that evaluate."""
        return [p for n in self.nodes for p in psutil.Process(n.pid).children(recursive=True) if is_worker(p)]

    def close(self):
        for node in [*self.nodes, self.head]:
            if node.poll() is None:
                self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def cluster():
    made = Cluster()
    yield made
    made.close()


@pytest.mark.slow
def test_nodes_killed_and_replaced(tmp_path, whole, cluster):
    """Three nodes of two workers: one after the other is killed, and a new one comes."""
    for _ in range(3):
        cluster.add()
    path, rng = tmp_path / "journal", random.Random(5)
    driver = start("ray", path, cluster.address, 1.0, workers=6, **cluster.settings)
    for kills in range(5):
        assert wait_for(path, 8 + 10 * kills, driver, 180), driver.communicate()
        node = rng.choice([n for n in cluster.nodes if any(map(is_worker, children(n)))])
        cluster.nodes.remove(node)
        cluster.kill(node)
        cluster.add()
    output = driver.communicate(timeout=300)
    assert driver.returncode == 0, output
    assert go(path, trials=TRIALS) == whole
    committed(path)


@pytest.mark.slow
def test_a_search_goes_on_with_fewer_workers_and_says_so_and_takes_in_who_comes(tmp_path, whole, cluster):
    cluster.add()
    path = tmp_path / "journal"
    driver = start("ray", path, cluster.address, 3.0, workers=4, **cluster.settings)
    cluster.wait(lambda: len(cluster.workers()) == 2)
    assert wait_for(path, 30, driver, 180)  # which takes more than half a minute
    assert len(cluster.workers()) == 2
    cluster.add()
    cluster.wait(lambda: len(cluster.workers()) == 4)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    assert "2 of 4 workers go on. 4 workers of 1 CPUs need 4; the cluster has 2 CPUs, of which 0 are free." in errors
    assert go(path, trials=TRIALS) == whole


@pytest.mark.slow
def test_a_cluster_that_starves_later_is_an_error_within_half_a_minute(tmp_path, whole, cluster):
    cluster.add()
    path = tmp_path / "journal"
    driver = start("ray", path, cluster.address, 0.5, **cluster.settings)
    assert wait_for(path, 10, driver, 120)
    cluster.kill(cluster.nodes.pop())
    killed = time.monotonic()
    _, errors = driver.communicate(timeout=120)
    assert "2 workers of 1 CPUs need 2; the cluster has 0 CPUs" in errors
    assert time.monotonic() - killed < 60  # half a minute without room, after Ray has found out and before it ends
    assert go(path, trials=TRIALS) == whole


@pytest.mark.slow
@pytest.mark.parametrize("local", [True, False])
def test_a_dead_head_ends_the_search_within_half_a_minute(tmp_path, whole, cluster, local):
    cluster.add()
    path = tmp_path / "journal"
    driver = start("ray", path, "local" if local else cluster.address, 0.5, **({} if local else cluster.settings))
    assert wait_for(path, 10, driver, 120)
    killed = time.monotonic()
    if local:
        for process in children(driver):
            if process.name() in ("gcs_server", "raylet"):
                process.kill()
    else:
        cluster.kill(cluster.head)
    _, errors = driver.communicate(timeout=100)
    assert time.monotonic() - killed < 30
    assert driver.returncode == 1
    assert "error: The Ray cluster is lost" in errors
    assert "the same command goes on" in errors
    done = committed(path)
    assert done
    assert go(path, trials=TRIALS) == whole
    assert committed(path).startswith(done)


def ray(*arguments, **environment):
    """The command `ray` on the outside of a cluster."""
    done = subprocess.run(
        [sys.executable, "-c", RAY, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("aiohttp_cors") is None, reason="jobs need ray[default]")
@pytest.mark.slow
def test_as_a_job_of_a_cluster_behind_a_token(tmp_path, whole):
    """As README has it: the driver runs on the head, joins its cluster, and only who has the token may submit."""
    port = free_port()
    cluster = Cluster(dashboard_port=port)
    try:
        cluster.add()
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "driver.py").write_text(DRIVER)
        path = tmp_path / "journal"
        submit = ("job", "submit", f"--address=http://127.0.0.1:{port}", f"--working-dir={tmp_path / 'work'}", "--")
        entry = (sys.executable, "driver.py", "ray", path, "auto", 0.02, 2)
        code, told = ray(*submit, *entry, **cluster.settings | {"RAY_AUTH_TOKEN": "wrong" * 8})
        assert code != 0
        assert not path.exists()
        code, told = ray(*submit, *entry, **cluster.settings)
        assert code == 0, told
        assert "succeeded" in told
        (address,) = {
            c.laddr.ip for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == "LISTEN"
        }
        assert address == "127.0.0.1"
    finally:
        cluster.close()
    assert len(committed(path).splitlines()) == TRIALS + 1
    assert go(path, trials=TRIALS) == whole


def children(process):
    return psutil.Process(process.pid).children(recursive=True)
