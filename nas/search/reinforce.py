"""REINFORCE with TuNAS's absolute reward (Bender et al. 2020, arXiv:2008.06120): a policy gradient over all genes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.search.accuracy import is_error
from nas.search.problem import Problem
from nas.search.strategy import Costs, Genotype, Genotypes, Strategy, check_number

_SECOND_MOMENT = 0.999  # decay of Adam's (Kingma & Ba 2015); like TuNAS's controller it has no first moment
_EPSILON = 1e-8

_Table = NDArray[np.float64]  # [genes, values]


@dataclass(frozen=True)
class _State:
    logits: _Table  # -inf where a gene has fewer values
    squares: _Table  # running mean of squared gradients
    told: int  # trials that the policy learned from
    baseline: float  # running mean of rewards


def reinforce(
    sizes: tuple[int, ...],
    *,
    population: int = 0,
    target: float | None = None,
    beta: float = -0.07,
    learning_rate: float = 0.1,
    memory: float = 0.9,
    problem: Problem | None = None,
) -> Strategy:
    """Draws every gene from its own distribution and shifts them towards what was rewarded (Williams 1992).

    The reward is `(1 - costs[0]) + beta * |cost / target - 1|`: TuNAS's absolute reward (sec. 3.3), which has its
    best networks at the target, where a reward that punishes only what is slower drifts to either side. It is one
    number: of more costs, further ones are not seen. Without a target it is `1 - costs[0]`, under the driver's limits.

    The policy is that of the trials told so far; a trial was drawn from the policy some trials (the lag) earlier, or
    taken by the driver in place of one that is infeasible or known. So the gradient is slightly off-policy. A failed
    trial teaches nothing. The default rate is for hundreds of trials; TuNAS's is for hundreds of thousands.

    State: logits and squared gradients of each gene's values, and a baseline.

    Args:
        sizes: the number of values of each gene.
        population: taken for the sake of the common signature; no trials are remembered.
        target: of the first objective that is no error, for example milliseconds; None: it counts nothing.
        beta: what missing the target by its whole costs, in units of accuracy; not above 0, which would reward it.
        learning_rate: of Adam.
        memory: share of the baseline that a new reward leaves.
        problem: has the objectives; None: an error, and what the target is of.

    Raises:
        ValueError: one of these is out of range, or `target` is given and the objectives are not an error and a cost.
    """
    if target is not None:
        check_number("target", target, 1e-6, 1e15)
    check_number("beta", beta, -1000, 0)
    objectives = ("error", "cost") if problem is None else problem.objectives
    column = next((i for i, name in enumerate(objectives) if not is_error(name)), None)
    if target is not None and (column is None or not is_error(objectives[0])):
        raise ValueError(
            f"target {target:g}: the objectives are {', '.join(objectives)}, and it needs an accuracy and the cost that"
            f" it is of. Make them objectives, or leave it out"
        )
    check_number("learning_rate", learning_rate, 1e-6, 10)
    check_number("memory", memory, 0, 0.9999)
    values = np.arange(max(sizes, default=1)) < np.asarray(sizes)[:, None]  # [genes, values]
    genes = np.arange(len(sizes))

    def init() -> _State:
        return _State(np.where(values, 0.0, -np.inf), np.zeros(values.shape), 0, 0.0)

    def ask(rng: np.random.Generator, state: _State, n: int) -> Genotypes:
        below = _probabilities(state.logits).cumsum(axis=1)[:, :-1]  # the last value takes what rounding leaves
        draws = rng.random((n, len(sizes), 1))
        return np.minimum((draws >= below).sum(axis=2), np.asarray(sizes) - 1).astype(np.uint8)

    def tell(state: _State, genotype: Genotype, costs: Costs) -> _State:
        if not np.isfinite(costs).all():
            return state
        reward = 1.0 - float(costs[0])
        if target is not None and column is not None:
            reward += beta * abs(float(costs[column]) / target - 1.0)
        baseline = reward if state.told == 0 else memory * state.baseline + (1 - memory) * reward
        gradient = -_probabilities(state.logits)
        gradient[genes, genotype] += 1.0
        gradient *= reward - (state.baseline if state.told else reward)
        told = state.told + 1
        squares = _SECOND_MOMENT * state.squares + (1 - _SECOND_MOMENT) * gradient**2
        step = gradient / (np.sqrt(squares / (1 - _SECOND_MOMENT**told)) + _EPSILON)
        return _State(state.logits + learning_rate * step, squares, told, baseline)

    settings = f"target={target}, beta={beta}, learning_rate={learning_rate}, memory={memory}"
    return Strategy(init=init, ask=ask, tell=tell, identity=f"reinforce({settings})")


def _probabilities(logits: _Table) -> _Table:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-1e300))
    return weights / weights.sum(axis=1, keepdims=True)
