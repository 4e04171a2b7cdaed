"""A plan as a folder that can be measured anywhere: models, a manifest, and the program that times them."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from nas import config
from nas.errors import DeviceError, LatencyError
from nas.files import write_bytes, write_json, write_text
from nas.measure import benchmark_model
from nas.measure.plan import Plan, model_of, runtime_class
from nas.ondevice.lock import own_command
from nas.ondevice.manifest import MANIFEST, checksum, load_manifest
from nas.ondevice.results import RESULTS, SCHEMA, Recording, read

# (what is done, share done 0..1, seconds left); infinitely many: nobody knows, such as while others are waited for
Progress = Callable[[str, float, float], None]

_OWN = (".measuring.", ".proving.")  # how folders begin that nobody but this program writes to
_BUSY = 0.25  # share of our CPUs' time that others take, from which on a round names them
_OPEN_SECONDS = 600.0  # for one model to open and run a few times; XLA takes seconds for a block
_HANG_SECONDS = 120.0  # for one sample of a model that has been tried
_GRACE_SECONDS = 5.0


def write(plan: Plan, folder: Path, settings: config.Latency, *, progress: Progress | None = None) -> None:
    """Writes the bundle of `plan`; one that is there already, whole and of the same plan, is kept.

    Raises:
        DeviceError: a library that writing needs is not installed.
        LatencyError: another bundle is there.
        RunError: the folder cannot be written to.
    """
    if folder.name.startswith(_OWN) and _schema(folder) not in (None, SCHEMA):
        shutil.rmtree(folder)  # begun by another version, which timed in another way
    if (folder / MANIFEST).exists():
        manifest = load_manifest(folder)
        found = manifest["digest"]
        if found == plan.digest:
            manifest["settings"] = _settings(settings)
            write_json(folder / MANIFEST, manifest)
            benchmark_model.write(folder, manifest)
            return
        raise LatencyError(
            f"{folder}: there is another bundle here ({found}; this one is {plan.digest}). Remove it, or name another "
            f"folder."
        )
    files, hashes, start = {}, {}, time.perf_counter()
    suffix = runtime_class(plan.device).suffix
    for number, (name, graph) in enumerate(plan.graphs.items(), 1):
        model = model_of(graph, plan.device, plan.precision, seed=plan.seed)
        hashes[name] = hashlib.sha256(model).hexdigest()
        files[name] = f"models/{hashes[name][:16]}{suffix}"
        if not (folder / files[name]).exists():
            write_bytes(folder / files[name], model)
        if progress is not None:
            share = number / len(plan.graphs)
            progress("writing", share, (time.perf_counter() - start) * (1 - share) / share)
    _copy_program(folder)
    manifest = {
        "schema": SCHEMA,
        "digest": plan.digest,
        "runtime": plan.device.runtime,
        "threads": plan.device.threads,
        "seed": plan.seed,
        "settings": _settings(settings),
        "device": msgspec.to_builtins(plan.device),
        "plan": plan.about(),
        "entries": plan.entries,
        "networks": [*plan.anchor_names, *plan.held_out_names],
        "network_blocks": plan.network_blocks,
        "calls": [
            {
                "name": name,
                "file": files[name],
                "sha256": hashes[name],
                "input": [plan.device.batch, *graph.input],
                "always": plan.always(name),
            }
            for name, graph in plan.graphs.items()
        ],
    }
    benchmark_model.write(folder, manifest)
    write_json(folder / MANIFEST, {**manifest, "sha256": checksum(manifest)})


def _schema(folder: Path) -> Any:
    """Of the bundle in `folder`; None where that cannot be told."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("schema")
    except (OSError, ValueError, AttributeError):
        return None


def _settings(settings: config.Latency) -> dict[str, float]:
    """What the measuring program is to know of them."""
    return {
        "seconds": settings.seconds,
        "max_seconds": settings.seconds * settings.patience,
        "min_rounds": settings.min_rounds,
        "tolerance": settings.tolerance,
        "max_drift": settings.max_drift,
        "busy": _BUSY,
        "open_seconds": _OPEN_SECONDS,
        "hang_seconds": _HANG_SECONDS,
    }


