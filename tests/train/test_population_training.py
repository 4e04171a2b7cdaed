"""Training of a population: copies are exact, cut off anywhere it ends the same, nothing is compiled for a member."""

import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import jax
import msgspec
import numpy as np
import pytest
import test_kill
import tiny

from nas import config
from nas.errors import CheckpointError, ConfigError, Diverged, RunError
from nas.evaluate import SubnetEvaluator
from nas.supernet import Supernet
from nas.train import generations, train_population, train_supernet
from nas.train.lineage import Lineage
from nas.train.step import Step
from nas.train.supernet import make_step

RATE, SMOOTHING = "optimiser.learning_rate", "label_smoothing"
VARY = config.Vary(label_smoothing=(0.0, 0.2), optimiser=config.VaryOptimiser(learning_rate=(0.02, 0.5)))
POPULATION = config.Population(vary=VARY, members=4, interval=0.5)
BASE = config.Train(epochs=1.5, batch_size=32, random_subnets=0, checkpoint_steps=1, population=POPULATION)  # 6 steps


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("population")
    return tiny.data(folder), Supernet(tiny.space(folder)), folder


@pytest.fixture(scope="module")
def steps_made():
    return {}


@pytest.fixture(autouse=True)
def one_step(monkeypatch, steps_made):
    """Equal settings share a compiled step: compiling is most of what these tests do."""

    def shared(supernet, data, settings, *, seed):
        key = key_of(settings), seed
        if key not in steps_made:
            steps_made[key] = make_step(supernet, data, settings, seed=seed)
        return steps_made[key]

    monkeypatch.setattr(generations, "make_step", shared)


def key_of(settings):
    """What the compiled step depends on."""
    return msgspec.json.encode(msgspec.structs.replace(settings, population=None))


def score(params):
    """Counts that follow from the weights to the bit."""
    first = np.asarray(params[sorted(params)[0]]).ravel()
    return [int(x) for x in first.view(np.uint32)[:3] % 1000]


def train(place, folder, settings=BASE, score=score, seed=0, **more):
    data, supernet, _ = place
    return train_population(supernet, data, settings, seed=seed, folder=folder, score=score, images=1000, **more)


@pytest.fixture(scope="module")
def whole(place, steps_made):
    """A population that was not cut off: its folder and weights."""
    with pytest.MonkeyPatch.context() as patched:
        one = steps_made.setdefault((key_of(BASE), 0), make_step(place[1], place[0], BASE, seed=0))
        patched.setattr(generations, "make_step", lambda *a, **k: one)
        folder = place[2] / "whole"
        return folder, train(place, folder)


