"""Stage 6: proof that each file does what its network does. The test set is touched here, and nowhere before."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
from numpy.typing import NDArray

from nas.errors import ExportError
from nas.evaluate import Standalone
from nas.files import read_as, write_json
from nas.fold import fold
from nas.measure import RECIPE, Call, Timing, measure_files, prepare
from nas.ondevice.lock import once
from nas.ops import in_float32
from nas.pipeline.export import file_name
from nas.pipeline.finish import Finished, finished
from nas.pipeline.job import Job
from nas.quantise import Quantisation, has_integers, integer, simulate

ACCURACY_TOLERANCE = 0.001  # top-1 in the runtime may differ so much from JAX's: 0.1 point, in float32 and in int8
RELATIVE_TOLERANCE = 1e-3  # of float32 logits, relative to the largest


class Latency(msgspec.Struct, frozen=True, omit_defaults=True):
    """Milliseconds: percentiles of the samples as they came, and what the table said.

    Nothing but the prediction is known where the device is not at hand.
    """

    median: float | None
    p10: float | None
    p90: float | None
    predicted: float
    predicted_low: float | None = None  # the 80 % interval of the prediction, where it is known
    predicted_high: float | None = None


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What verify.json says of one file."""

    full_check: bool
    max_abs_diff: float | None  # None: not finite
    max_rel_diff: float | None
    top1_agreement: float
    accuracy: float
    jax_accuracy: float
    size_bytes: int
    reason: str | None  # why it is refused; None: it passed
    latency_ms: Latency | None = None
    # 1.1: when this was measured the machine was 10 % slower than for its table; None: the device is not at hand
    machine_level: float | None = None
    # measured latency without busy moments, at the machine's speed for its table: what compares with predictions, the
    # limit and other networks; None: the device is not at hand
    comparable_ms: float | None = None
    passed: bool = False


def verify(job: Job) -> None:
    """Writes verify.json beside each network: parity, accuracy on the test set in the runtime, measured latency.

    Latency is measured only where the device is at hand; what another machine takes says nothing of it.
    """
    job.folder.require("export")
    networks = finished(job.path)
    job.console.start(
        f"verify: {len(networks)} networks in {job.runtime_name}, {len(job.data.test.labels)} test images"
    )
    checks: dict[tuple[str, str], Verdict] = {}
    for number, made in enumerate(networks, start=1):
        for precision in job.files:
            checks[made.name, precision] = check(job, made, precision)
        job.console.progress(number, len(networks), {"": made.name})
    latencies = _measured(job, networks) if job.device.at_hand else _predicted(job, networks)
    for made in networks:
        verdicts = {p: msgspec.structs.replace(checks[made.name, p], **latencies[made.name, p]) for p in job.files}
        _judge_int8(verdicts, job.experiment.verify.int8_loss)
        verdicts = {p: msgspec.structs.replace(v, passed=v.reason is None) for p, v in verdicts.items()}
        for precision, v in verdicts.items():
            _deliver(made.folder / file_name(precision, job.runtime.suffix), v.passed)
        write_json(made.folder / "verify.json", msgspec.to_builtins(verdicts))
        words = ", ".join(f"{p} {_words(v)}" for p, v in verdicts.items())
        job.console.say(f"  {made.name}: {words}")


def _words(verdict: Verdict) -> str:
    assert verdict.latency_ms is not None
    ms, how = verdict.comparable_ms, ""
    if ms is None:
        ms, how = verdict.latency_ms.predicted, " predicted, not measured"
        if (low := verdict.latency_ms.predicted_low) is not None:
            how += f" (80 % interval {low:.4g} to {verdict.latency_ms.predicted_high:.4g} ms)"
    refused = "" if verdict.passed else f" REFUSED: {verdict.reason}"
    return f"top-1 {verdict.accuracy:.2%} at {ms:.4g} ms{how}{refused}"


