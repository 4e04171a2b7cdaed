"""How Ray is started: protected, or not at all."""

import os
import subprocess
import sys

import pytest

from nas import cluster
from nas.cluster import preflight
from nas.errors import ExecutorError

STARTS = """
import contextlib, os, psutil, sys
if sys.argv[1] == "ray first":
    import ray
from nas.errors import ExecutorError
from nas.cluster import connect
try:
    with contextlib.ExitStack() as undo:
        ray = connect("local", undo, cpus=1)
        servers = [p for p in psutil.Process().children(recursive=True) if p.name() == "gcs_server"]
        asked = ray._raylet.get_authentication_mode() == ray._raylet.AuthenticationMode.TOKEN
        print(asked, servers[0].environ()["RAY_AUTH_MODE"],
              servers[0].environ()["RAY_USAGE_STATS_ENABLED"])
except ExecutorError as e:
    print(e)
"""


def starts(*arguments, **environment):
    """What a process that starts a cluster of its own says, in an environment without Ray's settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    clean["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", STARTS, *arguments]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_ray_imported_before_and_a_long_temporary_folder_change_nothing(tmp_path):
    folder = tmp_path / ("folders" * 8)  # as on macOS
    folder.mkdir()
    assert starts("ray first", TMPDIR=str(folder)) == "True token 0"


@pytest.mark.parametrize("first", ["ray first", "nas first"])
def test_a_cluster_of_its_own_without_a_token_is_refused(first):
    assert "RAY_AUTH_MODE is 'disabled'" in starts(first, RAY_AUTH_MODE="disabled")


@pytest.fixture
def alone(monkeypatch):
    """As if no cluster had been joined and nothing been said about tokens."""
    monkeypatch.setattr(cluster, "_connected", lambda: False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    return monkeypatch


def test_what_will_keep_a_cluster_from_starting_is_told_before(alone, tmp_path):
    preflight()
    alone.setattr(cluster.tempfile, "tempdir", str(tmp_path / ("long" * 20)))
    preflight()  # in /tmp
    folder = cluster._temporary_folder()
    assert len(os.fsencode(folder)) <= cluster._LONGEST_TEMP
    os.rmdir(folder)
    alone.setattr(cluster, "_SHORT_TEMP", "/nowhere")
    with pytest.raises(ExecutorError, match="TMPDIR to a path of at most 26 bytes"):
        preflight()
    preflight("auto")  # a running cluster has its own place
    alone.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ExecutorError, match="without a token"):
        preflight()
    alone.setitem(sys.modules, "ray", None)
    with pytest.raises(ExecutorError, match="Ray is not installed"):
        preflight("auto")
