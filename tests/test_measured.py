"""`nas measure` and `nas export` on the command line: options that would be ignored, names, precisions, proofs."""

import io
import re
import shutil
import tomllib
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny

from nas import catalog, cli, cost, measured
from nas.architecture import Architecture, Input, save_params
from nas.config import Latency
from nas.console import Console
from nas.errors import DeviceError, LatencyError, UnmeasuredBlock
from nas.export import RUNTIMES
from nas.latency import Table, find_table, load_device
from nas.measure import RECIPE, bundle, hardware, tpu
from nas.ondevice.results import read
from nas.ops import weights
from nas.report import write_table_report
from nas.space import load_space


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_experiment(tmp_path)
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as e:
        cli.main(list(arguments))
    assert e.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        "--bundle out",
        "--prove 10",
        "--as mine",
        "--precision int8",
        "--image 8x8x1",
        "--classes 4",
        "--seed 1",
        "--over adb",
    ],
)
def test_options_of_spaces_are_refused_for_an_experiment(here, capsys, option):
    said = refused(capsys, "measure", "tiny_experiment.toml", *option.split())
    assert f"{option.split()[0]} has no meaning where WHAT is an experiment" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--out x", "--out has no meaning where WHAT is a space"),
        ("--smoke", "--smoke has no meaning where WHAT is a space"),
        ("--bundle x --as mine", "--as has no meaning with --bundle"),
        ("--bundle x --prove 10", "--prove has no meaning with --bundle"),
        ("--prove 10 --as mine", "--as has no meaning with --prove"),
        ("--bundle x --over adb", "--over needs --as NAME"),
        ("--over adb --as mine", "--over needs --bundle FOLDER"),
        ("--bundle x --precision int8 --precision float32", "a bundle is of one precision"),
    ],
)
def test_options_that_do_not_go_together_are_refused(here, capsys, options, message):
    assert message in refused(capsys, "measure", "digits_mixed", "--device", "host_onnxruntime", *options.split())


def test_results_are_imported_with_what_they_say_themselves(here, capsys):
    said = refused(capsys, "measure", "--import", "out", "--as", "mine", "--device", "host_onnxruntime")
    assert "--device has no meaning for --import" in said


# Other tests may run beside these, and take the CPU.
QUICK = Latency(seconds=0.5, min_rounds=4, anchors=6, holdout=4, patience=1.0, max_busy=1.0, max_drift=9.0)


def test_a_space_in_a_file_of_its_own_is_named_by_that_in_what_is_to_be_done_next(here, capsys):
    space = tiny.space(here)
    measured.write_bundle(space, "host_onnxruntime", here / "out", QUICK, precision="float32")
    bundle.run(here / "out")
    told = io.StringIO()
    where = measured.import_results(
        here / "out", name="mine", space="tiny.toml", settings=QUICK, console=Console(told, plain_seconds=0)
    )
    command = re.search(r"in full: nas (report .*)", told.getvalue())
    assert command is not None
    with pytest.raises(SystemExit) as e:
        cli.main(command[1].split())
    assert e.value.code == 0, capsys.readouterr().err
    assert (where / "report.html").exists()
    for what, path, message in (
        ("digits_mixed", "out", "out: it was measured for space 'tiny', and WHAT is 'digits_mixed': give that space"),
        ("tiny.toml", "tiny.toml", "tiny.toml: these are no results .* It writes results.jsonl in the folder"),
    ):
        assert re.search(message, refused(capsys, "measure", what, "--import", path, "--as", "mine"))
    other = load_space("tiny.toml", input_shape=(12, 12, 1), classes=4)
    with pytest.raises(UnmeasuredBlock, match=r"`nas measure tiny\.toml --image 12x12x1 --classes 4 --device mine`"):
        find_table("mine", "float32", other)


