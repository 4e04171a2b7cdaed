"""`nas.search(...)` from Python: any space, an evaluation of one's own, a trained run, an experiment."""

import subprocess
import sys

import numpy as np
import pytest
import tiny
from synthetic_tables import write_device

import nas
from nas.errors import ConfigError, EvaluateError, JournalError, LimitError, UnmeasuredBlock
from nas.search import STRATEGIES, Front

CHOICES = {f"op{i}": ["none", "conv", "pool"] for i in range(5)}


def top1(network) -> float:
    """More parameters are better, with less and less gain."""
    from nas import cost

    return 1 - 1 / (2 + cost.parameters(network.flat()) / 300)


def of_choices(values) -> float:
    return sum(v == "conv" for v in values.values()) / 6


def price(genotypes):
    return 1.0 + genotypes.sum(axis=1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two devices with tables of the tiny space."""
    monkeypatch.chdir(tmp_path)
    space = tiny.space(tmp_path)
    for seed, name in enumerate(("phone", "board")):
        write_device(space, name, seed)
    return space


def quiet(space, **more) -> Front:
    return nas.search(space, **({"evaluate": top1, "trials": 24, "strategy": "nsga2", "quiet": True} | more))


def test_a_space_a_device_and_a_function_give_a_front(here):
    whole = quiet(here, device="phone")
    middle = np.median([t.latency_ms for t in whole.evaluated])
    front = quiet(
        here,
        device="phone",
        latency_ms=float(middle),
        objectives=["macs", "latency_ms", "top1"],
        limits={"latency_ms@board": "90%"},
    )
    assert front.costs == ("error", "latency_ms", "macs")
    assert 0 < len(front.evaluated) <= 24  # the space has no more
    assert all(t.latency_ms <= middle for t in front.evaluated)
    assert front.best(latency_ms=float(middle), device="phone") == front.best()
    best = front.best()
    assert best.correct == round(10_000 * top1(here.decode(best.genotype)))
    told = whole.explain(best)
    assert "latency_ms" in told.networks
    assert told.networks["latency_ms"].svg.count("<rect") == len(here.decode(best.genotype).blocks)


def test_what_is_optimised_is_said_by_name_and_the_rest_may_have_limits(here):
    middle = float(np.median([t.latency_ms for t in quiet(here, device="phone").evaluated]))
    limited = quiet(here, device="phone", latency_ms=middle, objectives=["top1", "macs"])
    assert limited.costs == ("error", "macs")
    assert all(t.latency_ms <= middle for t in limited.evaluated)
    without = quiet(here, objectives=["params", "top1"])
    assert (without.costs, list(without.evaluated[0].cheap)) == (("error", "params"), ["params"])
    least = quiet(here, device="phone", objectives=["macs"], limits={"top1": 0.6})
    assert (least.costs, len(least)) == (("macs",), 1)
    assert least.best().cheap["macs"] == min(t.cheap["macs"] for t in least.evaluated if t.top1 >= 0.6)
    named = quiet(here, device="phone", objectives=["top1", "latency_ms"])
    assert named == quiet(here, device="phone")  # as without


def test_of_costs_of_ones_own_some_may_be_objectives(here):
    costs = {"latency_ms": price, "size": lambda g: 10.0 - g[:, 0]}
    front = quiet(CHOICES, evaluate=of_choices, costs=costs, objectives=["top1", "size"], limits={"latency_ms": 5})
    assert front.costs == ("error", "size")
    assert all(t.latency_ms <= 5 for t in front.evaluated)
    problem = nas.make_problem(here, costs=costs, objectives=["top1", "size", "macs"])
    assert problem.objectives == ("error", "macs", "size")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_searches_for_accuracy_alone(strategy):
    def evaluate(values, share=1.0):
        return of_choices(values)

    front = quiet(CHOICES, evaluate=evaluate, strategy=strategy, objectives=["top1"], trials=40)
    assert front.costs == ("error",)
    assert front.evaluated[0].cheap == {}
    assert front.best().top1 == max(t.top1 for t in front.evaluated if t.total == 10_000) >= 3 / 6
    assert "top1" in repr(front)


def test_the_same_seed_gives_the_same_front_and_a_journal_goes_on(here, tmp_path):
    calls = []

    def counted(network):
        calls.append(network)
        return top1(network)

    first = quiet(here, evaluate=counted, device="phone", journal=tmp_path / "j", trials=10)
    assert len(calls) == 10
    longer = quiet(here, evaluate=counted, device="phone", journal=tmp_path / "j")
    assert len(calls) == 24
    assert longer.evaluated[:10] == first.evaluated
    assert longer == quiet(here, evaluate=counted, device="phone")
    assert longer.evaluated != quiet(here, device="phone", seed=1).evaluated
    with pytest.raises(JournalError, match="another search"):
        quiet(here, evaluate=counted, device="board", journal=tmp_path / "j")


def test_the_predictor_is_given_what_else_is_known():
    asked = []

    def features(genotypes):
        asked.append(len(genotypes))
        return 1.0 + genotypes[:, :1]

    more = {"evaluate": of_choices, "costs": {"latency_ms": price}, "trials": 30, "population": 8}
    informed = quiet(CHOICES, strategy="predictor", features=features, **more)
    assert max(asked) > 100
    assert informed.evaluated != quiet(CHOICES, strategy="predictor", **more).evaluated


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_searches_choices_that_build_no_network(strategy):
    def evaluate(values, share=1.0):
        assert 0 < share <= 1
        return of_choices(values)

    front = quiet(CHOICES, evaluate=evaluate, strategy=strategy, costs={"latency_ms": price}, trials=40)
    assert front.costs == ("error", "latency_ms")
    assert front.best().top1 >= 3 / 6
    assert front.setting.space.describe(front.best().genotype).keys() == CHOICES.keys()


def test_the_function_may_want_genotypes(here):
    seen = []

    def evaluate(genotype):
        seen.append(genotype)
        return 0.5

    quiet(here, evaluate=evaluate, decode=False, trials=5)
    assert all(g.shape == (len(here.sizes),) and g.dtype == np.uint8 for g in seen)


def test_it_says_how_it_goes(here, tmp_path, capsys):
    def go(trials):
        quiet(
            here,
            device="phone",
            objectives=["top1", "latency_ms", "macs"],
            trials=trials,
            quiet=False,
            journal=tmp_path / "j",
        )
        return capsys.readouterr().err.splitlines()

    line = go(12)[-1]
    for what in ("  12/12  eta 0:00", "trials/s ", "busy ", "volume 0.", "best top-1 ", "at ms ", "at macs "):
        assert what in line
    assert go(12)[-1].startswith("search: ")  # nothing was done
    assert "  14/14  eta 0:00" in go(14)[-1]


def test_what_can_be_reached_is_told_first_and_impossible_limits_are_refused(here, capsys):
    calls = []
    with pytest.raises(LimitError, match=r"the fastest network of space 'tiny' takes"):
        nas.search(here, evaluate=calls.append, device="phone", latency_ms=1e-9)
    with pytest.raises(LimitError, match=r"macs is 1, but no network of the space has less than"):
        nas.search(here, evaluate=calls.append, limits={"macs": 1})
    with pytest.raises(
        LimitError, match=r"latency_ms is 0.5, but no network of the space has less than 1 \(the most is 11"
    ):
        nas.search(CHOICES, evaluate=calls.append, costs={"latency_ms": price}, limits={"latency_ms": 0.5})
    assert not calls
    capsys.readouterr()
    nas.search(here, evaluate=top1, device="phone", latency_ms="50%", trials=3)
    said = capsys.readouterr().err
    assert said.index("reachable") < said.index("search: predictor, 3 trials")


def test_functions_that_can_be_imported_evaluate_in_processes_too(here):
    """Of choices, and of a space by its path; others are refused, and so is a space that no worker can make anew."""
    more = {"evaluate": of_choices, "costs": {"latency_ms": price}, "trials": 12}
    shape = {"input_shape": here.input, "classes": here.classes, "trials": 4}
    for space, given in ((CHOICES, more), ("tiny.toml", shape)):
        assert quiet(space, executor="processes", workers=1, **given) == quiet(space, **given)
    with pytest.raises(ConfigError, match=r"cannot import '.*<lambda>'"):
        quiet(CHOICES, executor="processes", **{**more, "evaluate": lambda values: 0.5})
    with pytest.raises(ConfigError, match="Give it by its name or path"):
        quiet(here, executor="processes", trials=4)
    with pytest.raises(ConfigError, match="with numbers, text or lists"):
        quiet({"size": [(1, 2), (3, 4)]}, executor="processes", **more)


@pytest.mark.parametrize("limit", [0, -3, 2])
def test_costs_of_ones_own_may_have_limits_of_any_sign(limit):
    cost = {"gain": lambda g: g.sum(axis=1) - 5.0}
    front = quiet(CHOICES, evaluate=of_choices, costs=cost, limits={"gain": limit}, trials=10)
    assert len(front.evaluated) == 10
    assert all(t.cheap["gain"] <= limit for t in front.evaluated)


def test_networks_that_cannot_be_had_at_all_leave_the_range_of_a_cost_alone():
    cost = {"ms": lambda g: np.where(g[:, 0] == 1, np.inf, price(g))}
    for count in (3, 12):  # counted, and crossed
        choices = {f"op{i}": [0, 1, 2, 3] for i in range(count)}
        front = quiet(choices, evaluate=lambda v: sum(v.values()) / 50, costs=cost, limits={"ms": "50%"}, trials=10)
        assert front.setting.limits["ms"] == pytest.approx(1 + 0.5 * 3 * count)


def test_limits_of_own_costs_are_held_in_large_spaces_too():
    large = {f"op{i}": list(range(5)) for i in range(12)}  # 2e8 ways
    front = quiet(large, evaluate=lambda v: sum(v.values()) / 50, costs={"ms": price}, limits={"ms": "20%"})
    assert all(t.cheap["ms"] <= 1 + 0.2 * 48 for t in front.evaluated)
    assert front.setting.limits["ms"] == pytest.approx(1 + 0.2 * 48)  # crossing finds both ends of a sum


@pytest.mark.parametrize(
    ("what", "arguments", "message"),
    [
        (CHOICES, {}, "what evaluates"),
        (CHOICES, {"evaluate": of_choices}, "nothing to minimise"),
        (CHOICES, {"evaluate": of_choices, "device": "phone"}, "choices alone have no blocks"),
        (CHOICES, {"evaluate": of_choices, "objectives": ["top1", "macs"]}, "macs is not known of choices alone"),
        ("tiny.toml", {"evaluate": top1, "objectives": ["macs"]}, r'no limit is on an accuracy.*Add "top1"'),
        ("tiny.toml", {"evaluate": top1, "objectives": ["top1", "macs", "macs"]}, "objectives names macs twice"),
        ("tiny.toml", {"evaluate": top1, "objectives": "top1"}, "objectives is 'top1': all that is optimised"),
        ("tiny.toml", {"evaluate": top1, "objectives": []}, r"objectives is \[\]: all that is optimised"),
        ("tiny.toml", {"evaluate": top1, "objectives": ["top1", "mac"]}, "Did you mean `macs`"),
        ("tiny.toml", {"evaluate": top1, "objectives": ["top1", "latency_ms"]}, "latency_ms of which device"),
        (CHOICES, {"evaluate": of_choices, "costs": {"ms": lambda g: 1.0}}, r"gave shape \(\) for 243 genotypes"),
        ("tiny.toml", {"evaluate": top1, "latency_ms": 3}, "of which device"),
        ("tiny.toml", {"evaluate": top1, "limits": {"mac": 3}}, "Did you mean `macs`"),
        ("tiny.toml", {"evaluate": top1, "limits": {"macs": "3 %%"}}, "a share like"),
        ("tiny.toml", {"evaluate": top1, "strategy": "nsga"}, "Did you mean `nsga"),
        ("tiny.toml", {"evaluate": top1, "executor": "rya"}, "Did you mean `ray`"),
        ("tiny.toml", {"evaluate": top1, "trials": 0}, "trials 0"),
        ("tiny.toml", {"evaluate": top1, "settings": {"beta": 1}}, "no such setting"),
        ("tiny.toml", {"evaluate": top1, "limits": {"macs": [3]}}, "a positive number of macs"),
        ("tiny.toml", {"evaluate": top1, "trials": 9.5}, "trials 9.5: a whole number"),
        ("tiny.toml", {"evaluate": top1, "workers": 0}, "workers 0: a whole number from 1"),
        ("tiny.toml", {"evaluate": 0.5}, "evaluate is 0.5: a function"),
        ("tiny.toml", {"evaluate": "nowhere:top1"}, "No function 'nowhere:top1'"),
        ("tiny.toml", {"evaluate": "math:pi"}, r"No function 'math:pi': it is 3\.14"),
        ("tiny.toml", {"evaluate": top1, "costs": {"error": price}}, "the accuracy has that name"),
        ("tiny.toml", {"evaluate": top1, "costs": {"ms": 3}}, "costs.'ms'. is 3: a function"),
        ("tiny.toml", {"evaluate": top1, "costs": {"ms": lambda g: ["x"] * len(g)}}, "gave no numbers"),
        ("tiny.toml", {"evaluate": top1, "costs": {"ms": lambda g: np.full(len(g), np.nan)}}, "gave NaN for genotype"),
        ("tiny.toml", {"evaluate": top1, "costs": {"ms": price}, "limits": {"ms": "5"}}, "a share like"),
        ("tiny.toml", {"evaluate": top1, "costs": {"ms": price}, "limits": {"ms": np.nan}}, "a finite number of ms"),
        ("tiny.toml", {"evaluate": top1, "features": np.ones((9, 1))}, "features is ndarray: a function"),
        ("tiny.toml", {"evaluate": top1, "features": lambda g: np.ones(len(g))}, r"gave shape \(2,\) for 2 genotypes"),
        ("tiny.toml", {"evaluate": top1, "features": lambda g: np.zeros((len(g), 1))}, "gave 0: they are taken log"),
        ({}, {"evaluate": of_choices, "costs": {"ms": price}}, "the space has no choices"),
        ({"a": 3}, {"evaluate": of_choices, "costs": {"ms": price}}, "choice 'a' is 3: a list"),
    ],
)
def test_a_mistake_is_told_before_anything_is_evaluated(what, arguments, message, here, tmp_path):
    with pytest.raises(ConfigError, match=message):
        nas.search(what, quiet=True, journal=tmp_path / "j", **arguments)
    assert not (tmp_path / "j").exists()


def test_a_device_without_a_table_says_how_to_make_one(here):
    with pytest.raises(UnmeasuredBlock, match="nas import"):
        nas.search("nas_bench_macro", evaluate=top1, device="phone", quiet=True)
    with pytest.raises(UnmeasuredBlock, match="--as my_machine"):
        nas.search("nas_bench_macro", evaluate=top1, device="host_onnxruntime", quiet=True)


@pytest.mark.parametrize(("wrong", "message"), [(lambda n: 75.0, "not percent"), (lambda n: n.top1, "AttributeError")])
def test_a_function_that_never_works_ends_the_search_early(wrong, message, here):
    calls = []

    def evaluate(network):
        calls.append(network)
        return wrong(network)

    with pytest.raises(EvaluateError, match=message):
        quiet(here, evaluate=evaluate)
    assert len(calls) <= 16


def test_a_function_that_never_works_is_told_where_the_space_ends_before():
    with pytest.raises(EvaluateError, match="All of the first 2 evaluations failed"):
        nas.search({"a": [1, 2]}, evaluate=lambda _: 75.0, objectives=["top1"], quiet=True)


def test_a_folder_in_the_journals_way_is_told(tmp_path):
    with pytest.raises(JournalError, match="choose another path"):
        nas.search(CHOICES, evaluate=of_choices, objectives=["top1"], quiet=True, journal=tmp_path)


def test_a_single_failure_is_a_failed_trial(here):
    def evaluate(network):
        if len(network.blocks) == 3:
            raise MemoryError("too small")
        return top1(network)

    front = quiet(here, evaluate=evaluate)
    failed = [t for t in front.evaluated if t.failure]
    assert failed
    assert "too small" in failed[0].failure


def test_a_named_space_is_that_of_the_devices_table(here, tmp_path):
    """The table says which images and classes it was made for."""
    import msgspec

    space = nas.load_space("nas_bench_macro", input_shape=(32, 32, 3), classes=7)
    table = msgspec.structs.replace(write_device(space, "seven", 3), input=(32, 32, 3), classes=7)
    table.save(tmp_path / "latency_models" / "seven" / space.name)
    front = nas.search("nas_bench_macro", evaluate=top1, device="seven", strategy="random", trials=3, quiet=True)
    assert front.setting.space.classes == 7


def test_the_loop_may_be_ones_own(here):
    """Ask, evaluate, tell: as the README has it."""
    problem = nas.make_problem(here, device="phone", latency_ms="60%")
    strategy = nas.search.nsga2(problem.sizes, population=8)
    state, seen = strategy.init(), set()
    for number in range(20):
        rng = nas.search.trial_rng(0, number)
        genotype = nas.search.choose(problem, rng, strategy.ask(rng, state, 64), seen)
        seen.add(genotype.tobytes())
        assert problem.feasible(genotype[None])[0]
        costs = np.array([1 - top1(here.decode(genotype)), *problem.cheap(genotype[None])[0]])
        state = strategy.tell(state, genotype, costs)
    assert len(seen) == 20


@pytest.mark.parametrize("first", ["import nas", "import nas.search", "from nas.search import Front; import nas"])
def test_nas_search_is_a_module_and_a_function_however_it_is_imported(first):
    code = (
        f"{first}\n"
        "import inspect, sys\n"
        "assert 'nas.pipeline' not in sys.modules\n"
        "assert nas.search.Front is nas.Front\n"
        "assert {'evaluate', 'latency_ms'} <= set(inspect.signature(nas.search).parameters)\n"
        "cost = {'ms': lambda g: g[:, 0] + 1.0}\n"
        "print(nas.search({'a': [1, 2]}, evaluate=lambda v: v['a'] / 4, costs=cost, quiet=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Front(2 trials of 2: error, ms)" in done.stdout


def test_the_face_has_what_it_names():
    for name in nas.__all__:
        assert getattr(nas, name) is not None
