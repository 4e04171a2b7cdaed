"""`nas fidelity`: what is kept, what is done again, and the whole of it on a tiny supernet."""

import io
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny

import nas
from nas import config
from nas.console import Console
from nas.errors import ConfigError, RunError
from nas.evaluate import SubnetEvaluator
from nas.fidelity import read_fidelity
from nas.pipeline.fidelity import Alone, Recipe, Training, as_alone, claim, each
from nas.supernet import Supernet
from nas.train import train_supernet

ROOT = Path(__file__).resolve().parents[2]


def plan(folder: Path, networks: int = 3) -> list[Training]:
    """Networks of one gene, two seeds each."""
    genotypes = np.arange(networks, dtype=np.uint8)[:, None]
    return [
        Training(n, s, g, folder / f"{n:02d}" / f"seed_{s}") for n, g in enumerate(genotypes, start=1) for s in (0, 1)
    ]


class Trainer:
    """Stands for the training: right about as many images as the network's number, and killed after `lives`."""

    def __init__(self, lives: int = 100):
        self.lives = lives
        self.trained: list[tuple[int, int]] = []

    def __call__(self, training, progress):
        if len(self.trained) == self.lives:
            raise KeyboardInterrupt
        (training.folder / "checkpoints").mkdir(parents=True)
        self.trained.append((training.network, training.seed))
        progress(10, 10, {"top1_largest": 0.5})
        return np.arange(13) < training.network + training.seed


def counts(results: list[Alone]) -> list[int]:
    return [int(r.unpacked().sum()) for r in results]


def test_cut_off_it_goes_on_with_what_is_missing_and_nothing_else(tmp_path):
    console, first = Console(io.StringIO()), Trainer(lives=4)
    with pytest.raises(KeyboardInterrupt):
        each(plan(tmp_path), first, console)
    second = Trainer()
    found = each(plan(tmp_path), second, console)
    assert first.trained + second.trained == [(n, s) for n in (1, 2, 3) for s in (0, 1)]
    assert len(second.trained) == 2
    assert counts(found) == [1, 2, 2, 3, 3, 4]
    assert not list(tmp_path.rglob("checkpoints"))  # what is finished needs none
    third = Trainer()
    assert counts(each(plan(tmp_path, networks=4), third, console)) == [1, 2, 2, 3, 3, 4, 4, 5]
    assert third.trained == [(4, 0), (4, 1)]


def test_progress_counts_over_all_trainings_with_the_time_left(tmp_path):
    told = io.StringIO()
    each(plan(tmp_path), Trainer(), Console(told, plain_seconds=0))
    assert "  20/60  eta 0:00  training 2/6  top-1 0.5" in told.getvalue()
    assert "network 2, seed 0: validation top-1 15.4% in 0 s" in told.getvalue()


def test_a_damaged_result_and_one_of_another_network_are_told(tmp_path):
    each(plan(tmp_path), Trainer(), Console(io.StringIO()))
    path = tmp_path / "02" / "seed_1" / "result.json"
    other = (tmp_path / "01" / "seed_1" / "result.json").read_bytes()
    short = path.read_bytes().replace(b'"images": 13', b'"images": 130')
    for content, why in ((b"{", "cannot be used"), (other, "it is of another network"), (short, "2 bytes are not")):
        path.write_bytes(content)
        with pytest.raises(RunError, match=rf"02/seed_1/result.json: .*{why}.*Remove it and run `nas fidelity`"):
            each(plan(tmp_path), Trainer(), Console(io.StringIO()))
    path.unlink()
    assert len(each(plan(tmp_path), Trainer(), Console(io.StringIO()))) == 6


def test_the_recipe_is_the_supernets_but_for_what_one_network_has_no_use_for():
    train = config.Train(epochs=7.0, sampler="sandwich", ema=0.99, label_smoothing=0.1, precision="bfloat16")
    alone = as_alone(train, None)
    differs = {f for f in config.Train.__struct_fields__ if getattr(alone, f) != getattr(train, f)}
    assert differs == {"sampler", "random_subnets"}
    assert as_alone(train, 2.0).epochs == 2.0
    assert as_alone(msgspec.structs.replace(train, processes=4, tensorboard=True), None) == alone