def _measured(job: Job, networks: Sequence[Finished]) -> dict[tuple[str, str], dict[str, Any]]:
    """What verdicts say of latency, by network and precision."""
    openers: dict[tuple[str, Any], Callable[[], Call]] = {
        (made.name, precision): functools.partial(_open, job, made, precision)
        for made in networks
        for precision in job.tables
    }
    count = len(openers)
    # The table's anchors are measured again with them: they tell how fast the machine is now, compared with then.
    for precision, table in job.tables.items():
        for index, anchor in enumerate(table.anchors):
            graph = job.space.decode(anchor.genotype).flat()
            openers[precision, index] = functools.partial(prepare, graph, job.device, precision, seed=index)
    job.console.say(f"  latency: {count} files and the tables' anchors, interleaved, batch {job.device.batch}")
    timings: dict[tuple[str, Any], Timing] = measure_files(
        openers,
        seconds=job.experiment.verify.seconds,
        threads=job.device.threads,
        seed=job.experiment.seed,
        say=once(job.console.say),
    )
    if any(getattr(table, "recipe", RECIPE) != RECIPE for table in job.tables.values()):  # learned models have none
        job.console.say(
            "  the tables are of an older version, which timed networks before they had settled: levels and comparable "
            "latencies are rough. `nas run EXPERIMENT --redo measure` makes them anew"
        )
    level = {
        precision: table.level(np.array([timings[precision, i].latency_ms for i in range(len(table.anchors))]))
        for precision, table in job.tables.items()
    }
    out = {}
    for (name, precision), predicted in _predictions(job, networks).items():
        timing = timings[name, precision]
        out[name, precision] = {
            "latency_ms": Latency(timing.median_ms, timing.p10_ms, timing.p90_ms, *predicted),
            "machine_level": level[precision],
            "comparable_ms": timing.latency_ms / level[precision],
        }
    return out


def _predicted(job: Job, networks: Sequence[Finished]) -> dict[tuple[str, str], dict[str, Any]]:
    """What verdicts say of latency on a device that is not at hand."""
    job.console.say(
        f"  latency: NOT measured, {job.device.device} is not at hand; predictions are reported. Accuracy "
        f"is that of {job.runtime_name} on this machine"
        + ("" if job.precision in job.files else f", in {job.file}; predictions are of {job.precision}")
    )
    predictions = _predictions(job, networks).items()
    return {of: {"latency_ms": Latency(None, None, None, *predicted)} for of, predicted in predictions}


def _predictions(job: Job, networks: Sequence[Finished]) -> dict[tuple[str, str], tuple[float, ...]]:
    """Milliseconds by network and precision of its file, and the ends of their interval where it is known."""
    return {
        (made.name, precision): (
            job.table_of(precision).network_ms(made.architecture.network),
            *(job.table_of(precision).interval_ms(made.architecture.network) or ()),
        )
        for made in networks
        for precision in job.files
    }


def verdicts_of(folder: Path) -> dict[str, Verdict]:
    """What verify.json in a network's folder says, by precision.

    Raises:
        RunError: it is missing or damaged.
    """
    return read_as(folder / "verify.json", dict[str, Verdict], stage="verify")


def _judge_int8(verdicts: dict[str, Verdict], tolerance: float) -> None:
    """int8 that loses too much against float32 is refused, however well its file does what it says."""
    if "int8" not in verdicts or "float32" not in verdicts or verdicts["int8"].reason is not None:
        return
    loss = verdicts["float32"].accuracy - verdicts["int8"].accuracy
    if loss > tolerance:
        reason = (
            f"int8 loses {100 * loss:.1f} points of top-1 against float32, more than {100 * tolerance:g} "
            f"(verify.int8_loss); more calibration images (finish.calibration_images) may help"
        )
        verdicts["int8"] = msgspec.structs.replace(verdicts["int8"], reason=reason)


def _deliver(path: Path, passed: bool) -> None:
    """A refused file is set aside as `<name>.refused`, so that nothing loads it by mistake."""
    if not passed:
        os.replace(path, path.with_name(path.name + ".refused"))


