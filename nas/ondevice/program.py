"""The measuring program: it times the models of a bundle in rounds, and appends every round to one file of results.

    supervisor ── starts ──► worker: opens each model, tries it once, then rounds until all are known well enough
        ▲                       │ appends lines to the results
        └──── exit status ──────┘

A worker that a model brings down is started anew without that model, which is noted as unsupported with what was said;
rounds that were timed stay. So does a machine that is switched off, or a person who has no more time: the same command
goes on. Lines of the results are JSON behind a checksum, so a half-written last one is noticed and dropped.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from nas.errors import DeviceError, LatencyError, NasError
from nas.ondevice import machine
from nas.ondevice.sessions import open_model, version
from nas.ondevice.timing import Call, Round, Samples, rounds, without_collection

SCHEMA = 1
RESULTS = "results.jsonl"
MANIFEST = "manifest.json"

_CHECKS = 1.1  # the intervals are looked at when there are so many times as many rounds as the last time
_SYNC_SECONDS = 1.0  # between writes that wait for the disk: a power cut costs no more than that
_NAME_SECONDS = 5.0  # between looks at who else uses the CPU
_TRIES = 3  # of a model, before it is timed
_OPEN_SECONDS = 600.0  # for one model to open and run once; XLA takes seconds for a block
_NOBODY_LISTENS = 3  # exit status of a worker whose reader is gone
_RESTARTS = 3  # after crashes that no model can be blamed for


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a file of results holds."""

    manifest: dict[str, Any]
    starts: tuple[dict[str, Any], ...]  # of each process that has timed: hardware, version, when
    rounds: tuple[Round, ...]
    seconds: float  # that the rounds took
    unsupported: dict[str, str]  # name of a call -> why it cannot run
    others: tuple[float, ...]  # of each round: share of our CPUs' time that other processes took; NaN if not known
    busiest: str  # other processes, when they took most
    complete: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Of the calls that were timed, in the order of the manifest."""
        return tuple(c["name"] for c in self.manifest["calls"] if c["name"] not in self.unsupported)

    def samples(self) -> Samples[str]:
        """The samples of all rounds.

        Raises:
            LatencyError: nothing was timed.
        """
        if not self.rounds or not self.names:
            why = "; ".join(f"{name}: {said}" for name, said in list(self.unsupported.items())[:1])
            raise LatencyError(f"nothing was timed{f' ({why})' if why else ''}. Run the measuring program to its end.")
        every = [c["name"] for c in self.manifest["calls"]]
        kept = {every.index(name): number for number, name in enumerate(self.names)}
        timed = []
        for ran in self.rounds:
            pairs = [(kept[i], ms) for i, ms in zip(ran.order, ran.times_ms, strict=True) if i in kept]
            timed.append(Round(tuple(i for i, _ in pairs), tuple(ms for _, ms in pairs)))
        return Samples.of(self.names, timed)


def read(path: Path) -> Recording:
    """The results in `path`.

    Raises:
        LatencyError: the file is missing, not one of results, or damaged before its last line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise LatencyError(f"{path}: cannot read these results: {e}. Run the measuring program first.") from e
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut off
        record = _decoded(line)
        if record is None:
            raise LatencyError(
                f"{path}, line {number}: damaged (its checksum does not fit). Bring the file anew from the device, or "
                f"delete it and measure again."
            )
        records.append(record)
    if not records or records[0].get("kind") != "manifest" or records[0]["manifest"].get("schema") != SCHEMA:
        raise LatencyError(f"{path}: these are no results of this version's measuring program (schema {SCHEMA}).")
    of = {kind: [r for r in records if r["kind"] == kind] for kind in ("start", "round", "unsupported", "end")}
    others = [float("nan") if r["others"] is None else r["others"] for r in of["round"]]
    seen = [(share, r["busiest"]) for share, r in zip(others, of["round"], strict=True) if r.get("busiest")]
    return Recording(
        manifest=records[0]["manifest"],
        starts=tuple(of["start"]),
        rounds=tuple(Round(tuple(r["order"]), tuple(r["times_ms"])) for r in of["round"]),
        seconds=sum(r["seconds"] for r in of["round"]),
        unsupported={r["name"]: r["why"] for r in of["unsupported"]},
        others=tuple(others),
        busiest=max(seen)[1] if seen else "",
        complete=bool(of["end"]),
    )


