"""From data, device and budget to verified networks: the stages, in their order.

Each stage is a function of a `Job`; it reads what the stages before it left in the run folder and writes its own part.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from nas.config import Experiment
from nas.console import Console
from nas.pipeline.export import export
from nas.pipeline.finish import finish
from nas.pipeline.job import Job
from nas.pipeline.measure import measure
from nas.pipeline.search import search
from nas.pipeline.summary import report
from nas.pipeline.train import train
from nas.pipeline.verify import verify
from nas.runfolder import RunFolder

STAGES: dict[str, Callable[[Job], None]] = {
    "measure": measure,
    "train": train,
    "search": search,
    "finish": finish,
    "export": export,
    "verify": verify,
    "report": report,
}


def run_experiment(
    experiment: Experiment,
    out: str | Path | None = None,
    *,
    stages: Iterable[str] = tuple(STAGES),
    console: Console | None = None,
) -> Path:
    """Runs the stages that are not done yet; returns the run folder (`runs/<name>` unless `out` says otherwise).

    Raises:
        NasError: of many kinds; what was finished before stays, and the same call goes on from there.
    """
    console = console or Console()
    path = Path(out) if out is not None else Path("runs") / experiment.name
    stages = tuple(stages)
    with RunFolder(path, experiment) as folder:
        job = Job(experiment, folder, console)
        # a stage that is asked for by name and only rewrites its own files is done again
        again = {"export", "verify", "report"} if len(stages) == 1 else set()
        todo = [s for s in stages if s in again or not folder.done(s)]
        for stage in todo:
            with folder.stage(stage):
                STAGES[stage](job)
        if not todo:
            console.say(f"{path}: {', '.join(stages)} {'are' if len(stages) > 1 else 'is'} done already.")
    return path
