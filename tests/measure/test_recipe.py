import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny

from nas import cost
from nas.config import Device, Latency, load_experiment
from nas.errors import DeviceError, LatencyError
from nas.latency import Table, load_device, op_counts
from nas.measure import Plan, evaluate, for_table, measure, prepare, prove_again, recipe, runtime_class, runtime_of
from nas.measure.plan import choose_networks
from nas.measure.recipe import accept
from nas.ondevice.results import Recording
from nas.ondevice.timing import Round, rounds
from nas.ops import Graph
from nas.pipeline.job import Job
from nas.space import Space, load_space


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits_mixed", input_shape=(16, 16, 1), classes=10)


@pytest.fixture(scope="module")
def device() -> Device:
    return load_device("host_onnxruntime")


@dataclasses.dataclass
class Simulated:
    """A device on which a call costs an overhead and so much for each op and MAC, and SE doubles at some time."""

    changes_at: float = float("inf")
    others: float = 0.0
    broken: tuple[str, ...] = ()
    speed: float = 1.0
    now: float = 0.0

    def own_ms(self, graph: Graph) -> float:
        return self.speed * (0.02 + 0.01 * sum(op_counts(graph).values()) + cost.macs(graph) * 1e-6)

    def call(self, graph: Graph):
        own = self.own_ms(graph) / 1e3
        se = "mul" in op_counts(graph)

        def call(n: int) -> None:
            for _ in range(n):
                self.now += own * (2.0 if se and self.now > self.changes_at else 1.0)

        return call

    def record(self, plan: Plan, number: int = 40) -> Recording:
        """What the measuring program would have written."""
        names = [name for name in plan.graphs if name not in self.broken]
        timed = rounds([self.call(plan.graphs[n]) for n in names], seed=0, clock=lambda: self.now)
        where = {i: list(plan.graphs).index(n) for i, n in enumerate(names)}
        ran = [next(timed) for _ in range(number)]
        return Recording(
            manifest={"calls": [{"name": name} for name in plan.graphs]},
            starts=({"hardware": "simulated", "version": "1", "time": 0.0, "load": "no load"},),
            rounds=tuple(Round(tuple(where[i] for i in r.order), r.times_ms) for r in ran),
            seconds=self.now,
            unsupported=dict.fromkeys(self.broken, "it fell over"),
            others=(self.others,) * number,
            busiest="make (pid 1) 90 %",
            complete=True,
        )


def networks_of(plan: Plan):
    """(name, genotype) of the whole networks of a plan."""
    yield from zip(plan.anchor_names, plan.anchors, strict=True)
    yield from zip(plan.held_out_names, plan.held_out, strict=True)


def settings_of(**options) -> Latency:
    return Latency(**{"anchors": 12, "holdout": 16, **options})


def simulate(space: Space, device: Device, simulated: Simulated, **options):
    settings = settings_of(**options)
    plan = for_table(space, device, "float32", settings, seed=0)
    return evaluate(plan, simulated.record(plan), settings)


def test_where_costs_add_up_the_table_is_exact_and_counts_a_call_once(space, device):
    simulated = Simulated()
    table, proof = simulate(space, device, simulated)
    assert proof.mape < 1e-6
    assert proof.kendall_tau > 0.999
    assert table.overhead_ms == pytest.approx(0.02)
    for key, (block, role) in space.blocks().items():
        alone = simulated.own_ms(block.graph) - (0.0 if role == "first" else 0.02)
        assert table.entries[key].latency_ms == pytest.approx(alone)
    assert table.correction.scale == pytest.approx(1)


def test_the_interval_of_an_entry_covers_what_another_measuring_would_give(space, device):
    """Each session has a speed of its own and each sample noise, so two tables differ: as much as both say."""
    settings = settings_of()
    plan = for_table(space, device, "float32", settings, seed=0)
    tables = []
    for seed in range(6):
        recording, rng = Simulated().record(plan), np.random.default_rng(seed)
        sessions = np.exp(0.02 * rng.standard_normal(len(plan.graphs)))
        noisy = [
            Round(
                r.order, tuple(np.array(r.times_ms) * sessions[list(r.order)] * np.exp(0.05 * rng.random(len(r.order))))
            )
            for r in recording.rounds
        ]
        tables.append(evaluate(plan, dataclasses.replace(recording, rounds=tuple(noisy)), settings)[0])
    inside = [
        abs(a.entries[k].latency_ms - b.entries[k].latency_ms)
        <= np.hypot(a.entries[k].interval_ms, b.entries[k].interval_ms)
        for a, b in zip(tables[::2], tables[1::2], strict=True)
        for k in a.entries
    ]
    assert 0.9 <= np.mean(inside) <= 0.99


