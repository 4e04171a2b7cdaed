"""Training: of the supernet (`train_supernet`, `train_on_ray`, `train_population`), and the loop of fine-tuning too."""

from nas.train.checkpoint import Checkpoints
from nas.train.generations import Generation, train_population
from nas.train.loop import Progress, fit, steps_of
from nas.train.ray_trainer import train_on_ray
from nas.train.supernet import train_supernet

__all__ = [
    "Checkpoints",
    "Generation",
    "Progress",
    "fit",
    "steps_of",
    "train_on_ray",
    "train_population",
    "train_supernet",
]
