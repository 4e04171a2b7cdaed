"""The sandwich rule: the largest network, the smallest, and random ones between them.

Yu & Huang 2019 (arXiv:1903.05134, sec. 3) bound the accuracy of all networks from both ends; the largest one teaches
the others in place, by its soft labels of the same step (there, and Yu et al. 2020, arXiv:2003.11142, sec. 3.1).
"""

import numpy as np

from nas import config
from nas.space import Space
from nas.train.samplers.sampler import Draw, Sampler, Score, at_least, ends


def sandwich(space: Space, settings: config.Train, *, steps: int) -> Sampler:
    """The largest, the smallest and `random_subnets` uniform networks, distilled from the largest.

    Raises:
        ConfigError: `random_subnets` is negative.
    """
    at_least(0, key="random_subnets", value=settings.random_subnets, sampler="sandwich")
    both = ends(space)

    def draw(step: int, rng: np.random.Generator, score: Score) -> Draw:
        return Draw(np.concatenate([both, space.sample(rng, settings.random_subnets)]), distil=True)

    return draw
