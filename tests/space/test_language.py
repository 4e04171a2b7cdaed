"""What the space files can say beyond lists and scalars: resolutions, blocks fixed in place, blocks of one's own."""

from pathlib import Path

import numpy as np
import pytest

from nas import cost
from nas.errors import ConfigError, SpaceError
from nas.space import copy_space, load_space

ELASTIC = """
resolution = [12, 8, 16]
[stem]
block = "conv_stem"
width = [4, 8]
stride = 2
[[stage]]
block = "mbconv"
stride = 2
depth = [1, 2]
width = 8
kernel = [3, 5]
expand = 2
[head]
block = "classifier"
width = [8, 16]
"""

GHOST = """
def ghost(net, x, *, width, stride=1, ratio=2):
    primary = net.conv(x, "primary", width // ratio, stride=stride)
    cheap = net.conv(primary, "cheap", width - width // ratio, kernel=3, groups=width // ratio)
    return net.act(net.norm(net.concat(primary, cheap), "norm"), "relu")
"""

OWN = """
[blocks]
ghost = "parts/ghost.py:ghost"
[stem]
block = "conv_stem"
width = 8
[[stage]]
block = ["ghost", { mbconv = { kernel = 5, expand = 2 } }, { mbconv = { kernel = 3, expand = 4 } }]
depth = [1, 2]
width = 8
ratio = [2, 4]
se = [false, true]
[head]
block = "classifier"
width = 0
"""


def write(folder: Path, text: str) -> str:
    path = folder / "s.toml"
    path.write_text(text)
    return str(path)


def write_own(folder: Path) -> str:
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "parts" / "ghost.py").write_text(GHOST)
    return write(folder, OWN)


def test_the_networks_of_one_resolution_are_those_of_a_space_over_such_images(tmp_path):
    space = load_space(write(tmp_path, ELASTIC), input_shape=(99, 99, 3), classes=5)
    assert space.resolutions == (8, 12, 16)
    assert space.input == (16, 16, 3)
    genotypes = space.sample(np.random.default_rng(0), 60)
    sides = space.resolution_of(genotypes)
    assert set(sides) == {8, 12, 16}
    alone_text = ELASTIC.replace("resolution = [12, 8, 16]", "")
    for genotype, side in zip(genotypes, sides, strict=True):
        alone = load_space(write(tmp_path, alone_text), input_shape=(side, side, 3), classes=5)
        network = space.decode(genotype)
        assert network.input == (side, side, 3)
        assert network == space.at(side).decode(space.without_resolution(genotype)[None][0])
        assert network == alone.decode(genotype[1:])
    assert space.count() == 3 * alone.count()
    assert space.price(genotypes, space.costs(cost.macs)) == pytest.approx(
        [cost.macs(space.decode(g).flat()) for g in genotypes]
    )


def test_a_space_of_one_resolution_is_its_own_part(tmp_path):
    fixed = load_space(write(tmp_path, ELASTIC.replace("[12, 8, 16]", "12")), input_shape=(32, 32, 1))
    assert fixed.resolutions == (12,)
    assert fixed.at(12) is fixed
    with pytest.raises(SpaceError, match="its resolutions are 12"):
        fixed.at(32)


def test_stem_and_head_can_be_elastic_too(tmp_path):
    space = load_space(write(tmp_path, ELASTIC), classes=5)
    names = [c.name for c in space.choices]
    assert {"stem/width", "head/width"} <= set(names)
    network = space.decode(space.encode({"stem/width": 8, "head/width": 16}))
    assert network.blocks[0].graph.shape[-1] == 8
    assert network.blocks[1].graph.input[-1] == 8
    assert "width=16" not in network.blocks[-1].label  # widths are shapes
    assert network.blocks[-1].graph.ops[0].shape[-1] == 16


def test_a_file_brings_blocks_of_its_own_and_blocks_with_options_fixed_in_place(tmp_path):
    space = load_space(write_own(tmp_path), input_shape=(8, 8, 1), classes=3)
    first = space.choices[[c.name for c in space.choices].index("stage1/layer1/block")]
    assert first.values == ("ghost", "mbconv kernel=5 expand=2", "mbconv kernel=3 expand=4")
    for value, has in (("ghost", {"ratio"}), ("mbconv kernel=3 expand=4", {"se"})):
        said = space.describe(space.encode({"stage1/layer1/block": value}))
        assert {n.rpartition("/")[2] for n in said if n.startswith("stage1/layer1/")} == {"block", *has}
    scopes = {b.name for p in space.positions for b in p.branches if b is not None and p.name == "stage1/layer1"}
    assert scopes == {f"stage1/layer1/{s}" for s in ("ghost", "mbconv_1", "mbconv_2")}


def test_a_tied_option_counts_though_the_first_layer_has_no_use_for_it(tmp_path):
    text = OWN.replace("se = [false, true]", "se = [false, true]\ntied = ['se']")
    write_own(tmp_path)
    space = load_space(write(tmp_path, text), input_shape=(8, 8, 1), classes=3)
    for genotype in space.sample(np.random.default_rng(0), 100):
        raw = np.where(genotype == 0, np.asarray(space.sizes) - 1, genotype).astype(np.uint8)
        assert space.decode(raw) == space.decode(space.canonical(raw))


