"""A population in a run: its best member is what the rest of the run uses, by `nas train` alone as by `nas run`."""

import io

import numpy as np
import pytest
import tiny

import nas
from nas import config
from nas.console import Console
from nas.errors import RunError
from nas.evaluate import SubnetEvaluator
from nas.pipeline import run_experiment
from nas.pipeline.job import Job
from nas.pipeline.train import scorer
from nas.runfolder import RunFolder
from nas.train.lineage import Lineage

POPULATION = """
[train.population]
members = 2
interval = 1.5
subnets = 1
[train.population.vary]
optimiser.learning_rate = [0.01, 1.0]

[search]"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The experiment, its run folder after measuring and training, and what was said."""
    folder = tmp_path_factory.mktemp("population")
    path = tiny.write_experiment(folder)
    path.write_text(path.read_text().replace("[search]", POPULATION, 1))
    experiment, said = nas.load_experiment(path), io.StringIO()
    run = run_experiment(experiment, folder / "run", stages=("measure", "train"), console=Console(said))
    return experiment, run, said.getvalue()


def test_the_weights_that_the_search_gets_are_those_that_the_winner_was_scored_with(finished):
    experiment, run, _ = finished
    winner = Lineage.read(run / "supernet" / "population.json").winning_line()[-1]
    with RunFolder(run, experiment) as folder:
        job = Job(experiment, folder, Console(io.StringIO()))
        score = scorer(job)
        assert tuple(score(job.supernet_params())) == winner.correct
        evaluate = SubnetEvaluator(
            job.supernet,
            job.supernet_params(),
            job.data,
            calibration_images=experiment.train.calibration_images,
            batch_size=experiment.train.eval_batch_size,
        )
        ends = np.stack([job.space.smallest(), job.space.largest()])
        assert evaluate(ends) == [winner.correct[0], winner.correct[-1]]
        assert job.trained_as.population is None
        assert job.trained_as.optimiser.learning_rate == winner.values["optimiser.learning_rate"]


def test_every_interval_is_told_with_its_best_member(finished):
    _, run, said = finished
    assert "train: supernet of tiny, 2 of them, 3 epochs" in said
    for interval in (1, 2):
        assert f"interval {interval} of 2: best is member " in said
    best = Lineage.read(run / "supernet" / "population.json").winning_line()[-1]
    assert f"(optimiser.learning_rate {best.values['optimiser.learning_rate']:.4g})" in said


def test_other_ranges_are_refused_in_a_folder_that_has_begun_and_the_same_say_that_all_is_done(finished):
    experiment, run, _ = finished
    said = io.StringIO()
    run_experiment(experiment, run, stages=("train",), console=Console(said))
    assert "done already" in said.getvalue()
    other = nas.load_experiment(
        run.parent / "tiny_experiment.toml", overrides=["train.population.vary.optimiser.learning_rate=[0.05, 1.0]"]
    )
    with pytest.raises(RunError, match=r"train.population.vary.optimiser.learning_rate"):
        run_experiment(other, run, stages=("train",))


def test_without_a_population_neither_digests_nor_run_folders_know_of_one(tmp_path):
    """Runs that were begun before there were populations go on."""
    one = nas.load_experiment(tiny.write_experiment(tmp_path))
    assert "population" not in config.deciding(one.train)
    assert set(config.deciding(one.train)) == set(config.Train.__struct_fields__) - {*config.NEUTRAL, "population"}
    with RunFolder(tmp_path / "run", one) as folder:
        assert "train.population" not in (folder.path / "config.toml").read_text()
