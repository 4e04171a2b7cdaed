"""Graphs: recording, flattening, keys, JSON."""

import msgspec
import pytest

from nas.catalog import list_spaces
from nas.ops import Act, Block, Conv, Graph, Network, Recorder, flatten, output_shape, weights
from nas.space import load_space


def two_blocks() -> tuple[Block, Block]:
    first = Recorder((8, 8, 3))
    x = first.act(first.norm(first.conv(first.input, "conv", 4, kernel=3, stride=2), "norm"), "relu")
    second = Recorder(x.shape)
    y = second.add(second.input, second.conv(second.input, "conv", 4))
    second.dense(second.pool(y), "logits", 5)
    return Block("a", "a", first.graph()), Block("b", "b", second.graph())


def test_shapes_are_resolved_while_recording():
    a, b = two_blocks()
    assert a.graph.shape == (4, 4, 4)
    assert b.graph.shape == (5,)


def test_a_chain_flattened_computes_the_same_values_in_the_same_order():
    flat = flatten(two_blocks())
    assert [op.inputs for op in flat.ops] == [(0,), (1,), (2,), (3,), (3, 4), (5,), (6,)]
    assert [w.name for w in weights(flat)] == [
        "a/conv/kernel", "a/norm/scale", "a/norm/offset", "a/norm/mean", "a/norm/var",
        "b/conv/kernel", "b/logits/kernel", "b/logits/bias",
    ]  # fmt: skip


def test_networks_round_trip_through_json_byte_for_byte():
    network = Network(two_blocks())
    data = msgspec.json.encode(network)
    again = msgspec.json.decode(data, type=Network)
    assert again == network
    assert hash(again) == hash(network)
    assert msgspec.json.encode(again) == data


def test_a_block_made_of_blocks_names_weights_below_each():
    net = Recorder((4, 4, 6))
    x = net.conv(net.input, "conv", 6)
    inner = net.under("first")
    x = inner.norm(inner.conv(x, "conv", 6), "norm")
    x = net.dense(net.under("second").under("third").conv(x, "conv", 6), "logits", 2)
    assert [op.name for op in net.graph().ops if hasattr(op, "name")] == [
        "conv", "first/conv", "first/norm", "second/third/conv", "logits",
    ]  # fmt: skip
    assert x.number == len(net.graph().ops)


def test_attention_has_a_third_of_the_channels_it_reads_and_survives_json():
    net = Recorder((4, 4, 24))
    assert net.linear_attention(net.input, 4).shape == (4, 4, 8)
    graph = net.graph()
    assert msgspec.json.decode(msgspec.json.encode(graph), type=Graph) == graph


def test_a_block_has_one_key_wherever_it_stands_and_another_for_another_input():
    a, _ = two_blocks()
    assert Block("elsewhere", "x", a.graph).graph.key == a.graph.key
    assert Graph((9, 9, 3), a.graph.ops).key != a.graph.key
    assert isinstance(a.graph.ops[0], Conv)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda net, x: net.conv(x, "c", 4, groups=2), "do not divide into 2 groups"),
        (lambda net, x: net.act(x, "rleu"), "unknown activation 'rleu'"),
        (lambda net, x: net.split(x, 2, 9), "not within 3 channels"),
        (lambda net, x: net.shuffle(x, 2), "do not divide"),
        (lambda net, x: net.add(x, net.pool(x)), "differ"),
        (lambda net, x: net.mul(net.pool(x), x), "does not fit"),
        (lambda net, x: net.linear_attention(x, 2), "3 channels are not queries, keys and values of heads of 2"),
        (lambda net, x: net.concat(x, net.pool(x)), "differ in more than channels"),
        (lambda net, x: net.concat(), "reads 1 value, not 0"),
        (lambda net, x: net.conv(net.dense(x, "d", 4), "c", 4), "an image .* is needed, not shape \\(4,\\)"),
        (lambda net, x: net.pool(net.dense(x, "d", 4)), "an image"),
        (lambda net, x: net.conv(x, "c", 0), "conv 'c': features is 0: a whole number from 1 on"),
        (lambda net, x: net.conv(x, "c", -5), "features is -5"),
        (lambda net, x: net.conv(x, "c", 4, kernel=0), "kernel is 0"),
        (lambda net, x: net.conv(x, "c", 4, kernel=3.0), "kernel is 3.0"),
        (lambda net, x: net.conv(x, "c", 4, kernel=True), "kernel is True"),
        (lambda net, x: net.conv(x, "c", 4, kernel="3"), "kernel is '3'"),
        (lambda net, x: net.conv(x, "c", 4, kernel=[3]), "kernel is "),
        (lambda net, x: net.conv(x, "c", 4, kernel=4), "kernel 4 is even"),
        (lambda net, x: net.conv(x, "c", 4, stride=0), "stride is 0"),
        (lambda net, x: net.conv(x, "c", 4, groups=0), "groups is 0"),
        (lambda net, x: net.dense(x, "d", 0), "dense 'd': features is 0"),
        (lambda net, x: net.pool(x, window=-1), "window is -1"),
        (lambda net, x: net.pool(x, window=3, stride=0), "stride is 0"),
        (lambda net, x: net.split(x, 2, 2), "not within 3 channels"),
        (lambda net, x: net.shuffle(x, 0), "groups is 0"),
    ],
)
def test_ops_that_do_not_fit_are_refused_while_recording(record, message):
    net = Recorder((8, 8, 3))
    with pytest.raises(ValueError, match=message):
        record(net, net.input)


@pytest.mark.parametrize("name", list_spaces())
def test_shapes_follow_from_the_ops_whatever_is_written(name):
    space = load_space(name)
    graph = space.decode(space.largest()).flat()
    for op in graph.ops:
        inputs = [graph.shape_of(v) for v in op.inputs]
        assert output_shape(op, inputs) == op.shape
        if isinstance(op, Act):
            assert output_shape(msgspec.structs.replace(op, shape=(1, 2, 3)), inputs) == op.shape
