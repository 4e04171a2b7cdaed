"""The self-test of a table: it says what the table and its proof say, and whose proof it is."""

import json
import re

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from test_report import VOID, plain, plots

from nas.cli import cli
from nas.errors import DeviceError, LatencyError
from nas.files import write_json
from nas.latency import Anchor, Entry, Proof, Table, calibrate, op_counts, prove
from nas.report import table_folders, write_table_report
from nas.report.selftest import _interval
from nas.space import Space, load_space


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits_mixed", input_shape=(16, 16, 1), classes=10)


def made(space: Space, *, anchors: int = 16, networks: int = 30, unsupported: bool = False, **changes):
    """A table of a machine where each op takes a little more in company, and its proof."""
    rng = np.random.default_rng(0)
    entries = {
        key: Entry(float(rng.lognormal(-4, 0.5)), float(rng.uniform(0, 0.1)), block.label, role, 40)
        for key, (block, role) in space.blocks().items()
    }
    genotypes = space.sample(rng, anchors + networks)
    chains = [[b.graph for b in space.decode(g).blocks] for g in genotypes]
    truth = [sum(entries[g.key].latency_ms + 0.003 * sum(op_counts(g).values()) for g in chain) for chain in chains]
    measured = np.array(truth) * rng.normal(1, 0.01, len(truth))
    lost = {}
    if unsupported:
        used = {g.key for chain in chains for g in chain}
        key = next(k for k in entries if k not in used)
        lost = {key: "<b>the runtime</b> fell over"}
        del entries[key]
    table = Table(
        **{
            "device": "a test & more", "runtime": "onnxruntime", "runtime_version": "1", "precision": "float32",
            "threads": 1, "batch": 1, "hardware": "none", "space": space.name, "space_digest": space.digest,
            "date": "2026-01-01T00:00:00+00:00", "command": "nas measure", "overhead_ms": 0.005, "entries": entries,
            "correction": calibrate(entries, chains[:anchors], measured[:anchors]), "unsupported": lost,
            "anchors": tuple(map(Anchor, map(tuple, genotypes[:anchors].tolist()), measured[:anchors].tolist())),
            "input": space.input, "classes": space.classes, **changes,
        }
    )  # fmt: skip
    held_out = genotypes[anchors:]
    proof = prove(
        table.price(space, held_out), measured[anchors:], genotypes=held_out, repeat_mape=0.005, repeat_tau=0.97,
        drift=0.01, table=table.digest, date="2026-01-02T00:00:00+00:00",
    )  # fmt: skip
    return table, proof


def written(folder, table: Table, *proofs: Proof):
    where = folder / "my_board" / table.space
    table.save(where)
    for proof in proofs:
        write_json(where / "proof.json", {"precisions": {table.precision: msgspec.to_builtins(proof)}})
    return where


def page(folder, **options) -> str:
    text = write_table_report(folder, **options).read_text(encoding="utf-8")
    assert text.count("plotly.js v") == 1
    return re.sub(r"<script>\s*/\*\*.*?</script>", "", text, flags=re.DOTALL).replace("\N{NO-BREAK SPACE}", " ")


def said(text: str) -> str:
    return plain(text.replace("&nbsp;", " "))


def test_the_page_says_what_the_proof_says(space, tmp_path):
    table, proof = made(space)
    text = page(written(tmp_path, table, proof))
    words = said(text)
    assert f"{proof.within_10:.0%} of {proof.networks} networks are predicted".replace("%", " %") in words
    assert re.search(rf"{100 * proof.mape:.1f} %\s*mean absolute error", words)
    assert re.search(rf"{proof.kendall_tau:.3f}\s*Kendall τ", words)
    assert re.search(rf"{proof.spearman:.3f}\s*Spearman", words)
    assert "the measuring with itself 0.970" in words
    assert "Proved 2026-01-02T00:00:00+00:00, the table being of 2026-01-01" in words
    assert "my_board" in words
    assert "Unsupported blocks None." in words
    for tried in table.correction.tried:
        assert tried.form in words
    assert (
        f"Taken was the simplest form whose error is within one standard error of the smallest: {table.correction.form}"
        in words
    )
    assert "--image 16x16x1 --classes 10" in words


def test_the_plots_have_each_network_and_each_form(space, tmp_path):
    table, proof = made(space)
    drawn = plots(page(written(tmp_path, table, proof)))
    assert set(drawn) == {"forms-float32", "proved-float32", "latency-float32", "macs-float32"}
    dots = drawn["proved-float32"]["data"][-1]
    assert dots["x"] == [r.predicted_ms for r in proof.rows]
    assert dots["y"] == [r.measured_ms for r in proof.rows]
    errors = drawn["latency-float32"]["data"][0]
    np.testing.assert_allclose(errors["y"], [r.predicted_ms / r.measured_ms - 1 for r in proof.rows])
    low, high = drawn["latency-float32"]["layout"]["yaxis"]["range"]
    assert low < min(errors["y"]) <= max(errors["y"]) < high
    assert drawn["forms-float32"]["data"][0]["x"] == [t.error for t in table.correction.tried]


