"""Attentive sampling (AttentiveNAS, Wang et al. 2021, arXiv:2011.09011, sec. 3): train what the Pareto front asks for.

The sandwich rule, except that a random subnet is not the first that comes: it is the best (BestUp) or the worst
(WorstUp) of a few networks of about equal MACs, judged by their loss on the step's own batch (the cheaper of the
paper's two estimators; `candidates = 3` is its "BestUp-3 (loss)").

MACs are aimed at as the paper does, by the space's own distribution of them: the target is the MACs of a network drawn
uniformly. The paper tabulates that distribution in bins and draws networks until one falls into the target's bin. Here
the candidates are the nearest to the target among `POOL` networks drawn uniformly for the step: the same targets, and
always the same amount of work.
"""

import numpy as np

from nas import config, cost
from nas.space import Space
from nas.train.samplers.sampler import Draw, Sampler, Score, at_least, ends

POOL = 512  # networks drawn for a step; counting MACs takes microseconds for each


def best_up(space: Space, settings: config.Train, *, steps: int) -> Sampler:
    """The largest, the smallest, and `random_subnets` times the best of `candidates` networks of about equal MACs.

    Raises:
        ConfigError: `random_subnets` or `candidates` is below 1.
    """
    return _attentive(space, settings, sampler="attentive_best_up", sign=1.0)


def worst_up(space: Space, settings: config.Train, *, steps: int) -> Sampler:
    """The largest, the smallest, and `random_subnets` times the worst of `candidates` networks of about equal MACs.

    Raises:
        ConfigError: `random_subnets` or `candidates` is below 1.
    """
    return _attentive(space, settings, sampler="attentive_worst_up", sign=-1.0)


def _attentive(space: Space, settings: config.Train, *, sampler: str, sign: float) -> Sampler:
    """A sampler that picks the candidates of the least `sign` * loss."""
    subnets = settings.random_subnets
    at_least(1, key="random_subnets", value=subnets, sampler=sampler)
    at_least(1, key="candidates", value=settings.candidates, sampler=sampler)
    macs = space.costs(cost.macs)
    both = ends(space)

    def draw(step: int, rng: np.random.Generator, score: Score) -> Draw:
        pool = space.sample(rng, max(POOL, subnets))
        targets = space.price(pool[:subnets], macs)
        _, first = np.unique(pool, axis=0, return_index=True)
        pool = pool[np.sort(first)]  # each network once, in the order drawn: sorted ones would favour low genes in ties
        distance = np.abs(space.price(pool, macs) - targets[:, None])  # [subnets, networks]
        near = np.argsort(distance, axis=1, kind="stable")[:, : settings.candidates]
        losses = sign * np.asarray(score(pool[near.ravel()]), np.float64).reshape(near.shape)
        chosen = np.where(np.isnan(losses), np.inf, losses).argmin(1)  # a network that overflows is not looked for
        return Draw(np.concatenate([both, pool[near[np.arange(subnets), chosen]]]), distil=True)

    return draw
