"""Laws of the supernet: a slice equals the subnet, gradients are those of the slice, nothing is compiled twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from nas import config
from nas.evaluate import SubnetEvaluator
from nas.ops import weights
from nas.run import run
from nas.space import load_space
from nas.supernet import Supernet, share
from nas.supernet.sharing import unshare
from nas.train.losses import cross_entropy
from nas.train.supernet import make_step


@pytest.fixture(scope="module", params=["tiny", "elastic", pytest.param("digits_mixed", marks=pytest.mark.slow)])
def supernet(request, tmp_path_factory) -> Supernet:
    """Small ones; tests/supernet/test_every_space.py holds all spaces to the first law."""
    folder = tmp_path_factory.mktemp("space")
    if request.param == "tiny":
        return Supernet(tiny.space(folder))
    if request.param == "elastic":
        return Supernet(tiny.elastic_space(folder))
    return Supernet(load_space(request.param, input_shape=(8, 8, 1), classes=3))


@pytest.fixture(scope="module")
def params(supernet):
    return supernet.init(0)


def images_for(network):
    return jax.random.normal(jax.random.key(1), (4, *network.input))


@pytest.fixture(scope="module")
def calibrate(supernet):
    return jax.jit(functools.partial(supernet.apply, mode="calibrate"))


def genotypes_of(supernet, n=3):
    space = supernet.space
    return np.stack([space.smallest(), space.largest(), *space.sample(np.random.default_rng(0), n)])


@pytest.fixture(scope="module")
def transformed(params):
    """Weights with transforms that do something."""
    rng = np.random.default_rng(1)
    return {n: a + 0.1 * rng.standard_normal(a.shape, np.float32) if "_to_" in n else a for n, a in params.items()}


def test_a_subnet_in_the_supernet_equals_its_slice_alone(supernet, transformed, calibrate):
    params, sides = transformed, set()
    for genotype in genotypes_of(supernet):
        network = supernet.space.decode(genotype)
        images = images_for(network)
        sides.add(network.input)
        logits, seen = calibrate(params, supernet.branches(genotype), images)
        alone, moments = run(network.flat(), supernet.slice(params, network), images, batch_stats=True)
        np.testing.assert_allclose(logits, alone, rtol=2e-5, atol=2e-5)
        for name, moment in moments.items():
            np.testing.assert_allclose(share(seen[name], moment.shape), moment, rtol=1e-4, atol=1e-5)
    assert calibrate._cache_size() == len(sides)


def test_with_measured_statistics_the_slice_alone_infers_the_same(supernet, params, calibrate):
    genotype = supernet.space.sample(np.random.default_rng(3), 1)[0]
    network, branches = supernet.space.decode(genotype), supernet.branches(genotype)
    images = images_for(network)
    everything = params | calibrate(params, branches, images)[1]
    alone, _ = run(network.flat(), supernet.slice(everything, network), images)
    if supernet.space.name == "tiny":
        logits, none = supernet.apply(everything, jnp.asarray(branches), images, mode="infer")
        np.testing.assert_allclose(logits, alone, rtol=2e-5, atol=2e-5)
        assert none == {}
    np.testing.assert_allclose(alone, calibrate(params, branches, images)[0], rtol=1e-3, atol=1e-3)


def test_a_slice_has_exactly_the_arrays_that_its_network_lists(supernet, params):
    network = supernet.space.decode(supernet.space.smallest())
    trained = {w.name: w.shape for w in weights(network.flat()) if w.trained}
    assert {n: a.shape for n, a in supernet.slice(params, network).items()} == trained


def test_gradients_are_those_of_the_slice_and_zero_outside_it(tmp_path):
    supernet = Supernet(tiny.space(tmp_path))
    params = supernet.init(0)
    x, labels = jax.random.normal(jax.random.key(1), (8, 8, 8, 1)), jnp.arange(8) % 3

    @jax.jit
    def elastic(params, branches):
        return jax.grad(lambda p: cross_entropy(supernet.apply(p, branches, x, mode="train")[0], labels))(params)

    for genotype in genotypes_of(supernet, 4):
        network = supernet.space.decode(genotype)

        def alone(p, network=network):
            sliced = supernet.slice(p, network)
            return cross_entropy(run(network.flat(), sliced, x, batch_stats=True)[0], labels)

        got, wanted = elastic(params, supernet.branches(genotype)), jax.jit(jax.grad(alone))(params)
        names = {w.name for w in weights(network.flat())}
        for name in params:
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-3, atol=2e-5, err_msg=name)
            if name not in names:
                assert not np.any(got[name]), name
    assert elastic._cache_size() == 1


@pytest.mark.parametrize(("stored", "shape"), [((7, 7, 1, 6), (3, 3, 1, 4)), ((5, 4), (2, 4)), ((6,), (3,))])
def test_unshare_puts_a_slice_back_where_share_took_it(stored, shape):
    full = jnp.arange(np.prod(stored), dtype=jnp.float32).reshape(stored) + 1
    part = share(full, shape)
    back = unshare(part, stored)
    np.testing.assert_array_equal(share(back, shape), part)
    assert np.count_nonzero(back) == part.size
    if len(stored) == 4:
        np.testing.assert_array_equal(part, full[2:5, 2:5, :, :4])  # the centre of the window, the leading channels


def test_200_subnets_train_and_are_evaluated_without_a_new_compilation(tmp_path):
    data, supernet = tiny.data(tmp_path), Supernet(tiny.space(tmp_path))
    settings = config.Train(batch_size=8, calibration_images=16, eval_batch_size=15)
    step = make_step(supernet, data, settings, seed=0)
    state = step.init(jax.tree.map(jnp.asarray, supernet.init(0)))
    for number in range(100):  # two random subnets a step
        state, _ = step(state, number, data.train.images[:8], data.train.labels[:8])
    evaluator = SubnetEvaluator(supernet, state["params"], data, calibration_images=16, batch_size=15)
    counts = evaluator(supernet.space.sample(np.random.default_rng(0), 200))
    assert step.compiled == 3  # its three parts
    assert evaluator.compiled == 2 * len({kind for kind, _ in supernet.layers(8)})
    assert all(0 <= c <= evaluator.total for c in counts)
