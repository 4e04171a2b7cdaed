"""The search stage on a trained supernet: the same outcome on every executor, and nothing evaluated twice."""

import hashlib
import importlib
import importlib.util
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tiny
from ray_cluster import Cluster, children, free_port, is_worker, listening, ray_command

import nas
from nas import native
from nas.console import Console
from nas.search import EXECUTORS, read_trials
from nas.search.journal import read


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with an experiment, and its run folder with table and supernet."""
    folder = tmp_path_factory.mktemp("engine")
    tiny.write_experiment(folder)
    experiment = nas.load_experiment(folder / "tiny_experiment.toml")
    nas.run_experiment(experiment, folder / "run", stages=["measure", "train"], console=Console(io.StringIO()))
    return folder


def searched(trained: Path, out: Path, *settings: str, redo: str | None = None) -> tuple[Path, str]:
    """The run folder, a copy of the trained one if it is new, after its search; and what was said."""
    if not out.exists():
        shutil.copytree(trained / "run", out)
    overrides = [*SEARCHES, *(f"search.{item}" for item in settings)]
    experiment = nas.load_experiment(trained / "tiny_experiment.toml", overrides=overrides)
    stream = io.StringIO()
    nas.run_experiment(experiment, out, stages=["search"], redo=redo, console=Console(stream, plain_seconds=0))
    return out, stream.getvalue()


SEARCHES = ("search.trials=10", "search.lag=4", "search.workers=2")


def command(trained: Path, out: Path, *settings: str) -> list[str]:
    """`nas search` as a line, for a copy of the trained run folder."""
    shutil.copytree(trained / "run", out)
    overrides = [word for item in (*SEARCHES, *settings) for word in ("--set", item)]
    return [
        sys.executable,
        "-m",
        "nas.cli",
        "search",
        str(trained / "tiny_experiment.toml"),
        "--out",
        str(out),
        *overrides,
    ]


def with_nas(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **more}


def digest(run: Path) -> str:
    """Of all that a journal says, but for seconds."""
    header, records = read(run / "search" / "journal.jsonl")
    outcome = [header, *({k: v for k, v in r.items() if k != "seconds"} for r in records)]
    return hashlib.sha256(json.dumps(outcome, sort_keys=True).encode()).hexdigest()


@pytest.fixture(scope="module")
def inline(trained) -> str:
    return digest(searched(trained, trained / "inline", 'executor="inline"')[0])


def test_worker_processes_count_as_this_process_does(trained, inline, tmp_path):
    assert digest(searched(trained, tmp_path / "run", 'executor="processes"')[0]) == inline


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_the_outcome_is_the_same_on_every_executor(executor, workers, trained, inline, tmp_path):
    found, _ = searched(trained, tmp_path / "run", f'executor="{executor}"', f"workers={workers}")
    assert digest(found) == inline


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_outcome_does_not_depend_on_how_python_hashes(executor, trained, inline, tmp_path):
    for seed in ("0", "4242"):
        line = command(trained, tmp_path / seed, f"search.executor={executor}")
        done = subprocess.run(line, env=with_nas(PYTHONHASHSEED=seed), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert digest(tmp_path / seed) == inline


def stopped(line: list[str]) -> subprocess.Popen:
    """The search of that line, stopped while its workers build their evaluators: or it might be done before its head is
    dead."""
    process = subprocess.Popen(line, env=with_nas(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not any(is_worker(p, "ray::Worker.setup") for p in children(process)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)
    return process


def goes_on(process: subprocess.Popen) -> str:
    """What it says on its standard error until it ends, within half a minute."""
    start = time.monotonic()
    process.send_signal(signal.SIGCONT)
    _, told = process.communicate(timeout=100)
    assert time.monotonic() - start < 30
    return told


@pytest.mark.slow
def test_where_the_head_dies_the_line_to_go_on_is_printed_within_half_a_minute_and_does(trained, inline, tmp_path):
    """A cluster of its own, which listens on loopback only; its head dies while workers compile their evaluators."""
    run = tmp_path / "run"
    line = command(trained, run, "search.executor=ray")
    process = stopped(line)
    family = [psutil.Process(process.pid), *children(process)]
    listens = listening(family)
    assert len(listens) >= 4
    assert all(ip.rpartition(":")[2].startswith("127.") or ip == "::1" for ip in listens), listens
    servers = [p for p in family if p.name() in ("gcs_server", "raylet")]
    assert len(servers) == 2
    for part in [*servers, *(p for p in family if is_worker(p))]:  # some systems let workers outlive their node
        part.kill()
    told = goes_on(process)
    assert process.returncode == 2
    assert "error: The Ray cluster is lost" in told
    _, _, again = told.partition("go on with:\n  ")
    name, *arguments = shlex.split(again)
    assert name == "nas"
    assert len(read(run / "search" / "journal.jsonl")[1]) < 10
    done = subprocess.run([*line[:3], *arguments], env=with_nas(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert digest(run) == inline


@pytest.mark.slow
def test_where_the_head_has_died_a_search_whose_workers_live_on_ends_as_well(trained, inline, tmp_path):
    run = tmp_path / "run"
    process = stopped(command(trained, run, "search.executor=ray"))
    for server in [p for p in children(process) if p.name() in ("gcs_server", "raylet")]:
        server.kill()
    time.sleep(5)  # the driver hears of it late
    told = goes_on(process)
    if process.returncode == 0:  # its workers had all that it needed
        assert digest(run) == inline
    else:
        assert "error: The Ray cluster is lost" in told


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("aiohttp_cors") is None, reason="jobs need ray[default]")
def test_as_a_job_of_a_cluster_behind_a_token_a_run_comes_to_its_end(trained, inline, tmp_path):
    """As README has it: the driver runs on the head, joins its cluster, and only who has the token may submit."""
    port, work, run = free_port(), tmp_path / "work", tmp_path / "run"
    work.mkdir()
    tiny.write_experiment(work)
    shutil.copytree(trained / "run", run)
    settings = [word for item in SEARCHES for word in ("--set", item)]
    entry = (
        sys.executable,
        "-m",
        "nas.cli",
        "run",
        "tiny_experiment.toml",
        "--out",
        run,
        "--address=auto",
        *settings,
    )
    submit = ("job", "submit", f"--address=http://127.0.0.1:{port}", f"--working-dir={work}", "--", *entry)
    # Two nodes of one machine unpack the job's folder in one place, the second one under the driver's feet: one node.
    cluster = Cluster(dashboard_port=port, cpus=2)
    try:
        code, _ = ray_command(*submit, **cluster.settings | {"RAY_AUTH_TOKEN": "wrong" * 8})
        assert code != 0
        assert not (run / "search").exists()
        for _ in range(10):
            code, told = ray_command(*submit, **cluster.settings)
            if "No available agent to submit job, please try again later" not in told:
                break
            time.sleep(3)
        assert code == 0, told
        assert "succeeded" in told
        found = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert {address.ip for address in found if address.port == port} == {"127.0.0.1"}
    finally:
        cluster.close()
    assert digest(run) == inline
    assert (run / "report.html").exists()


def test_what_was_counted_once_is_not_evaluated_again_whatever_the_search(trained, inline, tmp_path):
    run, _ = searched(trained, tmp_path / "run", 'executor="inline"', "trials=5")
    before = read_trials(run / "search" / "journal.jsonl")
    assert all(t.seconds > 0 for t in before)
    searched(trained, run, 'executor="inline"', redo="search")
    assert digest(run) == inline
    assert [t.seconds > 0 for t in read_trials(run / "search" / "journal.jsonl")] == [False] * 5 + [True] * 5
    counts = {t.genotype: t.correct for t in read_trials(run / "search" / "journal.jsonl")}
    searched(trained, run, 'executor="inline"', 'strategy="random"', "trials=12", redo="search")
    trials = read_trials(run / "search" / "journal.jsonl")
    assert any(t.genotype not in counts for t in trials)
    for trial in trials:
        assert (trial.seconds == 0) == (trial.genotype in counts)
        assert counts.get(trial.genotype, trial.correct) == trial.correct


def test_counts_of_another_version_other_hardware_or_other_kernels_are_not_taken(trained, monkeypatch):
    """The last bits of logits may decide an answer, and those depend on all of these."""
    stage = importlib.import_module("nas.pipeline.search")
    experiment = nas.load_experiment(trained / "tiny_experiment.toml")
    digests = SimpleNamespace(digest="the same")
    job = SimpleNamespace(experiment=experiment, space=digests, data=digests, path=trained)

    def name() -> str:
        cache = stage._cache(job, {"a": np.zeros(3, np.float32)})
        assert cache is not None
        return cache.path.name

    monkeypatch.setattr(native, "available", lambda: True)
    before = name()
    assert before == name()
    others = [
        (stage, "version", lambda package: "another"),
        (stage, "hardware", lambda: "another"),
        (native, "available", lambda: False),  # convolutions by XLA alone
        (native, "source", lambda: "another"),
        (native, "status", lambda: "in use, other instructions"),
    ]
    for module, function, other in others:
        with monkeypatch.context() as patch:
            patch.setattr(module, function, other)
            assert name() != before, function
    assert before == name()


def test_answers_counted_in_int8_are_told_from_those_in_float_wherever_they_are_written(trained, inline, tmp_path):
    run, _ = searched(trained, tmp_path / "run", 'executor="inline"', "trials=2")  # leaves float counts in the cache
    int8 = 'objectives=[{name="top1", precision="int8"}, {name="latency_ms", at_most="70%"}]'
    overrides = ["search.trials=6", 'search.executor="inline"', int8]
    experiment, stream = nas.load_experiment(trained / "tiny_experiment.toml", overrides=overrides), io.StringIO()
    nas.run_experiment(experiment, run, stages=["search"], redo="search", console=Console(stream, plain_seconds=0))
    header, _ = read(run / "search" / "journal.jsonl")
    assert header["accuracy"] == "top1_int8"
    assert all(t.seconds > 0 for t in read_trials(run / "search" / "journal.jsonl"))
    assert (run / "search" / "front.csv").read_text().startswith("trial,top1_int8,correct,total,")
    assert "(validation, inherited weights, int8)" in stream.getvalue()
    assert read(trained / "inline" / "search" / "journal.jsonl")[0].keys() == header.keys() - {"accuracy"}


def test_a_folder_may_be_shared_between_runs_or_the_cache_be_off(trained, inline, tmp_path):
    shared = f'cache="{tmp_path / "counts"}"'
    for name, setting, evaluated in (("a", shared, 10), ("b", shared, 0), ("c", 'cache="off"', 10)):
        run, _ = searched(trained, tmp_path / name, 'executor="inline"', setting)
        trials = read_trials(run / "search" / "journal.jsonl")
        assert sum(t.seconds > 0 for t in trials) == evaluated
        assert digest(run) == inline
        assert not (run / "evaluations").exists()


def test_the_search_says_how_it_goes_and_writes_events_on_request(trained, tmp_path):
    pytest.importorskip("tensorboardX")
    run, said = searched(trained, tmp_path / "run", 'executor="inline"', "tensorboard=true")
    line = next(line for line in said.splitlines() if line.startswith("  7/10"))
    for what in ("eta 0:0", "trials/s ", "busy ", "volume 0.", "best top-1 ", "at ms "):
        assert what in line
    assert len(line) <= 120
    events = b"".join(f.read_bytes() for f in (run / "search" / "events").iterdir())
    assert events.count(b"top1") == events.count(b"latency_ms") == 10
    longer, _ = searched(trained, run, 'executor="inline"', "tensorboard=true")  # done already: nothing is told again
    assert len(list((longer / "search" / "events").iterdir())) == 1