def test_the_worst_networks_are_drawn_worst_first_with_what_was_measured(space, tmp_path):
    table, proof = made(space)
    text = page(written(tmp_path, table, proof))
    named = [int(n) for n in re.findall(r"<h3>network (\d+)", text)]
    errors = np.abs([r.predicted_ms / r.measured_ms - 1 for r in proof.rows])
    assert named == (np.argsort(-errors, kind="stable")[:4] + 1).tolist()
    assert text.count('class="block"') == sum(len(space.decode(proof.rows[n - 1].genotype).blocks) for n in named)
    assert len(re.findall(r">measured [\d.]+ ms</text>", text)) == 4


def test_every_tag_is_closed_and_nothing_is_fetched(space, tmp_path):
    from html.parser import HTMLParser

    open_tags = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert not any(k in ("src", "href") and v and v.startswith(("http", "//")) for k, v in attrs)
            if tag not in VOID:
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Checker().feed(page(written(tmp_path, *made(space, unsupported=True))))
    assert open_tags == []


def test_unsupported_blocks_are_told_and_what_runtimes_say_is_no_markup(space, tmp_path):
    table, proof = made(space, unsupported=True)
    text = page(written(tmp_path, table, proof))
    assert "cannot run 1 blocks" in said(text)
    assert "&lt;b&gt;the runtime&lt;/b&gt; fell over" in text


def test_a_proof_of_another_table_is_told(space, tmp_path):
    table, proof = made(space)
    other = msgspec.structs.replace(table, correction=msgspec.structs.replace(table.correction, scale=2.0))
    words = said(page(written(tmp_path, other, proof)))
    assert f"PROOF OF ANOTHER TABLE (hash {table.digest}; the table here has {other.digest})" in words
    unnamed = msgspec.structs.replace(proof, table="")
    assert "PROOF OF ANOTHER TABLE: this table predicts otherwise" in said(page(written(tmp_path, other, unnamed)))
    assert "PROOF OF ANOTHER" not in said(page(written(tmp_path, table, unnamed)))


def test_a_table_without_proof_or_choice_has_a_page_that_says_so(space, tmp_path):
    table, _ = made(space, anchors=3)
    words = said(page(written(tmp_path, table)))
    assert "This table has no proof." in words
    assert "There were 3 anchors, too few to choose among forms" in words


def test_all_precisions_of_a_folder_are_on_its_page(space, tmp_path):
    table, proof = made(space)
    where = written(tmp_path, msgspec.structs.replace(table, precision="int8"))
    written(tmp_path, table, proof)
    text = page(where)
    assert '<section id="float32">' in text
    assert '<section id="int8">' in text


def test_a_table_of_a_space_that_changed_or_is_not_here_is_refused(space, tmp_path):
    table, proof = made(space, space_digest="0" * 16)
    with pytest.raises(LatencyError, match=r"another form of space 'digits_mixed' \(hash 0000"):
        write_table_report(written(tmp_path, table, proof))
    table = msgspec.structs.replace(made(space)[0], space="elsewhere")
    with pytest.raises(LatencyError, match=r"'elsewhere', which is not here: --space FILE"):
        write_table_report(written(tmp_path, table, proof))


def test_the_interval_of_a_mean_is_about_two_standard_errors():
    values = np.random.default_rng(0).normal(0.02, 0.03, 100)
    low, high = _interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.15)
    assert np.isnan(_interval(values[:1])).all()


def test_folders_are_found_by_themselves_or_by_their_device(space, tmp_path):
    where = written(tmp_path, *made(space))
    assert table_folders(str(where)) == [where]
    with pytest.raises(DeviceError):
        table_folders(str(where.parent))
    with pytest.raises(LatencyError, match="none: there is no such folder of tables"):
        table_folders(str(where / "none"))
    (where.parent / "device.toml").write_text('device = "a board"\nruntime = "onnxruntime"\nhardware = "a board"\n')
    assert table_folders(str(where.parent)) == [where]
    with pytest.raises(LatencyError, match=r"has no latency tables.*nas measure SPACE --device host_onnxruntime"):
        table_folders("host_onnxruntime")


def test_the_command_writes_the_page(space, tmp_path):
    where = written(tmp_path, *made(space))
    result = CliRunner().invoke(cli, ["report", str(where)], catch_exceptions=False)
    assert (result.exit_code, result.output.strip()) == (0, str(where / "report.html"))
    out = tmp_path / "elsewhere.html"
    result = CliRunner().invoke(cli, ["report", str(where), "--out", str(out)], catch_exceptions=False)
    assert out.read_text(encoding="utf-8") == (where / "report.html").read_text(encoding="utf-8")


def test_json_of_a_proof_on_disk_is_read_by_any_reader(space, tmp_path):
    where = written(tmp_path, *made(space))
    kept = json.loads((where / "proof.json").read_text(), parse_constant=pytest.fail)
    assert kept["precisions"]["float32"]["networks"] == 30
