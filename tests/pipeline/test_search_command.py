"""`nas search` on the line: an experiment with other limits, a space with a function, and mistakes."""

import csv

import pytest
import tiny
from click.testing import CliRunner
from synthetic_tables import write_device

from nas.cli import cli, main
from nas.config import Limit
from nas.errors import ConfigError, NasError
from nas.pipeline import commands, load_experiment

EVALUATE = """
def top1(network):
    return 0.5 + 0.02 * len(network.blocks)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_experiment(tmp_path)
    space = tiny.space(tmp_path, shape=(32, 32, 3), classes=10)
    write_device(space, "phone", 0)
    (tmp_path / "judge_of_tiny.py").write_text(EVALUATE)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(cli, ["search", *arguments])


def test_a_space_a_device_and_a_function_leave_a_front_and_go_on(here):
    line = ("./tiny.toml", "--device", "phone", "--evaluate", "judge_of_tiny:top1", "--limit", "90%")
    first = call(*line, "--strategy", "nsga2", "--trials", "5", "--out", "found")
    assert first.exit_code == 0, first.exception
    assert "Front(" in first.output
    rows = list(csv.DictReader((here / "found" / "front.csv").open()))
    assert len(rows) >= 1
    assert (here / "found" / "front.svg").read_text().startswith("<svg")
    kept = (here / "found" / "journal.jsonl").read_text()
    assert call(*line, "--strategy", "nsga2", "--trials", "8", "--out", "found").exit_code == 0
    assert (here / "found" / "journal.jsonl").read_text().startswith(kept)


def test_an_address_on_the_line_is_that_of_the_cluster_to_search_on(here, monkeypatch):
    found = []
    monkeypatch.setattr(commands, "search_experiment", lambda experiment, out, **_: found.append(experiment.search))
    space = ("./tiny.toml", "--device", "phone", "--data", "bars.npz")
    for what in (("tiny_experiment.toml", "--set", "search.workers=3"), space):
        done = call(*what, "--address", "10.0.0.1:6379")
        assert done.exit_code == 0, done.exception
    assert [(s.executor, s.address) for s in found] == [("ray", "10.0.0.1:6379")] * 2
    assert found[0].workers == 3


def test_limits_of_the_line_replace_those_of_the_experiment():
    assert commands.parsed(["20", "macs=3e8", "params=50%"]) == {"latency_ms": 20.0, "macs": 3e8, "params": "50%"}
    for wrong in ("fast", "macs=", "mac=3", "macs=0", "latency_ms=-1"):
        with pytest.raises(ConfigError):
            commands.parsed([wrong])


def test_an_experiment_takes_limits_and_keeps_the_rest(here):
    experiment = load_experiment("tiny_experiment.toml")
    other = commands.limited(experiment, commands.parsed(["30%", "macs=1e6"]))
    assert other.limit.at_most == "30%"
    assert other.limits == {"macs": 1e6}  # as a file that says so has it: its run folder goes on
    tolerant = load_experiment("tiny_experiment.toml", overrides=['limits={macs={at_most="9%",tolerance="5%"}}'])
    assert commands.limited(tolerant, {"macs": 1e6}).asked["macs"] == Limit(1e6, tolerance="5%")
    assert other.search == experiment.search


def test_images_and_a_space_make_an_experiment(here):
    made = commands.experiment_of(
        "./tiny.toml", "bars.npz", device="phone", strategy="random", trials=7, limits={"latency_ms": "50%"},
        overrides=["train.epochs=1"],
    )  # fmt: skip
    assert made.name == "tiny-phone"
    assert made.data.source == str(here / "bars.npz")
    assert (made.search.strategy, made.search.trials, made.train.epochs) == ("random", 7, 1)
    assert made.limit.at_most == "50%"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("tiny_experiment.toml", "--evaluate", "a:b"), "--evaluate has no meaning"),
        (("./tiny.toml", "--device", "phone"), "Give --data PATH"),
        (("./tiny.toml", "--evaluate", "a:b", "--smoke"), "--smoke has no meaning"),
    ],
)
def test_what_would_be_ignored_is_refused(line, message, here):
    done = call(*line)
    assert done.exit_code == 2
    assert message in done.output


def test_where_nothing_can_be_evaluated_no_line_is_given_that_would_fail_again(here, capsys):
    (here / "judge_in_percent.py").write_text("def top1(network):\n    return 78.2\n")
    line = ("./tiny.toml", "--device", "phone", "--evaluate", "judge_in_percent:top1", "--out", "found")
    with pytest.raises(SystemExit) as e:
        main(["search", *line, "--strategy", "random", "--trials", "9"])
    assert e.value.code == 2
    told = capsys.readouterr().err
    assert "evaluate gave 78.2" in told
    assert "another --out" in told
    assert "go on with" not in told


def test_a_function_that_is_not_there_is_named(here):
    with pytest.raises(NasError, match="No function 'nowhere:top1'"):
        commands.search_by(
            "nowhere:top1", "./tiny.toml", here / "out", device="phone", strategy=None, trials=3, limits={}
        )


def test_a_search_is_done_anew_on_request(here, monkeypatch):
    asked = []
    monkeypatch.setattr(commands, "run_experiment", lambda experiment, out, **more: asked.append((str(out), more)))
    assert call("tiny_experiment.toml", "--redo", "search", "--strategy", "random").exit_code == 0
    assert asked == [("runs/tiny", {"stages": ("search",), "redo": "search"})]


def test_help_has_an_example():
    done = call("--help")
    assert "nas search experiments/quickstart.toml" in done.output
    assert "--evaluate mine:top1" in done.output
