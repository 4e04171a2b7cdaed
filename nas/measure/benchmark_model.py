"""Measuring by TensorFlow Lite's own `benchmark_model`, on a phone or board without Python.

A bundle of LiteRT models has a script (`benchmark_model.sh`, there as measure.sh) that runs the tool on every model
once a round, and keeps a log of all that the tool said. `read` makes of it what the measuring program's results hold,
so that the same recipe judges both. The tool's words: tensorflow/lite/tools/benchmark/benchmark_model.cc and
tensorflow/core/util/stats_calculator.h.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nas.errors import LatencyError
from nas.files import write_text
from nas.ondevice.manifest import MANIFEST, load_manifest
from nas.ondevice.results import Recording
from nas.ondevice.timing import Round

RUNTIME = "litert"  # whose models the tool runs
SCRIPT = "measure.sh"
CALLS = "calls.txt"
LOG = "benchmark_model.log"
DOWNLOAD = (
    "https://storage.googleapis.com/tensorflow-nightly-public/prod/tensorflow/release/lite/tools/nightly/latest/"
    "android_aarch64_benchmark_model"
)

_TWICE = 2  # failures that condemn a model, as in the script, which tries it no more then
_TIMEOUT = 124  # exit status of `timeout`
_ROUNDED = 1e-3  # the tool prints six digits

_HEAD = "@ nas benchmark_model 1 "
_START = re.compile(r"@ start (\d+)\n@ with (tool=.*)\n@ hardware (.+)\n@ load (.*)\n")
_ROUND = re.compile(r"@ round (\d+)\n(.*?)^@ done \1 (\d+)\n", re.MULTILINE | re.DOTALL)
_RUN = re.compile(r"@ run (\d+)\n(.*?)^@ ended \1 (\d+)\n", re.MULTILINE | re.DOTALL)
_TIMINGS = re.compile(r"Inference timings in (\S+): .*\bInference \(avg\): (\S+)")
_STATISTICS = re.compile(r"\bcount=(\d+) (?:first=\S+ curr=\S+ min=(\S+) max=(\S+) avg=(\S+) std=|curr=([^\s(]+))")
_IGNORED = re.compile(r"Unconsumed cmdline flags:.*--(num_threads|use_xnnpack)")
_THREADS = re.compile(r"Num threads: \[(\d+)\]")
_GRAPH = re.compile(r"Graph: \[(.*)\]")


class _Run(NamedTuple):
    """The tool on one model."""

    call: int
    said: str
    ms: float | None  # mean of the run; None: it failed
    why: str  # it failed


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Adds to the bundle in `folder` what measuring without Python needs, if the tool runs its models."""
    if manifest["runtime"] != RUNTIME:
        return
    shutil.copyfile(Path(__file__).with_suffix(".sh"), folder / SCRIPT)
    settings = manifest["settings"]
    lines = [
        f"digest {manifest['digest']}",
        f"threads {manifest['threads']}",
        f"rounds {settings['min_rounds']}",
        f"hang {settings['hang_seconds']:.0f}",
        *(
            f"call {number} {call['file']} {','.join(map(str, call['input']))}"
            for number, call in enumerate(manifest["calls"])
        ),
    ]
    write_text(folder / CALLS, "\n".join(lines) + "\n")


