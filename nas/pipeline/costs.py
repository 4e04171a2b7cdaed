"""What needs no evaluation: latencies, MACs, parameters, bytes, as objectives and limits, and what the space can reach.

All of these but learned latencies and peak memory are sums over blocks; peak memory is the largest over blocks. Their
smallest and largest values over the whole space are found exactly. With several limits at once, a network that meets
them all is looked for, or a proof that there is none.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas import config, cost
from nas.config import Experiment, Limit
from nas.errors import ConfigError, LimitError
from nas.export.size import onnx_bytes
from nas.latency import LatencyModel, Table, find_model, find_models, preferred
from nas.pipeline.job import Job, LatencyLimit, in_unit, limit_on, tolerated
from nas.search.accuracy import Least, error_of
from nas.search.strategy import children
from nas.space import Space
from nas.space.memory import activation_bytes
from nas.space.space import Genotypes

_ENUMERATE = 2**16  # spaces up to this size are gone through wholly
_ROUNDS = 100  # of weighing several limits against each other
_GENERATIONS, _CHILDREN, _PARENTS = 40, 1024, 64  # of crossing what came near
_STEP = 0.3  # by how much a weight changes in a round, at most: exp(0.3)


@dataclasses.dataclass(frozen=True, eq=False)
class Searched:
    """What costs are counted by where there is no run folder; in one, the `Job` is."""

    experiment: Experiment
    space: Space
    tables: Mapping[str, LatencyModel]  # of the experiment's device, by precision; empty without a device

    @property
    def precision(self) -> str:
        asked = self.experiment.limit.precision
        return preferred(self.tables) if asked is None else asked

    @functools.cached_property
    def limit(self) -> LatencyLimit:
        """The latency limit; raises LimitError if no network can meet it."""
        return limit_on(self.tables[self.precision], self.space, self.experiment)


Price = Callable[[Genotypes], NDArray[np.float64]]  # [n, genes] -> [n]


@dataclasses.dataclass(frozen=True, eq=False)
class Cost:
    """One exact cost. Networks with a block that a device cannot run cost infinitely much there."""

    name: str
    price: Price
    bound: Price  # what a limit is held against; never below the price
    least: float  # over the space
    most: float
    cheapest: Genotypes  # [genes], of the least
    digest: str  # of what the prices depend on besides the space
    parts: Sequence[NDArray[np.float64]] | None  # [branches] at each position, where their sum is the bound
    limit: float = float("inf")  # as it was asked for
    tolerated: float = float("inf")  # what still counts as within the limit
    model: LatencyModel | None = None  # of a latency: what predicts it

    def __str__(self) -> str:
        limit = f" at most {self.limit:.6g}," if self.limit < float("inf") else ""
        limit += f" up to {self.tolerated:.6g} tolerated," if self.tolerated > self.limit else ""
        return f"{self.name}:{limit} reachable {self.least:.6g} to {self.most:.6g}"


def exact_costs(job: Job | Searched) -> tuple[Cost, ...]:
    """The costs that trials tell, latency_ms first, then what only has a limit.

    Raises:
        LimitError: no network of the space can meet one of the limits; it has what the space can reach.
        DeviceError, UnmeasuredBlock, LatencyError: a further device has no table for this space.
    """
    names = cost_names(job.experiment)
    asked = job.experiment.asked
    found = []
    for name in (*names, *(n for n in asked if n not in names)):
        if name == "latency_ms":
            found.append(_latency(job))
        else:
            found.append(_limited(_named(job, name, asked[name].precision), asked[name]))
    return tuple(found)


def cost_names(experiment: Experiment) -> tuple[str, ...]:
    """What trials tell that needs no evaluation, as a journal has it: `latency_ms` first, then other objectives."""
    told = {o.name for o in experiment.objectives} | ({"latency_ms"} & experiment.asked.keys())
    return tuple(sorted(told - set(config.ACCURACIES)))


def minimised(experiment: Experiment) -> tuple[str, ...]:
    """The objectives as costs, errors first, in the order of `Problem.cost_names`."""
    objectives = {o.name for o in experiment.objectives}
    errors = errors_of(experiment.accuracies, experiment.maximised)
    return (*errors, *(name for name in cost_names(experiment) if name in objectives))


def errors_of(accuracies: Sequence[str], maximised: Sequence[str]) -> tuple[str, ...]:
    """What is minimised of the errors of all that is counted."""
    return tuple("error" if name == accuracies[0] else error_of(name) for name in accuracies if name in maximised)


def require_countable(space: Space, accuracies: Collection[str]) -> None:
    """Nothing, if subnets of `space` can be counted so.

    Raises:
        ConfigError: they choose their precisions themselves.
    """
    if space.mixed and "top1_int8" in accuracies:
        raise ConfigError(
            f"top1 asks for precision int8, but the stages of space {space.name!r} choose theirs, and are counted "
            f"as they choose. Leave top1's `precision` out, or that of the stages."
        )


def least_of(asked: Mapping[str, Limit]) -> dict[str, Least]:
    """Limits on accuracies as the search has them, by their names; of limits that are right."""
    out = {}
    for name, limit in asked.items():
        assert limit.at_least is not None
        least = config.share_of(limit.at_least)
        out[name] = Least(least, config.tolerated_least(least, limit.tolerance))
    return out


def say_costs(job: Job) -> None:
    """Tells what the space can reach in further objectives and limits, or that they are impossible."""
    costs = exact_costs(job)
    for made in costs[1:]:
        job.console.say(f"  {made}")
    for name, least in least_of(job.experiment.least).items():
        job.console.say(f"  {name}: {least}; which networks reach that is known when they are evaluated")
    within(job.space, costs)


def within(space: Space, costs: Sequence[Cost]) -> Genotypes:
    """A genotype [genes] that meets every limit; the fastest network if that does.

    Small spaces are gone through wholly. In large ones the limits are weighed against each other: the cheapest network
    under a weighted sum of costs, each in units of its limit, is exact, and whatever the weights, no network can meet
    all limits if even that one costs more than the sum of the weights (Lagrangian bound: Geoffrion 1974,
    doi:10.1007/BFb0120690). Weights grow where a limit was missed (Arora et al. 2012, doi:10.4086/toc.2012.v008a006).
    Where neither a network nor that proof is found, those that came nearest are crossed.

    Raises:
        LimitError: that no network meets all limits is proven; or, in a large space, none was found.
    """
    limited = [c for c in costs if np.isfinite(c.tolerated)]

    def excess(genotypes: Genotypes) -> NDArray[np.float64]:
        """[n, genes] -> [n]: the worst cost over its limit; infinite where a device cannot run it."""
        return np.max([_ratio(c, genotypes) for c in costs], axis=0)

    starts = np.stack([c.cheapest for c in (costs[0], *limited)])
    met = excess(starts) <= 1
    if met.any():
        return starts[met.argmax()]
    if (count := math.prod(space.sizes)) <= _ENUMERATE:
        everything = np.stack(np.unravel_index(np.arange(count), space.sizes), axis=1).astype(np.uint8)
        over = excess(everything)
        found, proven = space.canonical(everything[over.argmin()]), over.min() > 1
    else:
        nearest, proven = _weighed(space, limited, excess)
        found = nearest if proven else _crossed(space, np.concatenate([starts, nearest[None]]), excess)
    if excess(found[None])[0] <= 1:
        return found
    how = "No network of the space is" if proven else "No network was found that is"
    raise LimitError(
        f"{how} within all limits at once: {'; '.join(map(str, limited))}. Each can be met alone: raise one of them."
    )


def _ratio(made: Cost, genotypes: Genotypes) -> NDArray[np.float64]:
    """A cost over its limit, [n]; without a limit 0, but infinite where the device cannot run the network."""
    if np.isfinite(made.tolerated):
        value = made.bound(genotypes)
        # costs of one's own may have limits that are not positive
        return value / made.tolerated if made.tolerated > 0 else 1 + value - made.tolerated
    return np.where(np.isfinite(made.price(genotypes)), 0.0, np.inf)


def _weighed(space: Space, limited: Sequence[Cost], excess: Price) -> tuple[Genotypes, bool]:
    """The network that came nearest to all limits under any weights, and whether it is proven that none meets them."""
    summed = [(c.tolerated, c.parts) for c in limited if c.parts is not None]
    limits = np.array([limit for limit, _ in summed])
    weights, nearest, least = np.full(len(summed), 1 / max(1, len(summed))), limited[0].cheapest, np.inf
    for _ in range(_ROUNDS if summed else 0):
        positions = zip(*(parts for _, parts in summed), strict=True)
        weighted = [np.tensordot(weights / limits, np.stack(parts), axes=1) for parts in positions]
        genotype, total = space.extreme(weighted, largest=False)
        if (over := excess(genotype[None])[0]) < least:
            nearest, least = genotype, over
        if least <= 1 or total > 1 + 1e-9:
            return nearest, bool(least > 1)
        ratios = np.array([space.price(genotype, parts) for _, parts in summed]) / limits
        weights = weights * np.exp(_STEP * np.clip(ratios - 1, -1.0, 1.0))
        weights /= weights.sum()
    return nearest, False


def _crossed(space: Space, pool: Genotypes, excess: Price) -> Genotypes:
    """The network nearest to all limits among children of those in `pool` [n, genes], for some generations."""
    rng = np.random.default_rng(0)
    for _ in range(_GENERATIONS):
        mothers, fathers = rng.integers(0, len(pool), (2, _CHILDREN))
        born = space.canonical(children(rng, pool[mothers], pool[fathers], space.sizes))
        pool = np.unique(np.concatenate([pool, born]), axis=0)
        over = excess(pool)
        pool = pool[np.argsort(over, kind="stable")[:_PARENTS]]
        if over.min() <= 1:
            break
    return pool[0]


def _latency(job: Job | Searched) -> Cost:
    """On the experiment's own device."""
    model, space, limit = job.tables[job.precision], job.space, job.limit
    _, fastest, _, _ = model.reachable(space)
    price, bound = _prices(model, space)
    least, most, parts = limit.fastest_ms, limit.slowest_ms, _parts(model, space)
    return Cost(
        "latency_ms", price, bound, least, most, fastest, model.digest, parts, limit.ms, limit.tolerated_ms, model
    )


