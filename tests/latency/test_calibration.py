import numpy as np
import pytest

from nas.latency import Correction, calibrate, op_counts
from nas.ops import Recorder


def counts_of(rng: np.random.Generator, n: int) -> list[dict[str, int]]:
    return [{"conv": int(rng.integers(6, 20)), "add": int(rng.integers(0, 4))} for _ in range(n)]


def test_norms_are_not_counted():
    net = Recorder((4, 4, 8))
    x = net.act(net.norm(net.conv(net.input, "conv", 8), "norm"), "relu")
    net.add(x, net.input)
    assert op_counts(net.graph()) == {"conv": 1, "act": 1, "add": 1}


def test_few_anchors_fit_a_scale_alone():
    sums = np.array([1.0, 2.0, 3.0])
    correction = calibrate(sums, [{"conv": 3}] * 3, 1.1 * sums)
    assert correction.scale == pytest.approx(1.1)
    assert (correction.offset_ms, correction.op_ms) == (0.0, {})


def test_scale_and_offset_are_found_exactly():
    sums = np.linspace(0.03, 0.15, 6)
    correction = calibrate(sums, counts_of(np.random.default_rng(0), 6), 1.2 * sums - 0.005)
    assert correction.scale == pytest.approx(1.2)
    assert correction.offset_ms == pytest.approx(-0.005)
    assert correction.leave_one_out == pytest.approx(0, abs=1e-9)


def test_ops_that_cost_more_in_company_are_found_and_help():
    rng = np.random.default_rng(1)
    counts, sums = counts_of(rng, 60), rng.uniform(0.05, 0.2, 60)
    measured = (1.1 * sums + 0.004 * np.array([c["add"] for c in counts])) * rng.normal(1, 0.005, 60)
    correction = calibrate(sums[:16], counts[:16], measured[:16])
    plain = calibrate(sums[:9], counts[:9], measured[:9])
    assert correction.op_ms["add"] == pytest.approx(0.004, rel=0.3)
    with_ops, without = (error(c, sums[16:], counts[16:], measured[16:]) for c in (correction, plain))
    assert with_ops < 0.02
    assert with_ops < without


def error(correction: Correction, sums: np.ndarray, counts: list[dict[str, int]], measured: np.ndarray) -> float:
    ops = [sum(correction.op_ms.get(k, 0) * n for k, n in c.items()) for c in counts]
    return float(np.abs((correction.scale * sums + correction.offset_ms + ops) / measured - 1).mean())


def test_leave_one_out_error_is_that_of_fitting_without_each_anchor():
    rng = np.random.default_rng(2)
    sums = rng.uniform(0.05, 0.2, 8)
    measured = sums * rng.normal(1, 0.05, 8)
    counts = [{"conv": 10}] * 8
    left_out = []
    for i in range(8):
        rest = np.arange(8) != i
        columns = np.c_[sums, np.ones(8)] / measured[:, None]
        solution = np.linalg.lstsq(columns[rest], np.ones(7), rcond=None)[0]
        left_out.append(columns[i] @ solution - 1)
    assert calibrate(sums, counts, measured).leave_one_out == pytest.approx(np.sqrt(np.mean(np.square(left_out))))
