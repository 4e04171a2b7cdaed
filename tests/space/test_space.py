"""Laws over every space that comes with the package, and over small ones made for a purpose."""

import itertools

import numpy as np
import pytest

from nas import catalog, cost
from nas.errors import ConfigError, SpaceError
from nas.ops import Network
from nas.space import Space, load_space

SPACES = catalog.list_spaces()

WIDE = """
[stem]
block = "conv_stem"
width = 8
[[stage]]
block = ["mbconv", "shufflenet_v2"]
stride = 2
depth = [1, 3]
width = [8, 12, 16]
kernel = [3, 5]
expand = [1, 2]
tied = ["kernel"]
[[stage]]
block = "mbconv"
depth = 2
width = [12, 16]
se = [false, true]
[head]
block = "classifier"
width = 0
"""


@pytest.fixture(params=[*SPACES, "wide"])
def space(request, tmp_path) -> Space:
    if request.param == "wide":
        (tmp_path / "wide.toml").write_text(WIDE)
        return load_space(str(tmp_path / "wide.toml"), input_shape=(16, 16, 3), classes=7)
    return load_space(request.param, input_shape=(32, 32, 3), classes=10)


def test_every_genotype_decodes_to_a_chain_that_fits(space):
    for genotype in space.sample(np.random.default_rng(0), 50):
        network = space.decode(genotype)
        assert network.input[0] in space.resolutions
        assert network.classes == space.classes
        for before, after in itertools.pairwise(network.blocks):
            assert before.graph.shape == after.graph.input


def test_encode_undoes_describe(space):
    for genotype in space.sample(np.random.default_rng(1), 50):
        np.testing.assert_array_equal(space.encode(space.describe(genotype)), genotype)


def test_canonical_genotypes_name_the_same_network_and_equal_networks_have_one(space):
    raw = np.random.default_rng(2).integers(0, space.sizes, size=(200, len(space.sizes)), dtype=np.uint8)
    canonical = space.canonical(raw)
    np.testing.assert_array_equal(space.branches(raw), space.branches(canonical))
    np.testing.assert_array_equal(space.canonical(canonical), canonical)


@pytest.mark.parametrize("of", [cost.macs, cost.parameters])
def test_additive_costs_equal_those_of_the_whole_network(space, of):
    genotypes = space.sample(np.random.default_rng(3), 50)
    prices = space.price(genotypes, space.costs(of))
    for genotype, price in zip(genotypes, prices, strict=True):
        assert price == of(space.decode(genotype).flat())
        assert price == space.price(genotype, space.costs(of))


def test_extremes_are_those_of_the_enumerated_space(tmp_path):
    (tmp_path / "wide.toml").write_text(WIDE.replace("[1, 3]", "[1, 2]").replace("[8, 12, 16]", "[8, 16]"))
    space = load_space(str(tmp_path / "wide.toml"), input_shape=(16, 16, 3), classes=7)
    everything = np.array(list(itertools.product(*map(range, space.sizes))), np.uint8)
    rng = np.random.default_rng(4)
    for _ in range(5):
        costs = [rng.normal(size=len(p.branches)) for p in space.positions]
        prices = space.price(everything, costs)
        for largest, value in ((False, prices.min()), (True, prices.max())):
            genotype, found = space.extreme(costs, largest=largest)
            assert found == pytest.approx(value)
            assert space.price(genotype, costs) == found
    assert space.count() == len(np.unique(space.canonical(everything), axis=0))


def test_sampled_prices_never_leave_the_reachable_range(space):
    costs = space.costs(cost.macs)
    prices = space.price(space.sample(np.random.default_rng(5), 2000), costs)
    assert space.extreme(costs, largest=False)[1] <= prices.min()
    assert prices.max() <= space.extreme(costs, largest=True)[1]


def test_the_digest_is_of_the_meaning_not_of_the_object():
    name = SPACES[0]
    assert load_space(name).digest == load_space(name).digest
    assert load_space(name).digest != load_space(name, classes=11).digest


