"""Our strategies as a searcher of Ray Tune: they propose, Tune schedules and runs the trials.

    problem = nas.make_problem(space, device="note10", latency_ms=20)
    config = tune.TuneConfig(search_alg=searcher(space, problem, strategy), num_samples=200)
    tune.Tuner(train, tune_config=config).fit()

The trainable gets {choice name: value} and reports `error`; cheap costs are those of `problem`. Proposals are
within the limits, canonical, and never repeated.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from nas.errors import ExecutorError
from nas.search.problem import Problem, choose
from nas.search.strategy import Strategy, trial_rng
from nas.space import Space

if TYPE_CHECKING:
    from ray.tune.search import Searcher


def searcher(space: Space, problem: Problem, strategy: Strategy, *, seed: int = 0) -> "Searcher":
    """A searcher of the choices of `space`. Trials that end with an error count as failures.

    Raises:
        ExecutorError: Ray Tune is not installed.
    """
    try:
        from ray.tune.search import Searcher
    except ImportError as e:
        raise ExecutorError("Ray Tune is not installed: `pip install 'ray[tune]'`.") from e

    class Proposals(Searcher):
        def __init__(self) -> None:
            super().__init__(metric="error", mode="min")
            self.state, self.asked, self.seen, self.number = strategy.init(), {}, set(), 0

        def suggest(self, trial_id: str) -> Any:
            rng = trial_rng(seed, self.number)
            genotype = choose(problem, rng, strategy.ask(rng, self.state, 64), self.seen)
            if genotype is None:
                return Searcher.FINISHED  # the space is exhausted
            self.number += 1
            self.asked[trial_id] = genotype
            self.seen.add(genotype.tobytes())
            return {c.name: c.values[gene] for c, gene in zip(space.choices, genotype, strict=True)}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            if (genotype := self.asked.pop(trial_id, None)) is not None:
                value = np.nan if error or result is None else float(result.get("error", np.nan))
                costs = np.array([value, *problem.cheap(genotype[None])[0]])
                self.state = strategy.tell(self.state, genotype, problem.told(strategy, costs))

    return Proposals()
