"""Objectives and limits beside accuracy: their exact ranges, several at once, further devices, and a whole run."""

import csv
import dataclasses
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny

import nas
from nas import cost
from nas.config import Experiment
from nas.console import Console
from nas.errors import ConfigError, LimitError, UnmeasuredBlock
from nas.latency import Table, import_table
from nas.pipeline import load_experiment, run_experiment
from nas.pipeline.costs import beyond, exact_costs, handmade, within
from nas.pipeline.job import Job
from nas.pipeline.search import make_problem
from nas.runfolder import RunFolder
from nas.search import Front
from nas.space import load_space

TOP1, LATENCY = '{name="top1"}', '{name="latency_ms"}'


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The tiny experiment, and two devices that are not at hand: on one MACs take time, the other likes them best."""
    folder = tmp_path_factory.mktemp("costs")
    tiny.write_experiment(folder)
    space = load_space(str(folder / "tiny.toml"), input_shape=(8, 8, 1), classes=3)
    macs = {key: cost.macs(block.graph) for key, (block, _) in space.blocks().items()}
    for device, work in (("compute", macs), ("odd", {key: 1.2 * max(macs.values()) - m for key, m in macs.items()})):
        rows = [f"{key},{(1 + of_block) / 1e6!r}" for key, of_block in work.items()]
        (folder / "table.csv").write_text("\n".join(["key,latency_ms", *rows]) + "\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            import_table(folder / "table.csv", form="csv", space=space, device=device)
    return folder


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def experiment_with(*overrides: str) -> Experiment:
    return load_experiment("tiny_experiment.toml", overrides=["device=compute", *overrides])


def job_of(out: Path, *overrides: str) -> Job:
    """A job whose table is there."""
    experiment = experiment_with(*overrides)
    run_experiment(experiment, out, stages=("measure",))
    return Job(experiment, RunFolder(out, experiment), Console())


def everything(job: Job) -> np.ndarray:
    count = int(np.prod(job.space.sizes))
    rows = np.stack(np.unravel_index(np.arange(count), job.space.sizes), axis=1).astype(np.uint8)
    return np.unique(job.space.canonical(rows), axis=0)


def test_every_range_is_the_least_and_the_most_of_all_networks(here, tmp_path):
    objectives = f'objectives=[{TOP1},{LATENCY},{{name="macs"}},{{name="latency_ms@odd"}}]'
    limits = 'limits={params="60%", memory_bytes="60%", size_bytes={at_most="60%", precision="int8"}}'
    job = job_of(tmp_path / "run", objectives, limits)
    networks = everything(job)
    flat = [job.space.decode(g).flat() for g in networks]
    by_hand = {
        "macs": [cost.macs(g) for g in flat],
        "params": [cost.parameters(g) for g in flat],
        "memory_bytes": [cost.peak_activation_bytes(g) for g in flat],
    }
    costs = exact_costs(job)
    assert [c.name for c in costs] == ["latency_ms", "latency_ms@odd", "macs", "params", "memory_bytes", "size_bytes"]
    for made in costs:
        prices = made.price(networks)
        assert (made.least, made.most) == (prices.min(), prices.max())
        assert made.price(made.cheapest[None]) == made.least
        if made.name in by_hand:
            assert prices.tolist() == by_hand[made.name]
    params = costs[3]
    assert params.limit == pytest.approx(params.least + 0.6 * (params.most - params.least))


def test_the_problem_has_the_objectives_in_order_and_holds_every_limit(here, tmp_path):
    objectives = f'objectives=[{TOP1},{{name="macs",at_most="50%"}},{LATENCY}]'
    job = job_of(tmp_path / "run", objectives, 'limits={params="40%"}')
    problem, networks = make_problem(job), everything(job)
    latency, macs, params = exact_costs(job)
    assert problem.cost_names == ("error", "latency_ms", "macs")
    np.testing.assert_array_equal(problem.cheap(networks)[:, 1], macs.price(networks))
    expected = (macs.price(networks) <= macs.limit) & (params.price(networks) <= params.limit)
    expected &= latency.price(networks) <= latency.limit
    np.testing.assert_array_equal(problem.feasible(networks), expected)
    assert 0 < expected.mean() < 1
    assert problem.feasible(problem.smallest[None])[0]


@pytest.mark.parametrize("enumerated", [True, False])
def test_limits_that_exclude_each_other_are_refused_and_others_are_met(here, tmp_path, monkeypatch, enumerated):
    """Over a grid of two limits, against all networks: nothing is refused that can be met, nor met that cannot."""
    if not enumerated:  # as in a large space
        monkeypatch.setattr("nas.pipeline.costs._ENUMERATE", 0)
    job = job_of(tmp_path / "run", f'objectives=[{TOP1},{LATENCY},{{name="latency_ms@odd"}}]')
    networks, costs = everything(job), exact_costs(job)
    met, refused, proven = 0, 0, 0
    for shares in np.ndindex(6, 6):
        limited = [
            dataclasses.replace(c, tolerated=c.least + share / 8 * (c.most - c.least))
            for c, share in zip(costs, shares, strict=True)
        ]
        if np.all([c.price(networks) <= c.tolerated for c in limited], axis=0).any():
            found = within(job.space, limited)
            assert all(c.price(found[None])[0] <= c.tolerated for c in limited)
            met += 1
        else:
            with pytest.raises(LimitError, match="within all limits at once") as e:
                within(job.space, limited)
            proven += str(e.value).startswith("No network of the space is")
            refused += 1
    assert met
    assert refused
    assert proven == refused if enumerated else proven > refused / 2


def test_what_is_within_the_tolerance_of_a_limit_is_feasible_and_said_to_exceed_it(here, tmp_path):
    """Of latency, of an objective and of a limit; a share of the limit, or absolute."""
    latency = '{name="latency_ms",at_most="40%",tolerance="5%"}'
    objectives = f'objectives=[{TOP1},{latency},{{name="macs",at_most="30%",tolerance="10%"}}]'
    job = job_of(tmp_path / "run", objectives, 'limits={params={at_most="30%",tolerance=300}}')
    latency, macs, params = costs = exact_costs(job)
    assert latency.tolerated == pytest.approx(1.05 * latency.limit)
    assert macs.tolerated == pytest.approx(1.1 * macs.limit)
    assert params.tolerated == pytest.approx(params.limit + 300)
    assert job.limit.tolerated_ms == latency.tolerated
    networks = everything(job)
    feasible = make_problem(job).feasible(networks)
    np.testing.assert_array_equal(feasible, np.all([c.price(networks) <= c.tolerated for c in costs], axis=0))
    strictly = np.all([c.price(networks) <= c.limit for c in costs], axis=0)
    assert feasible.sum() > strictly.sum() > 0
    for genotype, over in zip(networks[feasible], ~strictly[feasible], strict=True):
        told = beyond(costs, genotype)
        assert bool(told) == over
        assert all("over its limit of" in line and "within its tolerance" in line for line in told)


def test_what_is_made_by_hand_is_within_all_limits_where_it_can_be(here, tmp_path):
    free = handmade(job_of(tmp_path / "free"))
    _, params = exact_costs(job_of(tmp_path / "one", 'limits={params="99%"}'))
    fewer = params.price(free[None])[0] - 1
    assert params.price(handmade(job_of(tmp_path / "two", f"limits={{params={fewer}}}"))[None])[0] <= fewer


def test_without_a_tolerance_what_a_search_is_of_stays_the_same(here, tmp_path):
    """Its digest, so that journals of before are continued."""
    plain = job_of(tmp_path / "one", 'limits.params="40%"')
    none = job_of(tmp_path / "two", 'limits.params={at_most="40%",tolerance=0}')
    assert make_problem(plain).digest == make_problem(none).digest
    some = job_of(tmp_path / "three", 'limits.params={at_most="40%",tolerance="1%"}')
    assert make_problem(plain).digest != make_problem(some).digest


def test_an_impossible_limit_becomes_possible_by_its_tolerance_alone(here, tmp_path):
    params = exact_costs(job_of(tmp_path / "run", 'limits.params="40%"'))[-1]
    below = 0.96 * params.least
    with pytest.raises(LimitError, match=r"\([\d.]+ with its tolerance\)"):
        job_of(tmp_path / "short", f'limits.params={{at_most={below},tolerance="1%"}}')
    job_of(tmp_path / "enough", f'limits.params={{at_most={below},tolerance="5%"}}')


def test_settings_that_need_more_images_than_there_are_are_told_after_measuring(here, tmp_path):
    search = 'search={strategy="successive_halving",settings={eta=4,rungs=4}}'
    with pytest.raises(ConfigError, match="the first rung would have 1/64 of 36 images"):
        job_of(tmp_path / "run", search)


def test_a_limit_below_the_range_is_told_after_measuring_with_the_range(here, tmp_path):
    with pytest.raises(LimitError, match=r"the limit of macs is 1, but no network of the space has less than \d+") as e:
        job_of(tmp_path / "run", "limits={macs=1}")
    assert re.search(r"the most is \d", str(e.value))


def test_ranges_are_shown_after_measuring(here, tmp_path, capsys):
    job_of(tmp_path / "run", 'limits={macs="50%"}')
    assert re.search(r"macs: at most \d+.*, reachable \d+ to \d+", capsys.readouterr().err)


def test_each_latency_is_explained_by_what_it_was_counted_with(here, tmp_path):
    """A further device may have tables of other precisions than the experiment's own."""
    eight = Path("latency_models/eight")
    table = msgspec.structs.replace(Table.load("latency_models/odd/tiny", "float32"), precision="int8")
    table.save(eight / "tiny")
    (eight / "device.toml").write_text('device="8"\nruntime="none"\nhardware="eight"\nprecision=["int8"]\n')
    job = job_of(tmp_path / "run", f'objectives=[{TOP1},{LATENCY},{{name="latency_ms@eight"}}]')
    own, further = exact_costs(job)
    assert [c.model.precision for c in (own, further)] == ["float32", "int8"]
    for made in (own, further):
        blocks_ms, once_ms = made.model.parts_ms(job.space.decode(made.cheapest))
        assert sum(blocks_ms) + once_ms == pytest.approx(made.least)


