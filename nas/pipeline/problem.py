"""What is searched, from Python: a space's exact costs and limits by name, and costs of one's own."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nas import config
from nas.config import Data, Experiment, Objective
from nas.errors import ConfigError, LimitError, UnmeasuredBlock
from nas.latency import LatencyModel, find_model, load_device
from nas.pipeline.costs import Cost, Price, Searched, cost_names, exact_costs
from nas.pipeline.job import in_unit
from nas.pipeline.search import problem_of
from nas.search import Problem
from nas.search.strategy import Genotypes, children
from nas.space import Space

Limit = float | int | str  # in the cost's unit, or "50%" of what the space can reach

_ENUMERATE = 2**16  # own costs of spaces up to this size are gone through wholly


def make_problem(
    space: Space,
    *,
    device: str | None = None,
    precision: str = "float32",
    latency_ms: Limit | None = None,
    objectives: Sequence[str] = (),
    limits: Mapping[str, Limit] | None = None,
    costs: Mapping[str, Callable[[Genotypes], ArrayLike]] | None = None,
    images: int = 10_000,
) -> Problem:
    """The problem that `nas.search` would search, for a loop of one's own: arguments and errors are as there.

    Example:
        >>> problem = nas.make_problem(space, device="note10", latency_ms=20)
        >>> strategy = nas.search.nsga2(problem.sizes, population=32)
        >>> state, rng, seen = strategy.init(), np.random.default_rng(0), set()
        >>> genotype = nas.search.choose(problem, rng, strategy.ask(rng, state, 64), seen)  # new, within the limits
        >>> costs = [1 - top1(space.decode(genotype)), *problem.cheap(genotype[None])[0]]
        >>> state = strategy.tell(state, genotype, costs)
    """
    precision = "mixed" if space.mixed else precision
    models = latency_on(space, device, precision)
    asked = dict(limits or {}) | ({} if latency_ms is None else {"latency_ms": latency_ms})
    found, names = counted(space, models, objectives, asked, dict(costs or {}), precision)
    return problem_of(space, found, names, digest=space.digest, total=images)


def latency_on(space: Space, device: str | None, precision: str) -> dict[str, LatencyModel]:
    """What predicts `latency_ms`, or nothing."""
    if device is None:
        return {}
    if not space.positions:
        raise ConfigError('choices alone have no blocks that a device has times of: give costs={"latency_ms": f}.')
    try:
        return {"latency_ms": find_model(device, precision, space)[0]}
    except UnmeasuredBlock as e:
        if not load_device(device).at_hand:
            raise
        raise UnmeasuredBlock(
            f"device {device} is this machine, which has no table of all blocks of space {space.name!r} in {precision} "
            f'yet. Measure one: `nas measure {space.name} --device {device} --as my_machine`; then device="my_machine".'
        ) from e


def counted(
    space: Space,
    models: Mapping[str, LatencyModel],
    objectives: Sequence[str],
    limits: Mapping[str, Limit],
    own: Mapping[str, Callable[[Genotypes], ArrayLike]],
    precision: str,
) -> tuple[tuple[Cost, ...], tuple[str, ...]]:
    """The costs, objectives first, and the names of these; `models` has that of `latency_ms`, or nothing."""
    has_latency = bool(models)
    for name, price in own.items():
        if name in ("error", "top1"):
            raise ConfigError(f"costs[{name!r}]: the accuracy has that name here. Give the cost another one.")
        if not callable(price):
            raise ConfigError(f"costs[{name!r}] is {price!r}: a function, [n, genes] to [n], is needed.")
    known = {n: limits.get(n) for n in (*objectives, *limits) if n not in own}
    config.check_costs(known)
    for name in known:
        if not space.positions:
            raise ConfigError(f"{name} is not known of choices alone: give costs={{{name!r}: f}}.")
        if name == "latency_ms" and not has_latency:
            raise ConfigError("latency_ms of which device? Give `device=`; `nas list devices` has the names.")
    if both := [name for name in own if name == "latency_ms" and has_latency]:
        raise ConfigError(f"{both[0]} is both that of the device and in `costs`: leave one of them out.")
    wanted = {*objectives, *(["latency_ms"] if has_latency else [])} - own.keys()
    if not wanted and not own:
        wanted = {"macs"} if space.positions else set()
    if not wanted and not own:
        raise ConfigError('nothing to minimise beside the error: give costs={"latency_ms": f}.')
    experiment = Experiment(
        name="search",
        space=space.name,
        device=models["latency_ms"].device if has_latency else "",
        data=Data(source=""),
        objectives=(
            Objective(name="top1"),
            *(Objective(name=n, precision=precision, at_most=limits.get(n)) for n in sorted(wanted)),
        ),
        limits={n: config.Limit(v, precision=precision) for n, v in limits.items() if n not in wanted and n not in own},
    )
    tables = {precision: models["latency_ms"]} if has_latency else {}
    made = exact_costs(Searched(experiment, space, tables))
    count = len(cost_names(experiment))
    first = sorted((*made[:count], *(_own(space, n, f, limits.get(n)) for n, f in own.items())), key=lambda c: c.name)
    return (*first, *made[count:]), tuple(c.name for c in first)


def _own(space: Space, name: str, price: Callable[[Genotypes], ArrayLike], asked: Limit | None) -> Cost:
    """A cost of one's own. What is reachable is exact in small spaces, and in large ones the best that was found."""

    def priced(genotypes: Genotypes) -> NDArray[np.float64]:
        values = _numbers(f"costs[{name!r}]", price(genotypes))
        if values.shape != (len(genotypes),):
            raise ConfigError(
                f"costs[{name!r}] gave shape {values.shape} for {len(genotypes)} genotypes: one value each is needed, "
                f"[n, genes] to [n]."
            )
        if np.isnan(values).any():
            raise ConfigError(
                f"costs[{name!r}] gave NaN for genotype {genotypes[np.isnan(values)][0].tolist()}: a number is needed; "
                f"infinity, where a network cannot be had at all."
            )
        return values

    if exact := math.prod(space.sizes) <= _ENUMERATE:
        every = np.unravel_index(np.arange(math.prod(space.sizes)), space.sizes)
        known = np.unique(space.canonical(np.stack(every, axis=1).astype(np.uint8)), axis=0)
        values = priced(known)
        least, cheapest = float(values.min()), known[values.argmin()]
        most = float(values[np.isfinite(values)].max(initial=least))
    else:
        cheapest, least = _extreme(space, priced)
        _, most = _extreme(space, lambda g: np.nan_to_num(-priced(g), neginf=np.inf))
        most = -most
    if not math.isfinite(least):
        raise LimitError(f"costs[{name!r}] is {least} for every network that was looked at: none of them can be had.")
    limit = math.inf
    if asked is not None:
        config.check_limit(name, asked, positive=False)
        limit = in_unit(asked, least, most)
        if limit < least and exact:
            raise LimitError(
                f"the limit of {name} is {limit:.6g}, but no network of the space has less than {least:.6g} (the most "
                f"is {most:.6g}). Set it between these."
            )
    return Cost(name, priced, priced, least, most, cheapest, name_of(price), None, limit, limit)