def read(path: Path) -> Recording:
    """What the log in `path` holds of the bundle in whose folder it lies.

    A sample is the mean of a run, as the measuring program's is of some inferences; the tool's minimum and median are
    whole microseconds, which are per cents of a small block. (LiteRT timed in the tool's manner on 2 virtual CPUs, 22
    networks of about 0.1 ms, 30 rounds: means differ from the program's by 0.6 %, medians by 0.7, minima by 0.8 on
    average.)
    A model that failed twice, or always, is unsupported.

    Raises:
        LatencyError: it is missing, not such a log or of another bundle, or damaged; nothing was timed; or the tool was
            not run as it must be.
    """
    if not (path.parent / MANIFEST).exists():
        raise LatencyError(f"{path}: the log is read beside its bundle's {MANIFEST}: put it into the bundle's folder.")
    manifest = load_manifest(path.parent)
    try:
        text = path.read_bytes().decode(errors="replace").replace("\r\n", "\n")
    except OSError as e:
        raise LatencyError(f"{path}: cannot read this log: {e}. Run `sh {SCRIPT}` on the device first.") from e
    head, _, rest = text.partition("\n")
    if not head.startswith(_HEAD):
        raise LatencyError(
            f"{path}: this is no log of {SCRIPT}: its first line is {head[:60]!r}. Bring {LOG} back whole."
        )
    if head.removeprefix(_HEAD) != manifest["digest"]:
        raise LatencyError(
            f"{path}: it is of another bundle ({head.removeprefix(_HEAD)}; this one is {manifest['digest']}). Put it "
            f"into its own."
        )
    starts: list[dict[str, Any]] = []
    timed: list[list[_Run]] = []
    seconds, complete, withs = 0.0, False, set[str]()
    for part in re.split(r"^(?=@ start )", rest, flags=re.MULTILINE):
        start = _START.match(part)
        if start is None:  # cut off while it began
            if "\n@ done " in part:
                raise LatencyError(f"{path}: damaged: rounds without a start. {_ANEW}")
            continue
        starts.append(_start(start))
        withs.add(start[2])
        at, complete = start.end(), False
        while found := _ROUND.match(part, at):
            if int(found[1]) != len(timed) + 1:
                raise LatencyError(f"{path}: damaged: round {found[1]} follows round {len(timed)}. {_ANEW}")
            timed.append(_runs(found[2], manifest, f"{path}, round {found[1]}"))
            seconds, at = seconds + int(found[3]), found.end()
        tail = part[at:].strip()
        complete = tail == "@ end"
        if not complete and len(re.findall(r"^@ round ", tail, re.MULTILINE)) > 1:
            raise LatencyError(f"{path}: damaged: round {len(timed) + 1} has no end, and others follow. {_ANEW}")
    if not timed:
        raise LatencyError(f"{path}: no round is complete. Run `sh {SCRIPT}` again on the device: it goes on.")
    if len(withs) > 1 or len({start["hardware"] for start in starts}) > 1:
        raise LatencyError(
            f"{path}: its parts are of several devices, tools or settings: {' and '.join(sorted(withs))}."
        )
    unsupported = _unsupported(timed, manifest, str(path))
    return Recording(
        manifest=manifest,
        starts=tuple(starts),
        rounds=tuple(_round(runs) for runs in timed),
        seconds=seconds,
        unsupported=unsupported,
        others=(float("nan"),) * len(timed),
        busiest="",
        complete=complete,
        notes=_notes(timed, starts[-1]),
    )


_ANEW = f"Bring {LOG} anew from the device, or delete it there and measure again."


def _start(found: re.Match[str]) -> dict[str, Any]:
    tool, _, cpus, flags = (word.partition("=")[2] for word in found[2].split(" ", 3))
    return {
        "hardware": found[3] + ("" if cpus == "any" else f", on CPUs of mask {cpus}"),
        "version": f"benchmark_model of cksum {tool}",
        "time": float(found[1]),
        "load": f"load average {found[4] or 'not known'}",
        "cpus": (),
        "flags": flags,
    }


def _runs(text: str, manifest: Mapping[str, Any], where: str) -> list[_Run]:
    """The runs of a round, in their order."""
    runs: list[_Run] = []
    at = 0
    while found := _RUN.match(text, at):
        call, said, status = int(found[1]), found[2].strip(), int(found[3])
        if call >= len(manifest["calls"]):
            raise LatencyError(f"{where}: there is no call {call} in this bundle. {_ANEW}")
        about = manifest["calls"][call]
        ms = None
        if status == 0:
            _check_settings(said, manifest["threads"], about["file"], f"{where}, `{about['name']}`")
            ms = _mean_ms(said, f"{where}, `{about['name']}`")
        runs.append(_Run(call, said, ms, "" if ms is not None else _why(said, status)))
        at = found.end()
    if text[at:].strip() or len({run.call for run in runs}) < len(runs):
        raise LatencyError(f"{where}: damaged. {_ANEW}")
    return runs


def _check_settings(said: str, threads: int, file: str, where: str) -> None:
    """Nothing, if the tool does not contradict how it was called."""
    if ignored := _IGNORED.search(said):
        raise LatencyError(
            f"{where}: this benchmark_model does not know --{ignored[1]}. Take a newer one ({DOWNLOAD})."
        )
    for what, found, wanted in (("threads", _THREADS, str(threads)), ("the model", _GRAPH, file)):
        if (told := found.search(said)) and told[1] != wanted:
            raise LatencyError(f"{where}: the tool ran with {what} {told[1]}, and it should be {wanted}. {_ANEW}")