def _prices(model: LatencyModel, space: Space) -> tuple[Price, Price]:
    """`model.price` and `model.bound` of this space.

    The blocks of a table are priced here, once, and not at every call: searches within a search make tens of thousands
    of calls for a few networks each.
    """
    if isinstance(model, Table):
        price = functools.partial(space.price, costs=model.costs(space), between=model.between(space))
        return price, price
    return functools.partial(model.price, space), functools.partial(model.bound, space)


def _parts(model: LatencyModel, space: Space) -> Sequence[NDArray[np.float64]] | None:
    """Of a latency that is a sum over positions, and over nothing else."""
    return model.costs(space) if isinstance(model, Table) and model.between(space) is None else None


def _named(job: Job | Searched, name: str, precision: str | None) -> Cost:
    """Without a limit yet."""
    space, device = job.space, name.partition("@")[2]
    if device:
        precision = preferred(find_models(device, space)[0]) if precision is None else precision
        model, _ = find_model(device, precision, space)
        least, cheapest, most, _ = model.reachable(space)
        parts = _parts(model, space)
        return Cost(name, *_prices(model, space), least, most, cheapest, model.digest, parts, model=model)
    precision = _of_bytes(job, precision)
    if name == "memory_bytes":
        return _memory(job, precision)
    runs = _runs(job)
    if name == "size_bytes":
        costs, digest = onnx_bytes(space, precision), f"{name}, {precision}"
    else:
        costs, digest = space.costs({"macs": cost.macs, "params": cost.parameters}[name]), name
    parts = [np.where(of, c, np.inf) for c, of in zip(costs, runs, strict=True)]
    cheapest, least = space.extreme(parts, largest=False)
    _, most = space.extreme(parts, largest=True)

    def price(genotypes: Genotypes) -> NDArray[np.float64]:
        return space.price(genotypes, costs)

    return Cost(name, price, price, least, most, cheapest, digest, parts)