def test_uniform_networks_take_one_value_everywhere(space):
    network: Network = space.decode(space.uniform(depth=max, kernel=max))
    kernels: dict[str, set[str]] = {}
    for block in network.blocks:
        if block.name.startswith("stage") and "kernel=" in block.label:
            kernels.setdefault(block.name.split("/")[0], set()).add(block.label.split("kernel=")[1].split()[0])
    assert all(len(found) == 1 for found in kernels.values()), kernels  # one stage may offer others than the next


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("kernel = [3, 5]", "kernal = [3, 5]"), r"line 10: unknown key `kernal`. Did you mean `kernel`"),
        (('"mbconv", "shufflenet_v2"', '"mbconv", "shuflenet"'), r"line 6: unknown block `shuflenet`. Did you mean"),
        (("depth = [1, 3]", "depth = [1, 1]"), "none twice"),
        (("depth = [1, 3]", "depth = []"), "at least one value"),
        (("depth = [1, 3]", "depth = [0, 3]"), "positive whole numbers"),
        (("stride = 2", "stride = [1, 2]"), "a stride cannot be chosen"),
        (("[8, 12, 16]", "[8, 13, 16]"), "width 13 is odd"),
        (('tied = ["kernel"]', 'tied = ["kernels"]'), "Did you mean `kernel`"),
        (('block = "classifier"', 'block = ["classifier", "conv_stem"]'), r"\[head\] is one block"),
        (('"mbconv", "shufflenet_v2"', "{ mbconv = { kernal = 5 } }"), "no option `kernal` to fix here. Did you mean"),
        (('"mbconv", "shufflenet_v2"', "{ mbconv = 5 }"), "a name is needed, or a table"),
        (('"mbconv", "shufflenet_v2"', "{ mbconv = { kernel = 5 } }"), "`kernel` is fixed in every entry"),
        (("[head]", "[haed]"), "unknown key `haed`. Did you mean `head`"),
        (("se = [false, true]", "se = [false, true"), "not valid TOML"),
        (("kernel = [3, 5]", "kernel = [[3], [5]]"), r"line 10: `kernel` is \[\[3\], \[5\]\]: one value, or a list"),
        (("kernel = [3, 5]", "kernel = {a = 1}"), "line 10: `kernel` is .*: one value, or a list"),
        (("kernel = [3, 5]", "kernel = '3'"), "`kernel` is '3': a whole number"),
        (("kernel = [3, 5]", "kernel = 0"), "kernel is 0"),
        (("kernel = [3, 5]", "kernel = -3"), "`kernel` is -3"),
        (("kernel = [3, 5]", "kernel = 3.0"), "`kernel` is 3.0: a whole number"),
        (("kernel = [3, 5]", "kernel = true"), "`kernel` is True: a whole number"),
        (("kernel = [3, 5]", "kernel = [4, 7]"), "kernel 4 is even"),
        (("expand = [1, 2]", "expand = 0"), "expand 0 is not above 0"),
        (("expand = [1, 2]", "expand = -1"), "`expand` is -1"),
        (("expand = [1, 2]", "expand = inf"), "`expand` is inf"),
        (("se = [false, true]", "se = 'yes'"), "`se` is 'yes': true or false"),
        (("se = [false, true]", "act = 'hardswish'"), "Did you mean `hard_swish`"),
        (('tied = ["kernel"]', "tied = 3"), "line 12: `tied` is 3: names are needed"),
        (('tied = ["kernel"]', 'tied = [["kernel"]]'), "line 12: `tied` is .*: one value, or a list"),
        (('block = ["mbconv", "shufflenet_v2"]', 'block = [["mbconv"]]'), "`block` (is|has) .*needed"),
        (('"conv_stem"\nwidth = 8', '"conv_stem"\nwidth = 0'), "line 2: .*features is 0"),
        (('"conv_stem"\nwidth = 8', '"conv_stem"\nwidth = 8\nstride = 0'), "line 2: .*stride is 0"),
        (('"conv_stem"\nwidth = 8', '"classifier"\nwidth = 8'), "`classes` is missing"),
        (("width = 0", "width = -5"), "`width` is -5"),
        (('"classifier"\nwidth = 0', '"conv_stem"\nwidth = 8'), r"line 19: block `conv_stem` gives shape \(8, 8, 8\)"),
    ],
)
def test_mistakes_in_a_space_are_told_with_line_and_nearest_name(tmp_path, change, message):
    assert change[0] in WIDE
    (tmp_path / "s.toml").write_text(WIDE.replace(*change))
    with pytest.raises(ConfigError, match=message):
        load_space(str(tmp_path / "s.toml"), input_shape=(16, 16, 3))


def test_an_empty_list_ties_nothing(tmp_path):
    (tmp_path / "s.toml").write_text(WIDE.replace('tied = ["kernel"]', "tied = []"))
    choices = load_space(str(tmp_path / "s.toml"), input_shape=(16, 16, 3)).choices
    assert any(c.name == "stage1/layer2/kernel" for c in choices)


def test_unknown_spaces_and_foreign_genotypes_are_refused():
    with pytest.raises(SpaceError, match="Did you mean `digits_mixed`"):
        load_space("digit_mixed")
    space = load_space("digits_mixed")
    with pytest.raises(SpaceError, match="Is it of another space"):
        space.decode([0, 1])
    with pytest.raises(SpaceError, match="must be 0"):
        space.decode([200] * len(space.sizes))
    with pytest.raises(SpaceError, match="too small for stride"):
        load_space("digits_mixed", input_shape=(2, 2, 1))
