"""Training: of the supernet (`train_supernet`), and the loop that fine-tuning uses too."""

from nas.train.checkpoint import Checkpoints
from nas.train.loop import Progress, fit, steps_of
from nas.train.supernet import train_supernet

__all__ = ["Checkpoints", "Progress", "fit", "steps_of", "train_supernet"]
