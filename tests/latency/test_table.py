import dataclasses
import json

import msgspec
import numpy as np
import pytest

from nas.errors import LatencyError, UnmeasuredBlock
from nas.latency import Anchor, Correction, Entry, Table
from nas.space import Space, load_space


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits_mixed", input_shape=(16, 16, 1), classes=10)


@pytest.fixture(scope="module")
def table(space: Space) -> Table:
    rng = np.random.default_rng(0)
    entries = {
        key: Entry(float(rng.lognormal(-5, 1)), float(rng.uniform(0, 0.1)), block.label, role, 15)
        for key, (block, role) in space.blocks().items()
    }
    return Table(
        device="a test",
        runtime="onnxruntime",
        runtime_version="1.31.1",
        precision="float32",
        threads=1,
        batch=1,
        hardware="none",
        space=space.name,
        space_digest=space.digest,
        date="2026-01-01T00:00:00+00:00",
        command="nas measure",
        overhead_ms=0.0047,
        correction=Correction(1.0 / 0.9, -0.0031, {"add": 1 / 700, "conv": 1e-4 / 3}, 0.02),
        anchors=(Anchor((0,) * len(space.sizes), 0.1), Anchor((1,) * len(space.sizes), 0.2)),
        entries=entries,
    )


def test_pricing_many_equals_pricing_each_to_the_last_bit(space, table):
    genotypes = space.sample(np.random.default_rng(1), 300)
    each = [table.network_ms(space.decode(g)) for g in genotypes]
    assert table.price(space, genotypes).tolist() == each


def test_a_network_costs_its_corrected_blocks_and_one_offset(space, table):
    network = space.decode(space.largest())
    assert table.network_ms(network) == pytest.approx(
        sum(table.block_ms(b.graph) for b in network.blocks) + table.correction.offset_ms
    )


def test_a_table_comes_back_from_disk_to_the_last_bit(space, table, tmp_path):
    table.save(tmp_path)
    loaded = Table.load(tmp_path, "float32")
    assert loaded == table
    genotypes = space.sample(np.random.default_rng(2), 100)
    assert loaded.price(space, genotypes).tolist() == table.price(space, genotypes).tolist()


def test_the_file_is_one_line_a_block(space, table, tmp_path):
    lines = table.save(tmp_path).read_text().splitlines()
    assert len(lines) == len(space.blocks()) + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["table.float32.csv", "table.float32.json"]


def test_the_reachable_range_holds_every_network(space, table):
    low, fastest, high, slowest = table.reachable(space)
    prices = table.price(space, space.sample(np.random.default_rng(3), 2000))
    assert low <= prices.min()
    assert prices.max() <= high
    assert (table.network_ms(space.decode(fastest)), table.network_ms(space.decode(slowest))) == (low, high)


def test_an_unmeasured_block_is_named_with_the_number_of_others_and_the_command(table):
    larger = load_space("digits_mixed", input_shape=(32, 32, 3), classes=10)
    with pytest.raises(UnmeasuredBlock, match=r"conv_stem act=hard_swish kernel=3.*and 43 more blocks.*nas measure"):
        table.costs(larger)
    with pytest.raises(UnmeasuredBlock, match="never measured on a test"):
        table.network_ms(larger.decode(larger.smallest()))
    with pytest.raises(UnmeasuredBlock):
        table.block_ms(larger.decode(larger.smallest()).blocks[0].graph)


def test_one_missing_block_of_many_is_noticed(space, table):
    key, (block, _) = list(space.blocks().items())[7]
    less = msgspec.structs.replace(table, entries={k: e for k, e in table.entries.items() if k != key})
    with pytest.raises(UnmeasuredBlock, match=f"`{block.label}` was never measured"):
        less.price(space, space.sample(np.random.default_rng(0), 3))


@pytest.mark.parametrize("file", ["table.float32.csv", "table.float32.json"])
@pytest.mark.parametrize("damage", ["truncate", "edit", "binary"])
def test_a_damaged_table_is_refused(table, tmp_path, file, damage):
    table.save(tmp_path)
    path = tmp_path / file
    whole = path.read_bytes()
    damaged = {"truncate": whole[: len(whole) // 2], "edit": whole.replace(b"0", b"1", 1), "binary": b"\xff\xfe\x00"}
    assert damaged[damage] != whole
    path.write_bytes(damaged[damage])
    with pytest.raises(LatencyError, match=r"(edited|damaged).*--redo measure"):
        Table.load(tmp_path, "float32")


def test_a_missing_table_is_named(table, tmp_path):
    table.save(tmp_path)
    with pytest.raises(LatencyError, match=r"table\.int8\.csv: there is no int8 latency table"):
        Table.load(tmp_path, "int8")


def test_a_header_of_another_version_is_refused(table, tmp_path):
    from nas.latency.pair import checksum

    table.save(tmp_path)
    path = tmp_path / "table.float32.json"
    head = json.loads(path.read_text())
    del head["sha256"]
    head["colour"] = "blue"
    head["sha256"] = checksum(head, (tmp_path / "table.float32.csv").read_text())
    path.write_text(json.dumps(head))
    with pytest.raises(LatencyError, match=r"another version.*colour"):
        Table.load(tmp_path, "float32")


def test_the_digest_changes_with_what_is_predicted_only(table):
    entries = dict(table.entries)
    key, entry = entries.popitem()
    slower = msgspec.structs.replace(entry, latency_ms=np.nextafter(entry.latency_ms, 1))
    replace = msgspec.structs.replace
    assert replace(table, entries={key: slower, **entries}).digest != table.digest
    assert replace(table, correction=Correction(1.0)).digest != table.digest
    assert replace(table, entries={key: entry, **entries}, date="later").digest == table.digest


def test_anchors_measured_again_tell_the_level(table):
    assert table.level(np.array([0.11, 0.22])) == pytest.approx(1.1)


def test_a_table_is_frozen(table):
    with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
        table.precision = "int8"