def _extreme(space: Space, price: Price) -> tuple[Genotypes, float]:
    """A genotype of nearly the least price, by crossing the best of random ones; and its price."""
    rng = np.random.default_rng(0)
    pool = space.sample(rng, 4096)
    for _ in range(40):
        pool = pool[np.argsort(price(pool), kind="stable")[:64]]
        mothers, fathers = rng.integers(0, len(pool), (2, 1024))
        pool = np.concatenate([pool, space.canonical(children(rng, pool[mothers], pool[fathers], space.sizes))])
    values = price(pool)
    return pool[values.argmin()], float(values.min())


def features_of(space: Space, features: Callable[[Genotypes], ArrayLike]) -> Price:
    """What else is known of networks [n, genes] -> [n, k], checked once here and whenever it is asked for.

    Raises:
        ConfigError: it is no function, or gives something else; then from what is returned, too.
    """
    if not callable(features):
        raise ConfigError(f"features is {type(features).__name__}: a function, [n, genes] to [n, k], is needed.")

    def known(genotypes: Genotypes) -> NDArray[np.float64]:
        values = _numbers("features", features(genotypes))
        if values.ndim != 2 or len(values) != len(genotypes):
            raise ConfigError(
                f"features gave shape {values.shape} for {len(genotypes)} genotypes: one row each is needed, "
                f"[n, genes] to [n, k]."
            )
        if not ((values > 0) & np.isfinite(values)).all():
            wrong = values[~((values > 0) & np.isfinite(values))][0]
            raise ConfigError(f"features gave {wrong:g}: they are taken logarithms of, so they must be above 0.")
        return values

    known(space.sample(np.random.default_rng(0), 2))
    return known


def _numbers(what: str, values: ArrayLike) -> NDArray[np.float64]:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{what} gave no numbers: {e}.") from e


def name_of(function: Callable[..., Any] | str) -> str:
    """What a journal knows of a function: its name. Whoever changes what it does starts a new journal."""
    if isinstance(function, str):
        return function
    return str(getattr(function, "__qualname__", type(function).__qualname__))
