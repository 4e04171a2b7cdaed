"""Graphs: recording, flattening, keys, JSON."""

import msgspec
import pytest

from nas.ops import Block, Conv, Graph, Network, Recorder, flatten, weights


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
    ],
)
def test_ops_that_do_not_fit_are_refused_while_recording(record, message):
    net = Recorder((8, 8, 3))
    with pytest.raises(ValueError, match=message):
        record(net, net.input)
