"""Laws over every block: recorded shapes are what the forward pass gives, at every size and stride."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import blocks, cost
from nas.blocks import BLOCKS, record
from nas.ops import weights
from nas.run import run

CASES = [
    (name, shape, stride)
    for name in BLOCKS
    if name != "classifier"
    for shape in ((8, 8, 8), (7, 5, 8), (1, 1, 8))
    for stride in (1, 2)
]


def params_of(graph, seed=0):
    rng = np.random.default_rng(seed)
    return {
        w.name: jnp.asarray(
            rng.normal(size=w.shape) / w.fan_in**0.5
            if w.role == "kernel"
            else np.full(w.shape, w.role in ("scale", "var")),
            jnp.float32,
        )
        for w in weights(graph)
    }


@pytest.mark.parametrize(("name", "shape", "stride"), CASES)
def test_the_forward_pass_has_the_recorded_shape(name, shape, stride):
    graph = record(name, shape, (("stride", stride), ("width", 16)))
    y, _ = run(graph, params_of(graph), jnp.ones((2, *shape)))
    assert y.shape == (2, *graph.shape)
    assert graph.shape == (-(-shape[0] // stride), -(-shape[1] // stride), 16)


@pytest.mark.parametrize("name", BLOCKS)
def test_statistics_measured_on_a_batch_reproduce_the_training_output(name):
    options = {"width": 8} | ({"classes": 3} if "classes" in blocks.options(name) else {})
    graph = record(name, (6, 6, 8), tuple(options.items()))
    x = jax.random.normal(jax.random.key(0), (16, 6, 6, 8))
    params = params_of(graph)
    y, seen = run(graph, params, x, batch_stats=True)
    assert set(seen) == {w.name for w in weights(graph) if not w.trained}
    again, none = run(graph, params | seen, x)
    np.testing.assert_allclose(again, y, rtol=1e-4, atol=1e-4)
    assert none == {}


def test_mbconv_has_the_macs_and_parameters_of_the_paper_s_table():
    # MobileNetV2 bottleneck 56x56x24 -> 56x56x24, expansion 6: by hand
    graph = record("mbconv", (56, 56, 24), (("act", "relu6"), ("expand", 6), ("kernel", 3), ("width", 24)))
    assert cost.macs(graph) == 56 * 56 * (24 * 144 + 9 * 144 + 144 * 24)
    assert cost.parameters(graph) == 24 * 144 + 9 * 144 + 144 * 24 + 2 * (144 + 144 + 24)
    assert cost.peak_activation_bytes(graph) == 4 * 56 * 56 * (24 + 144 + 144)


def test_squeeze_excite_starts_as_a_gate_between_0_and_1():
    graph = record("mbconv", (4, 4, 8), (("act", "relu"), ("expand", 2), ("se", True), ("width", 16)))
    assert {"se_reduce/kernel", "se_reduce/bias", "se_expand/kernel", "se_expand/bias"} < set(params_of(graph))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mbconv", {}, "`width` is missing"),
        ("mbconv", {"width": 8, "kernal": 3}, "no option `kernal`. Did you mean `kernel`"),
        ("mbconv", {"width": 8, "kernel": 3.0}, "`kernel` is 3.0: a whole number"),
        ("mbconv", {"width": 8, "kernel": True}, "`kernel` is True: a whole number"),
        ("mbconv", {"width": 8, "kernel": (3, 5)}, "`kernel` is .*: a whole number"),
        ("mbconv", {"width": 8, "kernel": [3, 5]}, "`kernel` is .*: a whole number"),
        ("mbconv", {"width": 8, "kernel": -3}, "`kernel` is -3: a whole number, 0 or more"),
        ("mbconv", {"width": 8, "kernel": 4}, "kernel 4 is even"),
        ("mbconv", {"width": 8, "expand": 0}, "expand 0 is not above 0"),
        ("mbconv", {"width": 8, "expand": 0.01}, "features is 0"),
        ("mbconv", {"width": 8, "expand": -1}, "`expand` is -1: a number, 0 or more"),
        ("mbconv", {"width": 8, "expand": float("inf")}, "`expand` is inf"),
        ("mbconv", {"width": 8, "expand": float("nan")}, "`expand` is nan"),
        ("mbconv", {"width": 8, "se": "yes"}, "`se` is 'yes': true or false"),
        ("mbconv", {"width": 8, "se": 1}, "`se` is 1: true or false"),
        ("mbconv", {"width": 8, "act": "hardswish"}, "`act` is 'hardswish'. Did you mean `hard_swish`"),
        ("mbconv", {"width": 8, "act": 3}, "`act` is 3"),
        ("conv_stem", {"width": 0}, "features is 0"),
        ("conv_stem", {"width": 8, "stride": 0}, "stride is 0"),
        ("classifier", {"width": -5, "classes": 3}, "`width` is -5"),
    ],
)
def test_options_of_a_wrong_type_or_size_are_told(name, options, message):
    with pytest.raises(ValueError, match=message) as told:
        record(name, (4, 4, 8), tuple(options.items()))
    assert not str(told.value).endswith(".")  # the file and line are put around it


def test_what_is_equal_to_an_option_but_of_another_type_does_not_pass_by_the_cache():
    assert record("mbconv", (4, 4, 8), (("kernel", 3), ("width", 8)))
    with pytest.raises(ValueError, match="kernel"):
        record("mbconv", (4, 4, 8), (("kernel", 3.0), ("width", 8)))


def test_an_odd_width_cannot_be_split_in_halves():
    with pytest.raises(ValueError, match="odd"):
        record("shufflenet_v2", (4, 4, 8), (("width", 15),))