def test_a_copy_of_a_space_loads_to_the_same_space_without_the_original(tmp_path):
    space = load_space(write_own(tmp_path))
    (tmp_path / "run").mkdir()
    copy_space(str(tmp_path / "s.toml"), tmp_path / "run")
    (tmp_path / "parts" / "ghost.py").unlink()
    assert load_space(str(tmp_path / "run" / "space.toml")).digest == space.digest


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("return net.act(", "net.act(", "return what it records last"),
        ('"cheap"', '"primary"', "weights 'primary/kernel' twice"),
        ("width - width // ratio, kernel", "width // ratio, kernel", r"gives shape \(32, 32, 4\), but \(32, 32, 8\)"),
        ("stride=stride", "stride=2", r"gives shape \(16, 16, 8\), but \(32, 32, 8\)"),
        ("net.concat", "net.join", "AttributeError: .*'join'"),
    ],
)
def test_a_block_that_breaks_its_contract_is_told_with_the_line_of_its_stage(tmp_path, was, now, message):
    path = write_own(tmp_path)
    (tmp_path / "parts" / "ghost.py").write_text(GHOST.replace(was, now))
    with pytest.raises(ConfigError, match=message) as caught:
        load_space(path)
    assert "line 7" in str(caught.value)


STEM = """
def stem(net, x, *, width=None, stride=2):
    return net.act(net.norm(net.conv(x, "conv", width or 8, stride=2), "norm"), "relu")
"""


def test_a_stem_that_halves_the_image_without_a_stride_is_told_to_have_one(tmp_path):
    """So that the message can be followed: what it asks for makes the space load."""
    path = write_own(tmp_path)
    (tmp_path / "parts" / "stem.py").write_text(STEM.replace(", stride=2):", "):"))
    Path(path).write_text(
        Path(path)
        .read_text()
        .replace("[blocks]", '[blocks]\nstem = "parts/stem.py:stem"')
        .replace('block = "conv_stem"', 'block = "stem"')
    )
    told = (
        r"block `stem` .*: it gives shape \(16, 16, 8\), but \(32, 32, 8\) is needed: the image as large as it "
        r"was, since its function has no keyword `stride`\. Give it one, `def stem\(net, x, \*, \.\.\., stride=2\)`"
    )
    with pytest.raises(ConfigError, match=told):
        load_space(path)
    (tmp_path / "parts" / "stem.py").write_text(STEM.replace("8, stride=2)", "8, stride=stride)"))
    assert load_space(path).decode(load_space(path).smallest()).blocks[0].graph.shape == (16, 16, 8)


def test_a_stem_may_leave_its_width_open_and_needs_a_stride_that_is_one(tmp_path):
    write_own(tmp_path)
    (tmp_path / "parts" / "stem.py").write_text(STEM)
    stem = '[stem]\nblock = "conv_stem"\nwidth = 8\n'
    text = OWN.replace("[blocks]\n", '[blocks]\nstem = "parts/stem.py:stem"\n').replace(
        stem, '[stem]\nblock = "stem"\n'
    )
    assert load_space(write(tmp_path, text)).positions[0].output == (16, 16, 8)
    for stride in ("0", '"two"', "2.0"):
        with pytest.raises(ConfigError, match=r"stride is .*: a whole number from 1 on is needed"):
            load_space(write(tmp_path, text.replace('"stem"\n', f'"stem"\nstride = {stride}\n')))
    (tmp_path / "parts" / "stem.py").write_text(STEM.replace("stride=2):", "stride=(2, 2)):"))
    with pytest.raises(ConfigError, match=r"stride is \(2, 2\): a whole number"):
        load_space(write(tmp_path, text))


def test_a_file_without_a_stem_or_with_one_stage_alone_is_told_what_to_write(tmp_path):
    with pytest.raises(ConfigError, match=r"`stem` is missing.* Valid keys: blocks, .*stage, stem"):
        load_space(write(tmp_path, OWN.replace("[stem]", "[head]", 1).rpartition("[head]")[0]))
    with pytest.raises(ConfigError, match=r"line 7: `stage` is one table. Each of several is written \[\[stage\]\]"):
        load_space(write(tmp_path, OWN.replace("[[stage]]", "[stage]")))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("parts/ghost.py", r"\"file.py:function\" or"),
        ("parts/goast.py:ghost", "cannot load"),
        ("parts/ghost.py:goast", "AttributeError"),
        ("parts/bad.py:ghost", "ZeroDivisionError"),
        ("parts/ghost.py:number", "is not a block"),
        ("math:floor", "is not a block"),
    ],
)
def test_a_block_that_cannot_be_loaded_is_told_with_its_line(tmp_path, spec, message):
    write_own(tmp_path)
    (tmp_path / "parts" / "ghost.py").write_text(GHOST + "number = 1\n")
    (tmp_path / "parts" / "bad.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=message) as caught:
        load_space(write(tmp_path, OWN.replace("parts/ghost.py:ghost", spec)))
    assert "line 3" in str(caught.value)
