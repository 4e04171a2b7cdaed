"""Where else a search can be followed: TensorBoard, MLflow, Weights & Biases. Each gives a plain function of a trial.

They enter here only. What is told to them is in the journal too, so one that fails is left out, and the search goes on.
"""

import contextlib
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nas.errors import RunError
from nas.search.trials import Trial

Callback = Callable[[Trial], None]

logger = logging.getLogger(__name__)


def _tensorboard(folder: Path, start: int, name: str, opened: contextlib.ExitStack) -> Callback:
    from nas.train.log import Events

    events = opened.enter_context(Events(folder / "events", start))
    return lambda trial: events.append({"step": trial.trial + 1, **scalars(trial)})


def _mlflow(folder: Path, start: int, name: str, opened: contextlib.ExitStack) -> Callback:
    mlflow: Any = importlib.import_module("mlflow")
    opened.enter_context(mlflow.start_run(run_name=name))
    return lambda trial: mlflow.log_metrics(scalars(trial), step=trial.trial + 1)


def _wandb(folder: Path, start: int, name: str, opened: contextlib.ExitStack) -> Callback:
    wandb: Any = importlib.import_module("wandb")
    run = opened.enter_context(wandb.init(project="nas", name=name, dir=str(folder)))
    return lambda trial: run.log(scalars(trial), step=trial.trial + 1)


CALLBACKS: dict[str, Callable[[Path, int, str, contextlib.ExitStack], Callback]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
_PACKAGES = {"tensorboard": ("tensorboardX", "tensorboardX>=2.6"), "mlflow": ("mlflow",) * 2, "wandb": ("wandb",) * 2}


def scalars(trial: Trial) -> dict[str, float]:
    """What is drawn of a trial: top1, its exact costs, the seconds it took, and whether it failed."""
    values = {
        "top1": trial.top1,
        **trial.shares,
        **trial.cheap,
        "seconds": trial.seconds,
        "failed": float(trial.failure is not None),
    }
    # MLflow takes no "@" in names
    return {k.replace("@", " on "): v for k, v in values.items() if math.isfinite(v)}


def require(names: Iterable[str]) -> None:
    """Nothing, if all of these can be used.

    Raises:
        RunError: the package of one is not installed.
    """
    for name in names:
        module, package = _PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise RunError(
                f"The search is to be followed in {name}, but {module} is not installed: `pip install '{package}'`. Or "
                f"leave out search.{'tensorboard' if name == 'tensorboard' else 'tracker'}: the journal has the same."
            )


@contextlib.contextmanager
def following(names: Iterable[str], *, folder: Path, start: int = 0, name: str = "search") -> Iterator[Callback]:
    """A function that tells trials to all of `names`.

    Args:
        names: of CALLBACKS.
        folder: for what they write.
        start: trials before this one were told before, by the process that this one goes on from, and are left out.
        name: of the run, where it has one.

    Raises:
        RunError: the package of one is not installed.
    """
    require(names := tuple(names))
    with contextlib.ExitStack() as opened:
        callbacks = {each: CALLBACKS[each](folder, start, name, opened) for each in names}

        def tell(trial: Trial) -> None:
            for each, callback in list(callbacks.items()) if trial.trial >= start else ():
                try:
                    callback(trial)
                except Exception as e:  # of anything: a server that is gone, a full disk
                    logger.warning("%s takes no more trials of this search: %r. The journal has them all.", each, e)
                    del callbacks[each]

        yield tell
