"""Tables that others published: their sums come out as theirs, and nothing that they do not have is made up."""

import json
import tomllib

import numpy as np
import pytest
import tiny

from nas import cost
from nas.errors import DeviceError, LatencyError, UnmeasuredBlock
from nas.latency import Table, find_table, import_table, load_device
from nas.space import load_space

# note10_lat@30ms_top1@78.4_finetune@75 (github.com/mit-han-lab/once-for-all, README: 339M MACs, 7.5M parameters):
# kernel and expansion of each layer, by stage, at 224 pixels.
PUBLISHED = [
    [(3, 3), (3, 3)],
    [(5, 4), (3, 3), (3, 4)],
    [(5, 4), (5, 4), (3, 3)],
    [(3, 6), (3, 4), (3, 4)],
    [(3, 6), (3, 6), (3, 4), (3, 3)],
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def w12():
    return load_space("ofa_mobilenet_v3_w12", classes=1000)


def published_genotype(space):
    values = {"resolution": 224} if len(space.resolutions) > 1 else {}
    for number, layers in enumerate(PUBLISHED, start=2):
        values[f"stage{number}/depth"] = len(layers)
        for layer, (kernel, expand) in enumerate(layers, start=1):
            values[f"stage{number}/layer{layer}/kernel"] = kernel
            values[f"stage{number}/layer{layer}/expand"] = expand
    return space.encode(values)


# Once-for-All


def test_the_published_note10_network_has_the_parameters_and_macs_that_its_authors_report(w12):
    graph = w12.decode(published_genotype(w12)).flat()
    assert round(cost.macs(graph) / 1e6) == 339
    assert round(cost.parameters(graph) / 1e6, 1) == 7.5


def test_the_published_note10_network_takes_what_its_authors_sum_up(real_data, here, w12):
    file = real_data / "lut_ofa_mbv3_note10.json"
    at_224 = w12.at(224)
    imported = import_table(file, form="ofa", space=at_224, device="note10", out=here / "at_224")
    assert not imported.missing
    network = at_224.decode(published_genotype(at_224))
    assert imported.table.network_ms(network) == pytest.approx(29.965345915208594, rel=1e-12)  # their estimator's sum
    whole = import_table(file, form="ofa", space=w12, device="note10")
    assert not whole.missing
    assert whole.table.network_ms(network) == pytest.approx(29.965, rel=2e-3)  # 7x7 was measured at 208 pixels too


def test_a_table_of_another_width_has_nothing_to_say_and_says_so(real_data, here):
    space = load_space("ofa_mobilenet_v3", classes=1000)
    with pytest.raises(LatencyError, match=r"none of the \d+ blocks of space 'ofa_mobilenet_v3'.*widths must be equal"):
        import_table(real_data / "lut_ofa_mbv3_note10.json", form="ofa", space=space, device="note10")
    assert not list(here.iterdir())


def test_a_table_says_whose_it_is_and_lies_where_the_device_is_found(real_data, here, w12):
    imported = import_table(real_data / "lut_ofa_mbv3_note10.json", form="ofa", space=w12, device="note10")
    assert sorted(str(p.relative_to(here)) for p in here.rglob("*") if p.is_file()) == [
        f"latency_models/note10/{name}"
        for name in (
            "device.toml",
            "ofa_mobilenet_v3_w12/table.float32.csv",
            "ofa_mobilenet_v3_w12/table.float32.json",
        )
    ]
    table, proof = find_table("note10", "float32", w12)
    assert table == imported.table
    assert proof is None
    assert (table.kind, table.hardware) == ("imported", "Samsung Galaxy Note10")
    assert "1908.09791" in table.notes[0]
    assert "MIT" in table.licence
    assert not load_device("note10").at_hand


def test_other_classes_are_a_block_without_entry(real_data, here):
    space = load_space("ofa_mobilenet_v3_w12", classes=10)
    imported = import_table(real_data / "lut_ofa_mbv3_note10.json", form="ofa", space=space, device="note10")
    heads = {b.graph.key for b in space.positions[-1].branches if b is not None}
    assert len(imported.missing) == len(heads)
    assert not heads & set(imported.table.entries)
    assert "have no entry in the file" in str(imported)
    with pytest.raises(UnmeasuredBlock, match=r"nearest is ofa_mobilenet_v3_w12/: 3 blocks.*mobilenet_v3_head.*10 cla"):
        find_table("note10", "float32", space)
    with pytest.raises(UnmeasuredBlock, match=r"nearest is ofa_mobilenet_v3_w12/, of 10 classes: 3 blocks.* 5 classes"):
        find_table("note10", "float32", load_space("ofa_mobilenet_v3_w12", classes=5))


def test_only_equal_blocks_are_found(here):
    """A block of low rank, or a stem with another activation, is not the published one."""
    text = """
        [stem]
        block = "conv_stem"
        width = 32
        stride = 2
        {stem}
        [[stage]]
        block = "mbconv"
        width = 32
        expand = 2
        kernel = 3
        act = "relu"
        rank = [0.5, 1.0]
        [head]
        block = "classifier"
        width = 8
        """
    op = "expanded_conv-input:3x3x32-output:3x3x32-expand:64-kernel:3-stride:1-idskip:1-se:0-hs:0"
    stem_row, row = {"mean": 2.0, "std": 0.1, "count": 10}, {"mean": 3.0, "std": 0.3, "count": 7}
    table = {"phone": {"6": {"Conv-input:6x6x1-output:3x3x32": stem_row, op: row}}}
    (here / "table.json").write_text(json.dumps(table))
    for stem, expected in (("", {2.0, 3.0}), ('act = "relu"', {3.0})):
        (here / "own.toml").write_text(text.format(stem=stem))
        space = load_space("own.toml", input_shape=(6, 6, 1), classes=3)
        imported = import_table("table.json", form="ofa", space=space, device="phone", unit="ms")
        assert {e.latency_ms for e in imported.table.entries.values()} == expected
        assert len(imported.missing) == 4 - len(expected)
    entry = next(iter(imported.table.entries.values()))
    assert (entry.interval_ms, entry.rounds) == (pytest.approx(1.96 * 0.3 / 7**0.5), 7)


# ProxylessNAS


def test_the_pixel_table_has_every_block_of_its_space(real_data, here):
    space = load_space("proxyless_nas", classes=1000)
    file = real_data / "lut_proxyless_pixel1.json"
    imported = import_table(file, form="proxyless", space=space, device="pixel1")
    assert not imported.missing
    published = json.loads(file.read_text())
    smallest = space.uniform(depth=min, kernel=min, expand=min)
    shapes = [(112, 16, 24, 2), (56, 24, 40, 2), (28, 40, 80, 2), (14, 80, 96, 1), (14, 96, 192, 2), (7, 192, 320, 1)]
    by_hand = sum(
        published[op]["mean"]
        for op in (
            "Conv-input:224x224x3-output:112x112x32",
            "expanded_conv-input:112x112x32-output:112x112x16-expand:1-kernel:3-stride:1-idskip:0",
            *(
                f"expanded_conv-input:{s}x{s}x{a}-output:{s // k}x{s // k}x{b}-expand:3-kernel:3-stride:{k}-idskip:0"
                for s, a, b, k in shapes
            ),
            "Conv_1-input:7x7x320-output:7x7x1280",
            "Logits-input:7x7x1280-output:1000",
        )
    )
    assert imported.table.network_ms(space.decode(smallest)) == pytest.approx(by_hand, rel=1e-12)


# CSV


@pytest.fixture
def space(tmp_path):
    return tiny.space(tmp_path)


def rows_of(space, gmacs: float = 2.0) -> list[list[str]]:
    """key, latency_ms of every block on a device of that speed."""
    return [[k, repr(cost.macs(b.graph) / gmacs / 1e6)] for k, (b, _) in space.blocks().items()]


def write(path, header, rows):
    path.write_text("\n".join(",".join(map(str, r)) for r in [header, *rows]) + "\n")
    return path


def test_a_csv_comes_back_as_it_was_written(here, space):
    rows = rows_of(space)
    imported = import_table(write(here / "t.csv", ["key", "latency_ms"], rows), form="csv", space=space, device="board")
    assert {k: repr(e.latency_ms) for k, e in imported.table.entries.items()} == dict(rows)
    assert Table.load(imported.path.parent, "float32") == imported.table
    about = tomllib.loads((here / "latency_models/board/device.toml").read_text())
    assert about["source"] == "t.csv"
    assert load_device("board").hardware == "board"


def test_a_block_without_a_row_is_left_out_and_told(here, space):
    rows = rows_of(space)
    imported = import_table(
        write(here / "t.csv", ["key", "latency_ms"], rows[:-2]), form="csv", space=space, device="board"
    )
    labels = [b.label for b, _ in space.blocks().values()]
    assert list(imported.missing) == labels[-2:]
    assert f"2 have no entry in the file and no latency, the first `{labels[-2]}`" in str(imported)


def test_a_label_names_a_block_where_only_one_has_it_or_shapes_tell_which(here, space):
    def shape(s):
        return "x".join(map(str, s))

    block = next(b for b, _ in space.blocks().values() if b.label.startswith("mbconv"))
    same = [b for b, _ in space.blocks().values() if b.label == block.label]
    assert len(same) > 1
    header = ["label", "input", "output", "latency_ms"]
    one = [block.label, shape(block.graph.input), shape(block.graph.shape), 0.5]
    imported = import_table(write(here / "t.csv", header, [one]), form="csv", space=space, device="b", unit="ms")
    assert {k: e.latency_ms for k, e in imported.table.entries.items()} == {block.graph.key: 0.5}
    with pytest.raises(LatencyError, match=rf"line 2: {len(same)} blocks of space 'tiny' are .* Tell them apart"):
        import_table(
            write(here / "t.csv", header, [[block.label, "", "", 0.5]]), form="csv", space=space, device="b", unit="ms"
        )


@pytest.mark.parametrize(("factor", "unit"), [(1e-3, "s"), (1e3, "us")])
@pytest.mark.parametrize("gmacs", [6.0, 30.0])
def test_a_table_in_another_unit_is_an_error_that_names_it(here, space, factor, unit, gmacs):
    rows = [[k, float(v) * factor] for k, v in rows_of(space, gmacs)]
    file = write(here / "t.csv", ["key", "latency_ms"], rows)
    with pytest.raises(LatencyError, match=rf"read as milliseconds.*--unit {unit}`"):
        import_table(file, form="csv", space=space, device="board")
    told = import_table(file, form="csv", space=space, device="board", unit=unit)
    assert {k: e.latency_ms for k, e in told.table.entries.items()} == pytest.approx(
        {k: float(v) for k, v in rows_of(space, gmacs)}
    )


def test_networks_measured_whole_correct_the_sums(here, space):
    rows = [[k, v, ""] for k, v in rows_of(space)]
    prices = {k: float(v) for k, v, _ in rows}
    genotypes = np.unique(space.sample(np.random.default_rng(0), 40), axis=0)[:6]
    for g in genotypes:
        total = sum(prices[b.graph.key] for b in space.decode(g).blocks)
        rows.append(["", repr(1.25 * total + 0.001), " ".join(map(str, g))])
    file = write(here / "t.csv", ["key", "latency_ms", "genotype"], rows)
    table = import_table(file, form="csv", space=space, device="board").table
    assert len(table.anchors) == 6
    assert table.correction.scale == pytest.approx(1.25)
    assert table.correction.offset_ms == pytest.approx(0.001)


def test_networks_in_another_unit_than_blocks_are_an_error(here, space):
    rows = [[k, v, ""] for k, v in rows_of(space)]
    rows.append(["", 1e-3 * sum(float(v) for _, v, _ in rows), " ".join(["0"] * len(space.sizes))])
    file = write(here / "t.csv", ["key", "latency_ms", "genotype"], rows)
    with pytest.raises(LatencyError, match="must be in one unit"):
        import_table(file, form="csv", space=space, device="board")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key,ms\n", r"line 1: the columns are key, ms\. `latency_ms` and `key` or `label` are needed"),
        ("latency_ms\n1\n", "line 1: the columns are latency_ms"),
        ("", "line 1: the columns are missing"),
        ("key,latency_ms\nK,-1\n", "line 2: `latency_ms` is '-1': a positive number"),
        ("key,latency_ms\nK,0\n", "line 2: `latency_ms` is '0'"),
        ("key,latency_ms\nK,nan\n", "line 2: `latency_ms` is 'nan'"),
        ("key,latency_ms\nK,fast\n", "line 2: `latency_ms` is 'fast'"),
        ("key,latency_ms\nK\n", "line 2: `latency_ms` is None"),
        ("key,latency_ms,interval_ms\nK,1,-1\n", "line 2: `interval_ms` is '-1': a number"),
        ("key,latency_ms\nK,1\nK,1\n", "line 3: this block has a row above"),
        ("key,latency_ms\n,1\n", "line 2: neither `key` nor `label`"),
        ("key,latency_ms,genotype\n,1,a b\n", "line 2: `genotype` is 'a b'"),
        ("key,latency_ms\nnobody,1\n", r"none of the \d+ blocks of space 'tiny'"),
    ],
)
def test_mistakes_in_a_csv_are_told_with_their_line(here, space, text, message):
    file = here / "t.csv"
    file.write_text(text.replace("K", next(iter(space.blocks()))))
    with pytest.raises(LatencyError, match=message):
        import_table(file, form="csv", space=space, device="board")
    assert not (here / "latency_models").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"b": {"mean": "x"}}}', '{"a": {"b": {"mean": -1}}}'])
@pytest.mark.parametrize("form", ["ofa", "proxyless"])
def test_a_file_of_another_format_is_refused(here, space, text, form):
    (here / "t.json").write_text(text)
    with pytest.raises(LatencyError, match=r"t\.json"):
        import_table("t.json", form=form, space=space, device="board")


def test_names_are_checked(here, space):
    file = write(here / "t.csv", ["key", "latency_ms"], rows_of(space))
    with pytest.raises(LatencyError, match=r"unknown format `cvs`.*Did you mean `csv`"):
        import_table(file, form="cvs", space=space, device="board")
    with pytest.raises(LatencyError, match="unknown unit `min`"):
        import_table(file, form="csv", space=space, device="board", unit="min")
    with pytest.raises(LatencyError, match=r"nothing\.csv: cannot read"):
        import_table(here / "nothing.csv", form="csv", space=space, device="board")
    for name in ("../board", "", "."):
        with pytest.raises(DeviceError, match="a name without folders"):
            import_table(file, form="csv", space=space, device=name)
    with pytest.raises(DeviceError, match="is the machine that runs are on"):
        import_table(file, form="csv", space=space, device="host_onnxruntime")
