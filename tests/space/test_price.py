"""The arithmetic of additive costs over populations, against the same sums done block by block."""

import msgspec
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import catalog
from nas.errors import SpaceError
from nas.latency import Correction, Entry, Table
from nas.space import Position, Space, load_space
from nas.space import space as module

PLAIN = Correction(1 / 0.9, -0.0031, {"add": 1 / 700, "conv": 1e-4 / 3})
FULL = Correction(  # every part that a correction can have
    scale=1 / 0.9,
    offset_ms=-0.0031,
    op_ms={"add": 1 / 700, "conv": 1e-4 / 3},
    weights_ms=1 / 7,
    floor_ms=1e-2 / 3,
    kind_scale={"mbconv": 1 / 0.7, "conv_stem": 1.1},
    border_ms={"add > conv": 1 / 30, "conv > conv": -1 / 70, "conv > depthwise": 1 / 9, "act > conv": 1 / 11},
)


def table_of(space: Space, seed: int = 0, correction: Correction = PLAIN) -> Table:
    rng = np.random.default_rng(seed)
    return Table(
        device="a test",
        runtime="onnxruntime",
        runtime_version="1",
        precision="float32",
        threads=1,
        batch=1,
        hardware="none",
        space=space.name,
        space_digest=space.digest,
        date="2026-01-01T00:00:00+00:00",
        command="none",
        overhead_ms=0.0,
        correction=correction,
        anchors=(),
        entries={
            key: Entry(float(rng.lognormal(-3, 2)), 0.0, b.label, role, 1) for key, (b, role) in space.blocks().items()
        },
    )


@pytest.fixture(scope="module")
def spaces(tmp_path_factory) -> list[Space]:
    """Two to draw genotypes of: with a choice of blocks, and with one of resolutions."""
    folder = tmp_path_factory.mktemp("spaces")
    return [tiny.space(folder), tiny.elastic_space(folder)]


@pytest.mark.parametrize("correction", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("name", catalog.list_spaces())
def test_a_population_costs_what_each_of_its_networks_does_to_the_last_bit(name, correction):
    space = load_space(name)
    table = table_of(space, correction=correction)
    genotypes = space.sample(np.random.default_rng(1), 40)
    each = [table.network_ms(space.decode(g)) for g in genotypes]
    assert table.price(space, genotypes).tolist() == each


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_genotypes_in_any_form_cost_what_each_of_them_does(spaces, data):
    space = data.draw(st.sampled_from(spaces))
    table = table_of(space, data.draw(st.integers(0, 3)), data.draw(st.sampled_from([PLAIN, FULL])))
    shape = data.draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3)]))
    dtype = data.draw(st.sampled_from([np.uint8, np.int64, np.int8]))
    order = data.draw(st.sampled_from("CF"))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    genotypes = np.asarray(rng.integers(0, space.sizes, (*shape, len(space.sizes))), dtype, order=order)
    prices = table.price(space, genotypes)
    assert prices.shape == shape
    rows = genotypes.reshape(-1, len(space.sizes))
    assert prices.ravel().tolist() == [table.network_ms(space.decode(g)) for g in rows]


@pytest.mark.parametrize("correction", [PLAIN, FULL], ids=["plain", "full"])
def test_the_seams_between_parts_of_a_population_do_not_show(spaces, correction, monkeypatch):
    space = spaces[1]
    table, genotypes = table_of(space, correction=correction), space.sample(np.random.default_rng(0), 23)
    whole = table.price(space, genotypes), space.branches(genotypes), space.canonical(genotypes)
    monkeypatch.setattr(module, "_PART", 5)
    parts = table.price(space, genotypes), space.branches(genotypes), space.canonical(genotypes)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("correction", [PLAIN, FULL], ids=["plain", "full"])
