"""BANANAS (White et al. 2021, arXiv:1910.11858): an ensemble predicts, Thompson sampling picks among mutations."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nas.search.blas import on_one_blas_thread
from nas.search.pareto import order
from nas.search.strategy import Costs, Genotype, Genotypes, Population, Strategy, check_population, neighbours, uniform

_MEMORY = 512  # trials that the ensemble is fitted on, the latest
_REFIT = 10  # trials between one fit and the next, as in the paper
_CANDIDATES = 2  # mutations for each proposal
_MEMBERS = 5
_HIDDEN = 64
_RIDGE = 1.0


@dataclass(frozen=True)
class _Ensemble:
    """Predicts standardised costs: `outputs` [members, features, objectives]."""

    outputs: NDArray[np.float64]
    mean: Costs
    scale: Costs


@dataclass(frozen=True)
class _State:
    elite: Population  # in NSGA-II's order
    latest: Population  # that did not fail
    told: int
    ensemble: _Ensemble | None


def bananas(sizes: tuple[int, ...], *, population: int = 32) -> Strategy:
    """Mutates the elite and proposes what looks best in one draw from the ensemble's belief about each candidate.

    Independent Thompson sampling (sec. 4): of every candidate and cost a value is drawn from a normal distribution with
    the mean and deviation of the ensemble's members; candidates are sorted by these, with several costs in NSGA-II's
    order. Members are networks with one hidden layer of random weights, of which the output layer is fitted in closed
    form on a bootstrap sample, over one-hot genes: the paper trains its networks by Adam, over path encodings of cells.
    Proposals depend on the last bits of a linear solver, so that a journal may refuse another machine's version of it.

    State: an elite of `population` trials, the latest 512 trials, and the ensemble, fitted anew every 10 trials.

    Args:
        sizes: the number of values of each gene.
        population: the size of the elite; proposals are uniform until it is full.

    Raises:
        ValueError: `population` is out of range.
    """
    check_population(population)
    count = sum(sizes)
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    fixed = np.random.default_rng(0)  # of the members' hidden layers: part of the strategy, not of a search
    hidden = fixed.normal(0.0, np.sqrt(2 / max(1, len(sizes))), (_MEMBERS, count, _HIDDEN))
    biases = fixed.normal(0.0, 1.0, (_MEMBERS, 1, _HIDDEN))

    def features(genotypes: Genotypes) -> NDArray[np.float64]:
        """[n, genes] -> [members, n, features]: the one-hot genes, what the hidden layer makes of them, and 1."""
        one_hot = np.zeros((len(genotypes), count))
        np.put_along_axis(one_hot, genotypes + offsets, 1.0, axis=1)
        inner = sum((hidden[:, genes] for genes in (genotypes + offsets).T), biases)  # one_hot @ hidden
        inner = np.maximum(inner, 0.0) / np.sqrt(_HIDDEN)
        plain = np.broadcast_to(one_hot, (_MEMBERS, *one_hot.shape))
        return np.concatenate([plain, inner, np.ones((_MEMBERS, len(genotypes), 1))], axis=2)

    @on_one_blas_thread
    def fitted(trials: Population, told: int) -> _Ensemble:
        mean, scale = trials.costs.mean(axis=0), trials.costs.std(axis=0)
        scale = np.where(scale > 0, scale, 1.0)
        rows = np.random.default_rng(told).integers(0, len(trials), (_MEMBERS, len(trials)))
        x = np.take_along_axis(features(trials.genotypes), rows[:, :, None], axis=1)
        y = ((trials.costs - mean) / scale)[rows]
        across = x.transpose(0, 2, 1)
        return _Ensemble(np.linalg.solve(across @ x + _RIDGE * np.eye(x.shape[2]), across @ y), mean, scale)

    def init() -> _State:
        return _State(Population.empty(len(sizes)), Population.empty(len(sizes)), 0, None)

    def ask(rng: np.random.Generator, state: _State, n: int) -> Genotypes:
        if state.ensemble is None or len(state.elite) < population:
            return uniform(rng, sizes, n)
        parents = state.elite.genotypes[rng.integers(0, len(state.elite), _CANDIDATES * n)]
        candidates = np.unique(neighbours(rng, parents, sizes), axis=0)
        # [members, candidates, objectives]; not by BLAS, which for so little wakes all its threads at every trial
        predicted = np.einsum("mcf,mfo->mco", features(candidates), state.ensemble.outputs)
        drawn = rng.normal(predicted.mean(axis=0), predicted.std(axis=0, ddof=1))
        best_first = candidates[order(drawn)]
        return best_first[np.arange(n) % len(best_first)]

    def tell(state: _State, genotype: Genotype, costs: Costs) -> _State:
        elite = state.elite.add(genotype, costs)
        elite = elite.take(order(elite.costs)[:population])
        state = replace(state, elite=elite, told=state.told + 1)
        if not np.isfinite(costs).all():
            return state
        latest = state.latest.add(genotype, costs).take(slice(-_MEMORY, None))
        if len(latest) >= min(population, _MEMORY) and (state.ensemble is None or state.told % _REFIT == 0):
            return replace(state, latest=latest, ensemble=fitted(latest, state.told))
        return replace(state, latest=latest)

    return Strategy(init=init, ask=ask, tell=tell, identity=f"bananas(population={population})")