class Results:
    """The file of results, open for appending by one process."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]):
        self.path, self._synced = path, 0.0
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self.append({"kind": "manifest", "manifest": manifest})
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):  # the line that a kill cut off
            with open(path, "r+b") as f:
                f.truncate(end)
        if end == 0:
            self.append({"kind": "manifest", "manifest": manifest})
        self.before = read(path)
        if self.before.manifest["digest"] != manifest["digest"]:
            raise LatencyError(
                f"{path}: these results are of another bundle ({self.before.manifest['digest']}, this one is "
                f"{manifest['digest']}). Move them away, or name another file with --out."
            )

    def append(self, record: Mapping[str, Any]) -> None:
        """One line: whatever becomes of this process, it is there; after a power cut, all but the last second's are."""
        text = json.dumps(record, separators=(",", ":")).encode()
        with open(self.path, "ab") as f:
            f.write(b"%08x %s\n" % (zlib.crc32(text), text))
            f.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(f.fileno())
                self._synced = time.monotonic()


def _decoded(line: bytes) -> dict[str, Any] | None:
    crc, _, text = line.partition(b" ")
    try:
        return json.loads(text) if int(crc, 16) == zlib.crc32(text) else None
    except ValueError:
        return None


# the worker


def work(folder: Path, results: Path, tell: Callable[[str, float, float, str], None]) -> None:
    """Opens the models of the bundle in `folder` and times them until all are known well enough.

    Args:
        tell: is told what is being done, the share that is done, seconds left, and more in words.

    Raises:
        LatencyError: the results are of another bundle or machine.
        DeviceError: the runtime is not installed.
    """
    manifest = load_manifest(folder)
    out = Results(results, manifest)
    if out.before.complete:
        return
    with machine.pinned(manifest["threads"]) as cpus:  # before models are opened: their threads inherit it
        now = {"hardware": machine.hardware(), "version": version(manifest["runtime"])}
        for start in out.before.starts:
            for what, value in now.items():
                if start[what] != value:
                    raise LatencyError(
                        f"{results}: these rounds were timed with {what} {start[what]!r}, and here it is {value!r}. "
                        f"They cannot be continued. Name another file with --out."
                    )
        calls = _open_all(folder, manifest, out, tell)
        out.append({"kind": "start", **now, "cpus": cpus, "time": time.time(), "load": machine.load()})
        _time(manifest, calls, out, cpus, tell)
    out.append({"kind": "end", "time": time.time(), "load": machine.load()})


def _open_all(
    folder: Path, manifest: Mapping[str, Any], out: Results, tell: Callable[[str, float, float, str], None]
) -> dict[int, Call]:
    """Number of a call -> its inferences; calls that the runtime refuses are noted."""
    for file, wanted in {call["file"]: call["sha256"] for call in manifest["calls"]}.items():
        try:
            found = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        except OSError as e:
            raise LatencyError(f"{folder / file}: {e}. Copy the whole bundle again, and run the same command.") from e
        if found != wanted:
            raise LatencyError(
                f"{folder / file} is not what the bundle was made with (was it cut short?). Copy it again, and run the "
                f"same command."
            )
    calls: dict[int, Call] = {}
    images = np.random.default_rng(manifest["seed"])
    start = time.perf_counter()
    attempt = _attempt(out.path)
    for number, call in enumerate(manifest["calls"]):
        if call["name"] in out.before.unsupported:
            continue
        attempt.write_text(call["name"], encoding="utf-8")  # whom to blame if this process does not survive it
        try:
            session = open_model(manifest["runtime"], folder / call["file"], threads=manifest["threads"])
            calls[number] = session.prepare(images.standard_normal(call["input"], np.float32))
            for _ in range(_TRIES):
                calls[number](1)
        except DeviceError:
            raise  # of the machine or its settings, whatever the model
        except Exception as e:  # a runtime may raise anything; what it said is what the person must know
            why = f"{type(e).__name__}: {e}".replace("\n", " ")[:500]
            out.append({"kind": "unsupported", "name": call["name"], "why": why})
            calls.pop(number, None)
        share = (number + 1) / len(manifest["calls"])
        tell("building", share, (time.perf_counter() - start) * (1 - share) / share, "")
    attempt.unlink(missing_ok=True)
    return calls


