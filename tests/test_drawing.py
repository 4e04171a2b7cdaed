"""Laws of the pictures."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from nas import catalog, words
from nas.drawing import BARS, WIDTH, draw, reach, strip
from nas.ops import Block, Network, Recorder
from nas.space import load_space

SVG = "{http://www.w3.org/2000/svg}"


def networks(space_name):
    space = load_space(space_name, input_shape=(32, 32, 3))
    genotypes = [space.smallest(), space.largest(), *space.sample(np.random.default_rng(1), 5)]
    return [(space, space.decode(g)) for g in genotypes]


def bars(svg):
    """(left end, width) of every bar, from top to bottom."""
    return [(float(r.get("x")), float(r.get("width"))) for r in ElementTree.fromstring(svg).iter(f"{SVG}rect")]


@pytest.mark.parametrize("name", catalog.list_spaces())
def test_one_bar_a_block_each_beginning_where_the_last_one_ended(name):
    for space, network in networks(name):
        times = np.random.default_rng(2).uniform(0.01, 1, len(network.blocks)).tolist()
        found = bars(draw(network, times, positions=[p.name for p in space.positions]))
        assert len(found) == len(network.blocks)
        assert sum(width for _, width in found) == pytest.approx(BARS[1] - BARS[0], abs=0.01 * len(found))
        assert found[0][0] == BARS[0]
        for (x, width), (following, _) in pairwise(found):
            assert x + width == pytest.approx(following, abs=0.011)


@pytest.mark.parametrize("name", catalog.list_spaces())
def test_every_position_that_is_not_taken_is_drawn_as_a_gap(name):
    for space, network in networks(name):
        svg = draw(network, [1.0] * len(network.blocks), positions=[p.name for p in space.positions])
        assert svg.count(">skipped</text>") == len(space.positions) - len(network.blocks)


def test_two_networks_drawn_to_one_scale_have_bars_of_one_scale():
    _, network = networks("digits_mixed")[0]
    n = len(network.blocks)
    half = bars(draw(network, [0.1] * n, span_ms=0.2 * n))
    assert sum(width for _, width in half) == pytest.approx((BARS[1] - BARS[0]) / 2, abs=0.1)


@pytest.mark.parametrize("once", [0.3, 0.0, -0.05])
def test_what_comes_once_a_network_is_a_bar_of_its_own_that_ends_at_the_sum(once):
    _, network = networks("digits_mixed")[1]
    times = [0.1 + 0.01 * i for i in range(len(network.blocks))]
    svg = draw(network, [*times, once])
    *blocks, (x, width) = bars(svg)
    pixels_per_ms = blocks[0][1] / times[0]
    assert width == pytest.approx(abs(once) * pixels_per_ms, abs=0.02)
    assert (x + width if once > 0 else x) == pytest.approx(BARS[0] + (sum(times) + once) * pixels_per_ms, abs=0.5)
    assert blocks[-1][0] + blocks[-1][1] == pytest.approx(x if once > 0 else x + width, abs=0.02)
    assert max(a + b for a, b in (*blocks, (x, width))) <= BARS[1] + 0.02
    assert f"{len(network.blocks)} blocks, {words.ms(sum(times) + once)} predicted" in svg
    assert ">once a network<" in svg


def test_bars_reach_farther_than_their_sum_where_the_last_goes_back():
    assert reach([0.1, 0.2, 0.1]) == pytest.approx(0.4)
    assert reach([0.1, 0.2, -0.1]) == pytest.approx(0.3)
    assert reach([]) == 0.0


def test_every_block_says_what_it_is_when_pointed_at():
    _, network = networks("digits_mixed")[1]
    svg = draw(network, [0.25] * len(network.blocks))
    titles = [t.text or "" for t in ElementTree.fromstring(svg).iter(f"{SVG}title")]
    for block, title in zip(network.blocks, titles, strict=True):
        assert title.startswith(block.name)
        assert words.shape(block.graph.shape) in title
        assert "0.250\N{NO-BREAK SPACE}ms" in title


def test_the_limit_is_a_line_and_no_time_stands_on_it():
    _, network = networks("digits_mixed")[0]
    n = len(network.blocks)
    svg = draw(network, [0.1] * n, limit_ms=0.1 * n * 1.01)
    (limit,) = re.findall(r'<line x1="([\d.]+)"[^>]*stroke="#d9534f"', svg)
    last = ElementTree.fromstring(svg).findall(f"{SVG}g[@class='block']")[-1].findall(f"{SVG}text")[-1]
    assert last.get("text-anchor") == "end"
    assert float(last.get("x", "nan")) < float(limit)


def test_a_latency_for_each_block_is_needed():
    _, network = networks("digits_mixed")[0]
    with pytest.raises(ValueError, match="one each is needed"):
        draw(network, [1.0])
    with pytest.raises(ValueError, match="at most one for the network"):
        draw(network, [1.0] * (len(network.blocks) + 2))


def test_names_are_escaped_and_unknown_blocks_drawn():
    net = Recorder((4, 4, 1))
    net.dense(net.input, "logits", 2)
    svg = draw(Network((Block("head/<b>&", "<b>& mode=<i>", net.graph()),)), [0.0])
    ElementTree.fromstring(svg)
    assert "&lt;b&gt;&amp;" in svg
    assert "<b>" not in svg


@pytest.mark.parametrize("median", [0.08, 0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("limit_ms", [None, 0.1, 0.3, 0.5])
def test_all_of_a_strip_is_within_it(median, limit_ms):
    root = ElementTree.fromstring(strip((0.1, 0.5), limit_ms, 0.95 * median, median, 1.1 * median))
    assert all(0 <= float(text.get("x", "nan")) <= WIDTH for text in root.iter(f"{SVG}text"))
    assert all(0 <= float(line.get("x1", "nan")) <= WIDTH for line in root.iter(f"{SVG}line"))
