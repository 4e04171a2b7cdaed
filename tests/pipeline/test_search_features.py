"""What a strategy that knows the problem is told of networks beside their costs."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nas import cost
from nas.errors import ConfigError
from nas.pipeline.search import sizes_of
from nas.search import Strategy, make_strategy, random_search
from nas.space import load_space


def test_macs_and_parameters_are_those_of_each_network():
    space = load_space("digits_mixed")
    genotypes = space.sample(np.random.default_rng(0), 5)
    job: Any = SimpleNamespace(space=space)
    graphs = [space.decode(genotype).flat() for genotype in genotypes]
    np.testing.assert_array_equal(sizes_of(job.space)(genotypes), [[cost.macs(g), cost.parameters(g)] for g in graphs])


def test_strategies_that_want_features_are_given_them():
    given: list[Any] = []

    def factory(sizes: tuple[int, ...], *, population: int, features: Any = None) -> Strategy:
        given.append(features)
        return random_search(sizes, population=population)

    problem: Any = SimpleNamespace(sizes=(2, 3))
    make_strategy(factory, problem, population=4, features=np.zeros_like)
    assert given[-1] is np.zeros_like
    assert make_strategy(random_search, problem, population=4, features=np.zeros_like).identity


def test_a_strategy_without_a_population_of_its_own_asks_for_one():
    def factory(sizes: tuple[int, ...], *, population: int) -> Strategy:
        return random_search(sizes, population=population)

    problem: Any = SimpleNamespace(sizes=(2, 3))
    with pytest.raises(ConfigError, match=r"strategy factory has none of its own\. Give one"):
        make_strategy(factory, problem)
