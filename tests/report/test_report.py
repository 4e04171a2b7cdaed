"""The page: it says what the files say, needs nothing else, and refuses what is not a finished run."""

import html
import itertools
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest
from synthetic_run import LIMIT_MS, build_run

from nas.config import load_experiment
from nas.errors import RunError
from nas.fidelity import answer, draw, judge, limits
from nas.files import write_json
from nas.report import write_report
from nas.report.folder import read_run
from nas.search import Front, journal
from nas.space import load_space
from nas.train.lineage import Lineage
from nas.train.lineage import Member as Trained
from nas.train.population import best, generation_rng, truncation

VOID = {"meta", "link", "br", "hr", "img", "input", "area", "base", "col", "embed", "source", "track", "wbr"}


def page(folder):
    """The page without the library inside it, no-break spaces made plain."""
    text = write_report(folder).read_text(encoding="utf-8")
    assert text.count("plotly.js v") == 1
    return re.sub(r"<script>\s*/\*\*.*?</script>", "", text, flags=re.DOTALL).replace("\N{NO-BREAK SPACE}", " ")


def plots(text):
    return json.loads(re.search(r'<script type="application/json" id="plots">(.*?)</script>', text, re.DOTALL)[1])


def plain(text):
    """What a reader sees: no tags, single spaces."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", body)).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return build_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def text(run):
    return page(run)


def test_the_first_lines_give_the_question_and_the_answer(run, text):
    winner = json.loads((run / "summary.json").read_text())["winner"]
    said = plain(text)
    start = said[: said.index("Accuracy against latency")]
    assert "The most accurate network for 16x16 digits within half of the latency range?" in start
    assert f"winner_1 classifies {winner['accuracy']:.1%}".replace("%", " %") in start
    assert f"{winner['comparable_ms']:.3f} ms, within the limit of 0.210 ms." in start
    for fact in ("p10 to p90", "winners/winner_1/model.onnx", "winners/winner_1/model.int8.onnx", "valid ONNX",
                 "int8 alternative", "Beats the hand-made network:", "1 thread", "AMD EPYC"):  # fmt: skip
        assert fact in start


def test_every_network_stands_in_the_table_and_is_drawn(text):
    table = text[text.index('id="networks"') : text.index('id="latency"')]
    for name in ("winner_1", "winner_2", "winner_3", "smallest", "largest", "handmade"):
        assert f"<b>{name}</b>" in table
    assert table.count(">float32</td>") == table.count(">int8</td>") == 6
    drawn = text[text.index('id="architectures"') : text.index('id="provenance"')]
    assert drawn.count("<svg") == 6
    assert ">skipped</text>" in drawn


def test_provenance_names_hashes_versions_seed_and_times(run, text):
    environment = json.loads((run / "environment.json").read_text())
    said = plain(text)
    for fact in (environment["space"]["digest"], environment["data"]["digest"], "9f86d081884c7d65",
                 "commit 3e0604816dc1", "onnxruntime 1.23.2", "6 min 52 s", "Time taken: 12 min 34 s"):  # fmt: skip
        assert fact in said


def test_the_plots_hold_every_trial_and_the_front(run, text):
    trials = read_run(run).trials
    front = Front.of(trials)
    traces = {t["name"]: t for t in plots(text)["front"]["data"]}
    assert traces["front of the trials"]["x"] == [t.latency_ms for t in front]
    succeeded = sum(t.failure is None for t in trials)
    assert len(traces["trials"]["x"]) + len(front) == succeeded < len(trials)
    assert "stage 1: " in traces["trials"]["text"][0]
    assert f"{len(trials) - succeeded} of {len(trials)} trials failed" in plain(text)
    assert plots(text)["front"]["layout"]["shapes"][0]["x0"] == LIMIT_MS


def test_every_plot_has_a_place_and_every_place_a_plot(text):
    assert sorted(re.findall(r'data-plot="([\w-]+)"', text)) == sorted(plots(text))


def test_nothing_is_loaded_from_anywhere(text):
    """The policy forbids it to the browser, the library's maps included; and the page itself does not try."""
    assert "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:" in text
    assert not re.search(r"<(link|iframe|img|object|embed|base)\b|@import|url\(|\bsrc\s*=", text)
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "").replace("http-equiv", "")


def test_the_commands_are_ones_that_the_program_takes(run, text):
    block = plain(text[text.index('id="next"') :])
    changes = re.findall(r"--out \S+ --set (name=\S+) --set (?:'([^']+)'|(\S+))", block)
    assert len(changes) == block.count("nas run")
    for change in changes:
        load_experiment(run / "config.toml", overrides=[part for part in change if part])
    assert "search.trials=800" in block


