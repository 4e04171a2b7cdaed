"""A latency model learned from networks measured whole: one network, one latency, whoever asks."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from synthetic_tables import a_table, write_device

from nas.errors import LatencyError, SpaceError, UnmeasuredBlock
from nas.latency import (
    About,
    Learned,
    Table,
    find_model,
    find_sources,
    find_table,
    import_file,
    import_networks,
    learn,
    load_model,
    place,
    prove_learned,
    transfer,
)
from nas.latency.features import branch_groups, feature_groups, features
from nas.space import Space, load_space

ABOUT = About(
    device="a phone", runtime="its own", runtime_version="2", precision="float32", threads=1, batch=1,
    hardware="a phone", date="2026-02-01T00:00:00+00:00", command="by hand",
)  # fmt: skip


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits_mixed", input_shape=(16, 16, 1), classes=10)


@pytest.fixture(scope="module")
def sources(space) -> list[tuple[str, Table]]:
    return [(f"device{seed}", a_table(space, seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def prior(space, sources) -> transfer.Prior:
    return transfer.space_prior(transfer.KnownDevices(space, tuple(t for _, t in sources)))


@pytest.fixture(scope="module")
def truth(space) -> Table:
    return a_table(space, 7)


@pytest.fixture(scope="module")
def model(space, sources, prior, truth) -> Learned:
    known = transfer.KnownDevices(space, tuple(t for _, t in sources))
    genotypes, drawn = transfer.design_space(known, 24, prior=prior)
    return learn(ABOUT, space, sources, genotypes, truth.price(space, genotypes), at_random=drawn, prior=prior)


@pytest.fixture(scope="module")
def networks(space) -> np.ndarray:
    return space.sample(np.random.default_rng(3), 2000)


def all_of(prediction) -> list[list[float]]:
    return [prediction.latency_ms.tolist(), prediction.low_ms.tolist(), prediction.high_ms.tolist()]


# features


def test_features_of_genotypes_are_those_of_their_networks(space, networks):
    groups = feature_groups(space, networks[:50])
    alone = np.array([list(features(space.decode(g)).values()) for g in networks[:50]])
    columns = {tuple(c) for c in alone.T}
    assert all(tuple(c) in columns for c in groups[0].T)
    assert {tuple(c) for c in alone.T if np.ptp(c) > 0} <= {tuple(c) for c in groups[0].T}


def test_branches_of_a_network_are_those_of_its_genotype(space, networks):
    for genotype in networks[:50]:
        np.testing.assert_array_equal(space.branches_of(space.decode(genotype)), space.branches(genotype))
    branches = space.branches(networks[:50])
    for of_branches, of_genotypes in zip(
        branch_groups(space, branches), feature_groups(space, networks[:50]), strict=True
    ):
        np.testing.assert_array_equal(of_branches, of_genotypes)


def test_a_network_of_another_space_has_no_branches_here(space):
    other = load_space("digits_mixed", input_shape=(16, 16, 1), classes=3)
    with pytest.raises(SpaceError, match="is none of space 'digits_mixed'"):
        space.branches_of(other.decode(other.smallest()))


# laws


def test_a_price_is_the_same_to_the_last_bit_in_any_company(model, space, networks):
    whole = model.predict(space, networks)
    rng = np.random.default_rng(0)
    for count in (1, 2, 63, 512, 513, 1999):
        some = rng.permutation(len(networks))[:count]
        part = model.predict(space, networks[some])
        for name in ("latency_ms", "low_ms", "high_ms"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[some])


def test_one_network_costs_what_its_genotype_costs(model, space, networks):
    whole = model.predict(space, networks)
    for row in range(0, 200, 7):
        network = space.decode(networks[row])
        assert model.network_ms(network) == whole.latency_ms[row]
        assert model.interval_ms(network) == (whole.low_ms[row], whole.high_ms[row])
        blocks_ms, once_ms = model.parts_ms(network)
        assert len(blocks_ms) == len(network.blocks)
        assert sum(blocks_ms) + once_ms == pytest.approx(model.network_ms(network), rel=1e-12)


def test_a_limit_is_held_against_the_upper_end(model, space, networks):
    found = model.predict(space, networks)
    np.testing.assert_array_equal(model.bound(space, networks), found.high_ms)
    np.testing.assert_array_equal(model.price(space, networks), found.latency_ms)
    assert (found.low_ms < found.latency_ms).all()
    assert (found.latency_ms < found.high_ms).all()


def test_learning_is_deterministic_and_free_of_order(model, space, sources, networks):
    genotypes = np.array([m.genotype for m in model.measured], np.uint8)
    latency = np.array([m.latency_ms for m in model.measured])
    drawn = np.array([m.at_random for m in model.measured])
    again = learn(ABOUT, space, sources, genotypes, latency, at_random=drawn)
    assert again.digest == model.digest
    order = np.random.default_rng(1).permutation(len(genotypes))
    moved = learn(ABOUT, space, sources, genotypes[order], latency[order], at_random=drawn[order])
    a, b = model.predict(space, networks), moved.predict(space, networks)
    np.testing.assert_allclose(a.latency_ms, b.latency_ms, rtol=1e-8)
    np.testing.assert_allclose(a.high_ms, b.high_ms, rtol=1e-8)


def test_the_extremes_of_a_small_space_are_found(tmp_path):
    small = tiny.space(tmp_path)
    everything = np.stack(np.unravel_index(np.arange(np.prod(small.sizes)), small.sizes), axis=1).astype(np.uint8)
    known = [(f"device{seed}", a_table(small, seed)) for seed in range(2)]
    genotypes = np.unique(small.sample(np.random.default_rng(0), 40), axis=0)[:12]
    found = learn(ABOUT, small, known, genotypes, a_table(small, 9).price(small, genotypes))
    bounds = found.bound(small, everything)
    low, fastest, high, slowest = found.reachable(small)
    assert (low, high) == (bounds.min(), bounds.max())
    assert (found.bound(small, fastest[None])[0], found.bound(small, slowest[None])[0]) == (low, high)


def test_no_random_network_is_beyond_the_extremes_found(model, space):
    many = space.sample(np.random.default_rng(8), 20000)
    low, _, high, _ = model.reachable(space)
    bounds = model.bound(space, many)
    assert low <= bounds.min()
    assert bounds.max() <= high
    assert "found by search, not exact" in model.caveat


def test_networks_with_a_block_that_cannot_be_run_are_out_of_reach(model, space, networks):
    block = next(b for b in space.decode(networks[0]).blocks if b.name.startswith("stage"))
    less = model.without({block.graph.key: "not implemented"})
    has = np.array([any(b.graph.key == block.graph.key for b in space.decode(g).blocks) for g in networks[:200]])
    bound = less.bound(space, networks[:200])
    assert has.any()
    np.testing.assert_array_equal(np.isinf(bound), has)
    np.testing.assert_array_equal(bound[~has], model.bound(space, networks[:200])[~has])
    assert less.network_ms(space.decode(networks[0])) == np.inf
    assert np.isfinite(less.reachable(space)[2])
    assert less.digest != model.digest


def test_networks_measured_again_tell_the_level_of_the_machine(model):
    assert model.level(1.25 * np.array([a.measured_ms for a in model.anchors])) == pytest.approx(1.25)


# files


def test_what_is_kept_is_text_and_comes_back_to_the_last_bit(model, space, networks, tmp_path):
    model.save(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.read_text(encoding="ascii")
    for again in (Learned.load(tmp_path, "float32", space), load_model(tmp_path, "float32", space)):
        assert again.digest == model.digest
        assert all_of(again.predict(space, networks)) == all_of(model.predict(space, networks))


def test_sources_that_are_no_longer_used_go(model, space, sources, tmp_path):
    model.save(tmp_path)
    genotypes = np.array([m.genotype for m in model.measured], np.uint8)
    learn(ABOUT, space, sources[:2], genotypes, [m.latency_ms for m in model.measured]).save(tmp_path)
    assert sorted(p.name for p in (tmp_path / "learned.float32" / "sources").iterdir()) == ["device0", "device1"]
    assert len(Learned.load(tmp_path, "float32", space).sources) == 2


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("networks.csv", lambda t: t.replace("0.", "1.", 1), "checksum"),
        ("model.json", lambda t: t.replace("a phone", "my phone"), "checksum"),
        ("model.json", lambda t: t[:100], "damaged"),
        ("model.json", lambda t: "[]", "checksum"),
        ("networks.csv", None, "there is no learned float32 latency model here"),
        ("sources/device1/digits.csv", None, "no float32 latency table"),
    ],
)
def test_a_changed_or_damaged_file_is_refused(model, space, tmp_path, file, change, message):
    model.save(tmp_path)
    folder = tmp_path / "learned.float32"
    if file.startswith("sources"):
        (folder / "sources" / "device1" / "table.float32.csv").unlink()
    elif change is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(change((folder / file).read_text()))
    with pytest.raises(LatencyError, match=message):
        Learned.load(tmp_path, "float32", space)


def test_another_source_is_refused(model, space, tmp_path):
    model.save(tmp_path)
    a_table(space, 5).save(tmp_path / "learned.float32" / "sources" / "device1")
    with pytest.raises(LatencyError, match="device1: the table is not the one that this model was learned from"):
        Learned.load(tmp_path, "float32", space)


def test_a_model_says_nothing_of_another_space(model, space, tmp_path):
    model.save(tmp_path)
    other = load_space("digits_mixed", input_shape=(16, 16, 1), classes=3)
    with pytest.raises(LatencyError, match=r"learned for space 'digits_mixed' .* says nothing of this"):
        Learned.load(tmp_path, "float32", other)
    with pytest.raises(LatencyError, match="says nothing of this"):
        model.price(other, other.sample(np.random.default_rng(0), 3))


# what can be learned from


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, ms: (g[:5], ms[:5]), "5 measured networks: at least 6"),
        (lambda g, ms: (g, np.full(len(g), 2.5)), r"all 12 networks take 2\.5 ms: nothing can be learned"),
        (lambda g, ms: (g, np.where(np.arange(12) == 3, np.nan, ms)), "latency 3 is nan"),
        (lambda g, ms: (g, np.where(np.arange(12) == 3, 0.0, ms)), r"latency 3 is 0\.0: milliseconds above 0"),
        (lambda g, ms: (g, ms[:-1]), r"shape \(11,\): one for each of 12"),
        (lambda g, ms: (g[[0, 0, *range(2, 12)]], ms), "is there twice"),
    ],
)
def test_measurements_that_nothing_can_be_learned_from_are_refused(space, sources, prior, truth, change, message):
    genotypes = space.sample(np.random.default_rng(0), 12)
    with pytest.raises(LatencyError, match=message):
        learn(ABOUT, space, sources, *change(genotypes, truth.price(space, genotypes)), prior=prior)


def test_genotypes_of_another_space_are_refused(space, sources, prior):
    with pytest.raises(SpaceError, match="Is it of another space"):
        learn(ABOUT, space, sources, np.zeros((12, 3), np.uint8), np.arange(1, 13), prior=prior)


# proof


def test_a_proof_stands_beside_that_of_the_most_similar_device(model, space, truth):
    others = space.sample(np.random.default_rng(11), 200)
    proof = prove_learned(model, others, truth.price(space, others))
    assert proof.learned is not None
    assert (proof.networks, proof.learned.measured, proof.learned.held_out) == (200, 24, True)
    assert proof.mape < proof.learned.similar_mape
    assert proof.learned.left_out_mape < proof.learned.left_out_similar_mape
    found = model.predict(space, others)
    exact = truth.price(space, others)
    assert proof.learned.coverage == ((found.low_ms <= exact) & (exact <= found.high_ms)).mean()
    assert "200 held-out networks" in str(proof)
    assert f"the most similar known device ({model.similar}), scaled" in str(proof)


def test_without_held_out_networks_each_is_predicted_from_the_others(model):
    proof = prove_learned(model, np.zeros((0, 1), np.uint8), [])
    assert proof.learned is not None
    assert not proof.learned.held_out
    assert proof.networks == 24
    assert proof.mape == pytest.approx(proof.learned.left_out_mape)
    assert all(r.predicted_ms != r.measured_ms for r in proof.rows)
    assert "24 networks, each predicted from all others" in str(proof)


# where it is found


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sheet(path: Path, space: Space, table: Table, *, count: int = 16, factor: float = 1.0, **changes: str) -> Path:
    """A filled-in CSV of networks; `changes` by row number."""
    genotypes = space.sample(np.random.default_rng(0), count)
    roles = ["random", "chosen", "held-out"]
    with path.open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["model", "genotype", "role", "latency_ms"])
        for number, (g, ms) in enumerate(zip(genotypes, table.price(space, genotypes), strict=True)):
            latency = changes.get(f"row{number}", repr(float(ms * factor)))
            rows.writerow([f"models/{number}.onnx", " ".join(map(str, g)), roles[number % 3], latency])
    return path


def test_networks_of_a_csv_become_a_model_of_the_device(here, space, truth):
    for seed in range(2):
        write_device(space, f"known{seed}", seed)
    done = import_file(
        sheet(here / "phone.csv", space, truth, row4=" "), form="networks", space=space, device="phone", unit="ms"
    )
    assert done.left_out == 1
    assert "1 rows have no latency" in str(done)
    assert [s.device for s in done.model.sources] == ["known0", "known1"]
    assert (len(done.model.measured), done.proof.networks) == (10, 5)
    assert sum(m.at_random for m in done.model.measured) == 6
    found, proof = find_model("phone", "float32", space)
    assert found.digest == done.model.digest
    assert proof == done.proof
    assert json.loads((here / "latency_models/phone/digits_mixed/learned.float32/model.json").read_text())["kernel"]
    assert [n for n, _ in find_sources(space)] == ["known0", "known1"]  # a model is no source of another one


def test_of_a_table_and_a_model_the_newer_one_is_taken(here, space, truth):
    write_device(space, "known0", 0)
    import_networks(sheet(here / "phone.csv", space, truth), space=space, device="phone", unit="ms")
    write_device(space, "phone", 7)  # of January 2026
    found, _ = find_model("phone", "float32", space)
    assert found.kind == "learned"
    later = here / "latency_models/phone/digits_mixed/learned.float32/model.json"
    later.unlink()
    assert find_model("phone", "float32", space)[0].kind == "measured"


def test_two_forms_of_a_space_are_kept_side_by_side(here, space, truth):
    """Over other images: neither a table nor a model of one stands in the way of the other."""
    larger = load_space("digits_mixed", input_shape=(24, 24, 1), classes=10)
    for form, seed in ((space, 0), (larger, 1)):
        known = a_table(form, seed)
        folder = here / "latency_models" / "known"
        known.save(place(folder, form))
        (folder / "device.toml").write_text('device = "k"\nruntime = "onnxruntime"\nhardware = "k"\n')
        assert find_table("known", "float32", form)[0].digest == known.digest
    assert find_table("known", "float32", space)[0].digest == a_table(space, 0).digest
    for form in (space, larger, space):
        table = a_table(form, 7)
        import_networks(sheet(here / "phone.csv", form, table), space=form, device="phone", unit="ms")
    for form in (space, larger):
        found, proof = find_model("phone", "float32", form)
        assert (found.kind, found.space_digest) == ("learned", form.digest)
        assert proof is not None
        assert not proof.doubt
    assert sorted(p.name for p in (here / "latency_models/phone").iterdir() if p.is_dir()) == [
        "digits_mixed",
        f"digits_mixed.{larger.digest}",
    ]
    with pytest.raises(UnmeasuredBlock, match=r"It has a model learned from whole networks, of digits_mixed, "):
        find_table("phone", "float32", space)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# spce: x\ngenotype,latency_ms\n", r"line 1: unknown `spce` of networks.*`space`"),
        ("# threads: 1\n# threads: 2\ngenotype,latency_ms\n", "line 2: `threads` is there twice"),
        ("# threads: two\ngenotype,latency_ms\n{g},1\n", "`threads` is 'two': a whole number"),
        ("# classes: 7\ngenotype,latency_ms\n{g},1\n", "of classes 7, and classes 10 was asked for"),
        ("# threads: 1\ngenotype,latency_ms\nx,1\n", "line 3: `genotype` is 'x': whole numbers"),
        ("genotype\n0\n", r"line 1: the columns are genotype. `genotype` and"),
        ("genotype,latency_ms,role\n0,1,chosn\n", r"line 2: unknown role `chosn`.*chosen"),
        ("genotype,latency_ms\nx,1\n", "line 2: `genotype` is 'x': whole numbers"),
        ("genotype,latency_ms\n0 1,1\n", "Is it of another space"),
        ("genotype,latency_ms\n{g},-1\n", "line 2: `latency_ms` is '-1': a positive number"),
        ("genotype,latency_ms\n{g},nan\n", "line 2: `latency_ms` is 'nan'"),
        ("genotype,latency_ms\n{g},1\n", "1 measured networks: at least 6"),
    ],
)
def test_rows_that_make_no_sense_are_refused(here, space, text, message):
    write_device(space, "known0", 0)
    genotype = " ".join(map(str, space.sample(np.random.default_rng(0), 1)[0]))
    (here / "phone.csv").write_text(text.replace("{g}", genotype))
    with pytest.raises((LatencyError, SpaceError), match=message):
        import_networks(here / "phone.csv", space=space, device="phone", unit="ms")
    assert not (here / "latency_models" / "phone").exists()


def test_seconds_taken_for_milliseconds_are_noticed_by_the_known_devices(here, space, truth):
    write_device(space, "known0", 0)
    seconds = sheet(here / "phone.csv", space, truth, factor=1e-3)
    with pytest.raises(LatencyError, match=r"times faster than on the nearest of 1 known devices.*--unit s|--unit s"):
        import_networks(seconds, space=space, device="phone")
    done = import_networks(seconds, space=space, device="phone", unit="s")
    genotype = np.array(done.model.measured[0].genotype, np.uint8)
    assert done.model.measured[0].latency_ms == pytest.approx(truth.price(space, genotype[None])[0])


def test_without_a_known_device_the_error_says_what_to_measure(here, space, truth):
    with pytest.raises(LatencyError, match=r"no device has a table of all blocks of space .*this_machine"):
        import_networks(sheet(here / "phone.csv", space, truth), space=space, device="phone", unit="ms")
    write_device(space, "phone", 1)
    (here / "latency_models/phone/digits_mixed/table.float32.csv").unlink()
    with pytest.raises(UnmeasuredBlock, match="it has no table"):
        find_model("phone", "float32", space)
