"""A program that prints what TensorFlow Lite's benchmark_model prints, with latencies that follow from the model."""

import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from nas import cost
from nas.latency import op_counts
from nas.measure.plan import Plan
from nas.ops import Graph

# The words of the tool (its versions of 2023), with the latencies of one model.
SAID = """\
INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Num threads: [{threads}]
INFO: Graph: [{graph}]
INFO: Use xnnpack: [1]
INFO: #threads used for CPU inference: [{threads}]
INFO: Loaded model {graph}
INFO: Initialized TensorFlow Lite runtime.
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
INFO: The input model file size (MB): 0.004448
INFO: Initialized session in 5.685ms.
INFO: Running benchmark for at least 1 iterations and at least 0.1 seconds but terminate if exceeding 10 seconds.
INFO: count=57 first={high} curr={high} min={low} max={high} avg={warm} std=31

INFO: Running benchmark for at least 5 iterations and at least 0.1 seconds but terminate if exceeding 10 seconds.
INFO: count=69 first={high} curr={low} min={low} max={high} avg={mean} std=12 p5={low} median={low} p95={high}

INFO: Inference timings in us: Init: 5685, First inference: {high}, Warmup (avg): {warm}, Inference (avg): {mean}
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE to the actual \
memory footprint of the model at runtime. Take the information at your discretion.
INFO: Memory footprint delta from the start of the tool (MB): init=3.48828 overall=5.14844
"""

TOOL = """\
#!/bin/sh
for word in "$@"; do
    case $word in --graph=*) model=${{word##*/}} ;; esac
done
echo "$*" >> {folder}/called
[ -r {folder}/$model.do ] && . {folder}/$model.do
exec cat {folder}/$model
"""


def mean_us(graph: Graph) -> float:
    """Of the device that the tool plays: a call, each op and each MAC cost so much."""
    return 200.0 + 100.0 * sum(op_counts(graph).values()) + cost.macs(graph) * 1e-2


def said(us: float, graph: str, threads: int = 1) -> str:
    """What the tool prints of a model file."""
    return SAID.format(
        graph=graph, threads=threads, mean=f"{us:.6g}", warm=f"{1.3 * us:.6g}", low=int(us * 0.97), high=int(us * 1.6)
    )


def write(folder: Path, plan: Plan, files: Mapping[str, str], *, does: Mapping[str, str] | None = None) -> Path:
    """The tool, in `folder`.

    Args:
        files: of the bundle, by the names of calls.
        does: name of a call -> shell that is run before the tool prints anything of that model.
    """
    folder.mkdir(exist_ok=True)
    for name, graph in plan.graphs.items():
        (folder / Path(files[name]).name).write_text(said(mean_us(graph), files[name]))
    for name, line in (does or {}).items():
        (folder / f"{Path(files[name]).name}.do").write_text(line.format(folder=folder, python=sys.executable) + "\n")
    tool = folder / "benchmark_model"
    tool.write_text(TOOL.format(folder=folder))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return tool
