"""The Ray executor against the inline one, and against candidates that misbehave. One cluster serves most tests."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import search_toy as toy
from ray_cluster import listening
from test_driver import go

from nas.cluster import connect
from nas.errors import ExecutorError
from nas.search import RayExecutor
from nas.search.executor import Result


def with_nas(**more):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **more}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A cluster of two CPUs that the executors of this module find, use and leave running."""
    with contextlib.ExitStack() as undo:
        before = {p.pid for p in psutil.Process().children(recursive=True)}
        yield connect("local", undo, cpus=2)
        family = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def genotype(first):
    return np.array([first, *[1] * 9], np.uint8)


def results(executor, genotypes):
    """The results by trial, all submitted at once."""
    with executor:
        for trial, g in enumerate(genotypes):
            executor.submit(trial, g)
        return dict(executor.next() for _ in genotypes)


def test_same_trials_as_inline(tmp_path):
    executor = RayExecutor("search_toy:evaluator", workers=2)
    assert executor.slots == 4
    assert go(tmp_path / "ray", executor=executor) == go(tmp_path / "inline")


def test_several_counts_come_back_as_they_were():
    genotypes = [genotype(0), genotype(3)]
    found = results(RayExecutor("search_toy:two_counts", workers=1), genotypes)
    assert [found[trial].correct for trial in range(2)] == toy.two_counts()(genotypes)


def test_weights_reach_the_factory(tmp_path):
    executor = RayExecutor("search_toy:evaluator", {}, {"bonus": np.full(1000, 2)}, workers=1)
    assert results(executor, [genotype(0)])[0].correct == toy.correct(genotype(0)) + 2000


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux only")
def test_workers_of_a_node_see_the_same_bytes_of_the_weights(tmp_path):
    path = tmp_path / "maps"
    weights = {"bonus": np.ones(2**18)}
    executor = RayExecutor("search_toy:mapped_evaluator", {"path": str(path)}, weights, workers=2)
    results(executor, [genotype(0)] * 2)
    (one, there), (other, here) = (json.loads(line) for line in path.read_text().splitlines())
    assert one != other
    assert there == here  # the same file, at the same offset: one copy in the node's memory
    assert not there[-1]


def test_short_evaluations_share_calls_and_long_ones_do_not(monkeypatch):
    sizes = []
    call = RayExecutor._call

    def noted(self, seat, what, reference, deadline, *work):
        sizes.append(len(work))
        call(self, seat, what, reference, deadline, *work)

    monkeypatch.setattr(RayExecutor, "_call", noted)
    for seconds, least, most in ((0.001, 8, 256), (0.2, 1, 1)):
        sizes.clear()
        executor = RayExecutor("search_toy:sleeper", {"seconds": seconds}, workers=1)
        found = results(executor, [genotype(0)] * (60 if seconds < 0.1 else 6))
        assert all(result.correct == 0 for result in found.values())
        assert least <= max(sizes) <= most


def test_a_hanging_candidate_is_told_from_those_that_share_its_call(tmp_path):
    """The deadline is that of one evaluation also where a call has several."""
    executor = RayExecutor("search_toy:bad_evaluator", {"log": str(tmp_path / "log")}, workers=1, timeout_seconds=2.0)
    firsts = [0] * 12 + [2] + [0] * 12
    found = results(executor, [genotype(first) for first in firsts])
    assert {trial for trial, result in found.items() if result.failure} == {12}
    assert found[12].failure == "gave no answer within 2 s 3 times"


def test_bad_candidates_fail_alone_and_their_neighbours_do_not(tmp_path, capfd):
    """Raising: an answer. Crashing and hanging: three attempts, each on a fresh worker, and then quarantine."""
    log = tmp_path / "log"
    executor = RayExecutor("search_toy:bad_evaluator", {"log": str(log)}, workers=2, timeout_seconds=1.0)
    firsts = [0, 0, 3, 0, 1, 2, 0, 0, 0]
    found = results(executor, [genotype(first) for first in firsts])
    for trial, first in enumerate(firsts):
        result = found[trial]
        if first == 0:
            assert (result.correct, result.failure) == (toy.correct(genotype(0)), None)
        else:
            assert result.correct is None
    assert found[4].failure == "ValueError: no such network"
    assert found[2] == Result(None, 0.0, "crashed the worker 3 times")
    assert found[5] == Result(None, 0.0, "gave no answer within 1 s 3 times")
    calls = [line.split() for line in log.read_text().splitlines()]
    workers = {first: len({pid for pid, gene in calls if gene == first}) for first in "123"}
    assert workers["1"] <= 2  # again where it shared a call that died
    assert workers["2"] in (2, 3)  # or it was later in a call that crashed
    assert workers["3"] in (3, 4)  # a crash may take along the answer before it, and is then put down to that
    assert "".join(capfd.readouterr()) == ""  # nothing reaches the terminal


