"""The measuring program: it times the models of a bundle in rounds, and appends every round to one file of results.

    supervisor ── starts ──► worker: opens each model, tries it, then rounds until all is known well enough
        ▲                       │ appends lines to the results, notes each step
        └──── exit status ──────┘

A worker that a model brings down is started anew without that model, which is noted as unsupported with what was said
(`nas.ondevice.supervisor`); rounds that were timed stay. So does a machine that is switched off, or a person who has no
more time: the same command goes on.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nas.errors import DeviceError, LatencyError, NasError
from nas.ondevice import machine
from nas.ondevice.manifest import load_manifest
from nas.ondevice.results import RESULTS, Failure, Results
from nas.ondevice.sessions import open_model, version
from nas.ondevice.stopping import Outlook, Wanted, rounds_for
from nas.ondevice.supervisor import FAILED, NOBODY_LISTENS, WRONG_USE, supervise, watch_path
from nas.ondevice.timing import Call, Round, Samples, rounds, without_collection
from nas.ondevice.watch import NOTHING, Watch

Tell = Callable[[str, float, float, str], None]  # what is done, the share that is done, seconds left, more in words

_FIRST_LOOK = 5  # rounds after which intervals are looked at: what they say is rough, but better than nothing
_LOOKS = 1.1  # and again when there are so many times as many rounds as the last time
_RECENT = 10  # rounds whose mean is how long the next ones take
_NAME_SECONDS = 5.0  # between looks at who else uses the CPU
_TRIES = 3  # of a model, before it is timed
_ALONE_CALLS, _ALONE_SECONDS = 1000, 1.0  # of a model that failed in company: so many calls, or so long


class Failed(Exception):
    """Calls have failed; the results name them."""


def work(folder: Path, results: Path, tell: Tell) -> None:
    """Opens the models of the bundle in `folder` and times them until all is known well enough.

    Raises:
        Failed: models could not be opened, or one could not be run.
        LatencyError: the results are of another bundle or machine, or of CPUs that this process may not use.
        DeviceError: the runtime is not installed.
    """
    manifest = load_manifest(folder)
    out = Results(results, manifest)
    if out.before.complete:
        return
    watch, starts = Watch(watch_path(results)), out.before.starts
    # Before models are opened: their threads inherit it. Cores of one machine need not be alike: it is the same ones.
    with machine.pinned(manifest["threads"], on=starts[-1]["cpus"] if starts else ()) as cpus:
        now = {"hardware": machine.hardware(), "version": version(manifest["runtime"])}
        for start in starts:
            for what, value in now.items():
                if start[what] != value:
                    raise LatencyError(
                        f"{results}: these rounds were timed with {what} {start[what]!r}, and here it is {value!r}. "
                        f"They cannot be continued. Name another file with --out."
                    )
        calls = _open_all(folder, manifest, out, watch, tell)
        out.append({"kind": "start", **now, "cpus": cpus, "time": time.time(), "load": machine.load()})
        _time(manifest, calls, out, cpus, watch, tell)
    out.append({"kind": "end", "time": time.time(), "load": machine.load()})


def work_alone(folder: Path, results: Path, name: str) -> None:
    """Opens one model of the bundle, with no other open, and runs it for a while.

    Raises:
        Failed: it cannot be opened or run; it is noted as unsupported.
        DeviceError: the runtime is not installed.
    """
    manifest = load_manifest(folder)
    out, watch = Results(results, manifest), Watch(watch_path(results))
    number = next(i for i, call in enumerate(manifest["calls"]) if call["name"] == name)
    with machine.pinned(manifest["threads"]):
        try:
            watch(number, manifest["settings"]["open_seconds"])
            call = _opened(folder, manifest, number)
            until = time.monotonic() + _ALONE_SECONDS
            for _ in range(_ALONE_CALLS):
                watch(number, manifest["settings"]["hang_seconds"])
                call(1)
                if time.monotonic() > until:
                    break
        except DeviceError:
            raise
        except Exception as e:
            out.unsupported(name, _words(e))
            raise Failed from e


def _open_all(folder: Path, manifest: Mapping[str, Any], out: Results, watch: Watch, tell: Tell) -> dict[int, Call]:
    """Number of a call -> its inferences, but for calls that are known as unsupported.

    Raises:
        Failed: some could not be opened, or not be run; all others were tried too.
    """
    _require_whole(folder, manifest)
    calls: dict[int, Call] = {}
    failed, start = False, time.perf_counter()
    for number, call in enumerate(manifest["calls"]):
        if call["name"] in out.before.unsupported:
            continue
        watch(number, manifest["settings"]["open_seconds"])
        try:
            calls[number] = _opened(folder, manifest, number)
        except DeviceError:
            raise  # of the machine or its settings, whatever the model
        except Exception as e:  # a runtime may raise anything; what it said is what the person must know
            out.failed(Failure(call["name"], _words(e), timing=False))
            failed = True
            if isinstance(e, MemoryError):  # it would be no better for the others
                break
        share = (number + 1) / len(manifest["calls"])
        tell("building", share, (time.perf_counter() - start) * (1 - share) / share, "")
    watch(NOTHING)
    if failed:
        raise Failed
    return calls


def _require_whole(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Nothing, if the models are those that the bundle was made with.

    Raises:
        LatencyError: one is missing or damaged.
    """
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