def _of_bytes(job: Job | Searched, precision: str | None) -> str:
    """Whether bytes are those of float32, int8 or mixed files, where `precision` is what was asked for."""
    if job.space.mixed:
        if precision not in (None, "mixed"):
            raise ConfigError(
                f"bytes are asked for in {precision}, but the stages of space {job.space.name!r} choose their "
                f"precision, and files have those. Leave `precision` out."
            )
        return "mixed"
    asked = job.precision if precision is None and job.tables else precision
    return "int8" if asked == "int8" else "float32"


def _memory(job: Job | Searched, precision: str) -> Cost:
    """Without a limit yet."""
    space = job.space
    costs, images = activation_bytes(space, precision)
    possible = [np.where(runs, c, np.inf) for c, runs in zip(costs, _runs(job), strict=True)]
    cheapest, least = space.extreme_highest(possible, images, largest=False)
    _, most = space.extreme_highest(possible, images, largest=True)

    def price(genotypes: Genotypes) -> NDArray[np.float64]:
        return space.highest(genotypes, costs, images)

    return Cost("memory_bytes", price, price, least, most, cheapest, f"memory_bytes, {precision}", None)


def _runs(job: Job | Searched) -> list[NDArray[np.bool_]]:
    """For each position [branches], whether the device can run the branch."""
    unsupported = job.tables[job.precision].unsupported if job.tables else {}
    return [np.array([b is None or b.graph.key not in unsupported for b in p.branches]) for p in job.space.positions]