def test_a_sheet_that_nobody_has_filled_in_is_told(here, capsys):
    space = tiny.space(here)
    measured.write_bundle(space, "host_onnxruntime", here / "out", QUICK, precision="float32")
    bundle.run(here / "out")
    measured.import_results(
        here / "out", name="mine", space="tiny.toml", settings=QUICK, console=Console(io.StringIO())
    )
    measured.write_bundle(space, "host_onnxruntime", here / "nets", QUICK, precision="float32", networks=8)
    options = ("--format", "networks", "--space", "tiny.toml", "--image", "8x8x1", "--classes", "3")
    said = refused(capsys, "import", "nets/networks.csv", *options, "--device", "other")
    assert re.search(r"networks.csv: \d+ of its rows have no `latency_ms`, among them all that are to learn from", said)


def test_devices_name_providers(here):
    from nas import catalog

    for name in ("host_onnxruntime_cuda", "host_onnxruntime_tensorrt"):
        text = (catalog.folder("latency_models") / name / "device.toml").read_text()
        assert tomllib.loads(text)["runtime"] in RUNTIMES


@pytest.fixture
def winner(here) -> Path:
    """The folder of a network that was never calibrated."""
    space = tiny.space(here)
    network = space.decode(space.smallest())
    folder = here / "winner"
    folder.mkdir()
    Architecture(
        schema="nas.architecture/1",
        name="w",
        network=network,
        classes=("a", "b", "c"),
        input=Input((8, 8, 1), (0.5,), (0.5,)),
    ).save(folder / "architecture.json")
    save_params(folder / "params", {w.name: np.full(w.shape, 0.1, np.float32) for w in weights(network.flat())})
    return folder


def exported(capsys, *arguments: str) -> list[str]:
    with pytest.raises(SystemExit) as e:
        cli.main(["export", *arguments])
    assert e.value.code == 0, capsys.readouterr().err
    return capsys.readouterr().out.split()


def test_a_network_is_exported_in_any_precision_of_the_runtime(winner, capsys):
    assert exported(capsys, str(winner)) == [str(winner / "model.onnx")]
    pytest.importorskip("openvino", reason="openvino is not installed")
    of_openvino = ("--runtime", "openvino", "--precision", "bfloat16")
    assert exported(capsys, str(winner), *of_openvino) == [str(winner / "model.bfloat16.onnx")]
    assert exported(capsys, str(winner), *of_openvino, "--out", "best.onnx") == ["best.onnx"]
    both = exported(capsys, str(winner), *of_openvino, "--precision", "float32", "--out", "best.onnx")
    assert both == ["best.bfloat16.onnx", "best.onnx"]
    assert Path("best.onnx").read_bytes() != Path("best.bfloat16.onnx").read_bytes()  # it says what to compute in


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--precision bfloat16", "onnxruntime has no precision `bfloat16`"),
        ("--precision float31", "Did you mean `float32`"),
        ("--precision int8", "int8 needs the ranges"),
        ("--runtime openvin", "Did you mean `openvino`"),
        ("--smoke", "--smoke has no meaning where SOURCE is a network"),
    ],
)
def test_what_cannot_be_exported_is_told(winner, capsys, options, message):
    assert message in refused(capsys, "export", str(winner), *options.split())


def test_an_experiment_says_its_precisions_itself(here, capsys):
    said = refused(capsys, "export", "tiny_experiment.toml", "--precision", "int8")
    assert "--precision has no meaning where SOURCE is an experiment" in said


# names, and where tables and proofs go

QUICK = measured.settings_of(
    ("seconds=0.3", "min_rounds=5", "anchors=3", "holdout=4", "patience=1", "max_drift=9", "max_busy=1")
)


@pytest.fixture
def laptop(here) -> Table:
    """A table of the tiny space on this machine, as device `laptop`."""
    measured.measure_space(tiny.space(here), "host_onnxruntime", QUICK, name="laptop", precisions=("float32",))
    return find_table("laptop", "float32", tiny.space(here))[0]


