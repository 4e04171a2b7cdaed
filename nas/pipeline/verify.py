"""Stage 6: proof that each file does what its network does. The test set is touched here, and nowhere before."""

import dataclasses
from typing import Any

import jax
import msgspec
import numpy as np
from numpy.typing import NDArray

from nas.errors import CheckpointError, ExportError
from nas.evaluate import Standalone
from nas.files import write_json
from nas.fold import fold
from nas.measure import Timing, measure_files, prepare
from nas.pipeline.export import file_name
from nas.pipeline.finish import Finished, finished
from nas.pipeline.job import Job
from nas.quantise import Quantisation, simulate

ACCURACY_TOLERANCE = 0.001  # top-1 in the runtime may differ so much from JAX's: 0.1 point
RELATIVE_TOLERANCE = 1e-3  # of float32 logits, relative to the largest


@dataclasses.dataclass(frozen=True)
class Check:
    """What verify.json says of one file, latency apart."""

    full_check: bool
    max_abs_diff: float
    max_rel_diff: float
    top1_agreement: float
    accuracy: float
    jax_accuracy: float
    size_bytes: int
    reason: str | None  # why it is refused; None: it passed


def verify(job: Job) -> None:
    """Writes verify.json beside each network: parity, accuracy on the test set in the runtime, measured latency."""
    job.folder.require("export")
    networks = finished(job.path)
    job.console.start(
        f"verify: {len(networks)} networks in {job.device.runtime}, {len(job.data.test.labels)} test images"
    )
    checks: dict[tuple[str, str], Check] = {}
    sessions: dict[tuple[str, Any], Any] = {}
    for number, made in enumerate(networks, start=1):
        for precision in job.device.precision:
            checks[made.name, precision], session = check(job, made, precision)
            sessions[made.name, precision] = session.prepare(_one_batch(job, made))
        job.console.progress(number, len(networks), {"": made.name})
    # The table's anchors are measured again with them: they tell how fast the machine is now, compared with then.
    for precision, table in job.tables.items():
        for index, anchor in enumerate(table.anchors):
            graph = job.space.decode(anchor.genotype).flat()
            sessions[precision, index] = prepare(graph, job.device, precision, seed=index)
    job.console.say(f"  latency: {len(checks)} files and the tables' anchors, interleaved, batch {job.device.batch}")
    timings: dict[tuple[str, Any], Timing] = measure_files(
        sessions, seconds=job.experiment.verify.seconds, threads=job.device.threads, seed=job.experiment.seed
    )
    level = {
        precision: table.level(np.array([timings[precision, i].latency_ms for i in range(len(table.anchors))]))
        for precision, table in job.tables.items()
    }
    for made in networks:
        verdict = {}
        for precision, table in job.tables.items():
            found, timing = checks[made.name, precision], timings[made.name, precision]
            verdict[precision] = {
                **dataclasses.asdict(found),
                "latency_ms": {
                    "median": timing.median_ms,
                    "p10": timing.p10_ms,
                    "p90": timing.p90_ms,
                    "predicted": table.network_ms(made.architecture.network),
                },
                "machine_level": level[precision],  # 1.1: now 10 % slower than when the table was measured
                "as_found_ms": {  # with the machine's busy moments, which the latency above is without
                    "median": timing.found_median_ms,
                    "p10": timing.found_p10_ms,
                    "p90": timing.found_p90_ms,
                },
                "passed": found.reason is None,
            }
        write_json(made.folder / "verify.json", verdict)
        words = ", ".join(
            f"{p} top-1 {v['accuracy']:.2%} at {v['latency_ms']['median']:.4g} ms"
            + ("" if v["passed"] else f" REFUSED: {v['reason']}")
            for p, v in verdict.items()
        )
        job.console.say(f"  {made.name}: {words}")


def check(job: Job, made: Finished, precision: str) -> tuple[Check, Any]:
    """Compares one file with JAX on real test images; also the opened session."""
    path = made.folder / file_name(precision, job.runtime.suffix)
    test = job.data.test
    images = made.architecture.input.normalise(test.images)
    if precision == "int8":
        expected = _simulated(made, images, job.experiment.train.eval_batch_size)
    else:
        alone = Standalone(made.architecture.network, job.data, batch_size=job.experiment.train.eval_batch_size)
        expected = alone.logits(made.params, test)
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
    if reason is None and abs(accuracy - jax_accuracy) > ACCURACY_TOLERANCE:
        reason = f"top-1 in the runtime is {accuracy:.2%}, in JAX {jax_accuracy:.2%}: more than 0.1 point apart"
    if reason is None and precision == "float32" and relative > RELATIVE_TOLERANCE:
        reason = f"logits differ by {relative:.2g} of the largest, more than {RELATIVE_TOLERANCE:g}"
    agreement = float((got.argmax(-1) == expected.argmax(-1)).mean())
    size = path.stat().st_size
    return Check(full_check, difference, relative, agreement, accuracy, jax_accuracy, size, reason), session


def _simulated(made: Finished, images: NDArray[np.float32], batch_size: int) -> NDArray[np.float32]:
    """Logits of the int8 network in JAX, which computes what integer kernels do."""
    path = made.folder / "quantisation.json"
    try:
        quantisation = msgspec.json.decode(path.read_bytes(), type=Quantisation)
    except (OSError, msgspec.DecodeError) as e:
        raise CheckpointError(f"{path}: cannot be read: {e}. Run `nas export` for this folder again.") from e
    graph, params = fold(made.architecture.network.flat(), made.params)
    run = jax.jit(lambda x: simulate(graph, params, quantisation, x))
    n = len(images)
    rows = np.arange(-(-n // batch_size) * batch_size) % n  # equal batches: one compilation
    out = [np.asarray(run(images[rows[i : i + batch_size]])) for i in range(0, len(rows), batch_size)]
    return np.concatenate(out)[:n]


def _one_batch(job: Job, made: Finished) -> NDArray[np.float32]:
    """Real images, as many as the device's batch."""
    rows = np.arange(job.device.batch) % len(job.data.val.labels)
    return made.architecture.input.normalise(job.data.val.images[rows])