def test_blocks_of_tables_are_priced_once_and_not_for_every_population(here, tmp_path, monkeypatch):
    job = job_of(tmp_path / "run", f'objectives=[{TOP1}, {LATENCY}, {{name="latency_ms@odd"}}]')
    networks = everything(job)
    expected = job.tables[job.precision].price(job.space, networks)
    costs = exact_costs(job)
    monkeypatch.setattr(Table, "_corrected", lambda *_: pytest.fail("a block is priced again"))
    assert [c.name for c in costs] == ["latency_ms", "latency_ms@odd"]
    for price in (costs[0].price, costs[0].bound):
        np.testing.assert_array_equal(price(networks), expected)
    assert np.isfinite(costs[1].price(networks)).all()


def test_a_further_device_without_a_table_is_told(here, tmp_path):
    with pytest.raises(nas.errors.DeviceError, match="od"):
        job_of(tmp_path / "one", 'limits={"latency_ms@od"=1.0}')
    with pytest.raises(UnmeasuredBlock, match="note10"):
        job_of(tmp_path / "two", 'limits={"latency_ms@note10"=1.0}')


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f'objectives=[{TOP1},{LATENCY},{{name="mcas"}}]', "unknown objective `mcas`. Did you mean `macs`"),
        (f'objectives=[{TOP1},{LATENCY},{{name="macs"}},{{name="macs"}}]', "each at most once"),
        (f'objectives=[{TOP1},{LATENCY},{{name="macs",at_most=0}}]', "a positive number of macs is needed"),
        ("limits={parms=5}", "unknown cost `parms`. Did you mean `params`"),
        ("limits={params=-5}", "`limits.params`: at_most is -5: a positive number of params is needed"),
        ('limits={params="half"}', "a share like"),
        ("limits={latency_ms=5}", "`latency_ms` is an objective: give it `at_most` there"),
        (
            f'objectives=[{TOP1},{LATENCY},{{name="flops"}}]',
            "unknown objective `flops`: `macs`, multiply-accumulates, are",
        ),
        ("limits={parameters=5}", "unknown cost `parameters`: they are `params` here. Valid costs: latency_ms, macs"),
        ("limits={top1=0.9}", "`top1` is an objective: give it `at_least` there"),
        (f'objectives=[{{name="top1",at_most=0.9}},{LATENCY}]', "accuracy is made high: give it an at_least"),
        (f'objectives=[{{name="top1",at_least=1.01}},{LATENCY}]', "at_least is 1.01: no accuracy is that"),
        (f'objectives=[{{name="top1",at_least="101%"}},{LATENCY}]', "at_least is 101%: no accuracy is that"),
        (f'objectives=[{{name="top1",at_least=90}},{LATENCY}]', 'up to 1 or "100%", is needed (in percent: "90%")'),
        (f'objectives=[{{name="top1",at_least=0}},{LATENCY}]', "at_least is 0.0: no accuracy is that"),
        (f'objectives=[{{name="top1",at_least="most"}},{LATENCY}]', "at_least is 'most': a share from 0 to 1"),
        (f'objectives=[{{name="top1",tolerance=0.01}},{LATENCY}]', "tolerance is that of a limit: give it an at_least"),
        (
            f'objectives=[{{name="top1",at_least=0.1,tolerance=0.2}},{LATENCY}]',
            "tolerance is 0.2: it leaves nothing of an at_least of 0.1",
        ),
        (f'objectives=[{TOP1},{LATENCY},{{name="macs",at_least=5}}]', "macs has an at_least, but costs are made small"),
        (f"objectives=[{TOP1},{TOP1},{LATENCY}]", "each at most once (top1 once in each precision)"),
        ('limits={top1={at_least=0.9,precision="int8"},top1_int8=0.8}', "`limits` has top1_int8 twice"),
        ('limits={top1_int8={at_least=0.9,precision="float32"}}', "top1_int8 is that of int8: leave it out"),
        (f"objectives=[{LATENCY}]", "neither an objective nor a limit is top1"),
        (f"objectives=[{TOP1}]", "neither an objective nor a limit is latency_ms"),
        (
            f'objectives=[{TOP1},{{name="latency_ms",tolerance="5%"}}]',
            "tolerance is that of a limit: give it an at_most",
        ),
        ("limits={params={at_most=5,tolerance=-1}}", "`limits.params`: tolerance is -1.0: a positive number of params"),
        (
            'limits={params={at_most=5,tolerance="some"}}',
            "tolerance is 'some': a number (params) or a share like \"5%\"",
        ),
        ('limits={params={tolerance="5%"}}', "`limits.params` has no at_most"),
        (
            'limits={size_bytes={at_most=5,precision="int4"}}',
            "precision is 'int4': of size_bytes there is float32 and int8",
        ),
        ("search.settings={tournment=3}", "strategy predictor has no such setting. It has none"),
        ("search.strategy='nsga4'", "Did you mean `nsga"),
    ],
)
def test_mistakes_are_told_when_the_experiment_is_read(here, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        experiment_with(override)


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        ("ageing_evolution", "{tournment=3}", "has no such setting. Did you mean `tournament`"),
        ("ageing_evolution", "{tournament=0.5}", "Expected `int"),
        ("reinforce", "{target='fast'}", "Expected"),
        ("successive_halving", "{eta=1}", "eta is 1: a number from 2 to 100 is needed"),
        ("successive_halving", "{explorer=1}", "has no such setting"),
    ],
)
def test_settings_of_a_strategy_are_checked_by_name_and_kind(here, strategy, settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        experiment_with(f"search.strategy={strategy}", f"search.settings={settings}")


def test_settings_reach_the_strategy(here):
    made = experiment_with("search.strategy=reinforce", "search.settings={target=2, beta=-0.1}")
    assert made.search.settings == {"target": 2, "beta": -0.1}


@pytest.mark.slow  # 20 s
def test_a_whole_run_with_several_costs_and_numbers_of_images(here, tmp_path):
    objectives = f'objectives=[{TOP1},{{name="latency_ms",at_most="80%"}},{{name="macs"}},{{name="latency_ms@odd"}}]'
    search = "search={strategy='successive_halving', trials=24, settings={eta=2, rungs=2}, feasible_only=true}"
    run = run_experiment(experiment_with(objectives, search, 'limits={params="80%"}'), tmp_path / "run")
    trials = nas.load_run(run).trials
    assert [*trials[0].cheap] == ["latency_ms", "latency_ms@odd", "macs"]
    assert {t.total for t in trials} == {18, 36}
    front = Front.of(trials, ("error", "latency_ms@odd"))
    rows = list(csv.DictReader((run / "search" / "front.latency_ms@odd.csv").open()))
    assert [int(row["trial"]) for row in rows] == [t.trial for t in front]
    further = {each["name"]: each for each in nas.load_run(run).summary["further"]}
    assert further.keys() == {"latency_ms@odd", "macs", "params"}
    assert further["params"]["value"] == nas.load_run(run).summary["winner"]["params"] <= further["params"]["limit"]
    assert nas.load_run(run).winner.architecture.genotype in {t.genotype for t in trials}
    assert (run / "report.html").exists()
