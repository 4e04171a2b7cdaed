"""Precision and pruning as choices: what they decide, what they leave as it was, and what conversions cost."""

import hashlib

import msgspec
import numpy as np
import pytest
import tiny

from nas import cost
from nas.catalog import list_spaces
from nas.config import Latency
from nas.errors import ConfigError, DeviceError, LatencyError
from nas.latency import load_device, precisions_of
from nas.measure import for_table
from nas.ops import PRECISIONS, Norm, activations
from nas.space import load_space, space_file
from nas.supernet import Supernet


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return tiny.joint_space(tmp_path_factory.mktemp("joint"), precisions=PRECISIONS)


def with_lines(text: str, lines: str) -> str:
    """The space with more keys in every stage; those that it sets itself are left out."""
    head, *stages = text.split("[[stage]]")
    keys = [line.split(" = ")[0] for line in lines.splitlines()]
    kept = ["\n".join(row for row in s.splitlines() if row.split(" = ")[0] not in keys) + "\n" for s in stages]
    return f"[[stage]]\n{lines}".join([head, *kept])


@pytest.mark.parametrize("name", ["small_mixed", "digits_mixed", "mobilenet_v3_32", "digits_joint"])
def test_a_single_value_of_precision_or_prune_changes_nothing(name, tmp_path):
    assert name in list_spaces()
    text = space_file(name).read_text()
    plain = "\n".join(row for row in text.splitlines() if row.split(" = ")[0] not in ("precision", "prune", "tied"))
    (tmp_path / "plain.toml").write_text(plain)
    (tmp_path / "single.toml").write_text(with_lines(plain, 'precision = "float32"\nprune = 0.0\n'))
    before, after = (load_space(str(tmp_path / f"{n}.toml"), input_shape=(32, 32, 3)) for n in ("plain", "single"))
    assert after.digest == before.digest
    assert after.count() == before.count()
    genotypes = before.sample(np.random.default_rng(0), 50)
    for of in (cost.macs, cost.parameters):
        assert (before.price(genotypes, before.costs(of)) == after.price(genotypes, after.costs(of))).all()
    assert after.blocks().keys() == before.blocks().keys()
    assert not after.mixed


def test_precision_is_one_gene_of_its_stage_and_stem_and_head_stay_float(space):
    assert space.mixed
    assert [c.name for c in space.choices if c.name.endswith("precision")] == ["stage1/precision", "stage2/precision"]
    values = {"stage1/depth": 2, "stage1/precision": "int8", "stage1/prune": 0.5}
    network = space.decode(space.encode(values))
    assert [b.graph.precision for b in network.blocks] == ["float32", "int8", "int8", "float32", "float32"]
    assert [b.graph.source for b in network.blocks] == ["float32", "float32", "int8", "int8", "float32"]
    assert network.flat().mixed
    assert "precision=int8" in network.blocks[1].label
    whole = space.decode(space.encode(values | {"stage1/precision": "float32", "stage1/prune": 0.0}))
    assert cost.macs(network.flat()) < cost.macs(whole.flat())


@pytest.mark.parametrize("first", PRECISIONS)
@pytest.mark.parametrize("second", PRECISIONS)
def test_a_block_says_what_it_reads_only_where_that_has_to_be_converted(space, first, second):
    network = space.decode(space.encode({"stage1/depth": 2, "stage1/precision": first, "stage2/precision": second}))
    held = ["float32", *(activations(b.graph.precision) for b in network.blocks)]
    assert [b.graph.precision for b in network.blocks] == ["float32", first, first, second, "float32"]
    assert [b.graph.source for b in network.blocks] == held[:-1]
    for block, before in zip(network.blocks, held, strict=False):
        converts = before != activations(block.graph.precision)
        assert ("after=" in block.label) == converts == (block.graph.reads is not msgspec.UNSET)
        assert (f"precision={block.graph.precision}" in block.label) == (converts or block.graph.precision != "float32")


