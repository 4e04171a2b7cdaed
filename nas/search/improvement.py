"""Expected hypervolume improvement, where one cost is uncertain and the others are known exactly.

How much a network adds to the dominated hypervolume, E being the least error on the front among networks that cost no
more than u, is an integral over costs u between its own and the reference,

    integral of max(0, min(E(u), reference error) - error) du,

because at each u its error replaces E(u) where it is lower. Under the expectation the integrand becomes the expected
shortfall of a distribution below a threshold, which has a closed form. With one cheap cost E(u) is a staircase and the
integral a sum over its steps: exact. With more it is averaged over points u of a low-discrepancy sequence, within the
box where the front reaches; outside of it, where nothing costs as little, E(u) is the reference error, and the integral
that times a volume: exact, however much cheaper than all before a network is.
(Emmerich et al. 2011, doi:10.1109/CEC.2011.5949880, have the case of all costs uncertain.)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from nas.search.pareto import nondominated

Floats = NDArray[np.float64]

_POINTS = 512  # of the sequence, for two and more cheap costs
_LARGEST_LOG = 700.0  # of a number of double precision


def expected_shortfall(mean: Floats, deviation: Floats, threshold: Floats) -> Floats:
    """E[max(0, threshold - X)] where the logarithm of X is normal with `mean` and `deviation`; they broadcast.

    The undiscounted price of a put option (Black & Scholes 1973, doi:10.1086/260062, eq. 13).
    """
    deviation = np.maximum(deviation, 1e-9)
    with np.errstate(divide="ignore"):
        d = (np.log(threshold) - mean) / deviation
    expected = np.exp(np.minimum(mean + deviation**2 / 2, _LARGEST_LOG))
    return np.maximum(threshold * ndtr(d) - expected * ndtr(d - deviation), 0.0)


@dataclass(frozen=True, eq=False)
class Front:
    """The dominated region in the form of E(u): `error` [steps] holds at costs from `low` to `high` [steps, cheap].

    With one cheap cost the steps are intervals; with more, points (low = high) that each stand for `volume` of costs,
    in the box from `corner` to the costs of `reference`, below which nothing is dominated; without, a single step of
    volume 1.
    """

    error: Floats
    low: Floats
    high: Floats
    volume: float
    reference: Floats  # [1 + cheap]
    corner: Floats  # [cheap]: the least of each cost on the front


def front_of(costs: Floats, reference: Floats) -> Front:
    """Of `costs` [n, 1 + cheap], the error first; rows that are not finite are left out.

    `reference` [1 + cheap] bounds what counts.
    """
    costs, reference = np.asarray(costs, np.float64), np.asarray(reference, np.float64)
    cheap = costs.shape[1] - 1
    front = costs[nondominated(costs)]
    front = front[(front < reference).all(axis=1)]
    corner = front[:, 1:].min(axis=0, initial=np.inf)
    corner = np.minimum(corner, reference[1:])
    if cheap == 0:
        return Front(
            np.append(front[:, 0], reference[0])[:1], np.zeros((1, 0)), np.zeros((1, 0)), 1.0, reference, corner
        )
    if cheap == 1:
        front = front[np.argsort(front[:, 1])]  # the error falls
        edges = np.concatenate([[-np.inf], front[:, 1], reference[1:]])
        errors = np.append(reference[0], front[:, 0])
        return Front(errors, edges[:-1, None], edges[1:, None], 1.0, reference, corner)
    from scipy.stats import qmc  # here, since it takes half a second that every worker would wait

    points = corner + (reference[1:] - corner) * qmc.Sobol(cheap, scramble=False).random(_POINTS)
    reached = (front[None, :, 1:] <= points[:, None]).all(axis=2)  # [points, front]
    error = np.where(reached, front[None, :, 0], reference[0]).min(axis=1, initial=reference[0])
    volume = float(np.prod(reference[1:] - corner)) / _POINTS
    return Front(error, points, points, volume, reference, corner)


def expected_improvement(front: Front, mean: Floats, deviation: Floats, cheap: Floats) -> Floats:
    """The expected growth [m] of the hypervolume by networks with cheap costs [m, cheap].

    `mean` and `deviation` [m] are those of the logarithm of the error.
    """
    if cheap.shape[1] == 1:
        share = np.maximum(front.high[:, 0] - np.maximum(front.low[:, 0], cheap), 0.0)
        return (expected_shortfall(mean[:, None], deviation[:, None], front.error) * share).sum(axis=1)
    # Many points share an error, and the shortfall is what takes time.
    error, place = np.unique(front.error, return_inverse=True)
    under = np.logical_and.reduce([of[:, None] <= low for of, low in zip(cheap.T, front.low.T, strict=True)])
    under = np.broadcast_to(under, (len(mean), len(place))).astype(np.float32)
    points = under @ np.eye(len(error), dtype=np.float32)[place]  # [m, errors], how many
    within = (expected_shortfall(mean[:, None], deviation[:, None], error) * points).sum(axis=1) * front.volume
    worst, high = front.reference[0], front.reference[1:]
    volume, inside = (np.maximum(high - low, 0.0).prod(axis=1) for low in (cheap, np.maximum(cheap, front.corner)))
    return within + expected_shortfall(mean, deviation, worst) * (volume - inside)
