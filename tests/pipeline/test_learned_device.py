"""A device of which only whole networks are known, from measuring them to the answer of a search."""

import csv
import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny
from synthetic_tables import a_table, write_device

import nas
from nas import cli
from nas.console import Console
from nas.errors import LimitError
from nas.latency import Learned, Table, find_model, import_networks
from nas.pipeline import load_experiment, run_experiment
from nas.pipeline.costs import handmade
from nas.pipeline.job import Job
from nas.pipeline.search import make_problem
from nas.runfolder import RunFolder
from nas.space import Space, load_space

QUICK = ("--set", "latency.seconds=0.3", "--set", "latency.min_rounds=5", "--set", "latency.holdout=4")
QUICK = (*QUICK, "--set", "latency.max_drift=9", "--set", "latency.max_busy=1", "--set", "latency.patience=1")
OF_TINY = ("tiny.toml", "--device", "host_onnxruntime", "--precision", "float32", "--image", "8x8x1", "--classes", "3")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder: the tiny experiment, and two known devices with tables of its space."""
    monkeypatch.chdir(tmp_path)
    tiny.write_experiment(tmp_path)
    for seed in range(2):
        write_device(tiny_space(), f"known{seed}", seed)
    return tmp_path


def tiny_space() -> Space:
    return load_space("tiny.toml", input_shape=(8, 8, 1), classes=3)


def nas_command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as e:
        cli.main([str(a) for a in arguments])
    return e.value.code or 0


def learn_phone(space: Space) -> tuple[Learned, Table]:
    """The device `phone`, and what it takes in truth."""
    truth = a_table(space, 7)
    genotypes = np.unique(space.sample(np.random.default_rng(0), 60), axis=0)[:24]
    with Path("phone.csv").open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["genotype", "latency_ms", "role"])
        for number, (g, ms) in enumerate(zip(genotypes, truth.price(space, genotypes), strict=True)):
            rows.writerow([" ".join(map(str, g)), repr(float(ms)), "held-out" if number % 3 == 0 else "random"])
    return import_networks("phone.csv", space=space, device="phone", unit="ms").model, truth


def a_job(here: Path, *overrides: str) -> Job:
    experiment = load_experiment("tiny_experiment.toml", overrides=["device=phone", *overrides])
    run_experiment(experiment, here / "run", stages=["measure"])
    return Job(experiment, RunFolder(here / "run", experiment), Console())


def test_networks_are_measured_here_and_a_model_is_learned(here, capsys):
    assert nas_command("measure", *OF_TINY, "--networks", 8, "--as", "laptop", *QUICK) == 0
    said = capsys.readouterr()
    assert "the most similar known device (known" in said.err
    assert "4 held-out networks" in said.err
    model, proof = find_model("laptop", "float32", tiny_space())
    assert isinstance(model, Learned)
    assert len(model.anchors) == 8
    assert sum(m.at_random for m in model.measured) == 4
    assert proof is not None
    assert proof.learned is not None
    assert proof.repeat_mape is not None
    assert not list((here / "latency_models/laptop/tiny").glob(".measuring*"))
    assert nas.load_device("laptop").precision == ("float32",)


@pytest.mark.parametrize(("count", "message"), [(5, "at least 6 are needed"), (900, "networks to choose: between 1")])
def test_numbers_of_networks_that_cannot_be_are_told_before_anything_is_measured(here, capsys, count, message):
    assert nas_command("measure", *OF_TINY, "--networks", count, "--as", "laptop", *QUICK) == 2
    assert message in capsys.readouterr().err
    assert not (here / "latency_models" / "laptop").exists()


def test_a_bundle_of_networks_comes_back_from_its_program_or_from_a_sheet(here, capsys):
    assert nas_command("measure", *OF_TINY, "--networks", 8, "--bundle", "out", *QUICK) == 0
    lines = Path("out/networks.csv").read_text().splitlines(keepends=True)
    head, rows = lines[:8], list(csv.DictReader(lines[8:]))
    assert [line.partition(":")[0] for line in head] == [
        f"# {key}" for key in ("space", "hash", "image", "classes", "runtime", "precision", "threads", "batch")
    ]
    assert [r["role"] for r in rows] == ["random"] * 4 + ["chosen"] * 4 + ["held-out"] * 4
    assert all((here / "out" / r["model"]).is_file() for r in rows)
    truth, space = a_table(tiny_space(), 7), tiny_space()
    with open("out/networks.csv", "w", newline="") as f:
        f.writelines(head)
        sheet = csv.DictWriter(f, rows[0])
        sheet.writeheader()
        for row in rows:
            genotype = np.array([row["genotype"].split()], np.uint8)
            sheet.writerow(row | {"latency_ms": truth.price(space, genotype)[0]})
    filled = (here / "out/networks.csv").read_bytes()
    assert nas_command("measure", *OF_TINY, "--networks", 8, "--bundle", "out", *QUICK) == 0  # the bundle is kept:
    assert (here / "out/networks.csv").read_bytes() == filled  # so is what was filled in
    options = ("--space", "tiny.toml", "--image", "8x8x1", "--classes", "3", "--unit", "ms")
    assert nas_command("import", "out/networks.csv", "--format", "networks", "--device", "by_hand", *options) == 0
    assert "learned from 8 networks" in capsys.readouterr().out
    assert find_model("by_hand", "float32", space)[0].kind == "learned"
    assert nas.load_device("by_hand").runtime == "onnxruntime"
    other = [o if o != "8x8x1" else "12x12x1" for o in options]
    assert nas_command("import", "out/networks.csv", "--format", "networks", "--device", "by_hand", *other) == 2
    assert "its networks are of image 8x8x1, and image 12x12x1 was asked for" in capsys.readouterr().err
    text = "".join(head).replace("float32", "int8") + filled.decode().partition(head[-1])[2]
    Path("out/int8.csv").write_text('"' + text.replace("\n# ", '",,,\n"# ', 1))  # as a spreadsheet saves it
    assert nas_command("import", "out/int8.csv", "--format", "networks", "--device", "by_hand", *options) == 2
    assert "of precision int8, and device by_hand has float32" in capsys.readouterr().err
    assert nas_command("import", "out/int8.csv", "--format", "networks", "--device", "by_hand_8", *options) == 0
    assert nas.load_device("by_hand_8").precision == ("int8",)
    assert find_model("by_hand_8", "int8", space)[0].precision == "int8"


def test_the_search_holds_the_limit_by_the_upper_end(here):
    learn_phone(tiny_space())
    job = a_job(here)
    model = job.tables["float32"]
    problem = make_problem(job)
    genotypes = job.space.sample(np.random.default_rng(0), 300)
    np.testing.assert_array_equal(problem.cheap(genotypes)[:, 0], model.price(job.space, genotypes))
    np.testing.assert_array_equal(problem.feasible(genotypes), model.bound(job.space, genotypes) <= job.limit.ms)
    assert problem.feasible(problem.canonical(problem.smallest[None]))[0]
    assert "found by search, not exact" in job.limit.caveat
    hand = handmade(job)
    assert model.bound(job.space, hand[None])[0] <= job.limit.ms


def test_a_limit_below_all_that_was_found_is_refused(here):
    model, _ = learn_phone(tiny_space())
    low = model.reachable(tiny_space())[0]
    latency = f'[{{name="top1"}}, {{name="latency_ms", at_most={0.99 * low}}}]'
    with pytest.raises(LimitError, match=r"fastest network .* found by search, not exact"):
        _ = a_job(here, f"objectives={latency}").limit


@pytest.mark.slow  # 15 s
def test_a_whole_run_reports_predictions_with_their_intervals(here, capsys):
    model, _ = learn_phone(tiny_space())
    assert nas_command("run", "tiny_experiment.toml", "--out", "run", "--device", "phone") == 0
    said = capsys.readouterr().err
    assert "phone is not at hand; its float32 latencies were learned by `nas import phone.csv" in said
    assert "the most similar known device" in said
    assert "found by search, not exact" in said
    assert re.search(r"ms predicted, not measured \(80 % interval .* to .* ms\)", said)
    run = nas.load_run(here / "run")
    winner = run.summary["winner"]
    network = run.winner.architecture.network
    assert winner["predicted_ms"] == model.network_ms(network)
    assert (winner["predicted_low_ms"], winner["predicted_high_ms"]) == model.interval_ms(network)
    assert winner["predicted_high_ms"] <= run.summary["limit_ms"]
    assert "80 % interval" in run.summary["verdict"]
    assert "80 % interval" in (here / "run" / winner["folder"] / "card.md").read_text()
    blocks = json.loads((here / "run" / winner["folder"] / "blocks.json").read_text())["float32"]
    assert sum(b["latency_ms"] for b in blocks) == pytest.approx(winner["predicted_ms"])
    assert run.proof["precisions"]["float32"]["learned"]["measured"] == 13
    page = (here / "run" / "report.html").read_text()
    text = re.sub(r"\s+", " ", page[: page.index("<script>")]).replace("\N{NO-BREAK SPACE}", " ")
    assert "predicted by the device's learned latency model, not measured; 80 % interval" in text
    assert "Learned from 13 networks measured whole; 80 % intervals hold" in text
    assert "The simplest answer, the most similar known device (known" in text
    assert " None" not in re.sub(r"<[^>]*>", " ", text)
    assert msgspec.json.decode((here / "run/environment.json").read_bytes())["tables"]["float32"] == model.digest