def _mean_ms(said: str, where: str) -> float | None:
    """Milliseconds an inference; None if the tool printed none.

    Raises:
        LatencyError: it is not in microseconds, or does not fit the statistics that are printed with it.
    """
    told = list(_TIMINGS.finditer(said))
    if not told:
        return None
    if len(told) > 1 or told[0][1] != "us":
        raise LatencyError(
            f"{where}: timings in {told[-1][1]!r}, {len(told)} times: once, in us, is what is understood."
        )
    statistics = _STATISTICS.findall(said[: told[0].start()])
    if not statistics:
        raise LatencyError(f"{where}: timings without the line `count=... avg=...` before them. {_ANEW}")
    count, low, high, mean, same = statistics[-1]  # the one before is of the warm-up
    try:
        avg_us, values = float(told[0][2]), [float(same or value) for value in (low, mean, high)]
    except ValueError as e:
        raise LatencyError(f"{where}: {e}. {_ANEW}") from e
    low_us, mean_us, high_us = values
    if not (
        int(count) > 0
        and 0 < avg_us < float("inf")
        and low_us * (1 - _ROUNDED) <= mean_us <= high_us * (1 + _ROUNDED)
        and abs(avg_us - mean_us) <= _ROUNDED * mean_us
    ):
        raise LatencyError(
            f"{where}: `Inference (avg): {told[0][2]}` does not fit `{count=!s} min={low_us:g} max={high_us:g} "
            f"avg={mean_us:g}` beside it; both should be us. {_ANEW}"
        )
    return avg_us / 1e3


def _why(said: str, status: int) -> str:
    """Why the tool failed, in its own words: its last error, or its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "it said nothing")
    how = {0: "it printed no timings", _TIMEOUT: "it did not end"}.get(status)
    how = how or (f"exit status {status}" if status < 128 else f"signal {status - 128}")
    return f"benchmark_model: {last[:300]} ({how})"


def _unsupported(timed: Sequence[Sequence[_Run]], manifest: Mapping[str, Any], where: str) -> dict[str, str]:
    """Name of a call -> why it cannot run."""
    failures: dict[int, list[str]] = {}
    worked = set[int]()
    for runs in timed:
        for run in runs:
            worked |= {run.call} if run.ms is not None else set()
            failures.setdefault(run.call, []).extend([run.why] if run.why else [])
    if not worked:
        why = next((reasons[0] for reasons in failures.values() if reasons), "no model was run")
        raise LatencyError(
            f"{where}: not one model was timed: {why}. Is it TensorFlow Lite's benchmark_model? {DOWNLOAD}"
        )
    bad = {call for call, reasons in failures.items() if len(reasons) >= _TWICE or (reasons and call not in worked)}
    every = range(len(manifest["calls"]))
    for number, runs in enumerate(timed, 1):
        if missing := set(every) - {run.call for run in runs} - bad:
            name = manifest["calls"][min(missing)]["name"]
            raise LatencyError(f"{where}, round {number}: `{name}` and {len(missing) - 1} more are missing. {_ANEW}")
    return {manifest["calls"][call]["name"]: failures[call][-1] for call in sorted(bad)}


def _round(runs: Sequence[_Run]) -> Round:
    timed = [(run.call, run.ms) for run in runs if run.ms is not None]
    return Round(tuple(call for call, _ in timed), tuple(ms for _, ms in timed))


def _notes(timed: Sequence[Sequence[_Run]], start: Mapping[str, Any]) -> tuple[str, ...]:
    """What is otherwise than where the measuring program runs."""
    notes = [
        f"timed by TensorFlow Lite's benchmark_model ({start['flags']}), a process for each model and round; a sample "
        f"is the mean of a run"
    ]
    said = next(run.said for runs in timed for run in runs if run.ms is not None)
    if not re.search(r"XNNPACK delegate|XNNPackDelegate", said, re.IGNORECASE):
        notes.append("the tool did not say that XNNPACK ran the models")
    return tuple(notes)
