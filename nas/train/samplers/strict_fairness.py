"""Strict fairness (FairNAS, Chu et al. 2021, arXiv:1907.01845, sec. 3): every value of a choice trains equally often.

The paper's choices all have m values: a step trains m networks, which take the values of each choice in a fresh random
order, so that each value is used once before the weights are updated. Here choices differ in their number of values:

- A step trains k networks, k being the largest number of values of any choice.
- A choice of s values deals them out in turn, 0, 1, ..., s-1, 0, 1, ..., on from step to step, k to a step; which of
  the step's networks gets which is random, for every choice anew. So over any run of steps no value of a choice is
  ahead of another by more than one use; in each step they are equal where s divides k, and over any s steps in a row
  always.
- The turn is counted from the number of the step, so nothing has to be remembered between steps. Each choice begins
  one value further than the choice before it, lest all of one size deal their extra uses alike.

Fair is the draw before it is put in canonical form: a value that was dealt for a layer that does not exist, or for an
option that the chosen block does not have, trains nothing. Such losses hit all values of a choice with the same
probability.

`strict_fairness_distilled` trains the largest network on the labels besides, before the others, which learn from it as
by the sandwich rule (BigNAS, Yu et al. 2020, arXiv:2003.11142, sec. 3.1). All on the labels, the layers that follow a
choice settle on an average of its values, so that the supernet tells early ones apart too little and late ones too
much; with a teacher, all values of an early choice are trained towards the features of one network.
(experiments/nas_bench_macro.py measures what that is worth.)
"""

import numpy as np

from nas import config
from nas.space import Space
from nas.train.samplers.sampler import Draw, Genotypes, Sampler, Score


def strict_fairness(space: Space, settings: config.Train, *, steps: int) -> Sampler:
    """As many networks a step as the largest choice has values, all on the labels. `random_subnets` plays no part."""

    def draw(step: int, rng: np.random.Generator, score: Score) -> Draw:
        return Draw(space.canonical(fair_values(space.sizes, step, rng)), distil=False)

    return draw


def strict_fairness_distilled(space: Space, settings: config.Train, *, steps: int) -> Sampler:
    """The largest network, and those of `strict_fairness` distilled from it. `random_subnets` plays no part."""
    largest = space.largest()[None]

    def draw(step: int, rng: np.random.Generator, score: Score) -> Draw:
        fair = space.canonical(fair_values(space.sizes, step, rng))
        return Draw(np.concatenate([largest, fair]), distil=True)

    return draw


def fair_values(sizes: tuple[int, ...], step: int, rng: np.random.Generator) -> Genotypes:
    """The values [k, genes] that step number `step` deals out to its k networks, k = max(sizes), not yet canonical."""
    k = max(sizes, default=1)
    turn = step * k + np.arange(k)[:, None] + np.arange(len(sizes))
    return rng.permuted(turn % np.asarray(sizes, np.int64), axis=0).astype(np.uint8)
