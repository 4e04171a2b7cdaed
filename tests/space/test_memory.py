"""Peak memory by blocks against whole networks."""

import dataclasses
import math

import msgspec
import numpy as np
import pytest
import tiny
from msgspec.structs import replace

from nas import cost
from nas.catalog import list_spaces
from nas.errors import SpaceError
from nas.ops import PRECISIONS, Act, Add, Graph, Network, in_precision
from nas.space import load_space
from nas.space.memory import activation_bytes

SMALL = """
resolution = [8, 12]

[stem]
block = "conv_stem"
width = 4

[[stage]]
block = ["mbconv", "fused_mbconv"]
stride = 2
depth = [1, 2]
width = [4, 12]
kernel = [3]
expand = [1, 6]

[head]
block = "classifier"
width = 8
"""


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    return load_space(str(tmp_path / "small.toml"), input_shape=(12, 12, 2), classes=3)


@pytest.mark.parametrize("name", list_spaces())
def test_the_largest_over_blocks_is_the_peak_of_the_whole_network(name):
    side = 32 if name.endswith("_32") or name in ("digits_mixed", "small_mixed", "nas_bench_macro") else 224
    space = load_space(name, input_shape=(side, side, 3), classes=10)
    parts, images = activation_bytes(space, "float32")
    genotypes = space.sample(np.random.default_rng(0), 6)
    expected = [cost.peak_activation_bytes(space.decode(g).flat()) for g in genotypes]
    assert space.highest(genotypes, parts, images).tolist() == expected


def test_elastic_resolution_has_images_of_its_own_and_the_range_is_that_of_all_networks(small):
    genotypes = np.indices(small.sizes).reshape(len(small.sizes), -1).T.astype(np.uint8)
    parts, images = activation_bytes(small, "float32")
    peaks = small.highest(genotypes, parts, images)
    assert peaks.tolist() == [cost.peak_activation_bytes(small.decode(g).flat()) for g in genotypes]
    for largest, expected in ((False, peaks.min()), (True, peaks.max())):
        genotype, found = small.extreme_highest(parts, images, largest=largest)
        assert found == expected
        assert small.highest(genotype, parts, images) == expected


@pytest.mark.parametrize("seed", range(5))
def test_the_range_is_exact_whatever_the_costs_and_leaves_out_what_cannot_run(small, seed):
    rng = np.random.default_rng(seed)
    genotypes = np.indices(small.sizes).reshape(len(small.sizes), -1).T.astype(np.uint8)
    parts = [rng.integers(0, 50, len(p.branches)).astype(float) for p in small.positions]
    for part in parts[1:-1]:
        part[rng.random(len(part)) < 0.3] = np.inf
    images = rng.integers(0, 50, 2).astype(float)
    peaks = small.highest(genotypes, parts, images)
    finite = peaks[np.isfinite(peaks)]
    if not len(finite):
        return
    assert small.extreme_highest(parts, images, largest=False)[1] == finite.min()
    assert small.extreme_highest(parts, images, largest=True)[1] == finite.max()


def test_int8_takes_a_quarter_but_for_the_image(small):
    genotypes = small.sample(np.random.default_rng(0), 20)
    whole = small.highest(genotypes, *activation_bytes(small, "float32"))
    quarter = small.highest(genotypes, *activation_bytes(small, "int8"))
    image = np.array([4 * math.prod(small.decode(g).input) for g in genotypes])
    np.testing.assert_array_less(quarter, (whole - image) / 4 + 1.25 * image + 1)
    np.testing.assert_array_less((whole - image) / 4 + image - 1, quarter)


def test_the_peak_of_int8_networks_is_that_of_their_ops_and_the_copy_of_the_image(small):
    genotypes = small.sample(np.random.default_rng(1), 40)
    expected = [cost.peak_activation_bytes(in_precision(small.decode(g).flat(), "int8", "float32")) for g in genotypes]
    assert small.highest(genotypes, *activation_bytes(small, "int8")).tolist() == expected


def test_where_precisions_meet_both_copies_count_while_one_is_converted(tmp_path):
    """Every network of a space, whole against by blocks, and against what its file's values take by hand."""
    space = tiny.joint_space(tmp_path, precisions=PRECISIONS)
    genotypes = np.unique(space.sample(np.random.default_rng(0), 400), axis=0)
    parts, images = activation_bytes(space, "mixed")
    peaks = space.highest(genotypes, parts, images)
    networks = [space.decode(g) for g in genotypes]
    assert peaks.tolist() == [cost.peak_activation_bytes(n.flat()) for n in networks]
    for largest, expected in ((False, peaks.min()), (True, peaks.max())):
        assert space.extreme_highest(parts, images, largest=largest)[1] == expected
    plain = [Network(tuple(replace(b, graph=in_precision(b.graph, "float32")) for b in n.blocks)) for n in networks]
    whole = np.array([cost.peak_activation_bytes(n.flat()) for n in plain])
    in_int8 = np.array([any(b.graph.precision == "int8" for b in n.blocks) for n in networks])
    assert (peaks[~in_int8] == whole[~in_int8]).all()  # weights are no activations
    assert (peaks[in_int8] < whole[in_int8]).any()


@pytest.mark.parametrize(
    ("held", "peak"),
    [
        (("float32", "float32", "float32"), 64 + 3 * 64),  # the image, and while the sum is made a, b and the sum
        (("float32", "int8", "int8"), 64 + 64 + 16),  # while a is converted
        (("float32", "int8", "float32"), 64 + 3 * 64),  # a was kept for the sum, b is float again
        (("int8", "int8", "float32"), 64 + 3 * 64),
        (("int8", "int8", "int8"), 64 + 3 * 16),
    ],
)
def test_the_peak_of_a_few_ops_is_what_one_adds_up_by_hand(held, peak):
    first, second, third = held
    shape = (4, 4, 1)
    a, b = Act((0,), shape, "sigmoid", precision=first), Act((1,), shape, "sigmoid", precision=second)
    both = Add((1, 2), shape, precision=third)
    reads = "float32" if first == "int8" else msgspec.UNSET
    assert cost.peak_activation_bytes(Graph(shape, (a, b, both), reads)) == peak


def test_a_space_that_may_begin_with_nothing_is_refused(small):
    bare = dataclasses.replace(small, positions=small.positions[2:])
    assert None in bare.positions[0].branches
    with pytest.raises(SpaceError, match="whose first block is always there"):
        activation_bytes(bare, "float32")
