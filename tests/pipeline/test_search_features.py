"""What a strategy that knows the problem is told of networks beside their costs."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from nas import cost
from nas.pipeline.search import _features
from nas.search import KNOWING, STRATEGIES
from nas.space import load_space


def test_macs_and_parameters_are_those_of_each_network():
    space = load_space("digits_mixed")
    genotypes = space.sample(np.random.default_rng(0), 5)
    job: Any = SimpleNamespace(space=space)
    graphs = [space.decode(genotype).flat() for genotype in genotypes]
    np.testing.assert_array_equal(_features(job)(genotypes), [[cost.macs(g), cost.parameters(g)] for g in graphs])


def test_strategies_that_know_the_problem_take_it():
    for name in KNOWING:
        assert STRATEGIES[name]((2, 3), population=4, problem=None, features=None).init() is not None