def _limited(made: Cost, asked: Limit) -> Cost:
    """The cost with its limit in its unit."""
    if asked.at_most is None:
        return made
    limit = in_unit(asked.at_most, made.least, made.most)
    most = tolerated(limit, asked.tolerance)
    if most < made.least:
        beyond = f" ({most:.6g} with its tolerance)" if most > limit else ""
        raise LimitError(
            f"the limit of {made.name} is {limit:.6g}{beyond}, but no network of the space has less than "
            f"{made.least:.6g} (the most is {made.most:.6g}). Set it between these, or choose another space or smaller "
            f"images."
        )
    return dataclasses.replace(made, limit=limit, tolerated=most)


def handmade(job: Job) -> Genotypes:
    """The hand-made network's genotype [genes]: uniform choices, nearest to the limit on latency from below.

    Every layer is the space's MBConv (its first block where there is none), every other option takes its smallest,
    middle or largest value in all layers alike; of these networks the slowest within all limits is taken, or the
    fastest where none is.
    """
    names = sorted({c.name.rpartition("/")[2] for c in job.space.choices})
    rows = []
    for levels in np.ndindex(*(3,) * len(names)):
        picks = {n: functools.partial(_pick, name=n, level=k) for n, k in zip(names, levels, strict=True)}
        rows.append(job.space.uniform(**picks))
    candidates = np.unique(np.stack(rows), axis=0)
    costs = exact_costs(job)
    latency_ms = costs[0].bound(candidates)
    if not np.isfinite(latency_ms).any():  # each has a block that the device cannot run
        return job.ends()[0]
    met = np.all([c.bound(candidates) <= min(c.limit, np.finfo(float).max) for c in costs], axis=0)
    order = np.lexsort((np.where(met, -latency_ms, latency_ms), ~met))
    return candidates[order[0]]


def beyond(costs: Sequence[Cost], genotype: Genotypes) -> list[str]:
    """A sentence for each limit that a network [genes] exceeds, within its tolerance."""
    values = [(c, float(c.bound(genotype[None])[0])) for c in costs]
    return [
        f"{c.name} is {value:.6g}: {value / c.limit - 1:.1%} over its limit of {c.limit:.6g}, within its tolerance "
        f"({c.tolerated:.6g})"
        for c, value in values
        if value > c.limit
    ]


def _pick(values: tuple[Any, ...], *, name: str, level: int) -> Any:
    """The smallest (0), middle (1) or largest (2) of an option's values; of blocks always the same one."""
    if name == "block":
        return "mbconv" if "mbconv" in values else values[0]
    ordered = values if isinstance(values[0], str) else sorted(values)
    return ordered[(len(ordered) - 1) * level // 2]
