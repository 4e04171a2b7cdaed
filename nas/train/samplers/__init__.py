"""Which subnets a step of supernet training computes gradients of.

A new sampler is one factory in a file of its own (the contract is `nas/train/samplers/sampler.py`), and one line here.
"""

from nas import config
from nas.errors import ConfigError
from nas.space import Space
from nas.train.samplers.attentive import best_up, worst_up
from nas.train.samplers.progressive_shrinking import progressive_shrinking
from nas.train.samplers.sampler import Draw, Factory, Sampler, Score
from nas.train.samplers.sandwich import sandwich
from nas.train.samplers.single_path import single_path
from nas.train.samplers.strict_fairness import strict_fairness, strict_fairness_distilled

__all__ = ["SAMPLERS", "Draw", "Factory", "Sampler", "Score", "sampler"]

SAMPLERS: dict[str, Factory] = {
    "attentive_best_up": best_up,
    "attentive_worst_up": worst_up,
    "progressive_shrinking": progressive_shrinking,
    "sandwich": sandwich,
    "single_path": single_path,
    "strict_fairness": strict_fairness,
    "strict_fairness_distilled": strict_fairness_distilled,
}


def sampler(settings: config.Train, space: Space, *, steps: int) -> Sampler:
    """The sampler `settings.sampler` of a training of `steps` steps on `space`.

    Raises:
        ConfigError: an unknown name, or settings that this sampler cannot work with.
    """
    if settings.sampler not in SAMPLERS:
        hint = config.nearest(settings.sampler, SAMPLERS, kind="sampler")
        raise ConfigError(f"unknown sampler `{settings.sampler}`.{hint}")
    return SAMPLERS[settings.sampler](space, settings, steps=steps)
