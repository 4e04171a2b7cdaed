"""Uniform single-path training (SPOS, Guo et al. 2020, arXiv:1904.00420, sec. 3)."""

import numpy as np

from nas import config
from nas.space import Space
from nas.train.samplers.sampler import Draw, Sampler, Score, at_least


def single_path(space: Space, settings: config.Train, *, steps: int) -> Sampler:
    """`random_subnets` uniform networks, all on the labels. The paper trains one a step.

    Raises:
        ConfigError: `random_subnets` is below 1.
    """
    at_least(1, key="random_subnets", value=settings.random_subnets, sampler="single_path")

    def draw(step: int, rng: np.random.Generator, score: Score) -> Draw:
        return Draw(space.sample(rng, settings.random_subnets), distil=False)

    return draw
