"""Whole runs whose accuracy is a limit, and searches that count float32 and int8."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

import nas
from nas import config, words
from nas.console import Console
from nas.errors import ConfigError, LimitError
from nas.pipeline.costs import require_countable
from nas.pipeline.summary import _least, below, missed
from nas.search import Trial, read_trials

CHOICES = {"a": list(range(6)), "b": list(range(6)), "c": list(range(6))}
LATENCY = '{name="latency_ms"}'


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with an experiment, and its run folder with table and supernet."""
    folder = tmp_path_factory.mktemp("accurate")
    tiny.write_experiment(folder)
    said(folder, "run", stages=["measure", "train"])
    return folder


def said(folder: Path, run: str, *overrides: str, **more) -> str:
    stream = io.StringIO()
    experiment = nas.load_experiment(
        folder / "tiny_experiment.toml", overrides=['search.executor="inline"', *overrides]
    )
    nas.run_experiment(experiment, folder / run, console=Console(stream, plain_seconds=0), **more)
    return stream.getvalue()


def work(chosen) -> float:
    return float(chosen["a"] + chosen["b"] + chosen["c"])


def top1(chosen) -> float:
    return 0.5 + 0.03 * work(chosen)


def both(chosen) -> dict[str, float]:
    return {"top1": top1(chosen), "top1_int8": top1(chosen) - 0.02 * chosen["c"]}


def searched(**more):
    settings = {
        "evaluate": top1,
        "costs": {"ms": lambda g: 1.0 + g.sum(1)},
        "trials": 60,
        "population": 8,
        "images": 1000,
    }
    return nas.search(CHOICES, **(settings | more), quiet=True)


@pytest.mark.slow  # 20 s; `make smoke` has it
def test_a_run_looks_for_the_fastest_network_that_is_accurate_enough_and_says_what_its_file_has(trained):
    limits = (f"objectives=[{LATENCY}]", 'limits.top1={at_least="34%",tolerance=0.01}')
    said(trained, "run", *limits, 'question=""', "search.trials=8", "finish.winners=2")
    run = nas.load_run(trained / "run")
    reached = [t for t in run.trials if t.top1 >= 0.33]
    (told,) = run.summary["least"]
    assert reached
    assert told["reached"]
    assert run.front.best().latency_ms == min(t.latency_ms for t in reached)
    assert run.winners["winner_1"].architecture.genotype == run.front.best().genotype
    assert told["answer"] == run.summary["winner"]["accuracy"]
    assert re.search(r"Fastest network within [\d.]+ ms, top1 at least 0\.34: top-1", run.summary["verdict"])
    page = (trained / "run" / "report.html").read_text()
    assert "Which network is the cheapest that is accurate enough?" in page
    assert f"at least {words.percent(0.34)} was asked for, down to {words.percent(0.33)} tolerated" in page


def test_a_limit_that_no_trial_reaches_is_told_with_the_nearest_and_the_run_ends_well(trained):
    text = said(trained, "run", "limits={top1=1.0}", f"objectives=[{LATENCY}]", "search.trials=6", redo="search")
    run = nas.load_run(trained / "run")
    nearest = max(t.top1 for t in run.trials)
    assert nearest < 1
    assert f"NONE reaches top1 at least 1, the nearest has: top-1 {nearest:.1%}" in text
    assert f"NO trial of the search reached top1 at least 1: the nearest had {nearest:.4g}" in run.summary["verdict"]
    assert "NO trial of the search reached it" in (trained / "run" / "report.html").read_text()
    assert list(run.winners) == ["winner_1"]
    with pytest.raises(LimitError, match="No trial reaches top1 at least 1, the nearest"):
        run.front.best()