@pytest.mark.parametrize("name", ["mine", "epyc_zen4_xla"])
def test_a_name_that_is_taken_is_told_before_anything_is_measured(here, monkeypatch, name):
    monkeypatch.setattr(measured, "record", None)  # nothing can be measured
    (here / "latency_models" / "mine").mkdir(parents=True)
    (here / "latency_models" / "mine" / "device.toml").write_text(
        f'device = "mine"\nruntime = "litert"\nhardware = "{hardware()}"\n'
    )
    space = tiny.space(here)
    with pytest.raises(DeviceError, match=rf"{name} is of runtime '(litert|xla)', not 'onnxruntime'.*--as"):
        measured.measure_space(space, "host_onnxruntime", QUICK, name=name)
    with pytest.raises(DeviceError, match=f"{name} is of runtime"):
        measured.measure_over(space, "host_onnxruntime", here / "out", "adb", QUICK, name=name)
    assert not (here / "out").exists()
    with pytest.raises(DeviceError, match=r"is of batch 64, not 1|is of runtime 'tpu_compiler', not 'onnxruntime'"):
        measured.measure_space(space, "host_onnxruntime", QUICK, name="tpu_v2_estimate")


def test_tables_say_what_machine_they_are_of_and_nothing_of_the_one_they_were_modelled_on(laptop, here):
    assert laptop.device == f"{hardware()}, onnxruntime, 1 thread"
    assert load_device("laptop").device == laptop.device
    toml = here / "latency_models" / "laptop" / "device.toml"
    toml.write_text(toml.read_text() + 'notes = "on the balcony"\nlicence = "mine"\n')
    other = msgspec.structs.replace(laptop, hardware="a board")
    _, proof = find_table("laptop", "float32", tiny.space(here))
    assert proof is not None
    measured.keep(
        other, proof, tiny.space(here), load_device("laptop"), Path("latency_models/board"), console=Console()
    )
    board = load_device("board")
    assert (board.notes, board.licence, board.hardware) == ("", "", "a board")
    assert board.device == "a board, onnxruntime, 1 thread"
    measured.keep(
        laptop, proof, tiny.space(here), load_device("laptop"), Path("latency_models/again"), console=Console()
    )
    assert load_device("again").notes == "on the balcony"  # the same machine


def test_what_is_measured_later_bears_the_name_that_the_device_has_by_then(laptop, here):
    toml = here / "latency_models" / "laptop" / "device.toml"
    toml.write_text(toml.read_text().replace(laptop.device, "the kitchen's laptop"))
    measured.measure_space(tiny.space(here), "host_onnxruntime", QUICK, name="laptop", precisions=("int8",))
    assert find_table("laptop", "int8", tiny.space(here))[0].device == "the kitchen's laptop"
    assert load_device("laptop").device == "the kitchen's laptop"


def test_another_form_of_a_space_has_a_folder_of_its_own(laptop, here):
    larger = tiny.space(here, (12, 12, 1))
    where = measured.measure_space(larger, "host_onnxruntime", QUICK, name="laptop", precisions=("float32",))
    assert where == Path("latency_models/laptop") / f"tiny.{larger.digest}"
    for space in (tiny.space(here), larger):
        table, proof = find_table("laptop", "float32", space)
        assert table.space_digest == space.digest
        assert proof is not None
        assert not proof.doubt
    assert measured.prove_table(larger, "laptop", QUICK, networks=4)[0].space_digest == larger.digest
    assert find_table("laptop", "float32", tiny.space(here))[0] == laptop


def test_a_proof_that_was_cut_off_goes_on(laptop, here, monkeypatch):
    class Stopped(Console):
        def share(self, what: str, share: float, seconds_left: float) -> None:
            if what.startswith("timing") and 0.3 < share < 1:
                raise KeyboardInterrupt

    longer = msgspec.structs.replace(QUICK, seconds=2.0, tolerance=0.0)
    with pytest.raises(KeyboardInterrupt):
        measured.prove_table(tiny.space(here), "laptop", longer, networks=6, console=Stopped())
    (work,) = (here / "latency_models/laptop/tiny").glob(".proving.*")
    before = len(read(work / "results.jsonl").rounds)
    assert before > 0
    kept = []
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: kept.append(read(folder / "results.jsonl")))
    _, proof = measured.prove_table(tiny.space(here), "laptop", longer, networks=6)
    (recording,) = kept
    assert len(recording.starts) == 2
    assert len(recording.rounds) > before
    assert find_table("laptop", "float32", tiny.space(here))[1] == proof


