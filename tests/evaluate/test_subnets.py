"""Scores of subnets: those of the network alone, and the same to the bit however many share their first layers."""

import dataclasses

import numpy as np
import pytest
import tiny

from nas.evaluate import Standalone, SubnetEvaluator, subnets
from nas.supernet import Supernet


@pytest.fixture(scope="module", params=["tiny", pytest.param("elastic", marks=pytest.mark.slow)])
def evaluator(request, tmp_path_factory) -> SubnetEvaluator:
    folder = tmp_path_factory.mktemp("data")
    space = tiny.space(folder) if request.param == "tiny" else tiny.elastic_space(folder)
    supernet = Supernet(space)
    return SubnetEvaluator(supernet, supernet.init(2), tiny.data(folder), calibration_images=64, batch_size=32)


@pytest.fixture
def genotypes(evaluator):
    return evaluator.supernet.space.sample(np.random.default_rng(1), 12)


def watched(evaluator, monkeypatch, **changes):
    """A copy that runs the same programs, the logits it counts, and the layers it computes: (mode, branches so far)."""
    copy = dataclasses.replace(evaluator, **changes)
    copy.__dict__["_programs"] = evaluator._programs
    logits, layers = [], []
    hits, calibrate, infer = subnets._hits, SubnetEvaluator._calibrate, SubnetEvaluator._infer

    def watch(mode, function):
        def run(self, side, row, start, *rest):
            stop = rest[0] if mode == "calibrate" else start + len(rest[0])
            layers.extend((mode, side, *row[: depth + 1]) for depth in range(start, stop))
            return function(self, side, row, start, *rest)

        return run

    monkeypatch.setattr(subnets, "_hits", lambda y, labels: logits.append(np.asarray(y)) or hits(y, labels))
    monkeypatch.setattr(SubnetEvaluator, "_calibrate", watch("calibrate", calibrate))
    monkeypatch.setattr(SubnetEvaluator, "_infer", watch("infer", infer))
    return copy, logits, layers


def test_a_score_is_that_of_the_network_on_its_own(evaluator, genotypes):
    for genotype, count in zip(genotypes[:4], evaluator(genotypes[:4]), strict=True):
        network = evaluator.supernet.space.decode(genotype)
        alone = Standalone(network, evaluator.data, batch_size=32)
        sliced = alone.calibrate(evaluator.supernet.slice(evaluator.params, network), images=64)
        assert alone.correct(sliced, evaluator.data.val) == count


def test_scores_do_not_depend_on_order_or_company(evaluator, genotypes):
    counts = evaluator(genotypes)
    assert len(set(counts)) > 1
    assert evaluator(genotypes[::-1]) == counts[::-1]
    assert evaluator(np.repeat(genotypes, 2, axis=0)) == np.repeat(counts, 2).tolist()
    assert [evaluator(g[None])[0] for g in genotypes] == counts


def test_layers_that_subnets_have_in_common_are_computed_once_and_give_the_same_bits(evaluator, genotypes, monkeypatch):
    everything = {}
    for cache_bytes in (0, 2**30):
        with monkeypatch.context() as patch:
            copy, logits, layers = watched(evaluator, patch, cache_bytes=cache_bytes)
            everything[cache_bytes] = copy(genotypes), logits, layers
    (alone, alone_logits, each), (shared, shared_logits, once) = everything.values()
    assert alone == shared
    assert all(np.array_equal(a, b) for a, b in zip(alone_logits, shared_logits, strict=True))
    assert len(once) == len(set(once))
    assert set(once) == set(each)
    assert len(once) < len(each)


def test_no_more_is_kept_than_allowed(evaluator, genotypes, monkeypatch):
    scores, fits = [], []
    original = SubnetEvaluator._fits

    def watch(self, side, stop, path):
        fits.append(original(self, side, stop, path))
        assert sum(kept.nbytes for _, kept in path[1:]) <= self.cache_bytes
        return fits[-1]

    for cache_bytes in (0, 60_000, 2**30):
        with monkeypatch.context() as patch:
            patch.setattr(SubnetEvaluator, "_fits", watch)
            scores.append(watched(evaluator, patch, cache_bytes=cache_bytes)[0](genotypes))
    assert scores[0] == scores[1] == scores[2]
    assert True in fits
    assert False in fits


@pytest.mark.parametrize(
    ("shared", "known", "depths"), [([2, 1, 0], 0, [1, 2]), ([1, 2, 0], 0, [1]), ([2, 3, 0], 2, []), ([0], 0, [])]
)
def test_a_subnet_is_kept_where_a_later_one_parts_from_it(shared, known, depths):
    assert subnets._partings(shared, known) == depths