def test_few_rounds_say_that_drift_was_not_judged(space, device):
    settings = settings_of(max_drift=0.0)
    plan = for_table(space, device, "float32", settings, seed=0)
    few, _ = evaluate(plan, Simulated(changes_at=0.5).record(plan, number=20), settings)
    assert any("drift was not judged: in 20 rounds" in note for note in few.notes)
    many, _ = evaluate(plan, Simulated().record(plan), settings_of())
    assert not any("not judged" in note for note in many.notes)


@pytest.mark.parametrize("anchors", [1, 3, 6])
def test_any_number_of_anchors_will_do(space, device, anchors):
    table, proof = simulate(space, device, Simulated(), anchors=anchors)
    assert len(table.anchors) == anchors
    assert proof.mape < 1e-6


def test_an_uneven_machine_is_refused_and_who_uses_it_is_told(space, device):
    with pytest.raises(LatencyError, match=r"known to \d+\.\d% only.*make \(pid 1\) 90 %.*quieter"):
        simulate(space, device, Simulated(changes_at=3.0))


def test_samples_that_tell_too_little_are_refused_whatever_the_cause(space, device):
    """Where nobody says who uses the CPU, as on macOS, the samples themselves do."""
    settings = settings_of(max_drift=0.03)
    plan = for_table(space, device, "float32", settings, seed=0)
    recording, rng = Simulated(others=float("nan")).record(plan), np.random.default_rng(0)
    noisy = tuple(
        Round(r.order, tuple(np.array(r.times_ms) * np.exp(0.5 * rng.standard_normal(len(r.order)))))
        for r in recording.rounds
    )
    with pytest.raises(LatencyError, match=r"known to \d+\.\d% only.*at most 3%"):
        evaluate(plan, dataclasses.replace(recording, rounds=noisy), settings)
    two_kinds = tuple(  # alike at the start and at the end, but two speeds, each half of the time
        Round(r.order, tuple(np.array(r.times_ms) * rng.choice([1.0, 1.6], len(r.order)))) for r in recording.rounds
    )
    with pytest.raises(LatencyError, match=r"known to \d+\.\d% only.*at most 3%"):
        evaluate(plan, dataclasses.replace(recording, rounds=two_kinds), settings)


def test_a_busy_machine_is_refused_and_who_uses_it_is_told(space, device):
    with pytest.raises(LatencyError, match=r"other processes took 60%.*at most 25%.*make \(pid 1\) 90 %"):
        simulate(space, device, Simulated(others=0.6), max_busy=0.25)
    with pytest.raises(LatencyError, match=r"took 60%.*nobody knows how far.*at most 3%.*make \(pid 1\) 90 %"):
        simulate(space, device, Simulated(others=0.6), max_busy=0.9)  # whatever that is
    table, _ = simulate(space, device, Simulated(others=0.6), max_busy=0.7, max_drift=0.15)
    assert any("busy: Using CPU meanwhile: make" in note for note in table.notes)


