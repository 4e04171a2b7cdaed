"""The processes executor against candidates that misbehave, drivers that die, and what its workers are like."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import search_toy as toy
from ml_dtypes import bfloat16
from test_driver import go

from nas.errors import ExecutorError
from nas.search import ProcessExecutor
from nas.search.executor import Result
from nas.search.processes import pack, unpack


def genotype(first):
    return np.array([first, *[1] * 9], np.uint8)


def results(executor, genotypes):
    """The results by trial, all submitted at once."""
    with executor:
        for trial, g in enumerate(genotypes):
            executor.submit(trial, g)
        return dict(executor.next() for _ in genotypes)


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children():
    return [p for p in psutil.Process().children(recursive=True) if "search/_worker.py" in " ".join(p.cmdline())]


def test_a_worker_that_can_no_longer_say_anything_still_answers():
    """Its standard error ends before it does, as that of a dying one may."""
    genotypes = [genotype(first) for first in range(4)]
    found = results(ProcessExecutor("search_toy:silent_evaluator", workers=1), genotypes)
    assert [found[trial].correct for trial in range(4)] == [toy.correct(g) for g in genotypes]


def test_weights_reach_the_factory_bit_for_bit_and_read_only(tmp_path):
    executor = ProcessExecutor("search_toy:evaluator", {}, {"bonus": np.full(1000, 2)}, workers=1)
    assert results(executor, [genotype(0)])[0].correct == toy.correct(genotype(0)) + 2000
    rng = np.random.default_rng(0)
    weights = {
        "a/kernel": rng.normal(size=(3, 4, 5)).astype(np.float32),
        "transposed": rng.normal(size=(7, 3)).T,
        "half": rng.normal(size=11).astype(bfloat16),
        "scalar": np.float32(3),
        "none": np.zeros((0, 3)),
        "flags": np.array([True, False]),
    }
    for given in (weights, {}, None):
        with open(tmp_path / "file", "w+b") as file:
            pack(file, {"factory": "f", "kwargs": {"x": "\n"}}, given)
            recipe, found = unpack(file.fileno())
        assert recipe == {"factory": "f", "kwargs": {"x": "\n"}}
        assert (found is None) == (given is None)
        for name, array in (given or {}).items():
            assert found[name].dtype == array.dtype
            assert found[name].shape == array.shape
            assert found[name].tobytes() == np.asarray(array, order="C").tobytes()
            assert not found[name].flags.writeable
            assert array.ndim == 0 or found[name].ctypes.data % 64 == 0 or not array.size


@pytest.mark.parametrize("weights", [np.array(["a"]), np.array([None]), np.zeros(2, ">f4"), np.zeros(1, "i4,f4")])
def test_weights_that_are_not_numbers_are_refused(weights, tmp_path):
    with pytest.raises(ExecutorError, match="numbers"), open(tmp_path / "file", "wb") as file:
        pack(file, {}, {"w": weights})


def test_bad_candidates_fail_alone_and_their_neighbours_do_not(tmp_path, capfd, caplog):
    """Raising: one attempt. Crashing and hanging: three, each on a fresh worker, and then quarantine."""
    log = tmp_path / "log"
    executor = ProcessExecutor("search_toy:bad_evaluator", {"log": str(log)}, workers=2, timeout_seconds=0.5)
    firsts = [0, 0, 3, 0, 1, 2, 0, 0, 0]
    found = results(executor, [genotype(first) for first in firsts])
    for trial, first in enumerate(firsts):
        if first == 0:
            assert (found[trial].correct, found[trial].failure) == (toy.correct(genotype(0)), None)
        else:
            assert found[trial].correct is None
    assert found[4].failure == "ValueError: no such network"
    assert found[2] == Result(None, 0.0, "crashed the worker 3 times")
    assert found[5] == Result(None, 0.0, "gave no answer within 0.5 s 3 times")
    calls = [line.split() for line in log.read_text().splitlines()]
    workers = {first: len({pid for pid, gene in calls if gene == first}) for first in "123"}
    assert workers == {"1": 1, "2": 3, "3": 3}
    assert not [r for r in caplog.records if r.args and firsts[r.args[0]] == 0]  # no neighbour is blamed
    assert "".join(capfd.readouterr()) == ""  # nothing reaches the terminal
    assert not children()


@pytest.mark.parametrize(("how", "failure"), [("system", "crashed the worker 3 times"), ("python", "MemoryError")])
def test_candidates_that_exhaust_memory_fail_and_the_search_goes_on(how, failure, tmp_path):
    executor = ProcessExecutor("search_toy:hungry_evaluator", {"how": how}, workers=2)
    found = results(executor, [genotype(first) for first in (0, 1, 0)])
    assert failure in str(found[1].failure)
    assert [found[0].correct, found[2].correct] == [toy.correct(genotype(0))] * 2


def test_an_evaluator_that_cannot_be_built_is_an_error_not_a_failure():
    with pytest.raises(ExecutorError, match="no weights here"):
        results(ProcessExecutor("search_toy:broken_evaluator", workers=1), [genotype(0)])
    with pytest.raises(ExecutorError, match=r"package\.module:function"):
        results(ProcessExecutor("search_toy:nothing", workers=1), [genotype(0)])
    assert not children()


@pytest.mark.parametrize(
    ("how", "why"),
    [("dies", r"crashed the worker \(exit status 7; it said last: no such driver"), ("hangs", "no answer within 2 s")],
)
def test_workers_that_never_start_are_an_error_that_says_why_and_not_a_loop(how, why):
    executor = ProcessExecutor(
        "search_toy:unstartable", {"how": how}, workers=1, setup_seconds=2.0 if how == "hangs" else 60.0
    )
    with pytest.raises(ExecutorError, match=f"keep dying.*{why}"):
        results(executor, [genotype(0)])
    assert not children()


def test_what_an_evaluator_prints_reads_or_starts_does_not_disturb_the_talk_with_its_driver(tmp_path, capfd):
    executor = ProcessExecutor("search_toy:rude_evaluator", workers=1)
    found = results(executor, [genotype(0)] * 3)
    assert {r.correct for r in found.values()} == {toy.correct(genotype(0))}
    assert "".join(capfd.readouterr()) == ""
    wait_until(lambda: not [p for p in psutil.process_iter(["cmdline"]) if "77.77" in (p.info["cmdline"] or [])])


def test_workers_that_are_killed_from_outside_cost_no_result(tmp_path):
    killed = 0

    def kill(trial):
        nonlocal killed
        if trial.trial % 10 == 4:
            children()[-1].kill()
            killed += 1

    executor = ProcessExecutor("search_toy:evaluator", {"delay_seconds": 0.01}, workers=2)
    assert go(tmp_path / "killed", executor=executor, on_trial=kill, trials=30) == go(tmp_path / "whole", trials=30)
    assert killed == 3


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no process to cores")
def test_a_worker_keeps_to_its_cores(tmp_path):
    facts = tmp_path / "facts"
    results(ProcessExecutor("search_toy:facts_evaluator", {"path": str(facts)}, workers=1), [genotype(0)])
    cores, threads, flags = eval(facts.read_text())
    assert cores == sorted(os.sched_getaffinity(0))[:1]
    assert threads == "1"
    assert "--xla_cpu_multi_thread_eigen=false" in flags


DRIVER = """
import sys
from test_driver import go
from nas.search import ProcessExecutor
go(sys.argv[1], executor=ProcessExecutor("search_toy:evaluator", {"delay_seconds": 0.1}, workers=2), trials=60)
"""


def test_a_killed_driver_leaves_no_process_behind_and_resumes(tmp_path):
    path = tmp_path / "journal"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: driver.poll() is not None or (path.exists() and path.read_bytes().count(b"\n") > 3))
    assert driver.poll() is None, driver.communicate()[0]
    family = children()
    assert len(family) == 2
    connections = [c for p in (psutil.Process(driver.pid), *family) for c in p.net_connections(kind="inet")]
    assert not connections
    driver.send_signal(signal.SIGKILL)
    output, _ = driver.communicate(timeout=15)
    assert output == ""
    wait_until(lambda: not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])
    assert os.listdir(tmp_path) == ["journal"]  # nor a file
    assert go(path) == go(tmp_path / "whole")
