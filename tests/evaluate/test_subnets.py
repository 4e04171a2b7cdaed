"""Scores of subnets: those of the network alone, and the same to the bit however many share their first layers."""

import dataclasses

import numpy as np
import pytest
import tiny

from nas import config
from nas.agreement import kendall_tau
from nas.data import load_data
from nas.evaluate import Standalone, SubnetEvaluator, subnets
from nas.evaluate.batches import calibration_batches
from nas.export import RUNTIMES
from nas.fold import fold
from nas.ops import Network
from nas.quantise import Quantisation, calibrate, has_integers, simulate
from nas.space import load_space
from nas.supernet import Supernet
from nas.train import train_supernet


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


# int8


@pytest.fixture(scope="module")
def in_int8(evaluator) -> SubnetEvaluator:
    return dataclasses.replace(evaluator, precision="int8")


def quantised(evaluator, genotype) -> tuple[Network, dict[str, np.ndarray], Quantisation]:
    """A subnet, its arrays, and the scales that its file gets from the evaluator's own calibration images."""
    network, data = evaluator.supernet.space.decode(genotype), evaluator.data
    arrays = evaluator.supernet.slice({**evaluator.params, **evaluator.statistics(genotype)}, network)
    params = {name: np.asarray(a) for name, a in arrays.items()}
    images = calibration_batches(
        data, images=evaluator.calibration_images, batch_size=evaluator.batch_size, size=network.input[:2]
    )
    return network, params, calibrate(*fold(network.flat(), params), images.reshape(-1, *network.input))


def test_an_int8_score_is_that_of_the_quantised_network_on_its_own(in_int8, genotypes, monkeypatch):
    copy, logits, _ = watched(in_int8, monkeypatch)
    for genotype in genotypes[:4]:
        network, params, scales = quantised(in_int8, genotype)
        graph, folded = fold(network.flat(), params)
        images = in_int8.data.normalise(in_int8.data.val.images[:], network.input[:2])
        alone = np.asarray(simulate(graph, folded, scales, images))
        exact = Standalone(network, in_int8.data).logits(params, in_int8.data.val)
        logits.clear()
        (count,) = copy(genotype[None])
        got = np.concatenate(logits)[: len(images)]
        assert count == (got.argmax(-1) == in_int8.data.val.labels[:]).sum()
        assert np.abs(got - alone).mean() < 0.05 * np.abs(got - exact).mean()


def test_int8_scores_do_not_depend_on_order_or_company(in_int8, genotypes):
    counts = in_int8(genotypes)
    assert in_int8(genotypes[::-1]) == counts[::-1]
    assert [in_int8(g[None])[0] for g in genotypes] == counts
    alone = dataclasses.replace(in_int8, cache_bytes=0)
    alone.__dict__["_programs"] = in_int8._programs
    assert alone(genotypes) == counts


def test_counts_in_two_precisions_are_those_of_each_alone_and_moments_are_measured_once(
    evaluator, in_int8, genotypes, monkeypatch
):
    alone = [evaluator(genotypes), in_int8(genotypes)]
    assert alone[0] != alone[1]
    for also, order in ((("int8",), (0, 1)), (("float32",), (1, 0))):
        with monkeypatch.context() as patch:
            both, _, layers = watched((evaluator, in_int8)[order[0]], patch, also=also)
            assert both.counts(genotypes) == [*zip(*(alone[i] for i in order), strict=True)]
        measured = [layer for layer in layers if layer[0] == "calibrate"]
        assert len(measured) == len(set(measured))
    assert both(genotypes) == alone[1]
    with monkeypatch.context() as patch:
        nothing_kept, _, _ = watched(evaluator, patch, also=("int8",), cache_bytes=0)
        assert nothing_kept.counts(genotypes) == [*zip(*alone, strict=True)]


def test_a_subnet_is_counted_in_the_precisions_that_its_stages_choose(tmp_path):
    chosen = ("float32", "int8", "int4_weights")  # `test_mixed` has all
    space = tiny.joint_space(tmp_path, precisions=chosen)
    supernet = Supernet(space)
    mixed = SubnetEvaluator(
        supernet, supernet.init(2), tiny.data(tmp_path), calibration_images=64, batch_size=32, precision="mixed"
    )
    in_float = dataclasses.replace(mixed, precision="float32")
    images = mixed.data.normalise(mixed.data.val.images[:], space.input[:2])
    labels, runtime = mixed.data.val.labels[:], RUNTIMES["onnxruntime"]()
    genotypes = np.unique(space.sample(np.random.default_rng(0), 12), axis=0)
    assert {b.graph.precision for g in genotypes for b in space.decode(g).blocks} == set(chosen)
    for genotype, count in zip(genotypes, mixed(genotypes), strict=True):
        network, params, scales = quantised(mixed, genotype)
        if not network.flat().mixed:
            assert [count] == in_float(genotype[None])
        else:
            file = runtime.emit(network.flat(), params, precision="mixed", quantisation=scales)
            assert abs(count - (runtime.open(file)(images).argmax(-1) == labels).sum()) <= 1


@pytest.mark.slow  # two minutes each: trains a supernet
@pytest.mark.parametrize(("space", "precision"), [("digits_mixed", "int8"), ("digits_joint", "mixed")])
def test_scores_in_a_precision_order_networks_as_their_files_do_in_the_runtime(space, precision, capsys):
    experiment = config.load_experiment("experiments/quickstart.toml", overrides=["train.epochs=10"])
    data = load_data(experiment.data)
    space = load_space(space, input_shape=data.image_shape, classes=data.classes)
    supernet, runtime = Supernet(space), RUNTIMES["onnxruntime"]()
    params = train_supernet(supernet, data, experiment.train, seed=0)
    genotypes = space.sample(np.random.default_rng(5), 24)
    in_float = SubnetEvaluator(supernet, params, data)
    as_filed = dataclasses.replace(in_float, precision=precision)
    part = data.val
    images, files = data.normalise(part.images[:], data.image_shape[:2]), []
    for genotype in genotypes:
        network, arrays, scales = quantised(as_filed, genotype)
        needed = scales if has_integers(network.flat(), precision) else None
        file = runtime.emit(network.flat(), arrays, precision=precision, quantisation=needed)
        files.append(int((runtime.open(file)(images).argmax(-1) == part.labels[:]).sum()))
    for name, counts in ((precision, as_filed(genotypes)), ("float32", in_float(genotypes))):
        apart, tau = np.subtract(counts, files), kendall_tau(np.array(counts, float), np.array(files, float))
        with capsys.disabled():
            print(
                f"\n{space.name}, {name}, {len(part)} images: {np.abs(apart).mean():.2f} from the file's on average, "
                f"{np.abs(apart).max()} at most, {(apart == 0).sum()} equal, mean {apart.mean():+.2f}, tau {tau:.3f}"
            )
        if name == precision:
            assert np.abs(apart).max() <= 2
            assert np.abs(apart).mean() <= 0.5
            assert tau >= 0.98
