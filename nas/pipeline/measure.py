"""Stage 1: the latency table of this space on this device, with its proof; the limit is checked against it."""

import datetime
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from nas.errors import DeviceError
from nas.files import write_json
from nas.latency import LatencyModel, Proof, find_model, find_models
from nas.measure import hardware
from nas.measure import measure as measure_table
from nas.pipeline.costs import require_countable
from nas.pipeline.job import Job, together
from nas.space import copy_space

_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "onnx", "ray", "libtpu",
    "onnxruntime", "openvino", "ai-edge-litert", "iree-base-compiler", "iree-base-runtime",
)  # fmt: skip


def measure(job: Job) -> None:
    """Writes latency/ (a table for each precision, proof.json) and environment.json.

    The table of a device that is not at hand is not measured but copied from the device's folder, with its proof.
    """
    job.runtime.version()  # a missing runtime is told before anything is built
    asked = job.experiment.limit.precision
    if asked is not None and asked not in job.precisions:
        raise DeviceError(
            f"the objective latency_ms asks for precision {asked!r}; device {job.experiment.device} has "
            f"{', '.join(job.precisions)} for this space. Change the objective's `precision` or the device."
        )
    job.space  # noqa: B018  data and space are checked, and told, before the measuring begins
    require_countable(job.space, job.experiment.accuracies)
    proofs: dict[str, Any] = {}
    tables: dict[str, LatencyModel] = {}
    for precision, (table, proof) in (_measured if job.device.at_hand else _kept)(job):
        table.save(job.path / "latency")
        tables[precision] = table
        if proof is None:
            job.console.say("  it has no proof: how well it predicts networks is not known")
            continue
        proofs[precision] = msgspec.to_builtins(proof)
        job.console.say(f"  {table.basis}")
        job.console.say(f"  {proof}")
    job.tables = together(tables)
    write_json(job.path / "latency" / "proof.json", {**proofs.get(job.precision, {}), "precisions": proofs})
    copy_space(job.experiment.space, job.path)
    write_json(job.path / "environment.json", environment(job, {p: t.digest for p, t in tables.items()}))
    for work in job.path.glob(".measuring.*"):  # kept until all are done, so that none is measured twice
        shutil.rmtree(work)


Found = tuple[LatencyModel, Proof | None]


def _measured(job: Job) -> Iterator[tuple[str, Found]]:
    """By precision the table, measured on this machine."""
    for precision in job.precisions:
        job.console.start(f"measure: {len(job.space.blocks())} blocks in {precision} on {job.experiment.device}")
        yield (
            precision,
            measure_table(
                job.space,
                job.device,
                precision,
                job.experiment.latency,
                seed=job.experiment.seed,
                folder=job.path / f".measuring.{precision}",
                progress=job.console.share,
                command=f"nas measure (experiment {job.experiment.name})",
            ),
        )


def _kept(job: Job) -> Iterator[tuple[str, Found]]:
    """By precision the table or learned model in the device's folder: it is not at hand, so that nothing is measured.

    Raises:
        UnmeasuredBlock: there is none in the precision that the objective asks for, or in any.
    """
    device, asked = job.experiment.device, job.experiment.limit.precision
    found, missing = find_models(device, job.space)
    if asked in missing:
        find_model(device, asked, job.space)
    for precision, (table, proof) in found.items():
        job.console.start(
            f"measure: {job.device.device} is not at hand; its {precision} latencies were {table.kind} by "
            f"`{table.command}`"
        )
        yield precision, (table, proof)
    for precision in missing:
        job.console.say(f"  {precision} is left out: the device has no latencies of this space in it")


def environment(job: Job, tables: dict[str, str]) -> dict[str, Any]:
    """What one must know to repeat the run."""
    data, space = job.data, job.space
    return {
        "nas": version("nas") or "a copy that is not installed",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": hardware(),
        "versions": {name: version(name) for name in _PACKAGES},
        "runtime": f"{job.device.runtime} {job.runtime.version() if job.device.at_hand else ''}".strip(),
        "seed": job.experiment.seed,
        "git_commit": git_commit(),
        "space": {
            "name": space.name,
            "digest": space.digest,
            "networks": space.count(),
            "choices": len(space.choices),
        },
        "data": {
            "source": Path(data.source).name,
            "digest": data.digest,
            "train": len(data.train.labels),
            "val": len(data.val.labels),
            "test": len(data.test.labels),
            "classes": list(data.class_names),
            "image_shape": list(data.image_shape),
        },
        "device": {"name": job.experiment.device, **msgspec.to_builtins(job.device)},
        "tables": tables,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    """Of an installed package; None if it is absent, as a runtime's or Ray may be."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the checkout that the package runs from, with "+changes" where it was edited; None elsewhere."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "-C", here, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
