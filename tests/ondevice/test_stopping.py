import numpy as np
import pytest

from nas.ondevice.stopping import Wanted, combined
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
