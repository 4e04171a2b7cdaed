"""Whatever is killed, wherever: nothing is lost, nothing is doubled, and the end is that of a search left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import search_toy as toy
from ray_cluster import Cluster, children, is_worker
from test_driver import go
from test_executors import digest

from nas.search import EXECUTORS
from nas.search.journal import read

TRIALS = 80

# A search whose evaluations take a while, in a process of its own: an executor, the journal, and where Ray is.
DRIVER = f"""
import sys
from nas.errors import ExecutorError
from nas.search import EXECUTORS
from test_driver import go
executor, path, address, delay_seconds, workers = sys.argv[1:]
kwargs = {{"delay_seconds": float(delay_seconds)}}
chosen = EXECUTORS[executor]("search_toy:evaluator", kwargs, workers=int(workers), address=address)
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
    """The digest of the search that nobody disturbs."""
    return ended(tmp_path_factory.mktemp("whole") / "journal")


def ended(path, executor=None):
    """The digest of a search that goes on to its end, which keeps what was committed."""
    done = committed(path)
    assert len(go(path, executor=executor, trials=TRIALS)) == TRIALS
    assert committed(path).startswith(done)
    return digest(path)


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
        assert driver.wait() in (-signal.SIGKILL, 0), driver.communicate()  # none refuses to go on
        if driver.returncode == 0 or b'"trial":%d' % (TRIALS - 5) in committed(path):
            assert committed(path).startswith(done)
            path.unlink()  # it has come to the end: from the beginning again
            done = b""
            continue
        killed += 1
        assert committed(path).startswith(done)  # nothing that was committed is lost
        done = committed(path)


@pytest.mark.parametrize(
    ("executor", "kills"),
    [("inline", 6), *(pytest.param(name, 50, marks=pytest.mark.slow) for name in ("inline", "processes"))],
)
def test_a_driver_killed_at_random_points(tmp_path, whole, executor, kills):
    path = tmp_path / "journal"
    kill_drivers(path, executor, kills, 0.005, seed=kills)
    assert ended(path) == whole


@pytest.mark.slow
def test_a_driver_on_ray_killed_at_random_points(tmp_path, whole):
    path = tmp_path / "journal"
    kill_drivers(path, "ray", 20, 0.05, seed=20)
    assert ended(path) == whole


def kill_workers(path, kills, stop, seed):
    """Kills evaluating workers of this process, some trials apart: nobody can tell a candidate that is hit three times
    from one that crashes its worker. Returns how many."""
    rng, killed, lines = random.Random(seed), 0, 1
    while killed < kills and not stop.wait(rng.uniform(0.05, 0.2)):
        if not path.exists() or path.read_bytes().count(b"\n") < lines:
            continue
        if workers := [p for p in psutil.Process().children(recursive=True) if is_evaluating(p)]:
            rng.choice(workers).kill()
            killed += 1
            lines = path.read_bytes().count(b"\n") + rng.randrange(1, 4)
    return killed


def is_evaluating(process):
    try:
        line = process.cmdline()
    except psutil.Error:
        return False
    return line[:1] == ["ray::Worker.evaluate"] or any(word.endswith("search/_worker.py") for word in line)


@pytest.mark.parametrize(
    ("executor", "kills"),
    [("processes", 2), *(pytest.param(name, 20, marks=pytest.mark.slow) for name in ("ray", "processes"))],
)
def test_workers_killed_at_random_points(tmp_path, whole, executor, kills):
    path, stop, found = tmp_path / "journal", threading.Event(), []
    thread = threading.Thread(target=lambda: found.append(kill_workers(path, kills, stop, seed=kills)))
    chosen = EXECUTORS[executor]("search_toy:evaluator", {"delay_seconds": 0.2}, workers=2)
    thread.start()
    try:
        assert ended(path, chosen) == whole
    finally:
        stop.set()
        thread.join()
    assert found == [kills]


@pytest.mark.parametrize("executor", [pytest.param("ray", marks=pytest.mark.slow), "processes"])
def test_a_search_completes_whatever_its_candidates_do(tmp_path, executor):
    """They crash, hang, run out of memory politely or not, and count in NaN."""
    log = tmp_path / "log"
    chosen = EXECUTORS[executor]("search_toy:wild_evaluator", {"log": str(log)}, workers=2, timeout_seconds=4.0)
    first = [np.array([gene, *[0] * 9], np.uint8) for gene in range(7)]
    problem = toy.problem((7,) * 10)
    trials = go(tmp_path / "wild", executor=chosen, trials=10, strategy="random", problem=problem, initial=first)
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
    assert len(committed(path).splitlines()) == TRIALS + 1
    assert ended(path) == whole


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
    assert ended(path) == whole


@pytest.mark.slow
def test_a_cluster_that_starves_says_within_half_a_minute_what_it_lacks(tmp_path, whole, cluster):
    """From the beginning, and when its only node dies: then Ray finds that out first, which takes up to 15 s."""
    path, starved = tmp_path / "journal", "2 workers of 1 CPUs need 2; the cluster has 0 CPUs, of which 0 are free."
    for nodes in (0, 1):
        if nodes:
            cluster.add()
        driver = start("ray", path, cluster.address, 0.5, **cluster.settings)
        if nodes:
            assert wait_for(path, 10, driver, 120)
            cluster.kill(cluster.nodes.pop())
        begun = time.monotonic()
        assert driver.stderr is not None
        for line in driver.stderr:
            if line == f"0 of 2 workers go on. {starved}\n":
                break
        else:
            raise AssertionError("nothing was said")
        assert time.monotonic() - begun < 30
        _, errors = driver.communicate(timeout=100)
        assert f"error: The cluster placed no worker within 20 s. {starved}" in errors
        assert time.monotonic() - begun < 60
    assert ended(path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 10])
@pytest.mark.parametrize("local", [True, False])
def test_a_dead_head_ends_the_search_within_half_a_minute(tmp_path, whole, cluster, local, lines):
    """While workers start, and while they evaluate."""
    cluster.add()
    path = tmp_path / "journal"
    driver = start("ray", path, "local" if local else cluster.address, 0.5, **({} if local else cluster.settings))
    assert wait_for(path, lines, driver, 120)
    while local and len(servers := [p for p in children(driver) if p.name() in ("gcs_server", "raylet")]) < 2:
        time.sleep(0.05)
    killed = time.monotonic()
    if local:
        for process in servers:
            process.kill()
    else:
        cluster.kill(cluster.head)
    _, errors = driver.communicate(timeout=100)
    assert time.monotonic() - killed < 30
    assert driver.returncode == 1
    assert "error: The Ray cluster is lost" in errors or ("error: Ray did not" in errors and lines == 1)
    assert "the same command goes on" in errors or lines == 1
    assert committed(path)
    assert ended(path) == whole