def run(folder: Path, *, progress: Progress | None = None) -> Recording:
    """Measures the bundle in `folder` on this machine, in a process of its own; what was measured before is kept.

    Raises:
        LatencyError: another measuring is running, and is not to be waited for any longer; the results are of another
            machine.
        DeviceError: the runtime is not installed.
    """
    command = [sys.executable, "-m", "nas.ondevice", str(folder), "--json", f"--command={own_command()}"]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    code, said = follow(command, progress=progress, env={**os.environ, "PYTHONPATH": path})
    if code != 0:
        kind = DeviceError if "not installed" in said else LatencyError
        raise kind(error_in(said) or f"the measuring program ended with exit status {code}.")
    return read(folder / RESULTS)


def follow(
    command: list[str], *, progress: Progress | None = None, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Runs the measuring program by `command`, telling its progress; its exit status and what it said on stderr."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        ) as process,
    ):
        assert process.stdout is not None
        last = ""
        try:
            for line in process.stdout:
                if not line.startswith('{"what"') or line == last:
                    continue  # a runtime's own words; or it still waits for the same measuring to end
                told, last = json.loads(line), line
                if progress is not None:
                    what = f"{told['what']} ({told['more']})" if told["more"] else told["what"]
                    left = told["seconds_left"]
                    progress(what, told["share"], math.inf if left is None else left)
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)  # its worker ends with it
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
        errors.seek(0)
        return code, errors.read()


def error_in(said: str) -> str:
    """The message of the error among what the measuring program said on stderr, or all of that."""
    return said.strip().rpartition("error: ")[2]


@contextlib.contextmanager
def kept_if_accepted(folder: Path | None) -> Iterator[None]:
    """Sets the results in `folder` aside if what is done with them inside is refused: the next call times anew."""
    try:
        yield
    except LatencyError:
        if folder is not None:
            path = recorded(folder)
            with contextlib.suppress(FileNotFoundError):  # another program that measures the same was quicker
                path.replace(path.with_name(f"{path.name}.refused"))
        raise


def recorded(folder: Path) -> Path:
    """The results in `folder`; where there are none, the log of benchmark_model.

    Raises:
        LatencyError: both are there, which may be of two machines.
    """
    log, results = folder / benchmark_model.LOG, folder / RESULTS
    if log.exists() and results.exists():
        raise LatencyError(
            f"{folder}: {log.name} and {results.name} are both here, and may be of two machines. Move the one away "
            f"that is not meant."
        )
    return log if log.exists() else results


def read_any(path: Path) -> Recording:
    """What was timed, by results of the measuring program or a log of benchmark_model; errors as of the two."""
    return benchmark_model.read(path) if path.suffix == ".log" else read(path)


def _copy_program(folder: Path) -> None:
    """The measuring program, and of this package only what it needs."""
    package = Path(__file__).resolve().parents[1]
    write_text(folder / "nas" / "__init__.py", '"""The part of `nas` that measures on a device."""\n')
    for source in (package / "errors.py", *sorted((package / "ondevice").glob("*.py"))):
        target = folder / "nas" / source.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    write_text(folder / "measure.py", _ENTRY)
    write_text(folder / "README.txt", _README)


_ENTRY = '''"""python measure.py: times the models of this folder on this machine; see README.txt."""

import sys
from pathlib import Path

from nas.ondevice.program import main

if __name__ == "__main__":
    sys.exit(main(folder=Path(__file__).resolve().parent))
'''

_README = f"""A bundle to be measured on a device.

Copy this folder to the device, which needs Python 3.11 or newer, NumPy and the runtime that manifest.json names, and
run there

    python measure.py

Cut off, the same command goes on, on the same CPUs. To choose a core: `taskset -c 7 python measure.py`. Then
bring results.jsonl back to where the bundle was made:

    nas measure --import results.jsonl --as NAME

Without Python, where measure.sh is beside this file (models of LiteRT), TensorFlow Lite's benchmark_model measures; for
64-bit Android it is at
{benchmark_model.DOWNLOAD}

    sh measure.sh path/to/benchmark_model           on Android below /data/local/tmp; cut off, the same command goes on
    CPUS=80 sh measure.sh path/to/benchmark_model   on the CPUs of that mask, here CPU 7 alone

Then bring benchmark_model.log back to this folder where the bundle was made, and import the folder.
"""
