"""Measuring on a machine that is reached over ssh or adb: a bundle is sent, run there, and its results come back.

Where there is no Python, TensorFlow Lite's benchmark_model goes along and measures (`nas.measure.benchmark_model`). The
system's own `ssh`, `scp` and `adb` do it, so that whatever reaches the machine by hand does here: keys, jump hosts
and names of ~/.ssh/config. Cut off anywhere, the same call goes on: files that lie there whole are not sent again, and
the measuring program continues its rounds.
"""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from nas.errors import DeviceError, LatencyError
from nas.measure import bundle
from nas.measure.benchmark_model import CALLS, DOWNLOAD, LOG, RUNTIME, SCRIPT
from nas.measure.bundle import Progress
from nas.ondevice.manifest import MANIFEST, load_manifest
from nas.ondevice.results import RESULTS
from nas.ondevice.sessions import needs

_FOLDER = "nas-measure"  # where bundles go when no folder is named
_FILES_AT_A_TIME = 32
_SSH = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]
_SSH_FAILED = 255  # exit status of ssh itself, whatever ran there


class Transport(Protocol):
    """A way to another machine: the commands here that do something there."""

    @property
    def name(self) -> str:
        """Of the machine, in messages."""
        ...

    @property
    def folder(self) -> str:
        """Bundles go below it."""
        ...

    @property
    def python(self) -> str | None:
        """Its Python, where it is not the one that a shell finds."""
        ...

    @property
    def tool(self) -> "Tool | None":
        """What measures there instead of Python."""
        ...

    def run(self, line: str) -> list[str]:
        """Runs a line of its shell, with its exit status and output."""
        ...

    def push(self, files: Sequence[Path], folder: str) -> list[str]:
        """Copies files into a folder there."""
        ...

    def pull(self, file: str, to: Path) -> list[str]:
        """Copies a file from there."""
        ...

    def lost(self, code: int, said: str) -> str | None:
        """What to do, if a command ended so because the machine could not be reached; None if it was."""
        ...


@dataclasses.dataclass(frozen=True)
class Tool:
    """TensorFlow Lite's benchmark_model."""

    path: Path  # here; it is sent along
    cpus: str = ""  # mask of those it runs on there, in hexadecimal; any if empty


@dataclasses.dataclass(frozen=True)
class Ssh:
    """A machine with an ssh server."""

    name: str  # [user@]host
    port: int | None
    folder: str
    python: str | None = None
    tool: Tool | None = None

    def run(self, line: str) -> list[str]:
        """See `Transport`."""
        return [_tool("ssh"), *_SSH, *(["-p", str(self.port)] if self.port else []), self.name, line]

    def push(self, files: Sequence[Path], folder: str) -> list[str]:
        """See `Transport`."""
        return [*self._copy(), *map(str, files), f"{self.name}:{folder}/"]

    def pull(self, file: str, to: Path) -> list[str]:
        """See `Transport`."""
        return [*self._copy(), f"{self.name}:{file}", str(to)]

    def lost(self, code: int, said: str) -> str | None:
        """See `Transport`."""
        if "Permission denied" in said and code == _SSH_FAILED:
            return "Nobody is asked for a password: let a key in (ssh-copy-id), and see that `ssh` enters without one."
        if "Host key verification failed" in said:
            return "Its key is not known here: enter once by hand with `ssh`, and compare it."
        return "See that `ssh` enters by hand." if code == _SSH_FAILED else None

    def _copy(self) -> list[str]:
        return [_tool("scp"), "-q", *_SSH, *(["-P", str(self.port)] if self.port else [])]


@dataclasses.dataclass(frozen=True)
class Adb:
    """An Android device with USB debugging."""

    name: str  # its serial number
    folder: str
    python: str | None = None
    tool: Tool | None = None

    def run(self, line: str) -> list[str]:
        """See `Transport`."""
        return [_tool("adb"), "-s", self.name, "shell", line]

    def push(self, files: Sequence[Path], folder: str) -> list[str]:
        """See `Transport`."""
        return [_tool("adb"), "-s", self.name, "push", *map(str, files), f"{folder}/"]

    def pull(self, file: str, to: Path) -> list[str]:
        """See `Transport`."""
        return [_tool("adb"), "-s", self.name, "pull", file, str(to)]

    def lost(self, code: int, said: str) -> str | None:
        """See `Transport`."""
        gone = re.search(r"device '.*' not found|device offline|no devices|error: closed|protocol fault", said)
        return "See that its cable holds, and that `adb devices` lists it as `device`." if code and gone else None