def _opened(folder: Path, manifest: Mapping[str, Any], number: int) -> Call:
    """The inferences of a call, which has been run a few times."""
    call = manifest["calls"][number]
    session = open_model(manifest["runtime"], folder / call["file"], threads=manifest["threads"])
    images = np.random.default_rng([manifest["seed"], number]).standard_normal(call["input"], np.float32)
    inferences = session.prepare(images)
    for _ in range(_TRIES):
        inferences(1)
    return inferences


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:500]


def _time(
    manifest: Mapping[str, Any],
    calls: Mapping[int, Call],
    out: Results,
    cpus: tuple[int, ...],
    watch: Watch,
    tell: Tell,
) -> None:
    """Rounds, until every interval is narrow enough or the time is up.

    When the time for all is used up, blocks that are known well enough are left out, and only they: all others are
    compared with references and whole networks. So more time goes only where it is needed.

    Raises:
        Failed: a call did.
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
    asked, recent = Wanted.of(manifest), list[float]()
    outlook = Outlook(min_rounds=settings["min_rounds"], max_seconds=settings["max_seconds"])
    needed = math.inf
    if not numbers:
        return
    running = NOTHING

    def begins(index: int) -> None:
        nonlocal running
        running = numbers[index]
        watch(running, settings["hang_seconds"])

    with without_collection():
        generator = rounds(
            list(calls.values()), seed=manifest["seed"], done=len(timed), wanted=lambda: wanted, begins=begins
        )
        next_look, named = min(_FIRST_LOOK, settings["min_rounds"]), 0.0
        supervisor = os.getppid()
        while os.getppid() == supervisor:  # a worker that outlives it would be timed against the next one
            enough, late = len(timed) >= settings["min_rounds"], used >= settings["max_seconds"]
            if len(timed) >= next_look or (enough and late):
                next_look = max(len(timed) + 5, int(len(timed) * _LOOKS))
                if not enough:
                    next_look = min(next_look, settings["min_rounds"])
                samples = Samples.of(names, timed)
                interval = asked.intervals(samples.timings())
                needy = [name for name, half in interval.items() if not half <= settings["tolerance"]]
                widest, wander = max(interval.values(), default=0.0), asked.unsteadiness(samples)
                most = settings.get("max_drift", math.inf)
                steady = wander <= most
                noise = (
                    f"noise of a sum {asked.noise(interval):.1%}; {len(interval) - len(needy)} of {len(interval)} "
                    f"blocks and networks known to {settings['tolerance']:.1%}, the worst to {widest:.1%}"
                    f"{'' if steady else f'; an anchor to {wander:.1%} of {most:.1%}'}"
                )
                if enough and ((not needy and steady) or late):
                    tell("timing", 1.0, 0.0, f"{len(timed)} rounds; {noise}")
                    return
                needed = max(
                    rounds_for(widest, settings["tolerance"], rounds=len(timed)),
                    rounds_for(wander, most, rounds=len(timed)),
                )
                next_wanted = sorted({*map(names.index, needy), *always})
                if used >= settings["seconds"] and enough and next_wanted != wanted:
                    wanted, recent = next_wanted, []
            begin, busy, own = time.perf_counter(), machine.busy_seconds(), time.process_time()
            try:
                ran = next(generator)
            except Exception as e:  # as when it was opened
                out.failed(Failure(manifest["calls"][running]["name"], _words(e), timing=True))
                raise Failed from e
            watch(NOTHING)
            took = time.perf_counter() - begin
            record: dict[str, Any] = {"seconds": took, "others": _others(cpus, busy, own, took)}
            if (record["others"] or 0.0) > settings["busy"] and time.monotonic() - named > _NAME_SECONDS:
                record["busiest"], named = machine.busiest(), time.monotonic()
            timed.append(ran)
            used += took
            order = [numbers[i] for i in ran.order]
            out.append({"kind": "round", "order": order, "times_ms": ran.times_ms, **record})
            recent = [*recent[1 - _RECENT :], took]
            share, left = outlook(
                rounds=len(timed),
                seconds=used,
                round_seconds=sum(recent) / len(recent),
                needed_rounds=max(needed, next_look),
            )
            tell("timing", share, left, f"{len(timed)} rounds; {noise}" if noise else f"{len(timed)} rounds")
    os._exit(NOBODY_LISTENS)


def _others(cpus: tuple[int, ...], before: Mapping[int, float], own: float, seconds: float) -> float | None:
    """The share of the time of `cpus` (all, if none is held) that other processes took since `before`."""
    now = machine.busy_seconds()
    ours = [c for c in (cpus or now) if c in now and c in before]
    if not ours:
        return None
    busy = sum(now[c] - before[c] for c in ours) - (time.process_time() - own)
    return round(float(min(max(busy / (seconds * len(ours)), 0.0), 1.0)), 4)


def main(arguments: list[str] | None = None, *, folder: Path | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="measure.py", description="Times the models of a bundle on this machine.")
    parser.add_argument("folder", type=Path, nargs="?" if folder else None, default=folder, help="of the bundle")
    parser.add_argument("--out", type=Path, help=f"results; {RESULTS} in the bundle if not given")
    parser.add_argument("--json", action="store_true", help="progress as JSON lines on stdout")
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    results = options.out or options.folder / RESULTS
    try:
        load_manifest(options.folder)
        if options.only is not None:
            work_alone(options.folder, results, options.only)
            return 0
        if options.worker:
            work(options.folder, results, _json_lines if options.json else _Lines())
            return 0
        code = supervise(
            options.folder, results, machine_readable=options.json, stream=sys.stderr, command=options.command
        )
    except Failed:
        return FAILED
    except NasError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return WRONG_USE
    except OSError as e:
        print(
            f"error: the system refused: {e}. Correct that (free space, permissions), and run the same command: it "
            f"goes on.",
            file=sys.stderr,
            flush=True,
        )
        return WRONG_USE
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
        os._exit(NOBODY_LISTENS)


class _Lines:
    """Progress for people, every few seconds."""

    def __init__(self) -> None:
        self._told = 0.0

    def __call__(self, what: str, share: float, seconds_left: float, more: str) -> None:
        if time.monotonic() - self._told < 3.0 and share < 1:
            return
        self._told = time.monotonic()
        print(f"{what} {share:4.0%}  {seconds_left:.0f} s left  {more}", flush=True)
