"""A Ray cluster of several nodes on this machine, to join, submit jobs to, and kill parts of."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

# `ray`, for nodes that join each other on loopback, which Ray takes for a mistake.
RAY = """
from ray._private import ray_constants, services
ray_constants.ENABLE_RAY_CLUSTER = True
services.get_node_ip_address = lambda address=None: "127.0.0.1"
from ray.scripts.scripts import main
main()
"""


class Cluster:
    """A head without CPUs, or with `cpus`, and nodes of two each, on loopback behind a token: families of processes.

    Attributes:
        settings: variables of the environment with which a process may join.
    """

    def __init__(self, dashboard_port=None, cpus=0):
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
        self.head = self._start("--head", f"--port={port}", f"--num-cpus={cpus}", f"--temp-dir={self.folder}", *board)
        self.wait(self._running)

    def _start(self, *arguments):
        command = [sys.executable, "-c", RAY, "start", "--block", "--node-ip-address=127.0.0.1"]
        with (self.folder / "said").open("a") as said:
            return subprocess.Popen(
                [*command, f"--object-store-memory={2**27}", *arguments],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **self.settings},
                stdout=said,
                stderr=said,
            )

    def _running(self):
        return (self.folder / "said").read_text().count("Ray runtime started")

    def wait(self, condition, seconds=90):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.folder / "said").read_text()
            time.sleep(0.1)

    def add(self):
        """Starts a node, and waits until the cluster has it."""
        before = self._running()
        self.nodes.append(self._start(f"--address={self.address}", "--num-cpus=2"))
        self.wait(lambda: self._running() > before)

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


def ray_command(*arguments, **environment):
    """The command `ray` on the outside of a cluster: its exit status, and what it says."""
    done = subprocess.run(
        [sys.executable, "-c", RAY, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


def children(process):
    return psutil.Process(process.pid).children(recursive=True)


def is_worker(process, title="ray::Worker"):
    try:
        return process.cmdline()[0].startswith(title)
    except (psutil.Error, IndexError):
        return False


def listening(processes):
    """The addresses that they listen on."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it is just ending
            connections = process.net_connections(kind="inet")
            found += [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]
    return found
