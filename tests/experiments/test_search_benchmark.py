"""The benchmark of searches: its problems are those that were published, and its figures are means over its rows."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import search as benchmark  # noqa: E402
import search_engine as engine  # noqa: E402
import search_peers as peers  # noqa: E402
import search_tasks as tasks  # noqa: E402


@pytest.fixture(scope="module")
def note10(real_data):
    return tasks.ofa_note10(real_data)


def test_the_predictor_is_once_for_alls_network_on_its_features(real_data, note10):
    space, predictor, _ = note10
    file = np.load(real_data / "ofa_acc_predictor.npz")
    genotypes = space.sample(np.random.default_rng(0), 30)
    features = np.zeros((30, 128), np.float32)
    for row, genotype in zip(features, genotypes, strict=True):
        values = space.describe(genotype)
        for slot in range(20):
            name = f"stage{slot // 4 + 2}/layer{slot % 4 + 1}"
            if f"{name}/kernel" in values:
                row[3 * slot + (3, 5, 7).index(values[f"{name}/kernel"])] = 1
                row[60 + 3 * slot + (3, 4, 6).index(values[f"{name}/expand"])] = 1
        row[120 + (values["resolution"] - 112) // 16] = 1
    hidden = features
    for i in range(3):
        hidden = np.maximum(hidden @ file[f"w{i}"].T + file[f"b{i}"], 0)
    expected = (hidden @ file["w3"].T + file["b3"])[:, 0] * 100
    np.testing.assert_allclose(predictor(genotypes), expected, rtol=1e-5)


def test_latencies_are_sums_of_the_table_of_each_resolution(note10):
    space, _, latency = note10
    kernels = [(3, 3), (5, 3, 3), (5, 5, 3), (3, 3, 3), (3, 3, 3, 3)]
    expands = [(3, 3), (4, 3, 4), (4, 4, 3), (6, 4, 4), (6, 6, 4, 3)]
    values: dict[str, int] = {"resolution": 224}  # the network that its authors publish for 30 ms
    for stage, (kernel, expand) in enumerate(zip(kernels, expands, strict=True), start=2):
        values[f"stage{stage}/depth"] = len(kernel)
        for layer, pair in enumerate(zip(kernel, expand, strict=True), start=1):
            values[f"stage{stage}/layer{layer}/kernel"], values[f"stage{stage}/layer{layer}/expand"] = pair
    assert latency(space.encode(values)[None])[0] == pytest.approx(29.965345915208594, rel=1e-12)


def test_peers_and_ours_keep_the_limit_and_what_they_find_is_comparable(note10):
    space, predictor, latency = note10
    asked = []

    def score(genotypes):
        asked.append(latency(genotypes).max())
        return predictor(genotypes)

    for search in (peers.ofa_evolution, peers.ageing):
        top1 = search(space.sizes, space.canonical, score, latency, 25, evaluations=1000, rng=np.random.default_rng(0))
        assert 78 < top1 < 83
    assert max(asked) <= 25


def test_nas_bench_201_is_whole(real_data):
    for task, volume in tasks.nb201(real_data).values():
        everything = np.stack(np.unravel_index(np.arange(5**6), task.problem.sizes), 1).astype(np.uint8)
        assert task.volume(task.costs(everything)) == pytest.approx(volume)
        assert task.problem.cheap(task.problem.smallest[None])[0, 0] == task.problem.cheap(everything).min()


def test_the_graph_of_a_cell_counts_only_what_is_used():
    edges = np.array([[0, 1], [0, 2], [1, 2], [0, 3], [1, 3], [2, 3]])
    cells = {
        (3, 3, 3, 3, 3, 3): (4, 6, 3, 1),  # paths, convolutions, most and fewest on a path
        (0, 0, 3, 0, 3, 3): (0, 0, 0, 6),  # nothing leaves the input
        (1, 1, 1, 1, 1, 1): (4, 0, 0, 0),
        (2, 0, 3, 0, 1, 0): (1, 1, 1, 1),  # the convolution between the inner nodes leads nowhere
        (4, 0, 2, 1, 0, 3): (2, 2, 2, 0),
    }
    found = tasks.cell_features(np.array(list(cells), np.uint8), edges)
    np.testing.assert_array_equal(found - 1, list(cells.values()))


def test_pymoos_search_sees_categories_and_counts_no_network_twice(real_data):
    pytest.importorskip("pymoo", reason="a peer of the benchmark alone: pip install pymoo")
    task, _ = tasks.nb201(real_data)["raspi4"]
    costs = peers.pymoo_nsga2(task, 60, 0)
    assert costs.shape == (60, 2)
    np.testing.assert_array_equal(costs, peers.pymoo_nsga2(task, 60, 0))


def test_figures_are_means_over_seeds():
    same = {"task": "nb201", "device": "raspi4", "trials": 50}
    rows = [
        {**same, "seed": seed, "who": who, "result": {"share": {"50": share}, "to_98": to_98}}
        for who in ("ours", "nsga2", "ageing", "random")
        for seed, share, to_98 in ((0, 0.9, 40), (1, 0.8, None), (2, 0.7, None))
    ]
    figures = benchmark.summary(rows)["nb201"]["raspi4"]
    assert figures["50"]["ours"] == {"mean": pytest.approx(0.8), "sd": pytest.approx(0.1), "n": 3}
    assert figures["evaluations_to_98"]["ours"] is None  # most never reach it
    assert set(figures) == {"50", "evaluations_to_98"}


def test_a_run_that_was_repeated_for_longer_counts_once():
    def row(seed, trials, shares):
        return {"task": "nb201", "device": "raspi4", "who": "ours", "seed": seed, "trials": trials,
                "result": {"share": shares, "to_98": None}}  # fmt: skip

    short, long = row(0, 50, {"50": 0.9, "125": 0.9}), row(0, 250, {"50": 0.9, "125": 0.95})
    assert benchmark.longest([long, short]) == benchmark.longest([short, long]) == [long]
    assert len(benchmark.longest([short, row(1, 50, {"50": 0.8})])) == 2


def test_the_figures_that_are_kept_have_every_key_and_twenty_seeds():
    results = BENCHMARKS.parent / "results"
    kept = {
        k: v
        for name in ("search_engine", "search")
        for k, v in json.loads((results / f"{name}.json").read_text()).items()
    }
    assert set(kept["ofa_note10"]) == set(map(str, benchmark.LIMITS_MS))
    of_limits = kept["ofa_note10"].values()
    assert all({"mean", "sd", "seconds", "at_5000", "ofa", "ageing"} <= figures.keys() for figures in of_limits)
    assert len(kept["nb201"]) == 5
    for device in kept["nb201"].values():
        assert set(device) == {*map(str, benchmark.BUDGETS), "evaluations_to_98"}
        assert all(set(figures) == {"ours", "nsga2", "ageing", "random"} for figures in device.values())
    assert {"ours", "nsga2"} <= kept["ofa_subnets"]["100"].keys()
    assert "nsga2" in kept["ofa_subnets"]["400"]
    assert all({"ours", "ridge"} <= kept["predictor_tau"][n].keys() for n in ("25", "50", "100"))
    assert set(kept["two_devices"]["250"]) == set(tasks.PAIR)
    assert "mean" in kept["candidates_per_second"]
    assert {"overhead_100ms", "overhead_10ms", "utilisation"} <= kept["ray"].keys()
    assert set(kept["engine"]["utilisation"]) == {"8", "32", "128"}
    assert set(seeds_of({name: kept[name] for name in benchmark.RUNS if name in kept})) == {20}


def seeds_of(figures):
    """Every `n` in a tree of figures."""
    if isinstance(figures, dict):
        yield from [figures["n"]] if "n" in figures else []
        for each in figures.values():
            yield from seeds_of(each)


def test_one_seed_has_no_deviation():
    assert benchmark.spread([0.5]) == {"mean": 0.5, "sd": None, "n": 1}


def test_a_search_for_two_devices_stands_beside_one_for_each():
    one, other = tasks.PAIR
    shares = {one: {"125": 0.9}, other: {"125": 0.8}}
    rows = [
        {"task": "two_devices", "seed": 0, "trials": 250, "result": {"share": shares}},
        *(
            {"task": "nb201", "device": device, "who": "ours", "seed": 0, "trials": 250,
             "result": {"share": {"125": 0.95}, "to_98": None}}
            for device in tasks.PAIR
        ),
    ]  # fmt: skip
    figures = benchmark.summary(rows)["two_devices"]["250"]
    assert (figures[one]["joint"]["mean"], figures[other]["joint"]["mean"]) == (0.9, 0.8)
    assert figures[one]["dedicated"]["mean"] == 0.95


def test_every_planned_run_has_a_function(real_data):
    planned = list(benchmark.planned(real_data, 1, True))
    assert {task for task, _ in planned} == set(benchmark.RUNS)
    row = benchmark.run(real_data, "predictor_tau", {"seed": 0, "count": 25})
    assert row["result"]["ours"] > 0.5


def test_a_row_of_the_engine_is_told_as_it_is():
    figures = {"ray": {"overhead_100ms": 0.01}, "engine": {}}
    assert benchmark.summary([{"task": "executors", "quick": True, "result": figures}]) == figures


def test_the_engine_is_measured_on_real_workers_and_on_simulated_ones():
    measured = engine.executor_figures(engine.ProcessExecutor, repeats=1, seconds=1.0)
    assert set(measured) == {"overhead_100ms", "overhead_10ms", "utilisation"}
    assert -0.2 < measured["overhead_100ms"] < 1  # no more than that: others may be at work beside it
    assert engine.simulated_utilisation(rounds=30, sizes=(8,))["8"]["lag_4x"] >= 0.95


def test_the_memory_of_the_driver_hardly_grows_with_the_trials():
    figures = engine.driver_figures(engine.random_search(engine.SIZES), (200, 2000))
    assert set(figures["milliseconds"]) == {"200", "2000"}  # which machines make of them what they like
    assert figures["growth_mb"] < 5