@pytest.mark.slow  # 15 s; `make smoke` has it
def test_one_search_counts_float32_and_int8_and_both_are_what_each_alone_has(trained):
    def trials(*overrides):
        said(trained, "run", *overrides, "search.trials=6", "search.strategy=random", stages=["search"], redo="search")
        return read_trials(trained / "run" / "search" / "journal.jsonl")

    names = '{name="top1"}', '{name="top1",precision="int8"}'
    alone = [trials(f"objectives=[{name},{LATENCY}]") for name in names]
    together = trials(f"objectives=[{','.join(names)},{LATENCY}]")
    assert [t.genotype for t in together] == [t.genotype for t in alone[0]]
    assert [t.correct for t in together] == [t.correct for t in alone[0]]
    assert [t.also["top1_int8"] for t in together] == [t.correct for t in alone[1]]
    as_limit = trials(f"objectives=[{names[0]},{LATENCY}]", "limits.top1_int8=0.3")
    assert [(t.correct, t.also) for t in as_limit] == [(t.correct, t.also) for t in together]
    assert (
        (trained / "run" / "search" / "front.csv")
        .read_text()
        .startswith("trial,top1,correct,total,top1_int8,correct_int8")
    )


def test_a_search_from_python_takes_a_limit_on_accuracy_and_finds_the_cheapest():
    front = searched(limits={"top1": 0.8})
    assert (front.costs, len(front)) == (("ms",), 1)
    assert front.best().cheap == {"ms": 11.0}
    assert front.best().top1 == 0.8
    assert searched(limits={"top1": {"at_least": "80%", "tolerance": 0.03}}).best().cheap == {"ms": 10.0}
    both_ways = searched(limits={"top1": 0.8}, objectives=["top1", "ms"])
    assert both_ways.costs == ("error", "ms")
    assert min(t.top1 for t in both_ways) == 0.8
    assert max(t.top1 for t in both_ways) == 0.95


def test_a_search_from_python_counts_two_accuracies():
    front = searched(evaluate=both, objectives=["top1", "top1_int8", "ms"])
    assert front.costs == ("error", "error_int8", "ms")
    front = searched(evaluate=both, limits={"top1_int8": 0.7}, objectives=["top1", "ms"])
    assert front.costs == ("error", "ms")
    assert all(t.shares["top1_int8"] >= 0.7 for t in front)
    front = searched(evaluate=both, limits={"top1_int8": 0.7, "top1": 0.74})
    assert front.best().cheap == {"ms": 9.0}
    assert front.best().shares["top1_int8"] >= 0.7
    with pytest.raises(nas.errors.EvaluateError, match=r"evaluate gave no top1_int8: return a dictionary of all"):
        searched(objectives=["top1", "top1_int8"])


def test_tolerances_from_python_are_those_of_experiments():
    exact = searched(limits={"ms": 9.0})
    wider = searched(limits={"ms": {"at_most": 9.0, "tolerance": "12%"}})
    assert max(t.cheap["ms"] for t in exact.evaluated) == 9.0
    assert max(t.cheap["ms"] for t in wider.evaluated) == 10.0
    assert wider.setting.limits == {"ms": 9.0}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"top1": 1.2}, "limit of top1: at_least is 1.2: no accuracy is that"),
        ({"top1": 90}, r'in percent: "90%"'),
        ({"top1": {"at_least": 0.9, "tolerance": 0.95}}, "leaves nothing of an at_least of 0.9"),
        ({"top1": {"tolerance": 0.1}}, r"limits\['top1'\] has no at_least"),
        ({"top1": {"at_most": 0.9}}, "accuracy is made high: give it an at_least"),
        ({"ms": {"tolerance": 0.1}}, r"limits\['ms'\] has no at_most"),
        ({"ms": {"at_most": 5, "tolernce": 0.1}}, "unknown field `tolernce`.*at_most, tolerance, precision, at_least"),
        ({"ms": {"at_least": 5}}, "costs are made small"),
        ({"ms": [5]}, "is .5.: a finite number of ms"),
        ({"top1": [0.9]}, "at_least is .0.9.: a share from 0 to 1"),
        ({"top1": {"at_least": 0.9, "precision": "int8"}, "top1_int8": 0.7}, "limits has top1_int8 twice"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits, message):
    with pytest.raises(ConfigError, match=message):
        searched(limits=limits)


