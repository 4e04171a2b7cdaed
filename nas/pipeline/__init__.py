"""From data, device and budget to verified networks: the stages, in their order.

Each stage is a function of a `Job`; it reads what the stages before it left in the run folder and writes its own part.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import msgspec

from nas import catalog, config
from nas.cluster import preflight
from nas.config import Experiment
from nas.console import Console
from nas.data import STORAGE
from nas.pipeline.costs import say_costs
from nas.pipeline.export import export
from nas.pipeline.fidelity import fidelity
from nas.pipeline.finish import finish
from nas.pipeline.job import Job
from nas.pipeline.measure import measure
from nas.pipeline.search import PROXIES, followers, make_problem, search, strategy_of
from nas.pipeline.summary import report
from nas.pipeline.train import train
from nas.pipeline.verify import verify
from nas.runfolder import RunFolder
from nas.search import CALLBACKS, EXECUTORS, STRATEGIES, callbacks, check_settings
from nas.train import ray_trainer
from nas.train.augment import POLICIES
from nas.train.log import require_tensorboard
from nas.train.losses import DIVERGENCES
from nas.train.optimiser import OPTIMISERS, SCHEDULES
from nas.train.precision import PRECISIONS
from nas.train.samplers import SAMPLERS

STAGES: dict[str, Callable[[Job], None]] = {
    "measure": measure,
    "train": train,
    "search": search,
    "finish": finish,
    "export": export,
    "verify": verify,
    "report": report,
}


# Valid names by key of an experiment file; what is missing here is checked where it is loaded (space, device, data).
KNOWN: dict[str, Collection[str]] = {
    "data.storage": STORAGE,
    "search.strategy": STRATEGIES,
    "search.executor": EXECUTORS,
    "search.tracker": CALLBACKS.keys() - {"tensorboard"},
    "search.proxy": PROXIES,
    "train.sampler": SAMPLERS,
    "train.distillation.divergence": DIVERGENCES,
    "train.augment.policy": POLICIES,
    "train.precision": PRECISIONS,
    "train.optimiser.name": OPTIMISERS,
    "train.optimiser.schedule": SCHEDULES,
    "finish.optimiser.name": OPTIMISERS,
    "finish.optimiser.schedule": SCHEDULES,
}


def load_experiment(path: str | Path, *, smoke: bool = False, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment at `path`, as `nas.config.load_experiment` reads it, every name in it checked.

    A space or device of the current folder becomes a path: workers, and those who go on with the run, may be elsewhere.

    Raises:
        ConfigError: with file and line, or the override, and the nearest valid key or name.
    """
    experiment = config.load_experiment(path, smoke=smoke, overrides=overrides, known=KNOWN)
    chosen = experiment.search
    check_settings(STRATEGIES[chosen.strategy], population=chosen.population, settings=chosen.settings)
    space = catalog.own(experiment.space, kind="space", file="space.toml")
    device = catalog.own(experiment.device, kind="device", file="device.toml")
    return msgspec.structs.replace(
        experiment,
        space=experiment.space if space is None else str(space),
        device=experiment.device if device is None else str(device.parent),
    )


def run_experiment(
    experiment: Experiment,
    out: str | Path | None = None,
    *,
    stages: Iterable[str] = tuple(STAGES),
    redo: str | None = None,
    console: Console | None = None,
) -> Path:
    """Runs the stages that are not done yet; returns the run folder (`runs/<name>` unless `out` says otherwise).

    With `redo`, that stage and all after it are forgotten first, and what they left is removed.

    Raises:
        NasError: of many kinds; what was finished before stays, and the same call goes on from there.
    """
    console = console or Console()
    path = Path(out) if out is not None else Path("runs") / experiment.name
    stages = tuple(stages)
    with RunFolder(path, experiment, redo=redo) as folder:
        if redo is not None:
            folder.redo(redo)
        job = Job(experiment, folder, console)
        # a stage that is asked for by name and only rewrites its own files is done again
        again = {"export", "verify", "report"} if len(stages) == 1 else set()
        todo = [s for s in stages if s in again or not folder.done(s)]
        if "train" in todo and experiment.train.processes > 1:
            ray_trainer.preflight(experiment.train)
        if "search" in todo and experiment.search.executor == "ray":
            preflight(experiment.search.address)  # what makes Ray impossible here is told before hours of training
        if "search" in todo:
            callbacks.require(followers(experiment.search))
        if "train" in todo and experiment.train.tensorboard:
            require_tensorboard()
        for stage in todo:
            with folder.stage(stage):
                STAGES[stage](job)
            if stage == "measure":  # after the stage: an impossible limit must not cost the table
                job.say_limit()
                say_costs(job)
                strategy_of(job, make_problem(job))  # settings that the problem refuses are told before training too
        if not todo:
            console.say(f"{path}: {', '.join(stages)} {'are' if len(stages) > 1 else 'is'} done already.")
    return path


def run_fidelity(experiment: Experiment, out: str | Path | None = None, *, console: Console | None = None) -> Path:
    """Whether the supernet in a run folder orders networks as training each of them alone does; returns the folder.

    No stage: it may be done at any time after `train`, and costs as many trainings as it is asked for. Cut off, the
    same call goes on; asked for more networks, it keeps those that it has.

    Raises:
        NasError: of many kinds; what was finished before stays.
    """
    path = Path(out) if out is not None else Path("runs") / experiment.name
    with RunFolder(path, experiment) as folder:
        fidelity(Job(experiment, folder, console or Console()))
    return path