def transport_of(over: str) -> Transport:
    """The way that `over` names: ssh://[user@]host[:port][/folder], or adb[:serial][/folder].

    A folder is absolute; one that begins with /~/ lies in the home folder. ?python=PATH may follow, as of a virtual
    environment, absolute or from the home folder on; or ?benchmark_model=PATH, of the tool here, with &cpus=MASK.

    Raises:
        DeviceError: it names none; or adb is missing, or has no device, or several and none is named; or there is no
            such tool.
    """
    over, _, options = over.partition("?")
    python, tool = _options(options)
    ssh = re.fullmatch(r"ssh://((?:[\w.+][\w.+-]*@)?\w[\w.-]*)(?::(\d+))?(/[\w./~+-]*)?", over)
    if ssh:
        return Ssh(ssh[1], int(ssh[2]) if ssh[2] else None, _folder(ssh[3], _FOLDER), python, tool)
    adb = re.fullmatch(r"adb(?::(\w[\w.:-]*))?(/[\w./+-]*)?", over)
    if adb:
        return Adb(_serial(adb[1]), _folder(adb[2], f"/data/local/tmp/{_FOLDER}"), python, tool)
    raise DeviceError(
        f"--over {over}: ssh://[user@]host[:port][/folder] or adb[:serial][/folder] is needed, such as "
        f"ssh://pi@raspberrypi/~/bench or adb."
    )


def _options(options: str) -> tuple[str | None, Tool | None]:
    """The Python there, and the tool to be sent."""
    if not options:
        return None, None
    python = re.fullmatch(r"python=([\w./+-]+)", options)
    tool = re.fullmatch(r"benchmark_model=(.+?)(?:&cpus=(?:0[xX])?([0-9a-fA-F]+))?", options)
    if not python and not tool:
        raise DeviceError(
            f"--over ...?{options}: ?python= and the path of a program there is needed, or ?benchmark_model= and the "
            f"path of that tool here, after which may come &cpus= and a mask in hexadecimal."
        )
    if not tool:
        return python[1] if python else None, None
    path = Path(tool[1]).expanduser()
    if not path.is_file() or not re.fullmatch(r"[\w.+-]+", path.name):
        raise DeviceError(
            f"--over ...?{options}: there is no such file here, or its name has blanks. Get it from {DOWNLOAD}."
        )
    return None, Tool(path.resolve(), tool[2] or "")


def measure_there(folder: Path, transport: Transport, *, progress: Progress | None = None) -> None:
    """Measures the bundle in `folder` on another machine; its results are in `folder` then.

    Raises:
        DeviceError: the machine cannot be reached, or lacks Python, NumPy or the runtime.
        LatencyError: the connection was lost, or measuring there was refused.
    """
    folder = folder.resolve()  # a relative path with a colon would be another machine to scp
    manifest = load_manifest(folder)
    bundle.recorded(folder)  # one of the two at most
    name = LOG if transport.tool else RESULTS
    if (folder / name).exists():
        found = bundle.read_any(folder / name)
        if found.complete and found.manifest["digest"] == manifest["digest"]:
            return
    there = f"{transport.folder}/{manifest['digest']}"
    models = [*dict.fromkeys(call["file"] for call in manifest["calls"])]
    if transport.tool:
        tool = transport.tool
        has = _look_by_shell(transport, there, manifest["runtime"])
        files = {file: folder / file for file in (*models, CALLS, SCRIPT)} | {tool.path.name: tool.path}
        _push(transport, there, has, files, progress)
        _do(transport, transport.run(f"chmod +x {shlex.quote(f'{there}/{tool.path.name}')}"))
        cpus = f"CPUS={tool.cpus} " if tool.cpus else ""
        program = f"env JSON=1 {cpus}sh {SCRIPT} ./{tool.path.name}"
    else:
        python, has = _look(transport, there, manifest["runtime"])
        program_files = [str(path.relative_to(folder).as_posix()) for path in sorted((folder / "nas").rglob("*.py"))]
        files = {file: folder / file for file in (*models, *program_files, "measure.py", MANIFEST)}
        _push(transport, there, has, files, progress)
        program = f"{shlex.quote(python)} measure.py --json"
    line = f"cd {shlex.quote(there)} && exec {program}"
    code, said = bundle.follow(transport.run(line), progress=progress)
    if code:
        if todo := transport.lost(code, said):
            raise LatencyError(
                f"the connection to {transport.name} was lost ({_last(said)}); what was timed is kept there. {todo} "
                f"The same command goes on."
            )
        raise LatencyError(f"{transport.name}: {bundle.error_in(said) or f'the measuring program ended with {code}.'}")
    part = folder / f".part.{name}"
    _do(transport, transport.pull(f"{there}/{name}", part))
    bundle.read_any(part)
    os.replace(part, folder / name)
    # Should the table be refused, the same command is to measure anew.
    _do(transport, transport.run(f"cd {shlex.quote(there)} && mv {name} {name}.fetched"))


