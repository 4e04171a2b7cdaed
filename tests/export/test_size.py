"""File sizes by blocks against files."""

import math

import numpy as np
import pytest
from export.networks import params_of

from nas.export.onnx import to_bytes, to_onnx
from nas.export.size import onnx_bytes
from nas.fold import fold
from nas.ops import Act
from nas.quantise import Quantisation, Scale, sources
from nas.space import load_space


def scaled(graph, rng):
    """Irregular scales, as calibration gives them; a ReLU's begin at 0."""

    def scale(v):
        op = graph.ops[v - 1] if v else None
        clipped = isinstance(op, Act) and op.function in ("relu", "relu6")
        limit = 6.0 if clipped and op.function == "relu6" else math.inf
        return Scale.of(0.0 if clipped else -rng.lognormal(), rng.lognormal(), at_most=limit)

    own = {v: scale(v) for v in set(sources(graph)) if v is not None}
    return Quantisation(tuple(None if v is None else own[v] for v in sources(graph)))


@pytest.mark.parametrize(("precision", "error"), [("float32", 0.002), ("int8", 0.01)])
@pytest.mark.parametrize(
    ("space", "shape"),
    [("digits_mixed", (16, 16, 1)), ("mobilenet_v3_32", (32, 32, 3)), ("shufflenet_v2_32", (32, 32, 3))],
)
def test_the_size_of_a_file_is_known_without_writing_it(space, shape, precision, error):
    """Seen: at most 0.12 % off in float32 and 0.80 % in int8, of files of 40 kB to 6 MB."""
    space = load_space(space, input_shape=shape, classes=10)
    parts = onnx_bytes(space, precision)
    rng = np.random.default_rng(0)
    for genotype in space.sample(rng, 12):
        graph = space.decode(genotype).flat()
        params = params_of(graph)
        quantisation = scaled(fold(graph, params)[0], rng) if precision == "int8" else None
        size = len(to_bytes(to_onnx(graph, params, quantisation)))
        assert space.price(genotype, parts) == pytest.approx(size, rel=error)
