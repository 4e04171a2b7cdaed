"""Mixup and CutMix: each image of a batch together with another, and their targets in the same shares.

Both give every pixel a weight, the same for the whole batch, from one draw of Beta(alpha, alpha). In Mixup that is the
weight of all pixels (Zhang et al. 2018, arXiv:1710.09412, sec. 2); in CutMix a box with the rest of the area has weight
0 and what is around it 1 (Yun et al. 2019, arXiv:1905.04899, sec. 3.1). Targets are mixed by the mean of the weights,
which accounts exactly for what a box loses beyond the edges.
"""

import jax
import jax.numpy as jnp
from jax import Array

from nas import config
from nas.errors import DataError
from nas.train.augment.placement import square


def mix(key: Array, images: Array, targets: Array, settings: config.Augment) -> tuple[Array, Array]:
    """Images and targets, each mixed with those of a random permutation of the batch.

    With both `settings.mixup` and `settings.cutmix` one of them is drawn for the batch, with probability 1/2 each; with
    neither the arguments are returned.

    Args:
        key: a JAX key.
        images: float [n, height, width, channels], normalised or not.
        targets: float [n, classes], one-hot or smoothed.
        settings: parameters of the Beta distributions; 0: never.

    Raises:
        DataError: targets of another shape.
    """
    if targets.ndim != 2 or len(targets) != len(images):
        raise DataError(
            f"mixing got targets of shape {targets.shape} for {len(images)} images; it needs shares of every class, "
            "[images, classes]: make them with jax.nn.one_hot(labels, classes)."
        )
    if not settings.mixup and not settings.cutmix:
        return images, targets
    kind_key, share_key, box_key, order_key = jax.random.split(key, 4)
    boxed = jax.random.bernoulli(kind_key) if settings.mixup and settings.cutmix else bool(settings.cutmix)
    alpha = jnp.where(boxed, settings.cutmix, settings.mixup)
    share = jax.random.beta(share_key, alpha, alpha)  # one for both kinds: it takes XLA seconds to compile
    weight = jnp.where(boxed, _around_box(box_key, images.shape[1:3], share), share)
    order = jax.random.permutation(order_key, len(images))
    mixed = _blend(images, images[order], weight[:, :, None])
    return mixed, _blend(targets, targets[order], weight.mean())


def _around_box(key: Array, size: tuple[int, ...], share: Array) -> Array:
    """[*size]: 0 in a box of the image's proportions and 1 - `share` of its area, centred anywhere; 1 elsewhere."""
    height, width = (jnp.floor(side * jnp.sqrt(1 - share)).astype(jnp.int32) for side in size)
    return 1.0 - square(key, 1, size, height, width)[0]


def _blend(own: Array, other: Array, weight: Array) -> Array:
    return (weight * own + (1 - weight) * other).astype(own.dtype)