# Printed there: what Python, what it lacks, and the files of the bundle that lie there, by their hashes.
_LOOK = """
import hashlib, json, os, sys
from importlib.util import find_spec
there, modules = sys.argv[1], sys.argv[2:]
def lacks(module):
    try:
        return find_spec(module) is None
    except ImportError:
        return True
files = {}
for folder in ("", "models", "nas", "nas/ondevice"):
    path = os.path.join(there, folder)
    os.makedirs(path, exist_ok=True)
    for name in os.listdir(path):
        if os.path.isfile(os.path.join(path, name)) and not name.startswith("results"):
            with open(os.path.join(path, name), "rb") as f:
                files[(folder + "/" + name).lstrip("/")] = hashlib.sha256(f.read()).hexdigest()
lacking = [module for module in modules if lacks(module)]
python = {"python": sys.executable, "version": list(sys.version_info[:2])}
print(json.dumps(dict(python, lacks=lacking, files=files)))
"""


def _look(transport: Transport, there: str, runtime: str) -> tuple[str, Mapping[str, str]]:
    """How Python is called there, and the hashes of the files that the folder `there`, made if need be, has.

    Raises:
        DeviceError: the machine cannot be reached, or lacks something.
    """
    module, package = needs(runtime)
    for python in (transport.python,) if transport.python else ("python3", "python"):
        line = shlex.join([python, "-c", _LOOK, there, "numpy", module])
        done = subprocess.run(transport.run(line), capture_output=True, text=True, stdin=subprocess.DEVNULL)
        said = done.stdout + done.stderr
        if todo := transport.lost(done.returncode, said):
            raise DeviceError(f"{transport.name} cannot be reached: {_last(said)}. {todo}")
        if done.returncode == 0 and done.stdout.strip():
            break
    else:
        hint = (
            f"{_without_python(runtime)}. Or by Python: Termux has one (`pkg install python openssh`), but adb may not "
            f"enter it: run `sshd` in it, `adb forward tcp:8022 tcp:8022` here, and use --over ssh://localhost:8022"
            if isinstance(transport, Adb)
            else f"Install Python 3.11 or newer there. Or {_without_python(runtime)}"
        )
        wanted = transport.python or "python3"
        raise DeviceError(f"{transport.name} has no `{wanted}` that could be run ({_last(said)}). {hint}.")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["version"] < [3, 11]:
        version = ".".join(map(str, found["version"]))
        raise DeviceError(f"{transport.name} has Python {version}; 3.11 or newer is needed. Install it there.")
    if found["lacks"]:
        packages = " ".join({"numpy": "numpy", module: package}[lack] for lack in found["lacks"])
        raise DeviceError(
            f"{transport.name}: {' and '.join(found['lacks'])} cannot be imported by its {python}. Run there: {python} "
            f"-m pip install {packages}"
        )
    return found["python"], found["files"]


def _without_python(runtime: str) -> str:
    """How a machine is measured that has none."""
    bundle = "" if runtime == RUNTIME else "make the bundle for LiteRT (`--device host_litert`) and "
    return (
        f"Without Python, {bundle}let TensorFlow Lite's benchmark_model measure: get it from {DOWNLOAD} (64-bit "
        f"Android) and add ?benchmark_model=PATH/TO/android_aarch64_benchmark_model to --over"
    )


