"""Folding batch normalisation changes no output and leaves no norm that could go."""

import numpy as np
import pytest
from export.networks import GRAPHS, compiled, images_of, params_of, recorded, reference

from nas.fold import fold
from nas.ops import Norm, weights
from nas.run import run


@pytest.mark.parametrize("name", GRAPHS)
def test_folded_network_computes_the_same(name):
    images, expected = reference(name)
    folded, arrays = fold(GRAPHS[name], params_of(GRAPHS[name]))
    assert {k: v.shape for k, v in arrays.items()} == {w.name: w.shape for w in weights(folded)}
    assert all(v.dtype == np.float32 for v in arrays.values())
    got = compiled(folded, arrays, images)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_only_norms_that_cannot_be_folded_stay():
    stay = {name: sum(isinstance(op, Norm) for op in fold(g, params_of(g))[0].ops) for name, g in GRAPHS.items()}
    assert {name: n for name, n in stay.items() if n} == {"everything": 2}


def test_an_existing_bias_is_kept():
    graph = recorded((3, 3, 2), lambda net, x: net.norm(net.conv(x, "conv", 4, bias=True), "norm"))
    params, images = params_of(graph), images_of(graph, 2)
    folded, arrays = fold(graph, params)
    np.testing.assert_allclose(run(folded, arrays, images)[0], run(graph, params, images)[0], rtol=1e-5, atol=1e-5)


def test_folding_twice_is_folding_once():
    folded, arrays = fold(GRAPHS["everything"], params_of(GRAPHS["everything"]))
    again, same = fold(folded, arrays)
    assert again == folded
    assert all((same[k] == arrays[k]).all() for k in arrays)