def require_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def files(folder):
    """What a finished population left, without what differs between runs."""
    out = {"population.json": (folder / "population.json").read_bytes()}
    for path in sorted(folder.rglob("metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        out[str(path.relative_to(folder))] = [r | {"images_per_second": 0, "waiting": 0} for r in rows]
    return out


class Cut(Exception):
    pass


def cutting(calls, function):
    left = [calls]

    def call(*arguments, **keywords):
        if not left[0]:
            raise Cut
        left[0] -= 1
        return function(*arguments, **keywords)

    return call


def test_cut_off_anywhere_it_ends_with_the_same_lineage_and_weights_bit_for_bit(place, whole, tmp_path, monkeypatch):
    folder, weights = whole
    run = tmp_path / "run"
    for owner, name, calls in [
        (Step, "__call__", 3),  # within the second member of the first generation
        (Lineage, "add", 2),  # trained and scored, but not recorded
        (Step, "__call__", 7),
        (Lineage, "_write", 1),
        (generations.Checkpoints, "restore", 2),
        (generations._Run, "remove_checkpoints", 2),  # in the last generation
        (generations, "write_bytes", 0),  # all is trained, the metrics of the line are not written
        (Lineage, "finish", 0),
        (generations, "_alone", 0),  # the winner is on record, its checkpoint is not
    ]:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, cutting(calls, getattr(owner, name)))
            with pytest.raises(Cut):
                train(place, run)
    require_equal(train(place, run), weights)
    assert files(run) == files(folder)
    require_equal(train(place, run, score=None), weights)  # done: nothing is scored any more
    assert not list((run / "population").glob("*/*/checkpoints"))


def test_members_that_are_replaced_begin_with_the_very_state_of_their_parent(place, whole, tmp_path, monkeypatch):
    began, ended = {}, {}
    fit = generations.fit

    def watched(step, state, *arguments, **keywords):
        key = tuple(int(part) for part in keywords["folder"].parts[-2:])
        began[key] = jax.tree.map(np.array, state)
        out = fit(step, state, *arguments, **keywords)
        ended[key] = jax.tree.map(np.array, out)
        return out

    monkeypatch.setattr(generations, "fit", watched)
    train(place, tmp_path / "run")
    members = Lineage.read(tmp_path / "run" / "population.json").members
    assert any(m.parent != m.member for m in members)
    assert len(members) == 12
    for member in members:
        state = began[member.generation, member.member]
        assert state["hyperparameters"] == {key: np.float32(value) for key, value in member.values.items()}
        if member.source >= 0:
            parent = ended[member.source, member.parent]
            for part in ("params", "optimiser"):
                jax.tree.map(np.testing.assert_array_equal, state[part], parent[part])


def test_three_programs_are_compiled_whatever_the_members_and_none_to_score_the_second(place, steps_made, whole):
    data, supernet, _ = place
    assert steps_made[key_of(BASE), 0].compiled == 3
    space = supernet.space
    genotypes = np.stack([space.smallest(), space.largest()])
    begun = {name: jax.device_put(array, whole[1][name].sharding) for name, array in supernet.init(0).items()}
    first = SubnetEvaluator(supernet, begun, data, batch_size=45)
    before = first(genotypes)
    compiled = first.compiled
    other = first.with_params(whole[1])
    after = other(genotypes)
    assert (other.compiled, first.compiled) == (compiled, compiled)
    assert after == SubnetEvaluator(supernet, whole[1], data, batch_size=45)(genotypes)
    assert first(genotypes) == before


def test_traced_hyperparameters_train_as_those_of_the_settings_do(place):
    """Every key that may vary, at values that are not the settings' own."""
    data, supernet, _ = place
    vary = {
        "label_smoothing": 0.1,
        "distillation.temperature": 2.5,
        "optimiser.learning_rate": 0.3,
        "optimiser.weight_decay": 0.01,
        "augment.magnitude": 4.0,
        "noise.drop_path": 0.25,
    }
    assert set(vary) == {key for key, _ in config._ranges(everything(config.Vary))}
    plain = config.Train(epochs=1.0, batch_size=32, random_subnets=0, augment=config.Augment(policy="randaugment"))
    images, labels = data.train.images[:32], data.train.labels[:32]
    written = make_step(supernet, data, config.with_values(plain, vary), seed=0)
    traced = make_step(supernet, data, plain, seed=0)
    a, b = written.init(supernet.init(0)), traced.init(supernet.init(0), vary)
    untouched = traced.init(supernet.init(0), {key: config.value_of(plain, key) for key in vary})
    for number in range(2):  # the first is in the warm-up, at a learning rate of 0
        a, _ = written(a, number, images, labels)
        b, _ = traced(b, number, images, labels)
        untouched, _ = traced(untouched, number, images, labels)
    for name in a["params"]:
        np.testing.assert_allclose(a["params"][name], b["params"][name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert traced.compiled == 3
    assert any(not np.allclose(b["params"][name], untouched["params"][name], atol=1e-3) for name in b["params"])


def everything(vary):
    """A `Vary` with every range set."""
    fields = {f.name: f.default for f in msgspec.structs.fields(vary)}
    return vary(**{n: everything(type(d)) if isinstance(d, msgspec.Struct) else (0.0, 1.0) for n, d in fields.items()})


def test_what_training_leaves_is_a_checkpoint_and_metrics_as_of_one_supernet(place, whole):
    folder, weights = whole
    data, supernet, _ = place
    alone = msgspec.structs.replace(BASE, population=None)
    found = train_supernet(supernet, data, alone, seed=0, folder=copied(folder))  # nothing is left to train
    require_equal(found, weights)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    line = Lineage.read(folder / "population.json").winning_line()
    assert [m.interval for m in line] == [0, 1, 2]
    of = make_step(supernet, data, config.with_values(alone, line[1].values), seed=0)
    rate = generations.optimiser.schedule(of.settings.optimiser, 6)(3)
    assert rows[1]["learning_rate"] == pytest.approx(np.asarray(rate).item(), rel=1e-5)


def copied(folder):
    to = folder.with_name(folder.name + "_copy")
    shutil.copytree(folder, to)
    return to


def test_another_seed_is_another_lineage_and_the_folder_of_one_is_refused_to_the_other(place, whole, tmp_path):
    with pytest.raises(CheckpointError, match="seed 0, here 1"):
        train(place, copied_to(whole[0], tmp_path), seed=1)
    other = msgspec.structs.replace(BASE, label_smoothing=0.1)
    with pytest.raises(CheckpointError, match="settings"):
        train(place, copied_to(whole[0], tmp_path), settings=other)


def copied_to(folder, place):
    to = place / "copy"
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


def test_a_member_that_diverges_is_replaced_and_never_scored(place, tmp_path, monkeypatch):
    fit = generations.fit

    def diverging(step, state, *arguments, **keywords):
        if keywords["folder"].parts[-2:] in (("000", "01"), ("001", "00")):
            raise Diverged("NaN")
        return fit(step, state, *arguments, **keywords)

    monkeypatch.setattr(generations, "fit", diverging)
    told = []
    train(place, tmp_path / "run", told=told.append)
    members = Lineage.read(tmp_path / "run" / "population.json").members
    lost = [(m.generation, m.member) for m in members if m.correct is None]
    assert lost == [(0, 1), (1, 0)]
    assert all((m.source, m.parent) not in lost for m in members)
    assert [int(np.isnan(g.scores).sum()) for g in told] == [1, 1, 0]


def test_a_real_divergence_is_told_from_a_good_member(place, tmp_path):
    vary = config.Vary(label_smoothing=(0.0, 0.2), optimiser=config.VaryOptimiser(learning_rate=(0.1, 1e38)))
    settings = config.with_values(BASE, {"population": config.Population(vary=vary, members=4, interval=1.5)})
    weights = train(place, tmp_path / "run", settings)
    assert all(np.isfinite(a).all() for a in weights.values())
    lost = [m for m in Lineage.read(tmp_path / "run" / "population.json").members if m.correct is None]
    assert lost
    assert all(m.values[RATE] > 1 for m in lost)


def test_weights_that_the_last_update_of_an_interval_broke_are_not_scored(place, tmp_path, monkeypatch):
    fit = generations.fit

    def breaking(step, state, *arguments, **keywords):
        out = fit(step, state, *arguments, **keywords)
        if keywords["folder"].parts[-2:] == ("000", "02"):
            out["params"] = {name: a.at[(0,) * a.ndim].set(np.inf) for name, a in out["params"].items()}
        return out

    monkeypatch.setattr(generations, "fit", breaking)
    train(place, tmp_path / "run")
    members = Lineage.read(tmp_path / "run" / "population.json").members
    assert [(m.generation, m.member) for m in members if m.correct is None] == [(0, 2)]


def test_a_population_that_diverges_as_a_whole_tries_three_times_from_where_it_was_and_then_says_so(
    place, tmp_path, monkeypatch
):
    fit, tried = generations.fit, []

    def diverging(step, state, *arguments, **keywords):
        generation = int(keywords["folder"].parts[-2])
        if generation:
            tried.append((keywords["start"], dict(state["hyperparameters"])))
            raise Diverged("NaN")
        return fit(step, state, *arguments, **keywords)

    monkeypatch.setattr(generations, "fit", diverging)
    for _ in range(2):  # the same again, without training again
        with pytest.raises(
            Diverged, match=r"all members .* 3 times in a row, with values of label_smoothing = \[0, 0.2\]"
        ):
            train(place, tmp_path / "run")
        assert [start for start, _ in tried] == [2] * 12
    assert len({float(values[RATE]) for _, values in tried}) > 8


@pytest.mark.parametrize("byte", [0.1, 0.5, 0.9])
def test_a_population_file_that_was_changed_is_not_believed(place, whole, tmp_path, byte):
    path = copied_to(whole[0], tmp_path) / "population.json"
    text = path.read_text()
    digits = [m.start() for m in re.finditer(r"(?<=\d)\d", text)]
    at = digits[int(byte * len(digits))]
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    with pytest.raises(RunError, match=r"population.json: missing or damaged.*--redo train"):
        train(place, path.parent)


def test_a_folder_where_one_supernet_trains_is_refused_to_a_population_and_the_settings_of_many_to_one(
    place, whole, tmp_path
):
    folder = copied_to(whole[0], tmp_path)
    (folder / "population.json").unlink()
    with pytest.raises(CheckpointError, match="checkpoint of one supernet"):
        train(place, folder)
    with pytest.raises(ConfigError, match="train_population"):
        train_supernet(place[1], place[0], BASE, seed=0)


EXPERIMENT = tiny.EXPERIMENT.replace("[train]", "[train]\noptimiser = { learning_rate = 0.1 }\n")


def experiment(tmp_path, more):
    path = tmp_path / "experiment.toml"
    path.write_text(EXPERIMENT.replace("[search]", more + "\n[search]"))
    return config.load_experiment(path)


def test_ranges_are_read_by_their_dotted_keys(tmp_path):
    loaded = experiment(
        tmp_path,
        "[train.population]\nmembers = 4\n[train.population.vary]\nlabel_smoothing = [0, 0.2]\n"
        "optimiser.learning_rate = [0.01, 1]",
    )
    assert loaded.train.population is not None
    assert loaded.train.population.ranges == {SMOOTHING: (0.0, 0.2), RATE: (0.01, 1.0)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("vary.optimiser.learning_rat = [0.1, 1.0]", "unknown key.*Did you mean `learning_rate`"),
        ("vary.optimiser.learning_rate = [0.1]", "learning_rate"),
        ("vary.optimiser.learning_rate = [1.0, 0.01]", "smallest and then the largest"),
        ("vary.optimiser.learning_rate = [0.2, 1.0]", "train.optimiser.learning_rate is 0.1"),
        ("vary.optimiser.learning_rate = [0.01, inf]", "smallest and then the largest"),
        ("vary.optimiser.learning_rate = [0.01, nan]", "smallest and then the largest"),
        ("vary.label_smoothing = [0.0, 1.5]", "at most 0.999"),
        ("vary.augment.magnitude = [0.0, 10.0]", "randaugment"),
        ("vary = {}", "names nothing"),
        ("members = 4", "vary"),
        ("members = 1\nvary.label_smoothing = [0.0, 0.2]", "members"),
        ("replaced = 0.6\nvary.label_smoothing = [0.0, 0.2]", "replaced"),
    ],
)
def test_a_population_that_cannot_be_is_refused_with_its_line(tmp_path, more, message):
    with pytest.raises(ConfigError, match=rf"line \d+.*{message}"):
        experiment(tmp_path, "[train.population]\n" + more)


@pytest.mark.parametrize("other", ["processes = 2", "profile_steps = 3", 'distillation = { divergence = "alpha" }'])
def test_what_a_population_does_not_go_with_is_refused(tmp_path, other):
    text = other + "\n[train.population]\nvary.distillation.temperature = [0.5, 2.0]"
    with pytest.raises(ConfigError, match="population"):
        experiment(tmp_path, text)


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import msgspec, numpy as np
import test_population_training as here
from nas import config
from nas.data import load_data
from nas.space import load_space
from nas.supernet import Supernet
from nas.train import train_population

place, run = Path(sys.argv[2]), Path(sys.argv[3])
data = load_data(config.Data(source=str(place / "bars.npz")))
space = load_space(str(place / "tiny.toml"), input_shape=data.image_shape, classes=data.classes)
params = train_population(Supernet(space), data, here.BASE, seed=0, folder=run, score=here.score, images=1000)
np.savez(run / "params.npz", **params)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_12_random_moments_it_ends_with_the_same_lineage_and_weights_bit_for_bit(tmp_path, monkeypatch):
    tiny.write_space(tmp_path)
    tiny.write_data(tmp_path)
    folders = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    monkeypatch.setenv("PYTHONPATH", folders + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(test_kill, "CHILD", CHILD)
    whole, run, rng, kills = tmp_path / "whole", tmp_path / "run", random.Random(0), 0
    with test_kill.Life(tmp_path, whole) as life:
        assert life.ended() == 0
    while kills < 12:
        seen = len(list((run / "population").glob("*/*/metrics.jsonl")))
        with test_kill.Life(tmp_path, run) as life:
            while life.process.poll() is None and len(list((run / "population").glob("*/*/metrics.jsonl"))) <= seen:
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.3))
            kills += life.killed()
        if life.process.returncode == 0:
            break
    with test_kill.Life(tmp_path, run) as life:
        assert life.ended() == 0
    print(f"{kills} kills")
    assert kills >= 6
    assert files(run) == files(whole)
    require_equal(np.load(run / "params.npz"), np.load(whole / "params.npz"))