def test_the_reachable_range_is_that_of_all_networks_there_are(spaces, correction, seed):
    for space in spaces:
        table = table_of(space, seed, correction)
        low, fastest, high, slowest = table.reachable(space)
        assert [table.network_ms(space.decode(g)) for g in (fastest, slowest)] == [low, high]
        if np.prod(space.sizes) < 2e5:
            prices = table.price(space, np.indices(space.sizes).reshape(len(space.sizes), -1).T)
            assert (prices.min(), prices.max()) == (low, high)
        else:
            prices = table.price(space, space.sample(np.random.default_rng(seed), 20_000))
            assert low <= prices.min() <= prices.max() <= high


def test_what_neighbours_cost_moves_the_extremes(spaces):
    """A cost of borders alone: the extremes are of networks with the fewest and the most of them."""
    space = spaces[0]
    table = table_of(space, correction=Correction(scale=0.0, border_ms={"add > conv": 1.0, "shuffle > conv": 1.0}))
    genotypes = np.indices(space.sizes).reshape(len(space.sizes), -1).T
    prices = table.price(space, genotypes)
    low, _, high, _ = table.reachable(space)
    assert (low, high) == (prices.min(), prices.max())
    assert high > low


def test_a_block_that_cannot_run_is_in_no_extreme_with_neighbours_either(spaces):
    space = spaces[0]
    table = table_of(space, correction=FULL)
    key = next(k for k, (b, role) in space.blocks().items() if role == "middle" and b.label.startswith("shuffle"))
    table = msgspec.structs.replace(table, unsupported={key: "it fell over"})
    genotypes = np.indices(space.sizes).reshape(len(space.sizes), -1).T
    prices = table.price(space, genotypes)
    low, _, high, _ = table.reachable(space)
    assert np.isinf(prices).any()
    finite = prices[np.isfinite(prices)]
    assert (low, high) == (finite.min(), finite.max())


def test_branches_are_those_that_the_genes_of_each_position_name(spaces):
    for space in spaces:
        genotypes = space.sample(np.random.default_rng(0), 50)
        expected = [[p.branch_of[tuple(g[list(p.genes)])] for p in space.positions] for g in genotypes]
        assert space.branches(genotypes).tolist() == expected


def test_256_values_of_a_choice_have_256_indices():
    position = Position("stage", (0,), np.arange(256, dtype=np.int32), (None,) * 256)
    assert position.index(np.arange(256, dtype=np.uint8)[None]).tolist() == list(range(256))


@pytest.mark.parametrize("order", ["C", "F"])
def test_canonical_sets_to_0_what_does_not_matter_and_nothing_else(spaces, order):
    for space in spaces:
        genotypes = np.asarray(np.random.default_rng(0).integers(0, space.sizes, (200, len(space.sizes))), order=order)
        canonical = space.canonical(genotypes)
        for before, after in zip(genotypes, canonical, strict=True):
            for gene, choice in enumerate(space.choices):
                matters = all(after[other] in values for other, values in choice.conditions)
                assert after[gene] == (before[gene] if matters else 0)
        np.testing.assert_array_equal(space.branches(canonical), space.branches(genotypes))


@pytest.mark.parametrize("value", [-1, 2, 255])
@pytest.mark.parametrize("what", ["price", "branches"])
def test_a_gene_out_of_range_is_named_and_never_looked_up(spaces, what, value):
    space = spaces[0]
    genotypes = np.zeros((3, len(space.sizes)), int)
    gene = space.sizes.index(2)
    genotypes[1, gene] = value
    arguments = (table_of(space).costs(space),) if what == "price" else ()
    with pytest.raises(SpaceError, match=rf"gene {gene} .* is {value}; .* must be 0\.\.1"):
        getattr(space, what)(genotypes, *arguments)


def test_a_space_without_choices_has_a_price(spaces):
    space = spaces[0]
    only = space.only(space.largest())
    table = table_of(only)
    assert table.price(only, np.zeros((2, 0), np.uint8)).tolist() == [table.network_ms(only.decode([]))] * 2
