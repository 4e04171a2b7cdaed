"""Spaces that others published: every network has the parameters and MACs that they report."""

import numpy as np
import pytest

from nas import cost
from nas.space import load_space


def genotypes_of(space, columns):
    """Genotypes [n, genes] of networks given as choice name -> value of each, [n]."""
    assert set(columns) == {c.name for c in space.choices}
    numbers = [[c.values.index(v) for v in columns[c.name].tolist()] for c in space.choices]
    return np.array(numbers, np.uint8).T


def test_nas_bench_macro_has_the_published_parameters_and_macs(real_data):
    published = np.load(real_data / "nas_bench_macro_tenth.npz")
    space = load_space("nas_bench_macro", input_shape=(32, 32, 3), classes=10)
    ops = ["identity", "mbconv kernel=3 expand=3", "mbconv kernel=5 expand=6"]
    names = [c.name for c in space.choices]
    columns = {name: np.array(ops)[column] for name, column in zip(names, published["ops"].T, strict=True)}
    genotypes = genotypes_of(space, columns)
    assert len(genotypes) == 656
    assert space.count() == 3**8
    np.testing.assert_array_equal(space.price(genotypes, space.costs(cost.parameters)), published["params"])
    np.testing.assert_array_equal(space.price(genotypes, space.costs(cost.macs)), published["flops"])


def test_once_for_all_has_the_published_parameters_and_macs(real_data):
    published = np.load(real_data / "ofa_mbv3_top1_half.npz")
    space = load_space("ofa_mobilenet_v3", classes=1000)
    columns = {"resolution": published["r"]}
    for stage in range(5):
        name = f"stage{stage + 2}"  # stage 1 is the first, fixed block
        columns[f"{name}/depth"] = published["d"][:, stage]
        for layer in range(4):
            columns[f"{name}/layer{layer + 1}/kernel"] = published["ks"][:, 4 * stage + layer]
            columns[f"{name}/layer{layer + 1}/expand"] = published["e"][:, 4 * stage + layer]
    genotypes = genotypes_of(space, columns)
    assert len(genotypes) == 1186
    np.testing.assert_array_equal(space.price(genotypes, space.costs(cost.parameters)), published["params"])
    np.testing.assert_array_equal(space.price(genotypes, space.costs(cost.macs)), published["macs"])


@pytest.mark.parametrize("resolution", [128, 176, 224])
def test_once_for_all_has_as_many_macs_as_its_convolutions_at_every_resolution(resolution):
    space = load_space("ofa_mobilenet_v3", classes=1000)
    largest = space.decode(space.encode(space.describe(space.largest()) | {"resolution": resolution}))
    assert largest.input == (resolution, resolution, 3)
    side = resolution // 2
    by_hand = side**2 * (27 * 16 + 9 * 16 + 16 * 16)
    channels = 16
    for width, stride, se in ((24, 2, 0), (40, 2, 1), (80, 2, 0), (112, 1, 1), (160, 2, 1)):
        for layer in range(4):
            hidden, out = 6 * channels, -(-side // (stride if layer == 0 else 1))
            squeezed = (hidden // 4 + 4) // 8 * 8
            by_hand += side**2 * channels * hidden + out**2 * hidden * (49 + width) + se * 2 * hidden * squeezed
            side, channels = out, width
    by_hand += side**2 * 160 * 960 + 960 * 1280 + 1280 * 1000
    assert cost.macs(largest.flat()) == by_hand