def test_the_tags_of_the_page_are_balanced(text):
    class Checker(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attrs):
            if tag not in VOID:
                self.open.append(tag)

        def handle_endtag(self, tag):
            if self.open[-1] in ("li", "p") and tag != self.open[-1]:
                self.open.pop()
            assert self.open.pop() == tag, self.getpos()

    checker = Checker()
    checker.feed(text)
    assert checker.open == []


def test_what_others_have_named_is_escaped(tmp_path):
    names = ("<b>&", "</script><script>alert(1)", *map(str, range(8)))
    folder = build_run(tmp_path, winners=1, trials=20, classes=names, question="Is <i>this</i> & {{ that }} safe?")
    text = page(folder)
    assert "&lt;b&gt;&amp;, &lt;/script&gt;&lt;script&gt;alert(1)" in text
    assert "Is &lt;i&gt;this&lt;/i&gt; &amp; {{ that }} safe?" in text
    assert "<b>&" not in text
    assert "alert(1)" not in "".join(re.findall(r"<script.*?</script>", text, re.DOTALL))


def test_a_run_without_int8_and_with_one_winner_has_its_page(tmp_path):
    said = plain(page(build_run(tmp_path, winners=1, int8=False, trials=20)))
    assert "No int8 file was made." in said
    assert "other winners" not in said


def test_a_search_in_int8_answers_in_int8(tmp_path):
    folder = build_run(tmp_path, winners=1, trials=20, precision="int8")
    text = page(folder)
    winner = json.loads((folder / "summary.json").read_text())["winner"]
    assert f"{winner['comparable_ms']:.3f} ms, within the limit" in plain(text)
    assert "winners/winner_1/model.int8.onnx, or winners/winner_1/model.onnx" in plain(text)
    assert "float32 alternative" in plain(text)
    names = [t["name"] for t in plots(text)["front"]["data"]]
    assert names[-1] == "winner, float32"
    assert "winner, int8" in names


def test_without_a_limit_none_is_drawn_or_claimed(tmp_path):
    folder = build_run(tmp_path, winners=1, trials=20, limit="none")
    text = page(folder)
    assert "none; its networks take" in plain(text)
    assert "ithin the limit" not in plain(text).replace("predicted to be within the limit", "")
    assert plots(text)["front"]["layout"]["shapes"] == []


