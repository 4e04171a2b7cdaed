import gc
import os
import time
from collections.abc import Callable

import numpy as np
import pytest

from nas.ondevice.timing import Samples, interleave, measure_files, rounds


class Machine:
    """A clock that calls advance: by their own milliseconds, times the machine's speed at that time."""

    def __init__(self, speed: Callable[[float], float] = lambda now: 1.0):
        self.now, self.speed = 0.0, speed

    def clock(self) -> float:
        return self.now

    def call(self, milliseconds: float | Callable[[float], float]) -> Callable[[int], None]:
        def run(n: int) -> None:
            for _ in range(n):
                own = milliseconds(self.now) if callable(milliseconds) else milliseconds
                self.now += own * self.speed(self.now) / 1e3

        return run


def times(machine: Machine, milliseconds: dict[str, float], **options) -> Samples[str]:
    calls = {name: machine.call(ms) for name, ms in milliseconds.items()}
    return interleave(calls, seed=0, clock=machine.clock, **{"seconds": 0.0, "min_rounds": 20, **options})


def test_each_round_runs_every_call_once_in_a_fresh_order():
    samples = times(Machine(), {"a": 1.0, "b": 2.0, "c": 3.0}, min_rounds=30)
    assert samples.times_ms.shape == (30, 3)
    assert all(sorted(row) == [0, 1, 2] for row in samples.order.tolist())
    assert len({tuple(row) for row in samples.order.tolist()}) > 3
    np.testing.assert_allclose(samples.times_ms, [[1.0, 2.0, 3.0]] * 30)


def test_the_budget_ends_the_rounds_but_not_before_the_fewest():
    assert len(times(Machine(), {"a": 20.0}, seconds=4.0, min_rounds=3).times_ms) == pytest.approx(100, abs=2)
    assert len(times(Machine(), {"a": 10.0}, seconds=0.0, min_rounds=7).times_ms) == 7


def test_a_machine_that_changes_speed_does_not_change_ratios():
    machine = Machine(lambda now: 1.0 if int(now / 0.7) % 3 == 0 else 1.6)
    own = {f"net{i}": 0.5 + 0.1 * i for i in range(20)}
    timings = times(machine, own, min_rounds=60).timings()
    ratios = np.array([timings[n].latency_ms / ms for n, ms in own.items()])
    np.testing.assert_allclose(ratios / np.median(ratios), 1, atol=0.01)
    assert np.median(ratios) == pytest.approx(1.0, rel=0.02)  # stated at the quiet level
    assert timings["net0"].p90_ms > 1.5 * timings["net0"].p10_ms  # the percentiles tell how it was


def test_a_clock_that_jumps_moves_no_timing():
    """A machine that is stopped, or sleeps, for an hour now and then; backwards the clock cannot go."""
    calls = 0

    def speed(now: float) -> float:
        nonlocal calls
        calls += 1
        return 3.6e6 if calls % 97 == 0 else 1.0

    samples = times(Machine(speed), {f"net{i}": 1.0 + i for i in range(10)}, min_rounds=60)
    assert 3 <= (samples.times_ms > 1e5).sum() <= 12
    for i in range(10):
        assert samples.timings()[f"net{i}"].latency_ms == pytest.approx(1.0 + i, rel=1e-6)
    assert time.get_clock_info("perf_counter").monotonic


def test_preemption_hardly_moves_a_timing():
    rng = np.random.default_rng(0)
    machine = Machine(lambda now: 5.0 if rng.random() < 0.2 else 1.0)
    timings = times(machine, {f"net{i}": 1.0 + i for i in range(10)}, min_rounds=60).timings()
    for i in range(10):
        assert timings[f"net{i}"].latency_ms == pytest.approx(1.0 + i, rel=0.02)


def test_tiny_calls_are_repeated_within_a_sample():
    machine, count = Machine(), 0

    def tiny(n: int) -> None:
        nonlocal count
        count += n
        machine.now += 2e-6 * n

    interleave({"tiny": tiny}, seconds=0.0, min_rounds=10, seed=0, clock=machine.clock)
    assert 550 <= count <= 650  # 10 rounds of 50 and 5 to settle, 5 and 40 to find that out


def test_inferences_are_timed_once_they_have_settled():
    """After another network has run, the first ones find its data in the caches."""
    machine, last = Machine(), []

    def network(name: str, milliseconds: float) -> Callable[[int], None]:
        def run(n: int) -> None:
            for _ in range(n):
                since = len(last) - 1 - max((i for i, other in enumerate(last) if other != name), default=-1)
                machine.now += milliseconds * (2.0, 1.5, 1.2, 1.1, 1.05, 1.0)[min(since, 5)] / 1e3
                last.append(name)
                del last[:-20]

        return run

    own = {"small": 0.05, "middle": 0.4, "large": 2.0}
    calls = {name: network(name, ms) for name, ms in own.items()}
    timings = interleave(calls, seconds=0.0, min_rounds=30, seed=0, clock=machine.clock).timings()
    for name, ms in own.items():
        assert timings[name].latency_ms == pytest.approx(ms, rel=0.01)


@pytest.mark.parametrize(("milliseconds", "inferences"), [(0.5, 5 + 1), (4.0, 3 + 1), (80.0, 1 + 1)])
def test_long_inferences_settle_in_fewer_calls(milliseconds, inferences):
    machine, count = Machine(), 0

    def call(n: int) -> None:
        nonlocal count
        count += n
        machine.now += milliseconds * n / 1e3

    interleave({"a": call}, seconds=0.0, min_rounds=10, seed=0, clock=machine.clock)
    before = 5 + 5 * 8  # to find out how long they take
    assert count == before + 10 * inferences