def test_another_recipe_is_refused_and_the_same_one_goes_on(tmp_path):
    recipe = Recipe(seed=0, space="a", data="b", train=config.Train(epochs=20.0))
    claim(tmp_path, recipe)
    claim(tmp_path, recipe)
    other = msgspec.structs.replace(recipe, train=config.Train(epochs=5.0))
    with pytest.raises(RunError, match=r"`epochs` is 5.0, was 20.0. Ask for the same .* or move that folder away"):
        claim(tmp_path, other)


def test_wrong_numbers_are_refused(tmp_path):
    path = tiny.write_experiment(tmp_path)
    for key, value in (("networks", 1), ("seeds", 0), ("epochs", -1)):
        with pytest.raises(ConfigError, match=rf"`fidelity.{key}` is {value}"):
            nas.load_experiment(path, overrides=[f"fidelity.{key}={value}"])


def test_it_asks_for_a_trained_supernet(tmp_path):
    experiment = nas.load_experiment(tiny.write_experiment(tmp_path))
    with pytest.raises(RunError, match=r"stage `train` has not been done.*Run `nas train`"):
        nas.stages.fidelity(experiment, tmp_path / "run")


@pytest.mark.slow
def test_the_whole_of_it_cut_off_resumed_and_reported(tmp_path):
    path = tiny.write_experiment(tmp_path)
    overrides = ["fidelity.networks=8", "data.validation=0.4"]
    experiment, run = nas.load_experiment(path, overrides=overrides), tmp_path / "run"
    nas.run_experiment(experiment, run)
    assert 'id="fidelity"' not in (run / "report.html").read_text(encoding="utf-8")

    nas.stages.fidelity(experiment, run)
    found = read_fidelity(run / "fidelity" / "fidelity.json")
    assert (len(found.networks), found.images, found.epochs) == (8, 72, 3.0)
    assert nas.load_run(run).fidelity == found
    page = (run / "report.html").read_text(encoding="utf-8")
    assert 'data-plot="order-supernet"' in page
    assert page.count('href="#fidelity"') == 2

    results = sorted((run / "fidelity").glob("*/seed_0/result.json"))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in results}
    right = {p: json.loads(content[0])["right"] for p, content in before.items()}
    results[3].unlink()
    nas.stages.fidelity(experiment, run)
    assert json.loads(results[3].read_bytes())["right"] == right[results[3]]  # the same training, to the bit
    for p in set(results) - {results[3]}:
        assert (p.read_bytes(), p.stat().st_mtime_ns) == before[p]
    assert read_fidelity(run / "fidelity" / "fidelity.json") == found

    command = [sys.executable, "-m", "nas.cli", "fidelity", str(path), "--out", str(run), "--networks", "9"]
    command += ["--set", "data.validation=0.4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "1 trainings, 8 done already" in done.stderr
    assert "Kendall tau with training alone" in done.stderr
    done = subprocess.run([*command, "--epochs", "1"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "`epochs` is 1.0, was 3.0" in done.stderr

    nas.run_experiment(experiment, run, stages=("measure", "train"), redo="train")
    assert not (run / "fidelity").exists()  # it was of another supernet


@pytest.mark.slow
def test_a_network_alone_counts_the_same_by_the_supernets_evaluation(tmp_path):
    """Calibrated and counted as a supernet of itself, as by `Standalone`."""
    from nas.evaluate import Standalone

    data, space = tiny.data(tmp_path), tiny.space(tmp_path)
    only = space.only(space.largest())
    settings = as_alone(config.Train(epochs=4.0, batch_size=32), None)
    params = train_supernet(Supernet(only), data, settings, seed=0)
    (counted,) = SubnetEvaluator(Supernet(only), params, data, calibration_images=64, batch_size=24)([()])
    alone = Standalone(only.decode(()), data, batch_size=24)
    assert alone.correct(alone.calibrate(params, images=64), data.val) == counted
    assert counted / len(data.val.labels) > 0.5  # three classes; it learns
