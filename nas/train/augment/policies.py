"""Policies: which operations an image goes through, and how strongly.

An operation's argument is centre ± reach, the sign by lot. *How strongly* is a number 0..10 that the two papers
translate differently: RandAugment's magnitude moves every operation away from the identity, AutoAugment's levels are
positions in a range, whose middle is the identity for `color`, `contrast`, `brightness` and `sharpness`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nas import config, kernels
from nas.errors import DataError
from nas.train.augment.operations import OPERATIONS, UNCOVERED

Policy = Callable[[Array, Array, config.Augment, Array], Array]
Scale = dict[str, Callable[[Any], tuple[Any, Any]]]  # strength 0..10, perhaps traced -> (centre, reach) of the argument

_INDEX = {name: index for index, name in enumerate(OPERATIONS)}

_GEOMETRY: Scale = {
    "shear_x": lambda m: (0, 0.03 * m),
    "shear_y": lambda m: (0, 0.03 * m),
    "translate_x": lambda m: (0, m / 32),  # up to 10 pixels of CIFAR's 32
    "translate_y": lambda m: (0, m / 32),
}

# Operations and ranges of Cubuk et al. 2020, arXiv:1909.13719, sec. 3 (ranges: those of AutoAugment's table 6). The
# paper leaves open how a magnitude enters; here 0 changes nothing and the enhancers go either way, as in torchvision.
RANDAUGMENT: Scale = _GEOMETRY | {
    "identity": lambda m: (0, 0),
    "auto_contrast": lambda m: (0, 0),
    "equalize": lambda m: (0, 0),
    "rotate": lambda m: (0, 3 * m),
    "solarize": lambda m: (256 - 25.6 * m, 0),
    "posterize": lambda m: (8 - round(0.4 * m), 0),
    "color": lambda m: (1, 0.09 * m),
    "contrast": lambda m: (1, 0.09 * m),
    "brightness": lambda m: (1, 0.09 * m),
    "sharpness": lambda m: (1, 0.09 * m),
}

# As the authors' code reads its levels (tensorflow/models, research/autoaugment/augmentation_transforms.py).
AUTOAUGMENT: Scale = _GEOMETRY | {
    "auto_contrast": lambda m: (0, 0),
    "equalize": lambda m: (0, 0),
    "invert": lambda m: (0, 0),
    "rotate": lambda m: (0, 3 * m),
    "solarize": lambda m: (256 - m * 256 // 10, 0),
    "posterize": lambda m: (4 - m * 4 // 10, 0),
    "color": lambda m: (0.1 + 0.18 * m, 0),
    "contrast": lambda m: (0.1 + 0.18 * m, 0),
    "brightness": lambda m: (0.1 + 0.18 * m, 0),
    "sharpness": lambda m: (0.1 + 0.18 * m, 0),
}

# Cubuk et al. 2019, arXiv:1805.09501, table 7: two operations each, as (name, probability, level). 0 stands for a level
# where the operation has none.
CIFAR10_SUBPOLICIES = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("auto_contrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("auto_contrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("auto_contrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("auto_contrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("auto_contrast", 0.9, 0)),
)


def none(key: Array, images: Array, settings: config.Augment, fill: Array) -> Array:
    """The images as they are."""
    return images


def randaugment(key: Array, images: Array, settings: config.Augment, fill: Array) -> Array:
    """`settings.operations` operations on each image, drawn with replacement from 14, at `settings.magnitude` of 10.

    Cubuk et al. 2020, arXiv:1909.13719, fig. 2.
    """
    if not settings.operations:
        return images
    pick_key, sign_key = jax.random.split(key)
    index, centre, reach = _tabled([(name, settings.magnitude) for name in RANDAUGMENT], RANDAUGMENT)
    picked = jax.random.randint(pick_key, (len(images), settings.operations), 0, len(index))
    return apply(images, index[picked], centre[picked] + _signs(sign_key, picked.shape) * reach[picked], fill)


def autoaugment(key: Array, images: Array, settings: config.Augment, fill: Array) -> Array:
    """One of the 25 sub-policies found for CIFAR-10 on each image (Cubuk et al. 2019, arXiv:1805.09501, table 7)."""
    pick_key, take_key, sign_key = jax.random.split(key, 3)
    steps = [step for subpolicy in CIFAR10_SUBPOLICIES for step in subpolicy]
    index, centre, reach = _tabled([(name, level) for name, _, level in steps], AUTOAUGMENT)
    probability = jnp.asarray([probability for _, probability, _ in steps])
    picked = 2 * jax.random.randint(pick_key, (len(images), 1), 0, len(CIFAR10_SUBPOLICIES)) + jnp.arange(2)
    taken = jax.random.uniform(take_key, picked.shape) < probability[picked]
    arguments = centre[picked] + _signs(sign_key, picked.shape) * reach[picked]
    return apply(images, jnp.where(taken, index[picked], _INDEX["identity"]), arguments, fill)


POLICIES: dict[str, Policy] = {"none": none, "randaugment": randaugment, "autoaugment": autoaugment}


def apply(images: Array, operations: Array, arguments: Array, fill: Array) -> Array:
    """Each image [n, height, width, channels] in 0..1 after its own operations, in order.

    Args:
        images: rounded to 256 levels here.
        operations: int [n, k], positions in `OPERATIONS`.
        arguments: float [n, k], theirs.
        fill: [channels] in 0..1, for uncovered pixels; rounded likewise.

    Raises:
        DataError: neither 1 nor 3 channels.
    """
    if images.shape[-1] not in (1, 3):
        raise DataError(
            f"the augmentation policies are for images of 1 (grey) or 3 (RGB) channels, these have "
            f'{images.shape[-1]}: convert the images, or set policy = "none".'
        )
    level = jnp.round(fill * 255)

    def one(drawn: tuple[Array, Array, Array]) -> Array:
        def step(image: Array, operation: tuple[Array, Array]) -> tuple[Array, None]:
            changed = lax.switch(operation[0], tuple(OPERATIONS.values()), image, operation[1])
            return jnp.where(changed == UNCOVERED, level, changed), None

        image, operations, arguments = drawn
        return lax.scan(step, image, (operations, arguments))[0]

    drawn = (jnp.round(images.astype(jnp.float32) * 255), operations, arguments)
    # One after the other, an image computes only what it drew; side by side, a switch computes all operations. In times
    # of a flip and shift, on CPU, 64 images: 2.8 against 55 (32x32x3), 2.0 against 6.2 (28x28x1), by
    # experiments/benchmarks/augment.py. Accelerators get the second, since a loop over images would leave most of the
    # device idle (reasoned, not measured).
    out = lax.map(one, drawn) if kernels.on_cpu() else jax.vmap(one)(drawn)
    return (out / 255).astype(images.dtype)


def _tabled(steps: Sequence[tuple[str, float | Array]], scale: Scale) -> tuple[Array, Array, Array]:
    """Of each (name, strength): the position in `OPERATIONS`, the centre and the reach of the argument."""
    xp = jnp if any(isinstance(strength, Array) for _, strength in steps) else np
    ranges = xp.array([scale[name](strength) for name, strength in steps], np.float32)
    return jnp.asarray([_INDEX[name] for name, _ in steps]), jnp.asarray(ranges[:, 0]), jnp.asarray(ranges[:, 1])


def _signs(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.rademacher(key, shape, jnp.float32)
