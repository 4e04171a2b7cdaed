"""What is told of a search while it runs, and to whom."""

import importlib.util
import math

import numpy as np
import pytest
from test_driver import go

from nas.errors import RunError
from nas.search import CALLBACKS, Progress, Trial, following, progress
from nas.search.callbacks import scalars
from nas.search.pareto import hypervolume


def trial(number, correct, ms, *, total=100, seconds=1.0, failure=None):
    return Trial(number, (0,), correct, total, {"latency_ms": ms}, failure, seconds)


def test_volume_and_best_are_those_of_all_trials(tmp_path):
    trials = go(tmp_path / "j")
    shown = Progress([1.0, 18.0], workers=1)
    for each in trials:
        shown.add(each)
    shown._not_before = 0.0
    costs = np.array([[t.error, t.latency_ms] for t in trials])
    assert shown.volume == pytest.approx(hypervolume(costs, [1.0, 18.0]) / 18.0)
    assert shown.best is not None
    assert shown.best.error == min(t.error for t in trials)
    shown.add(trial(60, None, 1.0, failure="no"))
    assert shown.volume == pytest.approx(hypervolume(costs, [1.0, 18.0]) / 18.0)


def test_trials_on_fewer_images_do_not_count_once_there_are_whole_ones():
    shown = Progress([1.0, 10.0], workers=1)
    shown.add(trial(0, 10, 5.0, total=11))
    shown.add(trial(1, 50, 5.0))
    shown.add(trial(2, 11, 5.0, total=11))
    shown._not_before = 0.0
    assert shown.best is not None
    assert shown.best.trial == 1
    assert shown.volume == pytest.approx(0.25)


def test_costs_that_may_be_less_than_nothing_have_no_volume():
    shown = Progress([1.0, -2.0], workers=1, start=3)
    for number, ms in enumerate((-3.0, -2.0, -9.0)):
        shown.add(trial(number, 50 + number, ms))
    assert shown.values() == {"best top-1": "52.00%", "at ms": "-9"}


@pytest.mark.parametrize(("costs", "told"), [(5, True), (6, False)])
def test_the_volume_of_many_costs_takes_too_long_to_be_told(costs, told):
    names = ["error", *(f"c{i}" for i in range(1, costs))]
    shown = Progress([1.0] * costs, workers=1, start=1, costs=names)
    shown.add(Trial(0, (0,), 50, 100, dict.fromkeys(names[1:], 0.5), None, 1.0))
    assert ("volume" in shown.values()) is told


def test_rate_and_utilisation_are_of_this_process_and_of_late(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Progress([1.0, 10.0], workers=2, start=3)
    for number in range(3):  # read from a journal at once
        shown.add(trial(number, 1, 5.0))
    assert math.isnan(shown.trials_per_second)
    assert set(shown.values()) == {"volume", "best top-1", "at ms"}
    for number in range(3, 13):
        now[0] += 1.0
        shown.add(trial(number, 1, 5.0, seconds=1.5))
    assert shown.trials_per_second == pytest.approx(1.0)
    assert shown.utilisation == pytest.approx(0.75)
    assert shown.values()["busy"] == "75%"
    assert shown.values()["trials/s"] == "1"


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_tracker_that_is_not_installed_is_an_error_that_says_what_to_install(name, tmp_path):
    module = {"tensorboard": "tensorboardX"}.get(name, name)
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    with pytest.raises(RunError, match=f"pip install '{module}"), following([name], folder=tmp_path):
        pass


@pytest.mark.parametrize("name", CALLBACKS)
def test_trackers_take_every_trial_from_the_first_new_one_on(name, tmp_path, monkeypatch):
    pytest.importorskip({"tensorboard": "tensorboardX"}.get(name, name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    with following([name], folder=tmp_path, start=2) as tell:
        for number in range(6):
            tell(trial(number, None if number == 3 else 50, 5.0, failure="no" if number == 3 else None))
    if name == "mlflow":
        import mlflow  # pyright: ignore[reportMissingImports]

        (run,) = mlflow.search_runs(experiment_ids=["0"], output_format="list")
        steps = [m.step for m in mlflow.MlflowClient().get_metric_history(run.info.run_id, "top1")]
        assert sorted(steps) == [3, 5, 6]
    else:
        written = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".db"]
        assert any(b"latency_ms" in p.read_bytes() for p in written)


def test_one_that_fails_is_left_out_and_the_search_goes_on(tmp_path, monkeypatch, caplog):
    told = []

    def broken(folder, start, name, opened):
        def tell(trial):
            told.append(trial.trial)
            raise ConnectionError("the server is gone")

        return tell

    monkeypatch.setitem(CALLBACKS, "mlflow", broken)
    monkeypatch.setattr("nas.search.callbacks.require", lambda names: None)
    with following(["mlflow"], folder=tmp_path) as tell:
        assert len(go(tmp_path / "j", on_trial=tell)) == 60
    assert told == [0]
    assert caplog.text.count("the server is gone") == 1


def test_what_is_drawn_has_no_values_that_are_not_finite():
    drawn = scalars(Trial(0, (0,), None, 10, {"latency_ms": 1.0, "latency_ms@note10": 2.0}, "failed"))
    assert drawn == {"latency_ms": 1.0, "latency_ms on note10": 2.0, "seconds": 0.0, "failed": 1.0}