def test_the_latency_that_is_limited_is_the_one_that_is_searched_by():
    space = nas.load_space("mobilenet_v3_32", input_shape=(32, 32, 3), classes=10)
    limits = {"latency_ms": {"at_most": "50%", "precision": "int8"}}
    with pytest.raises(ConfigError, match=r"of precision 'int8', and .* 'float32': give precision='int8'"):
        nas.make_problem(space, device="epyc_zen4_onnxruntime", limits=limits)


def test_limits_are_reached_together(tmp_path):
    """Each of two by another trial is not enough; of a network in mixed precision the one file counts."""
    trials = [Trial(0, (0,), 95, 100, {"ms": 1.0}, also={"top1_int8": 10})]
    trials += [Trial(1, (1,), 10, 100, {"ms": 1.0}, also={"top1_int8": 94})]
    asked = {"top1": config.Limit(at_least=0.9), "top1_int8": config.Limit(at_least="90%")}
    job = SimpleNamespace(
        experiment=SimpleNamespace(least=asked), space=nas.Space.of_choices({"a": [0, 1]}), file="float32"
    )
    winner = {"accuracy": 0.9, "int8": {"accuracy": 0.8999999999}}
    first, second = _least(job, trials, winner)
    assert (first["reached"], second["reached"]) == (True, False)
    assert missed(first) == below(first) == below(second) == ""
    assert missed(second).startswith("NO trial of the search reached top1_int8 at least 0.9 beside the other limits")
    job.file, asked = "mixed", asked.pop("top1_int8")
    (only,) = _least(job, trials, {"accuracy": 0.5, "int8": None})
    assert (only["reached"], only["answer"]) == (True, 0.5)
    assert "0.5, is below the 0.9 that was asked for" in below(only)


def test_subnets_that_choose_their_precisions_are_not_counted_in_int8_alone():
    space = SimpleNamespace(mixed=True, name="joint")
    require_countable(space, ("top1",))
    with pytest.raises(ConfigError, match="stages of space 'joint' choose theirs"):
        require_countable(space, ("top1", "top1_int8"))


def test_a_target_is_that_of_a_cost_beside_an_accuracy():
    with pytest.raises(ConfigError, match="target 5: the objectives are ms, and it needs an accuracy and the cost"):
        searched(limits={"top1": 0.8}, strategy="reinforce", settings={"target": 5.0})


def test_a_target_is_not_that_of_a_second_accuracy():
    """Milliseconds at the target are rewarded, whatever stands between."""
    front = searched(
        evaluate=both,
        objectives=["top1", "top1_int8", "ms"],
        strategy="reinforce",
        settings={"target": 5.0, "beta": -5.0},
    )
    late = [t.cheap["ms"] for t in front.evaluated[-15:]]
    assert abs(sum(late) / len(late) - 5.0) < 2.0


def test_a_search_that_nothing_reaches_gives_a_front_that_says_so(tmp_path):
    front = searched(limits={"top1": 0.99}, trials=220, strategy="grid")
    assert repr(front).endswith("none reaches that, the nearest, trial " + f"{front.nearest.trial}, has top1 0.95)")
    with pytest.raises(LimitError, match=r"No trial reaches top1 at least 0\.99, the nearest"):
        front.plot()
    front.write_csv(tmp_path / "front.csv")
    assert (tmp_path / "front.csv").read_text() == "trial,top1,correct,total,ms,genotype\n"


def test_a_problem_for_a_loop_of_ones_own_has_the_limit():
    problem = nas.make_problem(
        nas.Space.of_choices(CHOICES), costs={"ms": lambda g: 1.0 + g.sum(1)}, limits={"top1": 0.8}
    )
    assert problem.objectives == ("ms",)
    assert problem.least["top1"].asked == 0.8