def test_weights_and_what_is_counted_know_nothing_of_precision(space):
    genotypes = space.sample(np.random.default_rng(0), 64)
    plain = genotypes.copy()
    for gene, choice in enumerate(space.choices):
        if choice.name.endswith("precision"):
            plain[:, gene] = 0
    assert (genotypes != plain).any()
    for of in (cost.macs, cost.parameters):
        assert (space.price(genotypes, space.costs(of)) == space.price(plain, space.costs(of))).all()
    for position in space.positions:
        assert len(position.computed[0]) <= len(position.branches)
    supernet = Supernet(space)
    params = supernet.init(0)
    for a, b in zip(genotypes[:8], plain[:8], strict=True):
        first, second = (supernet.slice(params, space.decode(g)) for g in (a, b))
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[n], second[n]) for n in first)


def timed(graph) -> float:
    """Milliseconds of a graph by a made-up machine: each op and each conversion takes a time of its own."""

    def of(*what) -> float:
        return int(hashlib.sha256(repr(what).encode()).hexdigest()[:6], 16) / 2**24

    made = ["float32", *(activations(op.precision) for op in graph.ops)]
    total, converted = 3.0, set()
    for op in graph.ops:
        total += 0.0 if isinstance(op, Norm) else of(type(op), op.shape, op.precision, getattr(op, "kernel", 0))
        wanted = activations(op.precision)
        converted |= {(v, wanted) for v in op.inputs if made[v] != wanted}
    converted |= {(len(graph.ops), "float32")} if made[-1] != "float32" else set()
    return total + sum(of("convert", graph.shape_of(v), to) for v, to in converted)


def test_a_table_prices_conversions_between_stages_as_they_were_measured(space):
    device = load_device("host_onnxruntime")
    plan = for_table(space, device, "mixed", Latency(anchors=2, holdout=4), seed=0)
    entry = {
        name: sum(weight * timed(plan.graphs[call]) for call, weight in terms.items())
        for name, terms in plan.entries.items()
    }
    for genotype in space.sample(np.random.default_rng(1), 40):
        network = space.decode(genotype)
        total = sum(entry[f"block {b.graph.key}"] for b in network.blocks)
        assert total == pytest.approx(timed(network.flat()), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('precision = ["float32", "int4"]', "unknown precision `int4`.*int4_weights"),
        ('precision = "int8"\nblock = ["mbconv", "identity"]', "leave its input as it is"),
        ("prune = [0.5, 1.0]", r"prune 1.0 is not within \[0, 1\)"),
    ],
)
def test_mistakes_are_told_with_their_line(change, message, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text(with_lines(tiny.JOINT, change + "\n"))
    with pytest.raises(ConfigError, match=message) as error:
        load_space(str(path), input_shape=(8, 8, 1), classes=3)
    assert "line" in str(error.value)


def test_what_is_not_known_of_mixed_precision_is_refused(space, tmp_path):
    both = load_device("host_onnxruntime")
    assert precisions_of(both, space) == ("mixed",)
    assert precisions_of(both, tiny.space(tmp_path)) == both.precision
    with pytest.raises(DeviceError, match=r"stages of space 'joint' may be in int8.*Choose a device that has"):
        precisions_of(load_device("host_xla"), space)
    with pytest.raises(LatencyError, match="cannot be measured in float32"):
        for_table(space, both, "float32", Latency(), seed=0)
    with pytest.raises(LatencyError, match="cannot be measured in mixed"):
        for_table(tiny.space(tmp_path), both, "mixed", Latency(), seed=0)


@pytest.mark.parametrize("device", ["host_openvino", "host_xla", "tpu_v4_estimate"])
def test_a_runtime_without_files_of_mixed_precision_is_refused_before_anything_is_built(device, tmp_path):
    space = tiny.joint_space(tmp_path, precisions=("float32", "int4_weights"))
    about = load_device(device)
    assert precisions_of(about, space) == ("mixed",)  # a table may have been measured elsewhere
    with pytest.raises(DeviceError, match=r"choose int4_weights, and runtime .* no files of mixed.*onnxruntime has"):
        for_table(space, about, "mixed", Latency(), seed=0)
