"""Search: strategies, journal, driver, and the executors that evaluate for it."""

from nas.search.ageing_evolution import ageing_evolution
from nas.search.driver import search
from nas.search.executor import Executor, Result
from nas.search.front import Front, Trial, Trials, read_trials
from nas.search.inline import InlineExecutor
from nas.search.nsga2 import nsga2
from nas.search.predictor_search import predictor_search
from nas.search.problem import Problem
from nas.search.random_search import random_search
from nas.search.ray_executor import RayExecutor
from nas.search.strategy import Strategy, trial_rng

STRATEGIES = {
    "random": random_search,
    "ageing_evolution": ageing_evolution,
    "nsga2": nsga2,
    "predictor": predictor_search,
}

KNOWING = {"predictor"}  # strategies that also take the problem, and features of networks

EXECUTORS = {
    "inline": InlineExecutor,
    "ray": RayExecutor,
}

__all__ = [
    "EXECUTORS",
    "KNOWING",
    "STRATEGIES",
    "Executor",
    "Front",
    "InlineExecutor",
    "Problem",
    "RayExecutor",
    "Result",
    "Strategy",
    "Trial",
    "Trials",
    "ageing_evolution",
    "nsga2",
    "predictor_search",
    "random_search",
    "read_trials",
    "search",
    "trial_rng",
]
