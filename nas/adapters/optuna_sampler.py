"""Our strategies as a sampler of Optuna: they propose, Optuna runs and keeps the trials.

    problem = nas.make_problem(space, device="note10", latency_ms=20)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler(space, problem, strategy))

The objective suggests every choice by `suggest_categorical(choice.name, choice.values)`. Its first value is the error,
or top-1 where that is maximised; cheap costs are those of `problem`, whatever else it gives. Proposals are within the
limits, canonical, and never repeated.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from nas.errors import ExecutorError
from nas.search.problem import Problem, choose
from nas.search.strategy import Strategy, trial_rng
from nas.space import Space

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler  # pyright: ignore[reportMissingImports]


def sampler(space: Space, problem: Problem, strategy: Strategy, *, seed: int = 0) -> "BaseSampler":
    """A sampler of the choices of `space`; raises ExecutorError without Optuna. Pruned trials count as failures."""
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ExecutorError("Optuna is not installed: `pip install 'optuna>=4'`.") from e

    class Sampler(optuna.samplers.BaseSampler):
        def __init__(self) -> None:
            self.state, self.asked, self.seen = strategy.init(), {}, set()

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {c.name: optuna.distributions.CategoricalDistribution(c.values) for c in space.choices}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            rng = trial_rng(seed, trial.number)
            genotype = choose(problem, rng, strategy.ask(rng, self.state, 64), self.seen)
            if genotype is None:
                study.stop()  # the space is exhausted
                genotype = problem.smallest  # again
            self.asked[trial.number] = genotype
            self.seen.add(genotype.tobytes())
            return {c.name: c.values[gene] for c, gene in zip(space.choices, genotype, strict=True)}

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            raise ExecutorError(f"The objective suggests {name!r}, which is no choice of space {space.name!r}.")

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            if (genotype := self.asked.pop(trial.number, None)) is not None:
                error = values[0] if state == optuna.trial.TrialState.COMPLETE else np.nan
                if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE:
                    error = 1 - error
                costs = np.array([error, *problem.cheap(genotype[None])[0]])
                self.state = strategy.tell(self.state, genotype, problem.told(strategy, costs))

    return Sampler()
