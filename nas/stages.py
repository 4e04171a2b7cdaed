"""The stages of an experiment as functions: each does what the command of its name does, and returns the run folder.

    experiment = nas.load_experiment("experiments/quickstart.toml")
    nas.stages.measure(experiment)
    nas.stages.train(experiment)

`nas.run_experiment` does all of them but `fidelity`, which stands beside them.
"""

from pathlib import Path

from nas.config import Experiment
from nas.pipeline import run_experiment, run_fidelity


def measure(experiment: Experiment, out: str | Path | None = None) -> Path:
    """The latency table of the space on the device, with its proof."""
    return run_experiment(experiment, out, stages=("measure",))


def train(experiment: Experiment, out: str | Path | None = None) -> Path:
    """The supernet."""
    return run_experiment(experiment, out, stages=("train",))


def search(experiment: Experiment, out: str | Path | None = None) -> Path:
    """The search under the limit."""
    return run_experiment(experiment, out, stages=("search",))


def finish(experiment: Experiment, out: str | Path | None = None) -> Path:
    """Winners and baselines, fine-tuned."""
    return run_experiment(experiment, out, stages=("finish",))


def export(experiment: Experiment, out: str | Path | None = None) -> Path:
    """Model files of winners and baselines."""
    return run_experiment(experiment, out, stages=("export",))


def verify(experiment: Experiment, out: str | Path | None = None) -> Path:
    """The proof of every file."""
    return run_experiment(experiment, out, stages=("verify",))


def report(experiment: Experiment, out: str | Path | None = None) -> Path:
    """summary.json and report.html."""
    return run_experiment(experiment, out, stages=("report",))


def fidelity(experiment: Experiment, out: str | Path | None = None) -> Path:
    """Whether the supernet orders networks as training each alone does; no stage of `nas.run_experiment`."""
    return run_fidelity(experiment, out)
