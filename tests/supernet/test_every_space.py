"""Every space of the package, in every precision: a subnet in the supernet is its slice alone.

Computed op by op (`disable_jit`) and, in half precision, with `lax` convolutions: a switch then runs the branch that is
taken and compiles no other, so that all spaces take minutes instead of hours. That a compiled switch does the same is
test_supernet.py's to show, and test_kernels.py has the other forms of convolutions.
"""

import jax
import numpy as np
import pytest

from nas import kernels
from nas.catalog import list_spaces
from nas.run import run
from nas.space import load_space
from nas.supernet import Supernet
from nas.train.precision import compute_params

# relative to the largest logit; float32 is computed in float64, since norms over 1x1 images amplify rounding
CLOSE = {"float32": 1e-5, "bfloat16": 0.2, "float16": 0.03}


@pytest.mark.slow
@pytest.mark.parametrize("precision", CLOSE)
@pytest.mark.parametrize("name", list_spaces())
def test_a_subnet_of_every_space_equals_its_slice_alone_in_every_precision(name, precision, monkeypatch):
    if precision != "float32":  # lax is slow in float64
        monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    space = load_space(name, input_shape=(32, 32, 1), classes=3)
    space = space.at(space.resolutions[0])  # the smallest runs soonest
    supernet = Supernet(space)
    with jax.enable_x64(precision == "float32"), jax.disable_jit():
        dtype = np.float64 if precision == "float32" else jax.numpy.dtype(precision)
        whole = np.float64 if precision == "float32" else np.float32
        params = {n: jax.numpy.asarray(a, whole) for n, a in supernet.init(0).items()}
        params = params if precision == "float32" else compute_params(params, dtype)
        images = jax.random.normal(jax.random.key(1), (8, *space.input)).astype(dtype)
        for genotype in (space.largest(), *space.sample(np.random.default_rng(0), 1)):
            network = space.decode(genotype)
            logits, _ = supernet.apply(params, supernet.branches(genotype), images, mode="train")
            alone, _ = run(network.flat(), supernet.slice(params, network), images, batch_stats=True)
            alone = np.asarray(alone, np.float32)
            assert np.abs(logits - alone).max() <= CLOSE[precision] * np.abs(alone).max()
