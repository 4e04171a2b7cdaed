"""A strategy by what an experiment says of it: its population, and settings of its own by their names."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from nas.config import nearest
from nas.errors import ConfigError
from nas.search.problem import Problem
from nas.search.strategies import STRATEGIES
from nas.search.strategy import Genotypes, Strategy

Features = Callable[[Genotypes], NDArray[np.float64]]


def make_strategy(
    factory: Callable[..., Strategy],
    problem: Problem,
    *,
    population: int | None = None,
    features: Features | None = None,
    settings: Mapping[str, Any] = types.MappingProxyType({}),
) -> Strategy:
    """`factory(problem.sizes, population=population, **settings)`, with `problem` and `features` where it takes them.

    Args:
        population: that of the strategy itself if None.
        features: [n, genes] -> [n, k]: what else is known of networks without evaluating them.
        settings: `search.settings` of an experiment.

    Raises:
        ConfigError: as `check_settings`.
    """
    check_settings(factory, population=population, settings=settings)
    taken = inspect.signature(factory).parameters
    known = {name: value for name, value in (("problem", problem), ("features", features)) if name in taken}
    return _made(factory, problem.sizes, **_given(population), **known, **settings)


def check_settings(
    factory: Callable[..., Strategy], *, population: int | None = None, settings: Mapping[str, Any]
) -> None:
    """Nothing, if the strategy takes these settings.

    Raises:
        ConfigError: an unknown setting, with the nearest known one, or a value that it does not take; or no population
            where it needs one.
    """
    own = inspect.signature(factory).parameters.get("population")
    if population is None and own is not None and own.default is inspect.Parameter.empty:
        raise ConfigError(f"`search.population`: strategy {_name_of(factory)} has none of its own. Give one.")
    hints = {n: hint for n, hint in typing.get_type_hints(factory).items() if n != "population" and _is_number(hint)}
    for name, value in settings.items():
        if name not in hints:
            hint = nearest(name, hints, kind="setting") if hints else " It has none."
            raise ConfigError(f"`search.settings.{name}`: strategy {_name_of(factory)} has no such setting.{hint}")
        try:
            msgspec.convert(value, hints[name])
        except msgspec.ValidationError as e:
            raise ConfigError(f"`search.settings.{name}` is {value!r}: {e}.") from e
    _made(factory, (2, 2), **_given(population), **settings)


def _name_of(factory: Callable[..., Strategy]) -> str:
    """As experiments name it."""
    return next((name for name, known in STRATEGIES.items() if known is factory), factory.__name__)


def _given(population: int | None) -> dict[str, int]:
    return {} if population is None else {"population": population}


def _made(factory: Callable[..., Strategy], *args: Any, **kwargs: Any) -> Strategy:
    try:
        return factory(*args, **kwargs)
    except ValueError as e:
        raise ConfigError(f"`[search]` with strategy {_name_of(factory)}: {e}.") from e


def _is_number(hint: Any) -> bool:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return {int, float, types.NoneType}.issuperset(parts)
