"""Our strategies in the loops of Optuna and Ray Tune, driven for real."""

from pathlib import Path

import numpy as np
import pytest

import nas
from nas.search import STRATEGIES, make_strategy

SPACE = nas.Space.of_choices({"width": [8, 16, 24, 32], "kernel": [3, 5, 7], "act": ["relu", "swish"]})


def price(genotypes):
    return 1.0 + genotypes @ np.array([2.0, 1.0, 0.5])


def error(values) -> float:
    return 1 - values["width"] / 40 - values["kernel"] / 100 - (values["act"] == "swish") / 50


PROBLEM = nas.make_problem(SPACE, costs={"ms": price}, limits={"ms": 6.0})


def strategy(name="nsga2"):
    return make_strategy(STRATEGIES[name], PROBLEM, population=6)


def genotype_of(values):
    return SPACE.encode(values)[None]


@pytest.mark.parametrize("name", ["optuna_sampler", "ray_tune_searcher"])
def test_an_adapter_stays_thin(name):
    path = Path(nas.__file__).parent / "adapters" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60


def check_all(tried):
    """Every trial is within the limit, and none is repeated."""
    rows = np.concatenate([genotype_of(values) for values in tried])
    assert (price(rows) <= 6.0).all()
    assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize("name", ["predictor", "nsga2", "bananas"])
def test_optuna_is_driven_within_the_limits_and_never_repeats(name):
    optuna = pytest.importorskip("optuna")
    from nas.adapters.optuna_sampler import sampler

    def objective(trial):
        values = {c.name: trial.suggest_categorical(c.name, c.values) for c in SPACE.choices}
        if values["width"] == 8:
            raise optuna.TrialPruned
        return 1 - error(values), price(genotype_of(values))[0]

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def run(seed):
        chosen = sampler(SPACE, PROBLEM, strategy(name), seed=seed)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=chosen)
        study.optimize(objective, n_trials=12)
        return [t.params for t in study.trials]

    tried = run(0)
    assert len(tried) == 12
    check_all(tried)
    assert run(0) == tried
    assert run(1) != tried


def test_optuna_ends_where_the_space_does():
    optuna = pytest.importorskip("optuna")
    from nas.adapters.optuna_sampler import sampler

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    every = SPACE.count()
    feasible = int(
        PROBLEM.feasible(np.stack(np.unravel_index(np.arange(every), SPACE.sizes), 1).astype(np.uint8)).sum()
    )
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler(SPACE, PROBLEM, strategy()))
    study.optimize(
        lambda t: (error({c.name: t.suggest_categorical(c.name, c.values) for c in SPACE.choices}), 1.0), n_trials=99
    )
    assert len(study.trials) == feasible + 1


def searcher():
    pytest.importorskip("ray.tune")
    from nas.adapters.ray_tune_searcher import searcher as made

    return made(SPACE, PROBLEM, strategy())


def test_a_ray_tune_searcher_proposes_within_the_limits_and_learns():
    proposals, tried = searcher(), []
    for number in range(12):
        values = proposals.suggest(f"t{number}")
        tried.append(values)
        failed = values["width"] == 8
        result = None if failed else {"error": error(values)}
        proposals.on_trial_complete(f"t{number}", result, error=failed)
    check_all(tried)
    assert len(proposals.state) > 0  # NSGA-II's population
    rest = [proposals.suggest(f"rest{number}") for number in range(50)]
    assert rest[-1] == "FINISHED"


@pytest.mark.slow  # half a minute: Ray Tune starts a process for each trial
def test_ray_tune_runs_our_proposals(tmp_path, monkeypatch):
    import contextlib

    from nas.cluster import connect, python_path

    proposals = searcher()
    monkeypatch.setenv("PYTHONPATH", python_path())  # whose functions workers import
    with contextlib.ExitStack() as undo:
        connect("local", undo, cpus=2)
        from ray import tune

        def train(config):
            return {"error": error(config)}

        tuner = tune.Tuner(
            tune.with_resources(train, {"cpu": 1}),
            tune_config=tune.TuneConfig(search_alg=proposals, num_samples=6, max_concurrent_trials=2),
            run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
        )
        results = tuner.fit()
        assert len(results) == 6
        assert not results.errors
        check_all([r.config for r in results])
        assert results.get_best_result("error", "min").metrics["error"] < 1