def _time(
    manifest: Mapping[str, Any],
    calls: Mapping[int, Call],
    out: Results,
    cpus: tuple[int, ...],
    tell: Callable[[str, float, float, str], None],
) -> None:
    """Rounds, until every call's interval is narrow enough or the time is up.

    When the time for all is used up, calls that are known well enough are left out, but for those that all others are
    compared with: so more time goes only where it is needed.
    """
    settings, numbers = manifest["settings"], list(calls)
    names = [manifest["calls"][n]["name"] for n in numbers]
    always = [i for i, n in enumerate(numbers) if manifest["calls"][n]["always"]]
    back = {n: i for i, n in enumerate(numbers)}
    timed = [
        Round(tuple(back[i] for i in r.order if i in back),
              tuple(ms for i, ms in zip(r.order, r.times_ms, strict=True) if i in back))
        for r in out.before.rounds
    ]  # fmt: skip
    used, wanted, noise = out.before.seconds, list(range(len(numbers))), ""
    if not numbers:
        return
    with without_collection():
        generator = rounds(list(calls.values()), seed=manifest["seed"], done=len(timed), wanted=lambda: wanted)
        next_check, named = settings["min_rounds"], 0.0
        supervisor = os.getppid()
        while os.getppid() == supervisor:  # a worker that outlives it would be timed against the next one
            if len(timed) >= next_check:
                next_check = max(len(timed) + 5, int(len(timed) * _CHECKS))
                interval = np.array([t.interval for t in Samples.of(names, timed).timings().values()])
                needy = np.flatnonzero(~(interval <= settings["tolerance"])).tolist()
                noise = f"noise {np.median(interval):.1%}, {len(needy)} of {len(names)} calls not yet known well enough"
                if not needy or used >= settings["max_seconds"]:
                    tell("timing", 1.0, 0.0, noise)
                    return
                if used >= settings["seconds"]:
                    wanted = sorted({*needy, *always})
            begin, busy, own = time.perf_counter(), machine.busy_seconds(), time.process_time()
            ran = next(generator)
            took = time.perf_counter() - begin
            record: dict[str, Any] = {"seconds": took, "others": _others(cpus, busy, own, took)}
            if (record["others"] or 0.0) > settings["busy"] and time.monotonic() - named > _NAME_SECONDS:
                record["busiest"], named = machine.busiest(), time.monotonic()
            timed.append(ran)
            used += took
            order = [numbers[i] for i in ran.order]
            out.append({"kind": "round", "order": order, "times_ms": ran.times_ms, **record})
            limit = settings["max_seconds" if used >= settings["seconds"] else "seconds"]
            left = max(limit - used, took * (settings["min_rounds"] - len(timed)), 0.0)
            tell("timing", min(used / (used + left), 0.999), left, noise)
    os._exit(_NOBODY_LISTENS)


def _others(cpus: tuple[int, ...], before: Mapping[int, float], own: float, seconds: float) -> float | None:
    """The share of the time of `cpus` (all, if none is held) that other processes took since `before`."""
    now = machine.busy_seconds()
    ours = [c for c in (cpus or now) if c in now and c in before]
    if not ours:
        return None
    busy = sum(now[c] - before[c] for c in ours) - (time.process_time() - own)
    return round(float(min(max(busy / (seconds * len(ours)), 0.0), 1.0)), 4)


# the supervisor


def supervise(folder: Path, results: Path, *, machine_readable: bool, stream: TextIO) -> int:
    """Runs workers until one has ended; returns an exit code: 0 done, 2 wrong use, told on stderr."""
    command = [sys.executable, "-m", "nas.ondevice", str(folder), "--out", str(results), "--worker"]
    command += ["--json"] if machine_readable else []
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    restarts = 0
    with _alone(results) as held:
        _attempt(results).unlink(missing_ok=True)  # of a process that was killed: nobody is to blame for that
        while True:
            # The worker holds the lock as well: should this process be killed, nobody measures beside what is left.
            worker = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, pass_fds=held)
            try:
                code = _wait(worker, results)
            except BaseException:
                worker.kill()
                worker.wait()
                raise
            if code in (0, 2, _NOBODY_LISTENS):
                return code
            blamed = _blamed(results)
            if blamed is not None and (code is None or code < 0):  # it hung, or a signal ended it
                why = f"it brought the process down ({_status(code)})"
                Results(results, load_manifest(folder)).append({"kind": "unsupported", "name": blamed, "why": why})
                print(f"{blamed}: {why}; going on without it", file=stream, flush=True)
                continue
            restarts += 1
            if restarts > _RESTARTS:
                raise LatencyError(
                    f"{folder}: the measuring process has ended {restarts} times for no model's fault that could be "
                    f"found ({_status(code)}). Is there too little memory? Run it with fewer models, or see its output."
                )


