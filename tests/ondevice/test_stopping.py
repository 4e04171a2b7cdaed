import numpy as np
import pytest

from nas.ondevice.stopping import Outlook, Wanted, combined, rounds_for
from nas.ondevice.timing import Timing


def timing(latency_ms: float, interval: float) -> Timing:
    return Timing(latency_ms, 0.0, interval, latency_ms, latency_ms, latency_ms, 40)


def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth, halves = {"block": 3.0, "conv": 2.5, "other": 1.0}, {"block": 0.02, "conv": 0.03, "other": 0.05}
    terms = {"block": 1.0, "conv": -0.5, "other": -0.5}
    inside = []
    for _ in range(4000):
        found = {n: timing(ms * (1 + halves[n] / 1.96 * rng.standard_normal()), halves[n]) for n, ms in truth.items()}
        latency_ms, interval_ms = combined(terms, found)
        inside.append(abs(latency_ms - 1.25) <= interval_ms)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


def test_what_a_block_does_to_a_network_counts_not_its_own_size():
    terms = {"block": 1.0, "conv": -1.0}
    asked = Wanted({"block": terms}, ["net"], 16.0)
    for conv in (9.99, 5.0):  # the entry is 0.01 ms or 5 ms: the same error in ms, and in a sum
        timings = {"block": timing(10.0, 0.001), "conv": timing(conv, 0.0), "net": timing(80.0, 0.002)}
        assert asked.intervals(timings) == {"net": 0.002, "block": pytest.approx(0.01 * 4 / 80)}


def test_a_sum_is_known_as_well_as_its_noise_says():
    """Entries with independent errors, summed over 25 blocks: 95 % of the sums are within the noise."""
    rng = np.random.default_rng(1)
    blocks = {f"block {i}": 1.0 + i for i in range(40)}
    asked = Wanted({name: {name: 1.0} for name in blocks}, ["net"], 25.0)
    timings = {name: timing(ms, 0.1 / ms) for name, ms in blocks.items()}  # each to 0.1 ms
    network = 25 * float(np.mean(list(blocks.values())))
    noise = asked.noise(asked.intervals({**timings, "net": timing(network, 0.0)}))
    errors = (0.1 / 1.96) * rng.standard_normal((4000, 25)).sum(1) / network
    assert np.mean(np.abs(errors) <= noise) == pytest.approx(0.95, abs=0.012)


def test_what_was_not_timed_asks_for_nothing():
    asked = Wanted({"block": {"block": 1.0, "conv": -1.0}}, ["net"], 16.0)
    assert asked.intervals({"block": timing(1.0, 0.1), "conv": timing(1.0, 0.1)}) == {}
    assert set(asked.intervals({"block": timing(1.0, 0.1), "net": timing(1.0, 0.1)})) == {"net"}
    assert np.isnan(asked.noise({}))


def test_so_many_rounds_make_an_interval_as_narrow_as_is_wanted():
    rng = np.random.default_rng(2)
    samples = rng.standard_normal((2000, 400))
    halves = {n: 1.96 * samples[:, :n].std(axis=1, ddof=1).mean() / np.sqrt(n) for n in (25, 100)}
    assert rounds_for(halves[25], halves[100], rounds=25) == pytest.approx(100, rel=0.03)
    assert rounds_for(0.01, 0.01, rounds=25) == 25
    for half, wanted in ((0.01, 0.0), (np.nan, 0.01), (np.inf, 0.01)):
        assert rounds_for(half, wanted, rounds=25) == np.inf


@pytest.mark.parametrize("seed", range(20))
def test_the_share_never_falls_and_the_time_left_is_finite_and_true_at_last(seed):
    """Whatever becomes of the estimates: they jump, and rounds take longer or less long."""
    rng = np.random.default_rng(seed)
    outlook = Outlook(min_rounds=int(rng.integers(2, 60)), max_seconds=float(rng.choice([0.0, 10.0, 50.0, 1e9])))
    shares, seconds = [0.0], 0.0
    for rounds in range(1, 200):
        round_seconds = float(rng.gamma(2.0))
        seconds += round_seconds
        needed = float(rng.choice([2.0, rounds, 3 * rounds, 1e6, np.inf]))
        share, left = outlook(rounds=rounds, seconds=seconds, round_seconds=round_seconds, needed_rounds=needed)
        assert shares[-1] <= share < 1
        assert 0 <= left < np.inf
        shares.append(share)


def test_the_time_left_is_what_the_widest_interval_still_takes_within_the_limits():
    def left(needed: float, **limits: float) -> float:
        outlook = Outlook(**{"min_rounds": 10, "max_seconds": 1000.0, **limits})
        return outlook(rounds=20, seconds=40.0, round_seconds=2.0, needed_rounds=needed)[1]

    assert left(50) == 60.0
    assert left(50, max_seconds=70.0) == 30.0  # the time is up before
    assert left(5) == 0.0
    assert left(5, min_rounds=25) == 10.0
    assert left(np.inf, max_seconds=30.0, min_rounds=25) == 10.0
