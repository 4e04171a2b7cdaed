"""What is laid around any strategy and gives a strategy again.

The driver already does for all of them what other engines have wrappers for (`nas.search.driver`): no genotype is
evaluated twice, none outside the limits, designs of one's own come first (`initial`), and `trials` ends the search.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from nas.errors import LimitError
from nas.search.problem import Problem, with_shares
from nas.search.strategy import Genotypes, Strategy, check_number
from nas.search.trials import Trial


def feasible_only(strategy: Strategy, problem: Problem, *, factor: int = 64) -> Strategy:
    """Proposes what `strategy` does, without what is outside the limits of `problem`.

    Where no proposal will do, the driver walks from an infeasible one to the smallest network and evaluates what it
    meets first within the limits, which lies close to them. Here more proposals are asked for instead, up to `factor`
    times as many: random search then draws uniformly from the feasible genotypes, and policies learn from what they
    proposed. If there are still too few, infeasible ones fill up, for the driver to walk from.

    Raises:
        ValueError: `factor` is out of range.
    """
    check_number("factor", factor, 1, 10_000)
    feasible = with_shares(problem, strategy.shares).feasible

    def ask(rng: np.random.Generator, state: Any, n: int) -> Genotypes:
        asked = n
        while True:
            wishes = strategy.ask(rng, state, asked)
            within = feasible(wishes)
            if within.sum() >= n or asked >= n * factor:
                return wishes[np.argsort(~within, kind="stable")[:n]]
            asked = min(2 * asked, n * factor)

    return replace(strategy, ask=ask, identity=f"feasible_only({strategy.identity}, factor={factor})")


def warm_start(strategy: Strategy, problem: Problem, trials: Iterable[Trial]) -> Strategy:
    """Begins where `strategy` stands once it was told `trials` of another search over the same space.

    Their errors are believed; cheap costs are those of `problem`, so that they may come from a search for another
    device or with other objectives. Trials on fewer images than others and those outside the limits of `problem` are
    not told. None counts as evaluated: to have some of them in this search's front too, give them as `initial`.

    Example:
        >>> warm_start(nsga2(problem.sizes, population=32), problem, read_trials("runs/note10/search/journal.jsonl"))

    Raises:
        LimitError: a trial's genotype is not of the problem's space, or an accuracy of the problem was not counted.
    """
    trials = list(trials)
    most = max((t.total for t in trials), default=0)
    trials = [t for t in trials if t.total == most]
    for trial in trials:
        if len(trial.genotype) != len(problem.sizes) or any(
            not 0 <= gene < size for gene, size in zip(trial.genotype, problem.sizes, strict=True)
        ):
            raise LimitError(
                f"trial {trial.trial} of a warm start has genotype {list(trial.genotype)}: genes below "
                f"{list(problem.sizes)} are needed. Was that search over another space?"
            )
        if uncounted := [n for n in problem.accuracies[1:] if n not in trial.also and trial.correct is not None]:
            raise LimitError(
                f"trial {trial.trial} of a warm start has no count of {', '.join(uncounted)}, which this search counts "
                f"as well. Start from a search that did, or without."
            )
    genotypes = np.array([t.genotype for t in trials], np.uint8).reshape(len(trials), len(problem.sizes))
    errors = [[t.costs.get(name, np.nan) for name in problem.error_names] for t in trials]
    costs = np.column_stack([errors, problem.cheap(genotypes)]) if trials else np.empty((0, 1))
    within = problem.feasible(genotypes) if trials else np.zeros(0, bool)
    genotypes, costs = problem.canonical(genotypes[within]), costs[within]
    state = strategy.init()
    for genotype, row in zip(genotypes, costs, strict=True):
        whole = genotype if len(strategy.shares) == 1 else np.append(genotype, np.uint8(len(strategy.shares) - 1))
        state = strategy.tell(state, whole, problem.told(strategy, row, most))
    digest = hashlib.sha256(genotypes.tobytes() + costs.tobytes()).hexdigest()[:16]
    return replace(strategy, init=lambda: state, identity=f"warm_start({strategy.identity}, {digest})")
