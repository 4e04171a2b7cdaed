"""A zero-cost proxy: a score of networks with untrained weights, from one small batch, that is no accuracy.

NASWOT is how differently images switch units on: the log-determinant of the kernel of their binary codes (Mellor et al.
2021, arXiv:2006.04647, eq. 2). A unit is on where the output of a layer is above 0; the paper takes those of ReLUs,
which not all networks have. Layers are the supernet's own programs, so none is compiled for a network.

What it is worth (`experiments/ablations/proxies.py`, NAS-Bench-Macro): alone, Kendall's tau with the published accuracy
is .55, less than that of MACs (.58). But it knows something else: as a further feature of the process of strategy
`predictor` it raised the tau of predictions from .53 to .57 after 8 evaluations, .61 to .64 after 12, .77 to .79 after
25, .85 to .86 after 50, and not at all after 100 (12 seeds). SynFlow (Tanaka et al. 2020) was tried and left out: on 60
of these networks it had .61 where MACs have .65, and both together .67.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from nas.space import Space
from nas.supernet import Supernet

_RIDGE = 1.0


def naswot(supernet: Supernet, params: Mapping[str, Any], images: Any) -> Callable[[Any], NDArray[np.float64]]:
    """Scores genotypes [n, genes] of one resolution: -> [n], higher for networks that tell images apart.

    Args:
        params: of the supernet, at initialisation.
        images: [batch, height, width, channels] as networks take them, of that resolution; 32 are enough.
    """
    side = images.shape[1]
    layers = supernet.layers(side)
    arrays = [supernet.params_of(position, params, "calibrate") for _, position in layers]

    @functools.cache
    def program(kind: int) -> Any:
        layer = supernet.layer(side, kind, "calibrate")

        def through(branch: Array, own: Any, x: Array, kernel: Array) -> tuple[Array, Array]:
            y = layer(branch, own, x)[0]
            on = (y > 0).reshape(len(y), -1).astype(jnp.float32)
            return y, kernel + on @ on.T + (1 - on) @ (1 - on).T

        return jax.jit(through)

    def score(row: NDArray[np.int32]) -> float:
        x, kernel = jnp.asarray(images), jnp.zeros((len(images), len(images)))
        for (kind, position), own, branch in zip(layers, arrays, row, strict=True):
            if position.branches[branch] is not None or position.input != position.output:
                x, kernel = program(kind)(branch, own, x, kernel)
        return float(np.linalg.slogdet(np.asarray(kernel, np.float64))[1])

    return lambda genotypes: np.array([score(row) for row in supernet.branches(genotypes)])


def additive(
    space: Space, genotypes: NDArray[np.uint8], scores: NDArray[np.float64]
) -> Callable[[NDArray[np.uint8]], NDArray[np.float64]]:
    """The sum over positions that is nearest to `scores` [n] of `genotypes` [n, genes], by ridge regression.

    Of all genotypes at once, [n, genes] -> [n], in standard units of `scores`: a proxy takes a forward pass, a search
    asks for thousands of networks a trial.
    """
    offsets = np.cumsum([0, *(len(p.branches) for p in space.positions)])

    def one_hot(genotypes: NDArray[np.uint8]) -> NDArray[np.float64]:
        taken = space.branches(genotypes) + offsets[:-1]
        out = np.zeros((len(taken), offsets[-1]))
        np.put_along_axis(out, taken, 1.0, axis=1)
        return out

    x, y = one_hot(genotypes), (scores - scores.mean()) / max(float(scores.std()), 1e-12)
    weights = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ y)
    parts = np.split(weights, offsets[1:-1])
    return lambda genotypes: space.price(genotypes, parts)
