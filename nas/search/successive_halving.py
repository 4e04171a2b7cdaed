"""Successive halving, asynchronous (ASHA: Li et al. 2020, arXiv:1810.05934): many on few images, the best on all."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.search.pareto import order
from nas.search.problem import Problem
from nas.search.random_search import random_search
from nas.search.strategy import Costs, Genotype, Genotypes, Population, Strategy, check_number, check_population


@dataclass(frozen=True)
class _Rung:
    trials: Population  # the latest at this share of the images, genotypes without their last gene
    promoted: NDArray[np.bool_]  # [p]: was evaluated on the next rung


@dataclass(frozen=True)
class _State:
    explorer: Any
    rungs: tuple[_Rung, ...]


def successive_halving(
    sizes: tuple[int, ...],
    *,
    population: int = 32,
    eta: int = 3,
    rungs: int = 3,
    problem: Problem | None = None,
    explorer: Strategy | None = None,
) -> Strategy:
    """Evaluates new genotypes on few validation images, and one in `eta` of them on `eta` times as many, up to all.

    A genotype is promoted when it is among the best `1 / eta` of its rung (algorithm 2); with several costs in
    NSGA-II's order (as in Schmucker et al. 2021, arXiv:2106.12639). Nothing waits for a rung to fill, so the best third
    changes, and nearly half of a rung's trials come up in the end. A rung is its latest `population` trials here, where
    the paper keeps all, so that the state is bounded. Trials on fewer than all images are no part of a front
    (`Front.of`), and `trials` counts them like others.

    State: the explorer's, and at most `population` trials for each rung.

    Args:
        sizes: the number of values of each gene.
        population: the trials of a rung that compete.
        eta: one in so many is promoted, to so many times the images.
        rungs: numbers of images; the first has `1 / eta ** (rungs - 1)` of them.
        problem: has the images, of which the first rung needs one at least; None: that is not checked.
        explorer: proposes what enters the first rung and is told what came of it there; random search if None, as in
            the paper (a model in its place is BOHB: Falkner et al. 2018, arXiv:1807.01774).

    Raises:
        ValueError: `population`, `eta` or `rungs` is out of range, the first rung has less than one image, the
            explorer chooses images itself, or goes by limits on accuracy or costs that are no objectives itself.
    """
    check_population(population)
    check_number("eta", eta, 2, 100)
    check_number("rungs", rungs, 2, 20)
    if (fewest := eta ** (rungs - 1)) > (images := 1_000_000 if problem is None else problem.total):
        raise ValueError(f"eta {eta}, rungs {rungs}: the first rung would have 1/{fewest} of {images} images, not one")
    source = random_search(sizes) if explorer is None else explorer
    if len(source.shares) > 1:
        raise ValueError(f"the explorer {source.identity} chooses numbers of images itself: give one that does not")
    if source.heeds_limits and problem is not None and (problem.least or problem.objectives != problem.cost_names):
        raise ValueError(
            f"the explorer {source.identity} wants to be told more than the objectives, which is all that rungs are "
            f"judged by: give another one, or make every cost an objective without limits on accuracy"
        )
    top = rungs - 1

    def init() -> _State:
        rung = _Rung(Population.empty(len(sizes)), np.zeros(0, bool))
        return _State(source.init(), (rung,) * rungs)

    def ask(rng: np.random.Generator, state: _State, n: int) -> Genotypes:
        wishes = [_on(_promotable(state.rungs[r], eta), r + 1) for r in reversed(range(top))]
        return np.concatenate([*wishes, _on(source.ask(rng, state.explorer, n), 0)])[:n]

    def tell(state: _State, genotype: Genotype, costs: Costs) -> _State:
        genes, level = genotype[:-1], int(genotype[-1])
        all_rungs = list(state.rungs)
        if level > 0:
            before = all_rungs[level - 1]
            same = (before.trials.genotypes == genes).all(axis=1)
            all_rungs[level - 1] = _Rung(before.trials, before.promoted | same)
        rung = all_rungs[level]
        latest = slice(-population, None)
        all_rungs[level] = _Rung(rung.trials.add(genes, costs).take(latest), np.append(rung.promoted, False)[latest])
        told = source.tell(state.explorer, genes, costs) if level == 0 else state.explorer
        return _State(told, tuple(all_rungs))

    return Strategy(
        init=init,
        ask=ask,
        tell=tell,
        identity=f"successive_halving(population={population}, eta={eta}, rungs={rungs}, explorer={source.identity})",
        shares=tuple(float(eta) ** (r - top) for r in range(rungs)),
    )


def _promotable(rung: _Rung, eta: int) -> Genotypes:
    """[n, genes], best first: the best 1 / eta of the rung that were not promoted and did not fail."""
    if len(rung.trials) < eta:
        return rung.trials.genotypes[:0]
    best = order(rung.trials.costs)[: len(rung.trials) // eta]
    sound = np.isfinite(rung.trials.costs[best]).all(axis=1)
    return rung.trials.genotypes[best[sound & ~rung.promoted[best]]]


def _on(genotypes: Genotypes, level: int) -> Genotypes:
    return np.concatenate([genotypes, np.full((len(genotypes), 1), level, np.uint8)], axis=1)
