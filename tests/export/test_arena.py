"""Peak activation memory on paper against the arena that LiteRT plans: read off the addresses of its tensors."""

import numpy as np
import pytest
from export.networks import params_of

from nas import cost
from nas.export import tflite
from nas.space import load_space

interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is not installed")


def arena_bytes(content: bytes) -> int:
    """From the first byte of the tensors that are not constants to the last, scratch memory of kernels included.

    Without XNNPACK, which would plan what it runs by itself and hide it.
    """
    kind = interpreter.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    made = interpreter.Interpreter(model_content=content, experimental_op_resolver_type=kind, num_threads=1)
    made.allocate_tensors()
    ends = []
    for details in made.get_tensor_details():
        if not details["name"].startswith("constant_"):
            view = made.tensor(details["index"])()
            start = view.__array_interface__["data"][0]
            ends.append((start, start + view.nbytes))
    return max(end for _, end in ends) - min(start for start, _ in ends)


@pytest.mark.parametrize(
    ("space", "shape"),
    [("mobilenet_v3_32", (32, 32, 3)), pytest.param("mobilenet_v3", (224, 224, 3), marks=pytest.mark.slow)],
)
def test_peak_activation_memory_is_what_the_runtime_plans_or_a_little_less(space, shape):
    """Seen: 2.1 % less on average at 32 px and 1.5 % at 224, at most 6.9 %, never more: tensors leave gaps."""
    space = load_space(space, input_shape=shape)
    errors = []
    for genotype in space.sample(np.random.default_rng(0), 20):
        graph = space.decode(genotype).flat()
        errors.append(cost.peak_activation_bytes(graph) / arena_bytes(tflite.to_bytes(graph, params_of(graph))) - 1)
    assert max(errors) <= 0
    assert min(errors) > -0.1
    assert np.mean(errors) > -0.04
