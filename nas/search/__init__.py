"""Search: strategies, journal, driver, and the executors that evaluate for it.

The module is a function too: `nas.search(...)` searches a space and returns the front (`nas.pipeline.direct.search`).
"""

import importlib
import inspect
import sys
import types
from typing import Any

from nas.search.ageing_evolution import ageing_evolution
from nas.search.bananas import bananas
from nas.search.cache import Cache
from nas.search.callbacks import CALLBACKS, following
from nas.search.driver import search
from nas.search.executor import Executor, Result
from nas.search.front import Front, Setting
from nas.search.grid import grid
from nas.search.inline import InlineExecutor
from nas.search.local_search import local_search
from nas.search.nsga2 import nsga2
from nas.search.nsga3 import nsga3
from nas.search.predictor_search import predictor_search
from nas.search.problem import Problem, choose
from nas.search.processes import ProcessExecutor
from nas.search.progress import Progress
from nas.search.random_search import random_search
from nas.search.ray_executor import RayExecutor
from nas.search.reinforce import reinforce
from nas.search.settings import check_settings, make_strategy
from nas.search.simulated import SimulatedExecutor
from nas.search.sms_emoa import sms_emoa
from nas.search.strategies import STRATEGIES
from nas.search.strategy import Strategy, trial_rng
from nas.search.successive_halving import successive_halving
from nas.search.trials import Trial, Trials, read_trials
from nas.search.wrappers import feasible_only, warm_start

EXECUTORS = {
    "inline": InlineExecutor,
    "processes": ProcessExecutor,
    "ray": RayExecutor,
    "simulated": SimulatedExecutor,
}

__all__ = [
    "CALLBACKS",
    "EXECUTORS",
    "STRATEGIES",
    "Cache",
    "Executor",
    "Front",
    "InlineExecutor",
    "Problem",
    "ProcessExecutor",
    "Progress",
    "RayExecutor",
    "Result",
    "Setting",
    "SimulatedExecutor",
    "Strategy",
    "Trial",
    "Trials",
    "ageing_evolution",
    "bananas",
    "check_settings",
    "choose",
    "feasible_only",
    "following",
    "grid",
    "local_search",
    "make_strategy",
    "nsga2",
    "nsga3",
    "predictor_search",
    "random_search",
    "read_trials",
    "reinforce",
    "search",
    "sms_emoa",
    "successive_halving",
    "trial_rng",
    "warm_start",
]


class _Callable(types.ModuleType):
    """This module, so that `nas.search` is callable whether it came by `import nas` or by `import nas.search`.

    What it calls lives upstairs, since it needs tables and data; it is imported at the first call.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Front:
        return _direct()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:  # what `help` and editors show
        return inspect.signature(_direct())


def _direct() -> Any:
    return importlib.import_module("nas.pipeline.direct").search


sys.modules[__name__].__class__ = _Callable
