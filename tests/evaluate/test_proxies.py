"""Zero-cost proxies: what they are by definition, and how the search gets them."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from nas.console import Console
from nas.evaluate.proxies import additive, naswot
from nas.pipeline import load_experiment, run_experiment
from nas.pipeline.job import Job
from nas.pipeline.search import make_problem
from nas.pipeline.search import run as search_again
from nas.runfolder import RunFolder
from nas.search import read_trials
from nas.space import load_space
from nas.supernet import Supernet


@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("proxies")
    tiny.write_experiment(folder)
    return Supernet(load_space(str(folder / "tiny.toml"), input_shape=(8, 8, 1), classes=3))


def test_naswot_is_the_log_determinant_of_how_alike_images_are_to_the_networks_units(supernet):
    """By the definition, from the layers' outputs of the network on its own."""
    params = supernet.init(0)
    images = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
    for genotype in supernet.space.sample(np.random.default_rng(1), 3):
        branches = supernet.branches(genotype)
        x, alike = jnp.asarray(images), np.zeros((6, 6))
        for number, (kind, position) in enumerate(supernet.layers(8)):
            own = supernet.params_of(position, params, "calibrate")
            x, _ = supernet.layer(8, kind, "calibrate")(branches[number], own, x)
            if position.branches[branches[number]] is not None or position.input != position.output:
                on = np.asarray(x).reshape(6, -1) > 0
                alike += (on[:, None] == on[None]).sum(axis=2)
        expected = np.linalg.slogdet(alike)[1]
        assert naswot(supernet, params, images)(genotype[None])[0] == pytest.approx(expected, rel=1e-5)


def test_images_that_are_all_the_same_are_not_told_apart(supernet):
    genotypes = supernet.space.sample(np.random.default_rng(1), 2)
    images = np.ones((4, 8, 8, 1), np.float32)
    assert np.isneginf(naswot(supernet, supernet.init(0), images)(genotypes)).all()


def test_an_additive_score_is_found_again(supernet):
    space, rng = supernet.space, np.random.default_rng(0)
    parts = [rng.normal(size=len(p.branches)) for p in space.positions]
    known, others = space.sample(rng, 200), space.sample(rng, 50)
    found = additive(space, known, space.price(known, parts))(others)
    assert np.corrcoef(found, space.price(others, parts))[0, 1] > 0.99


@pytest.mark.slow  # 20 s
def test_a_search_with_a_proxy_asks_for_it_once_and_goes_on_with_the_same_scores(tmp_path, monkeypatch):
    tiny.write_experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    search = 'search={strategy="predictor", population=4, trials=8, proxy="naswot", executor="inline"}'
    experiment = load_experiment("tiny_experiment.toml", overrides=[search])
    run = run_experiment(experiment, tmp_path / "run", stages=("measure", "train", "search"))
    before = read_trials(run / "search" / "journal.jsonl")
    lines = (run / "search" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (run / "search" / "journal.jsonl").write_bytes(b"".join(lines[:6]))  # cut off
    monkeypatch.setattr(
        importlib.import_module("nas.pipeline.search"), "naswot", None
    )  # would fail if it were computed again
    job = Job(experiment, RunFolder(run, experiment), Console())
    assert search_again(job) == before
    plain = load_experiment("tiny_experiment.toml", overrides=[search.replace("naswot", "none")])
    other = make_problem(Job(plain, RunFolder(run, plain), Console()))
    assert other.digest != make_problem(job).digest
