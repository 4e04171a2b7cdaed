import json

import msgspec
import numpy as np
import pytest
from scipy import stats

from nas.latency import Proof, prove


def test_errors_are_shares_of_the_measured_latency():
    proof = prove(np.array([1.04, 1.92, 3.45, 5.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert proof.mape == pytest.approx((0.04 + 0.04 + 0.15 + 0.25) / 4)
    assert proof.bias == pytest.approx((0.04 - 0.04 + 0.15 + 0.25) / 4)
    assert (proof.within_5, proof.within_10, proof.networks, proof.rows) == (0.5, 0.5, 4, ())
    assert proof.kendall_tau == 1


def test_tau_is_scipys_and_lies_within_its_interval():
    rng = np.random.default_rng(0)
    measured = rng.uniform(1, 2, 40)
    predicted = measured + rng.normal(0, 0.2, 40)
    proof = prove(predicted, measured)
    assert proof.kendall_tau == stats.kendalltau(predicted, measured).statistic
    assert proof.tau_low < proof.kendall_tau < proof.tau_high
    wide = prove(predicted[:8], measured[:8])
    assert wide.tau_high - wide.tau_low > proof.tau_high - proof.tau_low


def test_the_interval_is_that_of_scipys_tau_over_resamples():
    rng = np.random.default_rng(1)
    measured = rng.integers(1, 6, 20).astype(float)  # with ties
    predicted = measured + rng.integers(-1, 2, 20)
    proof = prove(predicted, measured)
    picks = rng.integers(0, 20, (2000, 20))
    taus = [stats.kendalltau(predicted[i], measured[i]).statistic for i in picks]
    assert (proof.tau_low, proof.tau_high) == pytest.approx(np.quantile(taus, (0.025, 0.975)), abs=0.03)


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 2, 12), rng.uniform(1, 2, 12)
    assert prove(a, b, seed=3) == prove(a, b, seed=3)


def test_a_proof_keeps_its_networks_through_json():
    genotypes = np.array([[0, 1], [1, 0]], np.uint8)
    proof = prove(np.array([1.0, 2.1]), np.array([1.0, 2.0]), genotypes=genotypes, p90_ms=np.array([1.5, 2.5]))
    assert proof.rows[1].genotype == (1, 0)
    assert proof.rows[1].p90_ms == 2.5
    assert msgspec.json.decode(msgspec.json.encode(proof), type=Proof) == proof
    assert "2 held-out networks" in str(proof)


@pytest.mark.parametrize(("predicted", "measured"), [([1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_too_few_or_unequal_numbers_are_refused(predicted, measured):
    with pytest.raises(ValueError, match="two equal lengths"):
        prove(np.array(predicted), np.array(measured))


def test_spearman_is_scipys_and_lies_within_its_interval():
    rng = np.random.default_rng(0)
    measured = rng.integers(1, 9, 40).astype(float)  # with ties
    predicted = measured + rng.normal(0, 1, 40)
    proof = prove(predicted, measured)
    assert proof.spearman == pytest.approx(stats.spearmanr(predicted, measured).statistic)
    assert proof.spearman_low < proof.spearman < proof.spearman_high


@pytest.mark.parametrize("of", ["predicted", "measured"])
def test_without_an_order_there_is_a_reason_and_no_number_that_json_does_not_know(of):
    same, other = np.full(5, 2.0), np.linspace(1.5, 2.5, 5)
    proof = prove(*((same, other) if of == "predicted" else (other, same)), repeat_tau=float("nan"))
    assert (proof.kendall_tau, proof.spearman, proof.tau_low, proof.repeat_tau) == (None, None, None, None)
    assert proof.no_order == f"all {of} latencies are one value"
    assert proof.no_order in str(proof)
    text = json.dumps(msgspec.to_builtins(proof), allow_nan=False)
    assert msgspec.json.decode(text, type=Proof) == proof


def test_a_proof_of_another_table_says_so():
    proof = prove(np.array([1.0, 2.1]), np.array([1.0, 2.0]), table="abc")
    assert proof.beside("abc") is proof
    assert str(proof.beside("def")).startswith("PROOF OF ANOTHER TABLE (hash abc; the table here has def): 2 held-out")
    old = prove(np.array([1.0, 2.1]), np.array([1.0, 2.0]))
    assert old.beside("def") is old