def test_costs_beside_latency_are_told_with_their_limits(tmp_path):
    folder = build_run(tmp_path, winners=1, trials=20)
    summary = json.loads((folder / "summary.json").read_text())
    summary["further"] = [
        {"name": "macs", "value": 2e6, "limit": None, "tolerated": None, "reachable": [1e6, 4e6]},
        {"name": "memory_bytes", "value": 61_000, "limit": 60_000, "tolerated": 63_000, "reachable": [1e4, 1e5]},
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    said = plain(page(folder)).replace("\N{NO-BREAK SPACE}", " ")
    assert "the answer has 2 M; networks of the space have from 1 M to 4 M" in said
    assert "has 61 kB, at most 60 kB was asked for: over it, within its tolerance of 63 kB;" in said


def test_an_answer_over_the_limit_is_called_so(tmp_path):
    said = plain(page(build_run(tmp_path, winners=1, trials=20, factor=3.0)))
    assert ": over the limit of 0.210 ms." in said
    assert "within the limit of 0.210" not in said


def test_an_answer_that_failed_its_checks_is_called_so(tmp_path):
    said = plain(page(build_run(tmp_path, winners=1, trials=20, passed=False)))
    assert "Its file did not pass the checks." in said
    assert "did not pass its checks: top-1 agreement with JAX is 91.1 %, 99 % is needed." in said
    assert "winner_1, float32: top-1 agreement with JAX is 91.1 %" in said


def test_a_space_that_has_changed_since_costs_only_the_words(tmp_path):
    folder = build_run(tmp_path, winners=1, trials=20)
    environment = json.loads((folder / "environment.json").read_text())
    environment["space"]["digest"] = "of another"
    (folder / "environment.json").write_text(json.dumps(environment))
    text = page(folder)
    assert "The space has changed since" in text
    assert ">skipped</text>" not in text


def test_training_that_left_no_metrics_leaves_no_plot(tmp_path):
    folder = build_run(tmp_path, winners=1, trials=20)
    for path in folder.rglob("metrics.jsonl"):
        path.unlink()
    text = page(folder)
    assert "Nothing was trained" in text
    assert not [name for name in plots(text) if name.startswith(("supernet", "fine"))]


def test_a_loss_that_is_not_a_number_leaves_a_gap_and_no_broken_page(tmp_path):
    folder = build_run(tmp_path, winners=1, trials=20)
    with open(folder / "supernet" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6000, "loss_largest": NaN, "top1_largest": null}\n')
    curve = plots(page(folder))["supernet-loss"]["data"][0]
    assert max(curve["x"]) < 6000


def test_the_fidelity_of_the_supernet_stands_there_if_it_was_asked_for(tmp_path, text):
    assert "fidelity" not in plain(text)
    folder = build_run(tmp_path, winners=1, trials=20)
    space = load_space("digits_mixed", input_shape=(16, 16, 1), classes=10)
    right = np.random.default_rng(0).random((12, 1, 288)) < np.linspace(0.8, 0.95, 12)[:, None, None]
    genotypes, supernet = draw(space, 12, seed=0), right[:, 0].sum(1) - 30
    found = judge(space, genotypes, supernet.tolist(), right, epochs=5.0, supernet_epochs=20.0)
    write_json(folder / "fidelity" / "fidelity.json", msgspec.to_builtins(found))
    text = page(folder)
    said = plain(text)
    for fact in (answer(found), *limits(found)):
        assert fact in said
    row = f"the supernet</td><td>1.00</td><td>1.00 to 1.00</td><td>{found.told_apart}</td>"
    assert row in text
    assert sorted(re.findall(r'data-plot="([\w-]+)"', text)) == sorted(plots(text))
    (dots,) = plots(text)["order-supernet"]["data"]
    assert dots["x"] == [n.supernet / 288 for n in found.networks]
    assert dots["y"] == [n.alone_mean / 288 for n in found.networks]
    low, high = (np.array(dots["error_y"][side]) for side in ("arrayminus", "array"))
    assert (low > 0).all()
    assert (high > 0).all()


NEEDED = (
    "config.toml",
    "environment.json",
    "latency/proof.json",
    "search/journal.jsonl",
    "summary.json",
    "winners/winner_1/architecture.json",
    "winners/winner_1/verify.json",
    "baselines/handmade/blocks.json",
)


@pytest.fixture
def moved(run):
    """Hides a file of the shared run for one test."""
    hidden = []

    def move(name):
        path = run / name
        hidden.append((path, path.rename(path.with_name("hidden"))))

    yield move
    for path, there in hidden:
        there.replace(path)


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_is_named_with_the_command_that_makes_it(run, text, moved, name):
    before = (run / "report.html").stat()
    moved(name)
    with pytest.raises(RunError, match=f"{re.escape(name)}: missing or damaged: .*`nas run"):
        write_report(run)
    assert (run / "report.html").stat() == before


@pytest.mark.parametrize("damage", ["", "[]", '{"name": 3}'])
@pytest.mark.parametrize("name", ["summary.json", "environment.json", "winners/winner_1/verify.json"])
def test_a_damaged_file_is_named(run, moved, name, damage):
    moved(name)
    (run / name).write_text(damage)
    with pytest.raises(RunError, match=f"{re.escape(name)}: missing or damaged: .*`nas run EXPERIMENT --redo"):
        write_report(run)


def test_block_times_of_another_network_are_refused(run, moved):
    moved("winners/winner_1/blocks.json")
    (run / "winners/winner_1/blocks.json").write_text((run / "baselines/largest/blocks.json").read_text())
    with pytest.raises(RunError, match="its blocks are not those of architecture"):
        write_report(run)


def test_the_same_files_give_the_same_page(run, text):
    assert page(run) == text


def test_neither_jax_nor_ray_is_imported():
    code = "import sys, nas.report; assert not {'jax', 'flax', 'ray', 'onnxruntime'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_trials_on_fewer_images_are_marked_and_left_out_of_the_front(tmp_path):
    """As successive halving leaves them: most networks were tried on a ninth of the images, where they look better."""
    folder = build_run(tmp_path)
    path = folder / "search" / "journal.jsonl"
    header, records = journal.read(path)
    most = records[0]["total"]
    few = [r | {"total": most // 9, "correct": most // 9} for r in records if r["correct"] is not None]
    few = [r | {"costs": r["costs"] | {"error": 0.0}} for r in few]
    for number, record in enumerate(few):
        record["trial"] = len(records) + number
    path.unlink()
    with journal.Journal(path, {k: v for k, v in header.items() if k != "schema"}) as written:
        for record in (*records, *few):
            written.append(record)
    run, text = read_run(folder), page(folder)
    traces = {t["name"]: t for t in plots(text)["front"]["data"]}
    assert len(traces["trials on fewer images"]["x"]) == len(few) > 0
    assert traces["trials on fewer images"]["visible"] == "legendonly"
    shown = traces["trials"]["y"] + traces["front of the trials"]["y"]
    assert len(shown) == sum(r["correct"] is not None for r in records)
    assert max(shown) < 1
    from_trial = [y for y in traces["from trial to winner"]["y"] if y is not None][::2]
    assert from_trial == [next(t.top1 for t in run.whole if t.genotype == w.architecture.genotype) for w in run.winners]
    said = plain(text)
    assert f"{len(few)} trials were on fewer images than all {most}" in said
    assert f"{len(records)} of them tried" in said  # networks, not trials


def test_a_faster_network_is_asked_for_with_all_other_objectives_and_from_where_the_limit_is(tmp_path):
    folder = build_run(tmp_path)
    config = folder / "config.toml"
    objectives = """[{name="top1"}, {name="latency_ms", at_most="50%"}, {name="latency_ms@note10", precision="int8"},
        {name="macs", at_most=4e6}]"""
    config.write_text(re.sub(r"objectives = .*", lambda _: f"objectives = {objectives}", config.read_text()))
    block = plain(page(folder))
    (command,) = re.findall(r"nas run config.toml --out \S+-faster .*?(?= Another seed)", block)
    overrides = [part for flag, part in itertools.pairwise(shlex.split(command)) if flag == "--set"]
    asked = load_experiment(config, overrides=overrides)
    before = load_experiment(config)
    assert [o.name for o in asked.objectives] == [o.name for o in before.objectives]
    for now, then in zip(asked.objectives, before.objectives, strict=True):
        if now.name == "latency_ms":
            summary = json.loads((folder / "summary.json").read_text())
            low, high = summary["reachable_ms"]
            share = (summary["limit_ms"] - low) / (high - low)
            assert float(now.at_most.rstrip("%")) == pytest.approx(50 * share, rel=0.01)
        else:
            assert now == then


def populated(folder, intervals=4):
    """A run of a population of six, whose scores follow its learning rates; population.json as training writes it."""
    build_run(folder)
    config = (folder / "config.toml").read_text()
    vary = "[train.population]\nmembers = 6\n[train.population.vary]\noptimiser.learning_rate = [0.01, 1.0]\n"
    (folder / "config.toml").write_text(config + "\n" + vary + "label_smoothing = [0.0, 0.2]\n")
    keys, ranges = ("optimiser.learning_rate", "label_smoothing"), [(0.01, 1.0), (0.0, 0.2)]
    evolution = truncation(ranges, [0.02, 0.0], members=6, replaced=0.34, resampled=0.2)
    state = evolution.init(generation_rng(0, 0))
    lineage = Lineage(folder / "supernet" / "population.json", {"seed": 0}, images=288)
    for generation in range(1, intervals + 1):
        scores = 200 - np.abs(np.log(state.values[:, 0] / 0.3)) * 30
        scores[3] = np.nan if generation == 1 else scores[3]
        for number in range(6):
            correct = None if np.isnan(scores[number]) else (int(scores[number]), 288)
            values = dict(zip(keys, state.values[number].tolist(), strict=True))
            parent = state.parents[number]
            lineage.add(Trained(state.generation, number, state.interval, state.source, parent, values, correct))
        winner = best(scores)
        state = evolution.tell(generation_rng(0, generation), state, scores)
    lineage.finish(winner)
    return lineage


def test_a_population_is_told_with_what_won_and_the_line_that_led_there(tmp_path, text):
    assert "Population" not in plain(text)
    lineage = populated(tmp_path / "run")
    line = lineage.winning_line()
    text = page(tmp_path / "run")
    said = plain(text)
    assert "6 supernets were trained beside each other, and compared after each of 4 intervals by 2 subnets" in said
    won = ", ".join(f"{key} {value:.4g}" for key, value in line[-1].values.items())
    assert f"What won: {won}." in said
    figure = plots(text)["population-optimiser.learning_rate"]
    winner = next(trace for trace in figure["data"] if trace["name"] == "the winner's line")
    assert winner["x"] == [1, 2, 3, 4]
    assert winner["y"] == [m.values["optimiser.learning_rate"] for m in line]
    assert figure["layout"]["yaxis"]["type"] == "log"
    assert "type" not in plots(text)["population-label_smoothing"]["layout"]["yaxis"]  # it may be 0
    dots = sum(len(t["x"]) for t in figure["data"] if t["name"] in ("members", "the winner's line"))
    assert dots == len(lineage.members)
    assert [(m.generation, m.member) for m in read_run(tmp_path / "run").population.line] == [
        (m.generation, m.member) for m in line
    ]


def test_a_population_that_is_not_finished_is_no_finished_run(tmp_path):
    lineage = populated(tmp_path / "run")
    lineage.winner = None
    lineage.add(lineage.members[-1])
    with pytest.raises(RunError, match=r"population.json: missing or damaged.*--redo train"):
        write_report(tmp_path / "run")
