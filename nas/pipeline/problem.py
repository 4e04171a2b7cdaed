"""What is searched, from Python: a space's exact costs and limits by name, and costs of one's own."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from nas import config
from nas.config import Data, Experiment, Objective
from nas.errors import ConfigError, LimitError, UnmeasuredBlock
from nas.latency import LatencyModel, find_model, load_device
from nas.pipeline.costs import Cost, Price, Searched, cost_names, errors_of, exact_costs, least_of
from nas.pipeline.job import in_unit, tolerated
from nas.pipeline.search import problem_of
from nas.search import Problem
from nas.search.accuracy import Least, is_error
from nas.search.strategy import Genotypes, children
from nas.space import Space

# In the cost's unit, or "50%" of what the space can reach; or as experiments have it, {"at_most": 20, "tolerance":
# "5%"}. Of top1 at least that: 0.9, "90%", or {"at_least": 0.9, "tolerance": 0.01}.
Limit = float | int | str | Mapping[str, Any] | config.Limit

_ENUMERATE = 2**16  # own costs of spaces up to this size are gone through wholly


def make_problem(
    space: Space,
    *,
    device: str | None = None,
    precision: str = "float32",
    latency_ms: Limit | None = None,
    objectives: Sequence[str] | None = None,
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
        >>> state = strategy.tell(state, genotype, problem.told(strategy, np.array(costs)))
    """
    precision = "mixed" if space.mixed else precision
    models = latency_on(space, device, precision)
    asked = limits_of(limits, latency_ms)
    accuracies, maximised, least = accuracies_of(objectives, asked)
    found, names, minimised = counted(space, models, objectives, asked, dict(costs or {}), precision)
    return problem_of(
        space,
        found,
        names,
        digest=space.digest,
        total=images,
        accuracies=accuracies,
        least=least,
        objectives=(*errors_of(accuracies, maximised), *minimised),
    )


def limits_of(limits: Mapping[str, Limit] | None, latency_ms: Limit | None) -> dict[str, config.Limit]:
    """Limits as experiments have them, by name of cost or accuracy.

    Raises:
        ConfigError: one has an unknown key, or a value of the wrong type.
    """
    out = {}
    for name, value in {**(limits or {}), **({} if latency_ms is None else {"latency_ms": latency_ms})}.items():
        try:
            given = msgspec.convert(value, config.Limit) if isinstance(value, Mapping) else value
            out[name] = config.as_limit(name, given)
        except msgspec.ValidationError as e:
            keys = ", ".join(config.Limit.__struct_fields__)
            raise ConfigError(f"limits[{name!r}] is {value!r}: {e}. A number, a share or a table of {keys}.") from e
    return out


def accuracies_of(
    objectives: Sequence[str] | None, limits: Mapping[str, config.Limit], usual: tuple[str, ...] = ("top1",)
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Least]]:
    """What is counted, which of it is maximised, and the limits on it.

    Accuracies that `objectives` names are maximised; without `objectives`, `usual`, unless an accuracy has a limit:
    then that limit is all that is asked of accuracy.

    Raises:
        ConfigError: a limit on an accuracy has the wrong form, or nothing is asked of any accuracy.
    """
    if objectives is not None:
        _check_names(objectives)
    limited = {name: limit for name, limit in limits.items() if name in config.ACCURACIES}
    for name, limit in limited.items():
        if limit.at_least is None and limit.at_most is None:
            raise ConfigError(f"limits[{name!r}] has no at_least: give it one, or leave it out.")
        config.check_limit(name, limit)
    named = [config.accuracy_of(name, limit) for name, limit in limited.items()]
    if twice := [name for name in named if named.count(name) > 1]:
        raise ConfigError(f"limits has {twice[0]} twice: leave one out.")
    limited = dict(zip(named, limited.values(), strict=True))
    aims = (() if limited else usual) if objectives is None else objectives
    maximised = tuple(n for n in config.ACCURACIES if n in aims)
    if not maximised and not limited:
        raise ConfigError(
            f"objectives is {list(aims)}, and no limit is on an accuracy: what should evaluations count? Add "
            f'"top1" to the objectives, or give limits={{"top1": 0.9}}.'
        )
    return tuple(n for n in config.ACCURACIES if n in {*maximised, *limited}), maximised, least_of(limited)


def _check_names(objectives: Sequence[str]) -> None:
    """Nothing, if `objectives` are names, each of them once."""
    names = [objectives] if isinstance(objectives, str) else list(objectives)
    if isinstance(objectives, str) or not names or not all(isinstance(n, str) for n in names):
        raise ConfigError(
            f'objectives is {objectives!r}: all that is optimised, by name, is needed, such as ["top1", "macs"]; or '
            f"leave it out."
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"objectives names {twice[0]} twice: leave one out.")


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
            f"yet. Measure one: `nas measure {space.argument} --device {device} --as my_machine`; then "
            f'device="my_machine".'
        ) from e