def test_what_comes_once_a_call_is_spread_over_many_inferences():
    machine = Machine()

    def queued(n: int) -> None:
        machine.now += 40e-6 + 20e-6 * n  # the host waits once for all that it enqueued

    timings = interleave({"a": queued}, seconds=0.0, min_rounds=5, seed=0, clock=machine.clock).timings()
    assert timings["a"].latency_ms == pytest.approx(0.020, rel=0.011)


def test_disagreement_sees_uneven_changes_only():
    even = times(Machine(lambda now: 1.0 if now < 1.4 else 1.4), {"a": 1.0, "b": 2.0, "c": 3.0}, min_rounds=99)
    assert even.disagreement(["a", "b", "c"], parts=3) < 0.01
    machine = Machine()
    own = {n: machine.call(lambda now, ms=ms: ms * (1.5 if now > 1.4 and ms > 2 else 1)) for n, ms in
           {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 1.5}.items()}  # fmt: skip
    uneven = interleave(own, seconds=0.0, min_rounds=99, seed=0, clock=machine.clock)
    assert uneven.disagreement(list(own), parts=3) > 0.15


def test_calls_left_out_of_some_rounds_are_timed_by_the_others():
    machine = Machine(lambda now: 1.0 if int(now / 0.7) % 3 == 0 else 1.6)
    own = {f"net{i}": 0.5 + 0.1 * i for i in range(20)}
    wanted, ran = list(range(20)), []
    generator = rounds([machine.call(ms) for ms in own.values()], seed=0, wanted=lambda: wanted, clock=machine.clock)
    for number in range(80):
        wanted = list(range(20)) if number < 40 else [3, 7]
        ran.append(next(generator))
    samples = Samples.of(tuple(own), ran)
    assert np.isnan(samples.times_ms[40:]).sum() == 40 * 18
    timings = samples.timings()
    assert [t.rounds for t in timings.values()] == [80 if i in (3, 7) else 40 for i in range(20)]
    ratios = np.array([timings[n].latency_ms / ms for n, ms in own.items()])
    np.testing.assert_allclose(ratios / np.median(ratios), 1, atol=0.02)


def test_calls_that_go_on_at_another_speed_of_the_machine_keep_their_ratio_to_those_left_out():
    machine, speed = Machine(lambda now: speed[0]), [1.0]
    own = {f"net{i}": 1.0 + 0.01 * i for i in range(60)}
    wanted, ran = list(range(60)), []
    generator = rounds([machine.call(ms) for ms in own.values()], seed=0, wanted=lambda: wanted, clock=machine.clock)
    for number in range(130):
        if number == 40:
            wanted, speed[0] = list(range(20)), 1.2
        ran.append(next(generator))
    timings = Samples.of(tuple(own), ran).timings()
    ratios = np.array([timings[n].latency_ms / ms for n, ms in own.items()])
    np.testing.assert_allclose(ratios / np.median(ratios), 1, atol=0.01)


def test_rounds_that_go_on_are_those_of_one_run():
    machine = Machine()
    calls = [machine.call(1.0) for _ in range(9)]
    whole = rounds(calls, seed=3, clock=machine.clock)
    orders = [next(whole).order for _ in range(10)]
    later = rounds(calls, seed=3, done=6, clock=machine.clock)
    assert [next(later).order for _ in range(4)] == orders[6:]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    machine = Machine(lambda now: float(np.exp(0.05 * rng.standard_normal())))
    names = {f"net{i}": 2.0 for i in range(400)}
    timings = times(machine, names, min_rounds=40).timings()
    found = np.array([t.latency_ms for t in timings.values()])
    half = np.array([t.interval for t in timings.values()])
    covered = np.mean(np.abs(found / np.median(found) - 1) <= half)
    assert 0.90 <= covered <= 0.99


def test_garbage_collection_is_restored_after_an_error():
    def broken(n: int) -> None:
        assert not gc.isenabled()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        interleave({"a": broken}, seconds=0.0, min_rounds=3, seed=0)
    assert gc.isenabled()


def test_files_are_measured_against_each_other():
    def counting(to: int) -> Callable[[int], None]:
        return lambda n: [sum(range(to)) for _ in range(n)].clear()

    openers = {"once": lambda: counting(1000), "often": lambda: counting(8000)}
    timings = measure_files(openers, seconds=0.2)
    assert timings["often"].latency_ms > 2 * timings["once"].latency_ms
    assert timings["once"].rounds >= 15
    assert timings["once"].p10_ms <= timings["once"].median_ms <= timings["once"].p90_ms


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_sessions_are_opened_where_they_are_timed():
    """Threads keep the CPUs that they started on: opened outside, sessions of more than one thread run anywhere."""
    if len(before := os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: nothing to pin to")
    held: dict[str, set[int]] = {}

    def opened():
        held["opening"] = os.sched_getaffinity(0)
        return lambda n: held.setdefault("timing", os.sched_getaffinity(0))

    measure_files({"a": opened}, seconds=0.0, min_rounds=3, threads=1)
    assert len(held["opening"]) == 1
    assert held["opening"] == held["timing"]
    assert os.sched_getaffinity(0) == before