def hampered(plan: Plan, seed: int, *, share: float = 0.0, by: float = 0.0, parts: float = 0.0) -> Recording:
    """240 rounds with noise, while others take our CPU in the first `share` of each 40 of them.

    They slow networks down by up to `by`, the more the larger they are, as one does who fills the caches.

    Args:
        parts: standard deviation by which every call wanders, whoever works, in a twelfth of the time.
    """
    recording, rng = Simulated().record(plan, 240), np.random.default_rng(seed)
    sizes = np.argsort(np.argsort([cost.macs(graph) for graph in plan.graphs.values()])) / len(plan.graphs)
    wander = parts * rng.standard_normal((12, len(sizes)))
    busy = np.arange(240) % 40 < share * 40
    timed = []
    for number, r in enumerate(recording.rounds):
        order = list(r.order)
        factor = np.exp(wander[number // 20] + 0.04 * rng.exponential(size=len(sizes)) + busy[number] * by * sizes)
        timed.append(Round(r.order, tuple(np.array(r.times_ms) * factor[order])))
    return dataclasses.replace(recording, rounds=tuple(timed), others=tuple(np.where(busy, 0.55, 0.02)))


def anchor_error(plan: Plan, recording: Recording) -> float:
    """Of the worst anchor, beside a quiet machine, a common factor set aside."""
    samples, quiet = recording.samples(), Simulated()
    found = samples.timings()
    ratio = [found[name].latency_ms / quiet.own_ms(plan.graphs[name]) for name in plan.anchor_names]
    return float(np.abs(ratio / np.median(ratio) - 1).max())


@pytest.fixture(scope="module")
def networks_only(space, device) -> Plan:
    """A plan without blocks, which takes no time to simulate."""
    plan = for_table(space, device, "float32", Latency(), seed=0)
    return dataclasses.replace(plan, blocks=False)


@pytest.mark.parametrize("by", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_anchors_of_a_hammered_machine_are_within_three_percent_or_refused(networks_only, share, by):
    """Under the settings of a run, whatever part of the time another process works."""
    for seed in range(3):
        recording = hampered(networks_only, seed, share=share, by=by)
        try:
            accept(networks_only, recording, Latency())
        except LatencyError:
            continue
        assert anchor_error(networks_only, recording) <= 0.035  # half a percent is the noise of 240 such rounds


def test_a_recording_refused_for_what_others_did_names_them(networks_only):
    for share in (0.5, 1.0):
        with pytest.raises(LatencyError, match=r"make \(pid 1\) 90 %"):
            accept(networks_only, hampered(networks_only, 0, share=share, by=0.2), Latency())


def test_a_window_of_hammering_in_a_long_measuring_is_refused_where_it_moves_anchors(networks_only):
    recording = Simulated().record(networks_only, 240)
    large = cost.macs(networks_only.graphs["anchor 0"])
    window = [
        Round(
            r.order,
            tuple(
                ms * (1.1 if 80 <= number < 200 and cost.macs(graphs[i]) > large else 1.0)
                for i, ms in zip(r.order, r.times_ms, strict=True)
            ),
        )
        for graphs in [list(networks_only.graphs.values())]
        for number, r in enumerate(recording.rounds)
    ]
    with pytest.raises(LatencyError, match=r"wandered .* known to \d+\.\d% only; at most 3%"):
        accept(networks_only, dataclasses.replace(recording, rounds=tuple(window)), Latency())


def test_a_quiet_machine_on_which_each_network_scatters_by_a_percent_is_not_refused(networks_only):
    for seed in range(15):
        recording = hampered(networks_only, seed, parts=0.01)
        accept(networks_only, recording, Latency())
        assert anchor_error(networks_only, recording) <= 0.03


def test_a_block_that_the_runtime_cannot_run_costs_infinitely_much_and_the_rest_is_searchable(space, device, tmp_path):
    key = next(k for k, (block, role) in space.blocks().items() if role == "middle" and "mul" in op_counts(block.graph))
    plan = for_table(space, device, "float32", settings_of(), seed=0)
    has = {n: any(b.graph.key == key for b in space.decode(g).blocks) for n, g in networks_of(plan)}
    assert any(has.values())
    assert not all(has.values())
    broken = (f"block {key}", *(name for name, broken in has.items() if broken))
    table, proof = simulate(space, device, Simulated(broken=broken))
    assert table.unsupported == {key: "it fell over"}
    assert len(table.anchors) == sum(not has[n] for n in plan.anchor_names)
    assert proof.networks == sum(not has[n] for n in plan.held_out_names)
    assert key not in table.entries
    assert proof.mape < 1e-6
    genotypes = space.sample(np.random.default_rng(0), 500)
    having = np.array([any(b.graph.key == key for b in space.decode(g).blocks) for g in genotypes])
    assert having.any()
    assert (np.isinf(table.price(space, genotypes)) == having).all()
    fastest_ms, low, slowest_ms, high = table.reachable(space)
    assert fastest_ms < slowest_ms < np.inf
    assert table.network_ms(space.decode(high)) == slowest_ms
    assert not any(b.graph.key == key for g in (low, high) for b in space.decode(g).blocks)
    table.save(tmp_path)
    assert Table.load(tmp_path, "float32") == table


def test_a_runtime_that_cannot_run_the_references_is_told(space, device):
    plan = for_table(space, device, "float32", settings_of(), seed=0)
    first = next(iter(plan.graphs))
    with pytest.raises(LatencyError, match=f"cannot run `{first}`.*it fell over"):
        simulate(space, device, Simulated(broken=(first,)))


def test_a_proof_at_another_time_takes_the_level_of_the_machine_out(monkeypatch, space, device):
    table, _ = simulate(space, device, Simulated())
    slower = Simulated(speed=1.3)
    monkeypatch.setattr(recipe, "record", lambda plan, *_, **__: slower.record(plan))
    proof = prove_again(table, space, device, settings_of(), networks=30, seed=1)
    assert proof.networks == 30
    assert proof.mape < 1e-6
    assert not {r.genotype for r in prove_again(table, space, device, settings_of(), networks=200, seed=0).rows} & {
        a.genotype for a in table.anchors
    }
    lost = Simulated(speed=1.3, broken=("anchor 1",))
    monkeypatch.setattr(recipe, "record", lambda plan, *_, **__: lost.record(plan))
    assert prove_again(table, space, device, settings_of(), networks=30, seed=1).mape < 1e-6
    other = load_space("digits_mixed", input_shape=(20, 20, 1), classes=10)
    with pytest.raises(LatencyError, match="not of this"):
        prove_again(table, other, device, settings_of(), networks=30, seed=1)


def test_a_space_without_choices_is_refused(space, device, tmp_path):
    single = tmp_path / "single.toml"
    stage = '[[stage]]\nblock = "mbconv"\nwidth = 16\n'
    single.write_text(f'[stem]\nblock = "conv_stem"\nwidth = 16\n{stage}[head]\nblock = "classifier"\nwidth = 32\n')
    with pytest.raises(LatencyError, match="has 1 networks"):
        simulate(load_space(str(single)), device, Simulated())


def test_the_same_seed_measures_the_same_networks_none_of_them_twice(space):
    first, again = (choose_networks(space, 16, 24, np.random.default_rng(5)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert len(np.unique(np.concatenate(first), axis=0)) == 16 + 24
    macs = space.price(space.sample(np.random.default_rng(0), 2000), space.costs(cost.macs))
    held_out = space.price(first[1], space.costs(cost.macs))
    assert held_out.min() < np.quantile(macs, 0.1)
    assert held_out.max() > np.quantile(macs, 0.9)


def test_a_real_table_is_complete_ranks_networks_and_comes_back_from_disk(space, device, tmp_path):
    told: list[tuple[str, float, float]] = []
    settings = settings_of(seconds=3.0, patience=1.0, max_busy=1.0, max_drift=9.0)  # whatever runs beside
    folder = tmp_path / "work"
    table, proof = measure(
        space, device, "float32", settings, seed=0, folder=folder, progress=lambda *what: told.append(what)
    )
    assert set(table.entries) == set(space.blocks())
    assert all(e.latency_ms > 0 and e.rounds >= 15 for e in table.entries.values())
    assert (table.runtime, table.threads, table.space_digest) == ("onnxruntime", 1, space.digest)
    assert proof.networks == 16
    assert proof.kendall_tau > 0.5
    assert proof.rows[0].predicted_ms == table.network_ms(space.decode(proof.rows[0].genotype))
    assert {what.partition(" ")[0] for what, _, _ in told} == {"writing", "building", "timing"}
    assert told[-1][1:] == (1.0, 0.0)
    table.save(tmp_path)
    assert Table.load(tmp_path, "float32") == table
    again, _ = measure(space, device, "float32", settings, seed=0, folder=folder)  # nothing is timed anew
    assert again == table
    with pytest.raises(LatencyError, match="another bundle"):
        measure(space, device, "float32", settings, seed=1, folder=folder)
    with pytest.raises(LatencyError, match="at most -1% may be theirs"):
        measure(space, device, "float32", settings_of(max_busy=-0.01, max_drift=9.0), seed=0, folder=folder)
    assert not (folder / "results.jsonl").exists()  # what was refused is timed anew
    assert (folder / "results.jsonl.refused").exists()


def test_an_int8_block_runs_without_data(space, device):
    block = space.decode(space.smallest()).blocks[1]
    prepare(block.graph, device, "int8")(1)


def test_an_unknown_runtime_or_precision_names_the_nearest(space):
    with pytest.raises(DeviceError, match="Did you mean `onnxruntime`"):
        runtime_of(Device(device="x", runtime="onnx_runtime"))
    with pytest.raises(DeviceError, match="Did you mean `int8`"):
        prepare(space.decode(space.smallest()).flat(), Device(device="x", runtime="onnxruntime"), "int4")
    with pytest.raises(DeviceError, match="precision `int4`, which runtime `onnxruntime` does not have"):
        runtime_class(Device(device="x", runtime="onnxruntime", precision=("float32", "int4")))


@pytest.mark.parametrize(
    ("line", "message"),
    [('runtime = "onnxruntim"', "unknown runtime"), ('runtime = "onnxruntime"\nprecision = ["int4"]', "`int4`")],
)
def test_a_job_tells_them_when_its_device_is_first_asked_for(tmp_path, line, message):
    (tmp_path / "device.toml").write_text(f'device = "x"\n{line}\n')
    experiment = load_experiment(tiny.write_experiment(tmp_path), overrides=(f"device='{tmp_path}'",))
    unused: Any = None
    for part in ("device", "runtime"):
        with pytest.raises(DeviceError, match=message):
            getattr(Job(experiment, unused, unused), part)