def _look_by_shell(transport: Transport, there: str, runtime: str) -> Mapping[str, str]:
    """The hashes of the files that the folder `there`, made if need be, has; without Python.

    Raises:
        DeviceError: the machine cannot be reached, or the tool cannot measure that runtime.
    """
    if runtime != RUNTIME:
        raise DeviceError(f"benchmark_model runs models of LiteRT, not of {runtime}: use --device host_litert.")
    quoted = shlex.quote(there)
    line = f"mkdir -p {quoted}/models && cd {quoted} && find . -type f -exec sha256sum {{}} +"
    done = subprocess.run(transport.run(line), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stdout + done.stderr
        if todo := transport.lost(done.returncode, said):
            raise DeviceError(f"{transport.name} cannot be reached: {_last(said)}. {todo}")
        raise DeviceError(
            f"{transport.name}: {there} cannot be used: {_last(said)}. Name another folder behind --over."
        )
    return {name: digest for digest, name in re.findall(r"^([0-9a-f]{64}) [ *]\./(.+?)\r?$", done.stdout, re.MULTILINE)}


def _push(
    transport: Transport, there: str, has: Mapping[str, str], files: Mapping[str, Path], progress: Progress | None
) -> None:
    """Sends those of `files` (name there, path here) that the folder `there` does not have."""
    wanted = [n for n, path in files.items() if has.get(n) != hashlib.sha256(path.read_bytes()).hexdigest()]
    total, sent, begin = sum(files[name].stat().st_size for name in wanted), 0, time.perf_counter()
    for into in dict.fromkeys(str(Path(name).parent.as_posix()) for name in wanted):
        of = [files[name] for name in wanted if Path(name).parent.as_posix() == into]
        for first in range(0, len(of), _FILES_AT_A_TIME):
            some = of[first : first + _FILES_AT_A_TIME]
            _do(transport, transport.push(some, there if into == "." else f"{there}/{into}"))
            sent += sum(path.stat().st_size for path in some)
            if progress is not None:
                taken = time.perf_counter() - begin
                progress(f"sending to {transport.name}", sent / total, taken / sent * (total - sent))


def _do(transport: Transport, command: list[str]) -> None:
    """Runs a command that gives nothing but its exit status.

    Raises:
        LatencyError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stdout + done.stderr
        todo = transport.lost(done.returncode, said) or "See to its free space and permissions."
        raise LatencyError(
            f"{Path(command[0]).name} failed with {transport.name}: {_last(said)}. {todo} The same command goes on."
        )


def _serial(wanted: str | None) -> str:
    """The serial number of the Android device that is meant."""
    done = subprocess.run([_tool("adb"), "devices"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise DeviceError(f"`adb devices` failed: {_last(done.stdout + done.stderr)}. See that adb runs by hand.")
    states = dict(line.split("\t", 1) for line in done.stdout.splitlines()[1:] if "\t" in line)
    found = wanted or next(iter(states), None)
    if found is None:
        raise DeviceError("adb sees no device. Attach one, switch USB debugging on, and look at `adb devices`.")
    if wanted is None and len(states) > 1:
        raise DeviceError(f"adb sees {len(states)} devices: {', '.join(states)}. Name one: --over adb:SERIAL.")
    if found not in states:
        raise DeviceError(f"adb sees no device {found!r}; it sees {', '.join(states) or 'none'}.")
    if states[found].strip() != "device":
        raise DeviceError(
            f"adb sees {found} as {states[found].strip()!r}: allow USB debugging on its screen, or attach it anew."
        )
    return found


def _folder(path: str | None, otherwise: str) -> str:
    """A folder as it is named there, relative to the home folder or absolute."""
    path = (path or "").rstrip("/")
    return path.removeprefix("/~/") if path not in ("", "/~") else otherwise


def _tool(name: str) -> str:
    """The path of a program of this machine.

    Raises:
        DeviceError: it is not installed.
    """
    path = shutil.which(name)
    if path is None:
        package = "the Android platform tools" if name == "adb" else "OpenSSH"
        raise DeviceError(f"`{name}` is not installed here: it comes with {package}. Or copy the bundle by hand.")
    return path


def _last(said: str) -> str:
    lines = [line for line in said.strip().splitlines() if not line.startswith('{"what"')]
    return lines[-1] if lines else "it said nothing"