def test_a_table_of_another_version_of_the_runtime_is_told_before_its_proof_is_measured(laptop, here, monkeypatch):
    monkeypatch.setattr(measured, "version", lambda runtime: "0.1")
    monkeypatch.setattr(measured, "prove_again", None)
    with pytest.raises(LatencyError, match=r"and here is 0\.1, of which"):
        measured.prove_table(tiny.space(here), "laptop", QUICK, networks=4)


def test_proofs_and_pages_of_installed_tables_go_to_the_current_folder(laptop, here, monkeypatch):
    package = here / "site-packages" / "nas" / "_data" / "latency_models"
    package.parent.mkdir(parents=True)
    (here / "latency_models").rename(package)
    monkeypatch.setattr(catalog, "folder", lambda kind: package if kind == "latency_models" else here / "none")
    before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    space = tiny.space(here)
    _, first = find_table("laptop", "float32", space)
    _, proof = measured.prove_table(space, "laptop", QUICK, networks=6)
    page = write_table_report(package / "laptop" / "tiny", space=str(here / "tiny.toml"))
    assert page == Path("latency_models/laptop/tiny/report.html")
    assert f"{proof.networks} networks" in page.read_text() or str(proof.networks) in page.read_text()
    assert find_table("laptop", "float32", space) == (laptop, proof)
    assert proof != first
    assert {path: path.read_bytes() for path in package.rglob("*") if path.is_file()} == before


def test_a_device_at_hand_keeps_no_tables_and_says_so(here):
    with pytest.raises(UnmeasuredBlock, match=r"whatever machine a run is on.*--device host_onnxruntime --as NAME"):
        find_table("host_onnxruntime", "float32", tiny.space(here))


def test_an_estimate_that_is_cut_off_goes_on_and_leaves_nothing_but_the_table(here, monkeypatch):
    space = tiny.space(here)
    asked: list[str] = []
    cut: list[str] = []

    def estimate(graph, generation, precision, batch, *, cache):
        known = cache / f"{graph.key}.json"
        if not known.exists():
            if len(asked) == 5 and not cut:
                cut.append(graph.key)
                raise KeyboardInterrupt
            asked.append(precision + graph.key)
            cache.mkdir(parents=True, exist_ok=True)
            known.write_text("{}")
        return tpu.Estimate(generation, precision, batch, 0.02 + 1e-6 * cost.macs(graph), 1, 1, 0.0, 0.0, 0.0, 0.0, 0)

    monkeypatch.setattr(tpu, "estimate", estimate)
    monkeypatch.setattr(tpu, "version", lambda: "libtpu 0, jax 0")
    with pytest.raises(KeyboardInterrupt):
        measured.measure_space(space, "tpu_v2_estimate", QUICK)
    where = measured.measure_space(space, "tpu_v2_estimate", QUICK)
    assert cut
    assert len(asked) == len(set(asked)) > 10  # no program twice
    assert sorted(p.name for p in where.iterdir()) == [
        "proof.json", "table.bfloat16.csv", "table.bfloat16.json", "table.float32.csv", "table.float32.json",
    ]  # fmt: skip


def test_a_table_of_another_recipe_is_not_proved_by_this_one(laptop, here, monkeypatch):
    assert laptop.recipe == RECIPE
    msgspec.structs.replace(laptop, recipe=1).save(here / "latency_models/laptop/tiny")
    monkeypatch.setattr(measured, "prove_again", None)
    with pytest.raises(LatencyError, match=r"recipe 1, now 2.*Measure the table anew"):
        measured.prove_table(tiny.space(here), "laptop", QUICK, networks=4)


def test_what_another_version_began_is_begun_anew(here):
    space, work = tiny.space(here), here / "latency_models/laptop/tiny/.measuring.float32"
    work.mkdir(parents=True)
    (work / "manifest.json").write_text('{"schema": 1, "digest": "0"}')
    (work / "results.jsonl").write_text("of another version")
    where = measured.measure_space(space, "host_onnxruntime", QUICK, name="laptop", precisions=("float32",))
    assert Table.load(where, "float32").recipe == RECIPE
    assert not work.exists()
