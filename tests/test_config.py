"""Experiment files: what they may say, and how mistakes in them are told."""

import re
from pathlib import Path

import pytest

from nas import catalog
from nas.config import Experiment, convert, line_of, load_experiment
from nas.errors import ConfigError
from nas.runfolder import resolved

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.toml"))

GOOD = """name = "x"
space = "digits_mixed"
objectives = [
    { name = "top1" },
    { name = "latency_ms", at_most = 0.5 },
]
[data]
source = "digits"
[train]
epochs = 3
[train.optimiser]
learning_rate = 1
[smoke]
train = { epochs = 1 }
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "e.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
@pytest.mark.parametrize("smoke", [False, True])
def test_every_experiment_loads_and_names_things_that_exist(path, smoke):
    experiment = load_experiment(path, smoke=smoke)
    assert experiment.space in catalog.list_spaces()
    assert experiment.device in catalog.list_devices()
    assert experiment.question


def test_the_smoke_table_is_laid_over_only_when_asked(tmp_path):
    path = write(tmp_path, GOOD)
    assert load_experiment(path).train.epochs == 3
    smoke = load_experiment(path, smoke=True)
    assert (smoke.train.epochs, smoke.train.optimiser.learning_rate) == (1, 1)


def test_overrides_are_laid_over_last_and_may_be_bare_words(tmp_path):
    path = write(tmp_path, GOOD)
    made = load_experiment(path, smoke=True, overrides=["train.epochs=7", "search.executor=inline"])
    assert (made.train.epochs, made.search.executor) == (7, "inline")


def test_paths_are_relative_to_the_file_and_on_the_command_line_to_where_one_stands(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD.replace('"digits"', '"sub/x.npz"'))
    assert load_experiment(path).data.source == str(tmp_path / "sub" / "x.npz")
    monkeypatch.chdir("/")
    assert load_experiment(path, overrides=["data.source=y.npz"]).data.source == "/y.npz"


def test_a_resolved_experiment_reads_back_as_itself(tmp_path):
    experiment = load_experiment(write(tmp_path, GOOD))
    assert load_experiment(write(tmp_path, resolved(experiment))) == experiment


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("at_most", "at_mst", r"line 5: unknown key `objectives.1.at_mst`. Did you mean `at_most`\?"),
        ("learning_rate", "learnig_rate", r"line 12: unknown key .*Did you mean `learning_rate`\?"),
        ("epochs = 3", 'epochs = "many"', r"line 10: `train.epochs`: Expected `float`"),
        ("epochs = 3", "epochs = -1", r"line 10: `train.epochs` is -1"),
        ("[train]", "[trian]", r"line 9: unknown key `trian`. Did you mean `train`\?"),
        ("train = { epochs = 1 }", "train = { epoch = 1 }", r"unknown key `train.epoch`. Did you mean `epochs`\?"),
        ('"latency_ms"', '"latency"', r"line 5: unknown objective `latency`. Did you mean `latency_ms`"),
        ("at_most = 0.5", 'at_most = "half"', r'a share like "50%" is needed'),
        ('{ name = "top1" },', "", "neither an objective nor a limit is top1"),
        ('name = "x"', 'name = "a/b"', "it names the run folder"),
        ('source = "digits"', 'source = "digits"\nvalidation = 1.5', "a share between 0 and 1"),
        ("[data]", "[data", "not valid TOML"),
        ('space = "digits_mixed"\n', "", "`space` is missing"),
    ],
)
def test_mistakes_are_told_with_file_line_and_nearest_key(tmp_path, old, new, message):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as told:
        load_experiment(path)
    assert str(path) in str(told.value)


def test_a_missing_file_and_a_malformed_override_are_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot read this experiment"):
        load_experiment(tmp_path / "none.toml")
    near = write(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=rf"Did you mean {re.escape(str(near))}\?"):
        load_experiment(f"{str(near).removesuffix('.toml')}s.toml")
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        load_experiment(write(tmp_path, GOOD), overrides=["search.trials"])


def test_lines_are_found_in_tables_arrays_of_tables_and_inline_tables():
    text = "a = 1\n[b]\nc = 2\n[[s]]\nx = 1\n[[s]]\nx = 2\ny = { z = 3 }\n"
    assert line_of(text, ["b", "c"]) == 3
    assert line_of(text, ["s", "1", "x"]) == 7
    assert line_of(text, ["s", "1", "y", "z"]) == 8
    assert line_of(text, ["s", "0", "x"]) == 5


def test_defaults_are_valid():
    made = convert(
        {"name": "x", "space": "s", "data": {"source": "digits"}, "objectives": []}, Experiment, path="p", text=""
    )
    assert made.search.lag >= 2 * made.search.workers
