"""Laws over every block: recorded shapes are what the forward pass gives, at every size and stride."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import blocks, cost
from nas.blocks import BLOCKS, record
from nas.blocks.rounding import make_divisible
from nas.ops import Conv, Norm, weights
from nas.run import run

HEADS = [name for name in BLOCKS if "classes" in blocks.options(name)]
CASES = [
    (name, shape, stride)
    for name in BLOCKS
    if name not in HEADS
    for shape in ((8, 8, 8), (7, 5, 8), (1, 1, 8))
    for stride in (1, 2)
]

compiled = jax.jit(run, static_argnums=0, static_argnames="batch_stats")


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
    y, _ = compiled(graph, params_of(graph), jnp.ones((2, *shape)))
    assert y.shape == (2, *graph.shape)
    assert graph.shape == (-(-shape[0] // stride), -(-shape[1] // stride), 16)


@pytest.mark.parametrize("name", BLOCKS)
def test_statistics_measured_on_a_batch_reproduce_the_training_output(name):
    options = {"width": 8} | ({"classes": 3} if name in HEADS else {})
    graph = record(name, (6, 6, 8), tuple(options.items()))
    x = jax.random.normal(jax.random.key(0), (16, 6, 6, 8))
    params = params_of(graph)
    y, seen = compiled(graph, params, x, batch_stats=True)
    assert set(seen) == {w.name for w in weights(graph) if not w.trained}
    again, none = compiled(graph, params | seen, x)
    np.testing.assert_allclose(again, y, rtol=1e-4, atol=1e-4)
    assert none == {}


@pytest.mark.parametrize(("name", "stride"), [(n, s) for n in BLOCKS for s in (1, 2) if n not in HEADS or s == 1])
def test_every_weight_of_a_block_has_a_name_of_its_own(name, stride):
    options = {"width": 16} | ({"classes": 3} if name in HEADS else {"stride": stride})
    names = [w.name for w in weights(record(name, (4, 4, 8), tuple(options.items())))]
    assert len(set(names)) == len(names)


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
        ("fused_mbconv", {"width": 8, "expand": 0}, "expand 0 is not above 0"),
        ("efficientvit", {"width": 8, "dim": 0}, "heads are 0 wide"),
        ("mobilenet_v3_head", {"width": 8, "classes": 3, "features": 0}, "features is 0"),
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


@pytest.mark.parametrize(("channels", "wanted"), [(3, 8), (8, 8), (11, 16), (12, 16), (18, 24), (30, 32), (90, 88)])
def test_widths_are_rounded_to_eights_and_never_down_by_more_than_a_tenth(channels, wanted):
    assert make_divisible(channels) == wanted


def test_squeeze_excite_squeezes_72_channels_to_24_as_once_for_all_does():
    graph = record("mbconv", (4, 4, 24), (("expand", 3), ("se", True), ("width", 40)))
    assert {w.name: w.shape for w in weights(graph)}["se_reduce/kernel"] == (1, 1, 72, 24)


def test_fused_mbconv_has_the_macs_and_parameters_of_its_figure():
    graph = record("fused_mbconv", (8, 8, 16), (("expand", 4), ("width", 16)))
    assert cost.macs(graph) == 8 * 8 * (9 * 16 * 64 + 64 * 16)
    assert cost.parameters(graph) == 9 * 16 * 64 + 64 * 16 + 2 * (64 + 16)
    single = record("fused_mbconv", (8, 8, 16), (("expand", 1), ("stride", 2), ("width", 24)))
    assert cost.macs(single) == 4 * 4 * 9 * 16 * 24
    assert cost.parameters(single) == 9 * 16 * 24 + 2 * 24


def test_identity_is_nothing_until_the_shape_changes():
    assert record("identity", (4, 4, 8), (("width", 8),)).ops == ()
    for change in ({"width": 16}, {"width": 8, "stride": 2}):
        graph = record("identity", (4, 4, 8), tuple(change.items()))
        assert [type(op) for op in graph.ops] == [Conv, Norm]
        assert cost.parameters(graph) == 8 * change["width"] + 2 * change["width"]


def test_efficientvit_has_the_macs_of_its_parts():
    options = {"width": 32, "dim": 16, "expand": 4, "kernel": 3}
    feed_forward = 16 * (32 * 128 + 9 * 128 + 128 * 32)
    for scale, sets in ((0, 1), (5, 2)):
        graph = record("efficientvit", (4, 4, 32), tuple((options | {"scale": scale}).items()))
        qkv, gathered = 16 * 32 * 96, 16 * (scale**2 * 96 + (96 * 16 if scale else 0))
        attention, project = 16 * sets * 2 * (2 * 16 * 17), 16 * sets * 32 * 32
        assert cost.macs(graph) == qkv + gathered + attention + project + feed_forward


def test_where_the_shape_changes_efficientvit_begins_with_an_inverted_residual():
    options = (("expand", 4), ("stride", 2), ("width", 32))
    graph = record("efficientvit", (8, 8, 16), options)
    entry = record("mbconv", (8, 8, 16), options)
    assert {w.name: w.shape for w in weights(graph) if w.name.startswith("entry/")} == {
        f"entry/{w.name}": w.shape for w in weights(entry)
    }
    rest = record("efficientvit", (4, 4, 32), (("expand", 4), ("width", 32)))
    assert cost.macs(graph) == cost.macs(entry) + cost.macs(rest)


def test_mobilenet_v3_head_has_the_parameters_of_once_for_all_s():
    graph = record("mobilenet_v3_head", (7, 7, 160), (("classes", 1000), ("width", 960)))
    assert cost.parameters(graph) == 160 * 960 + 2 * 960 + 960 * 1280 + 1280 * 1000 + 1000


@pytest.mark.parametrize("block", ["mbconv", "fused_mbconv"])
def test_lower_ranks_cost_less_and_full_rank_is_the_plain_convolution(block):
    def of_rank(rank):
        return record(block, (4, 4, 32), (("expand", 4), ("rank", rank), ("width", 32)))

    costs = [cost.parameters(of_rank(rank)) for rank in (0.25, 0.5, 0.75, 1.0)]
    assert costs == sorted(set(costs))
    assert of_rank(1.0) == record(block, (4, 4, 32), (("expand", 4), ("width", 32)))
    shapes = {w.name: w.shape for w in weights(of_rank(0.5))}
    assert "project/kernel" not in shapes
    assert (shapes["project_a/kernel"], shapes["project_b/kernel"]) == ((1, 1, 128, 16), (1, 1, 16, 32))
    assert of_rank(0.9) == of_rank(1.0)  # two convolutions through 32 channels would save nothing
    for rank in (0, 1.5):
        with pytest.raises(ValueError, match="not within"):
            of_rank(rank)


@pytest.mark.parametrize("block", ["mbconv", "fused_mbconv", "shufflenet_v2"])
@pytest.mark.parametrize("stride", [1, 2])
def test_pruning_leaves_the_leading_inner_channels_and_none_is_the_whole_block(block, stride):
    expand = () if block == "shufflenet_v2" else (("expand", 2),)

    def of_share(*prune):
        return record(block, (4, 4, 64), (*expand, *prune, ("stride", stride), ("width", 64)))

    whole, half = of_share(), of_share(("prune", 0.5))
    assert of_share(("prune", 0.0)) == whole
    counts = [cost.parameters(of_share(("prune", share))) for share in (0.0, 0.25, 0.5, 0.75)]
    assert counts == sorted(set(counts), reverse=True)
    shapes, smaller = ({w.name: w.shape for w in weights(g)} for g in (whole, half))
    assert list(smaller) == list(shapes)  # also where as many channels are left as are read
    assert half.shape == whole.shape
    assert smaller["project/kernel"][2] == shapes["project/kernel"][2] // 2
    assert smaller["expand/kernel"][-1] == shapes["expand/kernel"][-1] // 2
    for share in (-0.5, 1.0):
        with pytest.raises(ValueError, match=r"0 or more|not within"):
            of_share(("prune", share))


def test_a_stem_with_pooling_has_the_stride_it_says():
    graph = record("conv_stem", (32, 32, 3), (("pool", True), ("stride", 4), ("width", 8)))
    assert [op.shape for op in graph.ops if isinstance(op, Conv)] == [(16, 16, 8)]
    assert graph.shape == (8, 8, 8)
    with pytest.raises(ValueError, match="stride 1 is odd"):
        record("conv_stem", (32, 32, 3), (("pool", True), ("width", 8)))