def _wait(worker: subprocess.Popen[bytes], results: Path) -> int | None:
    """The exit status of `worker`; None after it was ended because a model took too long to open."""
    trying, since = "", time.monotonic()
    while True:
        try:
            return worker.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            with suppress(FileNotFoundError):
                now = _attempt(results).read_text(encoding="utf-8")
                if now != trying:
                    trying, since = now, time.monotonic()
                elif now and time.monotonic() - since > _OPEN_SECONDS:
                    worker.kill()
                    worker.wait()
                    return None


def _status(code: int | None) -> str:
    if code is None:
        return f"not open after {_OPEN_SECONDS:.0f} s"
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def _attempt(results: Path) -> Path:
    """Holds the name of the call that is being tried for the first time."""
    return results.with_name(results.name + ".trying")


def _blamed(results: Path) -> str | None:
    attempt = _attempt(results)
    if not attempt.exists():
        return None
    name = attempt.read_text(encoding="utf-8")
    attempt.unlink()
    return name or None


@contextmanager
def _alone(results: Path) -> Iterator[tuple[int, ...]]:
    """One measuring at a time on this machine, by one user: two would time each other. Yields the lock's files.

    NAS_LOCKS names the folder of the lock, where several jobs are to be let alone with each other (as tests are).

    Raises:
        LatencyError: another is running.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield ()
        return
    results.parent.mkdir(parents=True, exist_ok=True)
    user = os.getuid() if hasattr(os, "getuid") else ""
    path = Path(os.environ.get("NAS_LOCKS") or tempfile.gettempdir()) / f"nas-measuring-{user}.lock"
    with open(path, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            lock.seek(0)
            raise LatencyError(
                f"another measuring is running on this machine ({lock.read().strip() or 'unknown'}); each would time "
                f"the other. Wait until it has ended, and run the same command."
            ) from e
        lock.truncate(0)
        lock.write(f"process {os.getpid()}, {results}")
        lock.flush()
        yield (lock.fileno(),)


def load_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a bundle.

    Raises:
        LatencyError: there is none, or it is of another version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise LatencyError(f"{path}: this is no bundle: {e}. Make one with `nas measure SPACE --bundle`.") from e
    if manifest.get("schema") != SCHEMA:
        raise LatencyError(f"{path}: a bundle of schema {manifest.get('schema')}; this program reads {SCHEMA}.")
    if manifest.get("sha256") != checksum(manifest):
        raise LatencyError(f"{path}: it was edited or damaged; only `settings` may change. Copy the bundle again.")
    return manifest


def checksum(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says, but for `settings`, which only say how long to measure."""
    deciding = {key: value for key, value in manifest.items() if key not in ("settings", "sha256")}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def main(arguments: list[str] | None = None, *, folder: Path | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="measure.py", description="Times the models of a bundle on this machine.")
    parser.add_argument("folder", type=Path, nargs="?" if folder else None, default=folder, help="of the bundle")
    parser.add_argument("--out", type=Path, help=f"results; {RESULTS} in the bundle if not given")
    parser.add_argument("--json", action="store_true", help="progress as JSON lines on stdout")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    results = options.out or options.folder / RESULTS
    try:
        load_manifest(options.folder)
        if options.worker:
            work(options.folder, results, _json_lines if options.json else _Lines())
            return 0
        code = supervise(options.folder, results, machine_readable=options.json, stream=sys.stderr)
    except NasError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; rounds that were timed are kept, and the same command goes on", file=sys.stderr)
        return 130
    if code == 0 and not options.json:
        print(f"done: {results}. Bring it back, and: nas measure --import {results.name} --as NAME", flush=True)
    return code


def _json_lines(what: str, share: float, seconds_left: float, more: str) -> None:
    """Progress for the program that started this one; where that is gone, this one ends too."""
    try:
        print(json.dumps({"what": what, "share": share, "seconds_left": seconds_left, "more": more}), flush=True)
    except BrokenPipeError:
        os._exit(_NOBODY_LISTENS)


class _Lines:
    """Progress for people, every few seconds."""

    def __init__(self) -> None:
        self._told = 0.0

    def __call__(self, what: str, share: float, seconds_left: float, more: str) -> None:
        if time.monotonic() - self._told < 3.0 and share < 1:
            return
        self._told = time.monotonic()
        print(f"{what} {share:4.0%}  {seconds_left:.0f} s left  {more}", flush=True)