def test_an_evaluator_that_cannot_be_built_is_an_error_not_a_failure():
    with pytest.raises(ExecutorError, match="no weights here"):
        results(RayExecutor("search_toy:broken_evaluator", workers=1), [genotype(0)])


@pytest.mark.slow
def test_workers_that_die_at_once_are_an_error_not_a_loop():
    with pytest.raises(ExecutorError, match="keep dying"):
        results(RayExecutor("os:_exit", {"status": 1}, workers=1), [genotype(0)])


def test_a_starved_cluster_is_an_error_that_says_what_is_missing():
    executor = RayExecutor("search_toy:evaluator", workers=1, threads=3, schedule_seconds=1.0)
    with pytest.raises(
        ExecutorError,
        match=r"placed no worker within 1 s\. 1 workers of 3 CPUs need 3; the cluster has 2 CPUs, of which 2 are free",
    ):
        results(executor, [genotype(0)])


@pytest.mark.slow
def test_workers_that_have_room_and_start_slowly_are_waited_for(tmp_path, monkeypatch):
    """Also where there are more workers than fit; but not for ever."""
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(5)")
    monkeypatch.syspath_prepend(tmp_path)  # which workers inherit
    executor = RayExecutor("search_toy:evaluator", workers=3, schedule_seconds=1.0)
    assert results(executor, [genotype(0)])[0].correct == toy.correct(genotype(0))
    executor = RayExecutor("search_toy:evaluator", workers=3, schedule_seconds=1.0, setup_seconds=2.0)
    with pytest.raises(ExecutorError, match=r"No worker has started within 2 s\. 3 workers of 1 CPUs need 3"):
        results(executor, [genotype(0)])


def test_a_worker_keeps_to_its_cores(tmp_path):
    facts = tmp_path / "facts"
    results(RayExecutor("search_toy:facts_evaluator", {"path": str(facts)}, workers=1), [genotype(0)])
    cores, threads, flags = eval(facts.read_text())
    assert cores == sorted(os.sched_getaffinity(0))[:1]
    assert threads == "1"
    assert "--xla_cpu_multi_thread_eigen=false" in flags


def test_listens_on_loopback_only():
    listens = listening([psutil.Process(), *psutil.Process().children(recursive=True)])
    assert len(listens) >= 4
    assert all(ip.rpartition(":")[2].startswith("127.") or ip == "::1" for ip in listens), listens


def test_who_has_no_token_is_turned_away():
    import ray

    script = "import sys, ray._raylet as r; r.GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None, timeout=5)"
    address = ray.get_runtime_context().gcs_address
    for token, refused in ((os.environ["RAY_AUTH_TOKEN"], False), ("wrong" * 8, True)):
        command = [sys.executable, "-c", script, address]
        visitor = subprocess.run(
            command, env=with_nas(RAY_AUTH_TOKEN=token), capture_output=True, text=True, timeout=60
        )
        assert ("AuthenticationError" in visitor.stderr) is refused
        assert (visitor.returncode != 0) is refused


def test_a_cluster_of_its_own_reports_nothing_to_anyone():
    servers = [p for p in psutil.Process().children(recursive=True) if p.name() in ("gcs_server", "raylet")]
    assert len(servers) == 2
    assert {p.environ()["RAY_USAGE_STATS_ENABLED"] for p in servers} == {"0"}


DRIVER = """
import sys
from test_driver import go
from nas.search import RayExecutor
go(sys.argv[1], executor=RayExecutor("search_toy:evaluator", {"delay_seconds": 0.2}, workers=2), trials=60)
"""


def test_a_killed_driver_leaves_no_process_behind_and_resumes(tmp_path):
    path = tmp_path / "journal"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, path],
        env=with_nas(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.05)
    family = psutil.Process(driver.pid).children(recursive=True)
    assert len(family) > 5
    driver.send_signal(signal.SIGKILL)
    output, _ = driver.communicate(timeout=15)
    assert output == ""  # nothing of Ray reaches the terminal
    deadline = time.monotonic() + 15
    while left := [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, [(p.pid, p.cmdline()) for p in left]
        time.sleep(0.2)
    assert go(path) == go(tmp_path / "whole")


def test_the_room_is_imported_without_ray():
    code = "import sys; sys.modules['ray'] = None; import nas.search; assert nas.search.EXECUTORS['ray']"
    subprocess.run([sys.executable, "-c", code], env=with_nas(), check=True)
