"""Stage 5: files that runtimes load: model.onnx and model.int8.onnx, beside each finished network."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nas import cost
from nas.architecture import Architecture, Input
from nas.data import Dataset
from nas.export import Runtime
from nas.files import write_bytes, write_json, write_text
from nas.fold import fold
from nas.latency import LatencyModel
from nas.ops import Graph, flatten
from nas.pipeline.finish import Finished, finished
from nas.pipeline.job import Job
from nas.quantise import Quantisation, calibrate, has_integers

_AXES = {"NCHW": "batch, channels, height, width", "NHWC": "batch, height, width, channels"}


def export(job: Job) -> None:
    """Writes each network's model files, quantisation.json, blocks.json and card.md."""
    job.folder.require("finish")
    networks = finished(job.path)
    job.console.start(f"export: {len(networks)} networks, {' and '.join(job.files)}")
    for number, made in enumerate(networks, start=1):
        for precision in job.files:
            quantisation = None
            if has_integers(made.architecture.network.flat(), precision):
                quantisation = quantise(made, job.data, images=job.experiment.finish.calibration_images)
                write_bytes(made.folder / "quantisation.json", quantisation_json(quantisation))
            data = model_file(job.runtime, made.architecture, made.params_of(precision), precision, quantisation)
            write_bytes(made.folder / file_name(precision, job.runtime.suffix), data)
        write_json(made.folder / "blocks.json", block_latencies(job, made))
        write_text(made.folder / "card.md", card(job, made))
        job.console.progress(number, len(networks), {"": made.name})


def file_name(precision: str, suffix: str) -> str:
    """model.onnx, model.int8.onnx ..."""
    return f"model{suffix}" if precision == "float32" else f"model.{precision}{suffix}"


def quantise(made: Finished, data: Dataset, *, images: int) -> Quantisation:
    """int8 ranges of a finished network, from training images."""
    graph, params = fold(made.architecture.network.flat(), made.params)
    return calibrate(graph, params, made.architecture.input.normalise(data.train.images[:images]))


def quantisation_json(quantisation: Quantisation) -> bytes:
    """The ranges as a file."""
    import msgspec

    return msgspec.json.encode(quantisation) + b"\n"


def model_file(
    runtime: Runtime,
    architecture: Architecture,
    params: Mapping[str, np.ndarray],
    precision: str,
    quantisation: Quantisation | None,
) -> bytes:
    """The bytes of the model, which carries what a program needs to feed it."""
    spec = architecture.input
    metadata = {
        "name": architecture.name,
        "input": f"float32 [{_AXES[runtime.layout]}], (pixel / 255 - mean) / std, pixel 0..255",
        "mean": ",".join(map(repr, spec.mean)),
        "std": ",".join(map(repr, spec.std)),
        "classes": "\n".join(architecture.classes),
        "precision": precision,
    }
    graph = architecture.network.flat()
    return runtime.emit(graph, params, precision=precision, quantisation=quantisation, metadata=metadata)


def block_latencies(job: Job, made: Finished) -> dict[str, list[dict[str, str | float]]]:
    """For each precision, what each block is predicted to take, in milliseconds; they sum to the network's.

    What comes once a network, whatever its blocks, is the last entry, `once`; it may be below 0.
    """
    network, out = made.architecture.network, {}
    for precision, table in job.tables.items():
        blocks_ms, once_ms = table.parts_ms(network)
        rows = [
            {"name": b.name, "label": b.label, "latency_ms": ms}
            for b, ms in zip(network.blocks, blocks_ms, strict=True)
        ]
        out[precision] = [*rows, {"name": "once", "label": "once a network", "latency_ms": once_ms}]
    return out


def card(job: Job, made: Finished) -> str:
    """A page about the network for whoever gets its files; measured figures are in verify.json."""
    spec, graph = made.architecture.input, flatten(made.architecture.network.blocks)
    height, width, channels = spec.shape
    classes = made.architecture.classes
    predicted = ", ".join(
        f"{table.network_ms(made.architecture.network):.4g} ms in {precision}{_interval(table, made)}"
        for precision, table in job.tables.items()
    )
    measured = f"Accuracy {'and latency ' if job.device.at_hand else ''}measured in {job.runtime_name}"
    if not job.device.at_hand:
        measured += "; latency was NOT measured, the device was not at hand"
    if job.precision not in job.files:
        measured += f"; the files are in {' and '.join(job.files)}, since {job.runtime_name} has no {job.precision}"
    blocks = "\n".join(f"| {b.name} | {b.label} | {_size(b.graph)} |" for b in made.architecture.network.blocks)
    return f"""# {made.architecture.name}

Classifies {height}x{width} images with {channels} channel{"s" if channels > 1 else ""} into {len(classes)} classes:
{", ".join(classes)}.

- Found in search space `{job.space.name}`, fine-tuned with distillation; role: {made.role}.
- Trained on {Path(job.data.source).name} ({len(job.data.train.labels)} images). It has not been tried on anything else.
- {cost.macs(graph):,} MACs, {cost.parameters(graph):,} parameters. Predicted on {job.device.device}: {predicted}.
- {measured}: verify.json, beside this file.

## Use

```python
{_usage(job, spec)}
```

`nas.load_architecture("architecture.json")` rebuilds the network in JAX; `nas export` writes these files anew.

## Blocks

| block | what | output |
|---|---|---|
{blocks}
"""


def _interval(model: LatencyModel, made: Finished) -> str:
    """In words, where it is known."""
    ends = model.interval_ms(made.architecture.network)
    return "" if ends is None else f" (80 % interval {ends[0]:.4g} to {ends[1]:.4g})"


def _usage(job: Job, spec: Input) -> str:
    """Lines of Python that run the file; without this package where another program is sure to read it."""
    height, width, channels = spec.shape
    first, *others = (file_name(precision, job.runtime.suffix) for precision in job.files)
    also = f"  # or {' or '.join(others)}" if others else ""
    if job.runtime.layout == "NCHW":
        return f"""import numpy as np, onnxruntime

session = onnxruntime.InferenceSession("{first}"){also}
mean = np.array({list(spec.mean)}, np.float32).reshape(1, -1, 1, 1)
std = np.array({list(spec.std)}, np.float32).reshape(1, -1, 1, 1)
pixels = np.zeros((1, {channels}, {height}, {width}), np.uint8)  # your images: batch, channels, height, width
logits = session.run(None, {{session.get_inputs()[0].name: (pixels / np.float32(255) - mean) / std}})[0]"""
    return f"""from pathlib import Path

import numpy as np
from nas.export import RUNTIMES

session = RUNTIMES["{job.device.runtime}"]().open(Path("{first}"))
mean, std = np.array({list(spec.mean)}, np.float32), np.array({list(spec.std)}, np.float32)
pixels = np.zeros((1, {height}, {width}, {channels}), np.uint8)  # your images: batch, height, width, channels
logits = session((pixels / np.float32(255) - mean) / std)"""


def _size(graph: Graph) -> str:
    return "x".join(map(str, graph.shape))