def _bring_back(path: Path) -> None:
    """A file that was refused before is judged anew."""
    refused = path.with_name(path.name + ".refused")
    if refused.exists():
        os.replace(refused, path)


def check(job: Job, made: Finished, precision: str) -> Verdict:
    """Compares one file with JAX on real test images."""
    path = made.folder / file_name(precision, job.runtime.suffix)
    _bring_back(path)
    test = job.data.test
    images = made.architecture.input.normalise(test.images[:])
    quantised = has_integers(made.architecture.network.flat(), precision)
    if quantised:
        expected = _simulated(made, images, job.experiment.train.eval_batch_size)
    else:
        network = in_float32(made.architecture.network)  # whatever its stages chose, that is its file
        alone = Standalone(network, job.data, batch_size=job.experiment.train.eval_batch_size)
        expected = alone.logits(made.params_of(precision), test)
    session = job.runtime.open(path, threads=job.device.threads)
    got = np.concatenate([session(images[i : i + 256]) for i in range(0, len(images), 256)])
    few = slice(0, job.experiment.verify.parity_images)
    difference = float(np.abs(got[few] - expected[few]).max())
    relative = difference / max(float(np.abs(expected[few]).max()), 1e-12)
    accuracy, jax_accuracy = (float((x.argmax(-1) == test.labels).mean()) for x in (got, expected))
    reason = None
    try:
        job.runtime.check(path)
        full_check = True
    except ExportError as e:
        full_check, reason = False, str(e)
    if reason is None and not np.isfinite(got).all():
        reason = f"the runtime gives logits that are not finite for {(~np.isfinite(got)).any(-1).sum()} test images"
    # What rounds more than float32 does is not simulated in JAX, int8 aside: it may lose what int8 may.
    simulated = precision in ("float32", "int8", "mixed")
    tolerance = ACCURACY_TOLERANCE if simulated else job.experiment.verify.int8_loss
    if reason is None and abs(accuracy - jax_accuracy) > tolerance:
        reason = (
            f"top-1 in the runtime is {accuracy:.2%}, in JAX {jax_accuracy:.2%}: more than {100 * tolerance:g} point "
            f"apart"
        )
    rounded = quantised and any(integer(made.architecture.network.flat()))  # weights alone: sums are those of floats
    if reason is None and precision in ("float32", "mixed") and not rounded and relative > RELATIVE_TOLERANCE:
        reason = f"logits differ by {relative:.2g} of the largest, more than {RELATIVE_TOLERANCE:g}"
    agreement = float((got.argmax(-1) == expected.argmax(-1)).mean())
    size = path.stat().st_size
    return Verdict(
        full_check=full_check,
        max_abs_diff=difference if np.isfinite(difference) else None,
        max_rel_diff=relative if np.isfinite(relative) else None,
        top1_agreement=agreement,
        accuracy=accuracy,
        jax_accuracy=jax_accuracy,
        size_bytes=size,
        reason=reason,
    )


def _simulated(made: Finished, images: NDArray[np.float32], batch_size: int) -> NDArray[np.float32]:
    """Logits of the int8 or mixed network in JAX, which computes what integer kernels do, and with which weights."""
    quantisation = read_as(made.folder / "quantisation.json", Quantisation, stage="export")
    graph, params = fold(made.architecture.network.flat(), made.params)
    run = jax.jit(lambda x: simulate(graph, params, quantisation, x))
    n = len(images)
    rows = np.arange(-(-n // batch_size) * batch_size) % n  # equal batches: one compilation
    out = [np.asarray(run(images[rows[i : i + batch_size]])) for i in range(0, len(rows), batch_size)]
    return np.concatenate(out)[:n]


def _open(job: Job, made: Finished, precision: str) -> Call:
    """Inferences of a file on real images, as many as the device's batch, ready to be timed."""
    session = job.runtime.open(made.folder / file_name(precision, job.runtime.suffix), threads=job.device.threads)
    rows = np.arange(job.device.batch) % len(job.data.val.labels)
    return session.prepare(made.architecture.input.normalise(job.data.val.images[rows]))