def counted(
    space: Space,
    models: Mapping[str, LatencyModel],
    objectives: Sequence[str] | None,
    limits: Mapping[str, config.Limit],
    own: Mapping[str, Callable[[Genotypes], ArrayLike]],
    precision: str,
) -> tuple[tuple[Cost, ...], tuple[str, ...], tuple[str, ...]]:
    """The costs, those that trials tell first; the names of these, and of those that are minimised.

    Trials tell objectives, the latency on the device and costs of one's own; without `objectives` all of these are
    minimised. `models` has that of `latency_ms`, or nothing.
    """
    has_latency = bool(models)
    named = [n for n in objectives or () if n not in config.ACCURACIES]
    limits = {n: limit for n, limit in limits.items() if n not in config.ACCURACIES}
    for name, limit in limits.items():
        if limit.at_most is None and limit.at_least is None:
            raise ConfigError(f"limits[{name!r}] has no at_most: give it one, or leave it out.")
    for name, price in own.items():
        if is_error(name) or name in config.ACCURACIES:
            raise ConfigError(f"costs[{name!r}]: the accuracy has that name here. Give the cost another one.")
        if not callable(price):
            raise ConfigError(f"costs[{name!r}] is {price!r}: a function, [n, genes] to [n], is needed.")
    known = {n: limits.get(n) for n in (*named, *limits) if n not in own}
    config.check_costs(known)
    asked = known.get("latency_ms")
    if asked is not None and asked.precision not in (None, precision):
        raise ConfigError(
            f"limits['latency_ms'] is of precision {asked.precision!r}, and the latency that is searched by of "
            f"{precision!r}: give precision={asked.precision!r} besides the limits."
        )
    for name in known:
        if not space.positions:
            raise ConfigError(f"{name} is not known of choices alone: give costs={{{name!r}: f}}.")
        if name == "latency_ms" and not has_latency:
            raise ConfigError("latency_ms of which device? Give `device=`; `nas list devices` has the names.")
    if both := [name for name in own if name == "latency_ms" and has_latency]:
        raise ConfigError(f"{both[0]} is both that of the device and in `costs`: leave one of them out.")
    wanted = {*named, *(["latency_ms"] if has_latency else [])} - own.keys()
    if not wanted and not own:
        wanted = {"macs"} if space.positions else set()
    if not wanted and not own and objectives is None:
        raise ConfigError('nothing to minimise beside the error: give costs={"latency_ms": f}.')
    experiment = Experiment(
        name="search",
        space=space.name,
        device=models["latency_ms"].device if has_latency else "",
        data=Data(source=""),
        objectives=(
            Objective(name="top1"),
            *(Objective(name=n, **_in(precision, limits.get(n))) for n in sorted(wanted)),
        ),
        limits={n: config.Limit(**_in(precision, v)) for n, v in limits.items() if n not in wanted and n not in own},
    )
    tables = {precision: models["latency_ms"]} if has_latency else {}
    made = exact_costs(Searched(experiment, space, tables))
    count = len(cost_names(experiment))
    first = sorted((*made[:count], *(_own(space, n, f, limits.get(n)) for n, f in own.items())), key=lambda c: c.name)
    names = tuple(c.name for c in first)
    return (*first, *made[count:]), names, names if objectives is None else tuple(n for n in names if n in named)


def _in(precision: str, limit: config.Limit | None) -> dict[str, Any]:
    """What is asked of a cost, in that precision where it names none."""
    asked = config.Limit() if limit is None else limit
    return {"at_most": asked.at_most, "tolerance": asked.tolerance, "precision": asked.precision or precision}


def _own(space: Space, name: str, price: Callable[[Genotypes], ArrayLike], asked: config.Limit | None) -> Cost:
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
    limit = within = math.inf
    if asked is not None:
        config.check_limit(name, asked, positive=False)
        assert asked.at_most is not None
        limit = in_unit(asked.at_most, least, most)
        within = tolerated(limit, asked.tolerance)
        if within < least and exact:
            beyond = f" ({within:.6g} with its tolerance)" if within > limit else ""
            raise LimitError(
                f"the limit of {name} is {limit:.6g}{beyond}, but no network of the space has less than {least:.6g} "
                f"(the most is {most:.6g}). Set it between these."
            )
    return Cost(name, priced, priced, least, most, cheapest, name_of(price), None, limit, within)


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
