"""Measuring over ssh and adb, played by programs that run commands in another folder of this machine."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import fake_benchmark_model
import pytest
import tiny

from nas import measured
from nas.config import Latency
from nas.errors import DeviceError, LatencyError
from nas.latency import Table
from nas.measure.remote import Adb, Ssh, transport_of
from nas.ondevice.manifest import load_manifest
from nas.ondevice.results import RESULTS, read
from nas.space import load_space

# Other tests may run beside these, and take the CPU.
QUICK = Latency(seconds=0.5, min_rounds=4, anchors=3, holdout=4, patience=1.0, max_busy=1.0, max_drift=9.0)

# What the other machine does with a line of shell: in its own home folder, by the commands of its own `bin`.
THERE = """#!{python}
import glob, os, subprocess, sys, time
home = {home!r}
def run(line):
    if os.path.exists(home + "/unplugged"):
        {unplugged}
    with open(home + "/log", "a") as f:
        f.write(line + "\\n")
    env = {{"HOME": home, "PATH": home + "/bin:/usr/bin:/bin", "NAS_LOCKS": home}}
    process = subprocess.Popen(["sh", "-c", line], cwd=home, env=env)
    if os.path.exists(home + "/cut") and "&& exec " in line:
        files = lambda: glob.glob(home + "/bench/*/results.jsonl") + glob.glob(home + "/bench/*/benchmark_model.log")
        while not any(word in open(path, "rb").read() for path in files() for word in (b'"round"', b"@ done")):
            time.sleep(0.01)
        process.kill()
        process.wait()
        sys.stderr.write({cut!r})
        sys.exit(255)
    return process.wait()
"""
SSH = (
    THERE
    + """
at = sys.argv.index("me@board")
assert sys.argv[1:at] == [*{options!r}, "-p", "2222"], sys.argv
sys.exit(run(sys.argv[at + 1]))
"""
)
SCP = (
    THERE
    + """
paths = sys.argv[sys.argv.index("2222") + 1:]
paths = [os.path.join(home, path[9:]) if path.startswith("me@board:") else path for path in paths]
sys.exit(run(" ".join(["cp", *paths])))
"""
)
ADB = (
    THERE
    + """
if sys.argv[1] == "devices":
    print("List of devices attached\\n" + open(home + "/devices").read())
    sys.exit(0)
assert sys.argv[1:3] == ["-s", "R58M"], sys.argv
what, rest = sys.argv[3], sys.argv[4:]
sys.exit(run(rest[0] if what == "shell" else " ".join(["cp", *rest])))
"""
)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The home folder of the other machine, which this one reaches by the only programs it has."""
    from nas.measure import remote

    home, bin = tmp_path / "there", tmp_path / "bin"
    (home / "bin").mkdir(parents=True)
    bin.mkdir()
    (home / "bin" / "python3").symlink_to(sys.executable)
    # A link leads Python out of its virtual environment: it is told where that is.
    write(home / "bin" / "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    lost = "sys.stderr.write('client_loop: send disconnect: Broken pipe\\n'); sys.exit(255)"
    gone = "sys.stderr.write(\"error: device 'R58M' not found\\n\"); sys.exit(1)"
    for name, text in {"ssh": SSH, "scp": SCP, "adb": ADB}.items():
        of = {"python": sys.executable, "home": str(home), "options": remote._SSH}
        write(
            bin / name,
            text.format(**of, unplugged=gone if name == "adb" else lost, cut="error: closed" if name == "adb" else ""),
        )
    monkeypatch.setenv("PATH", str(bin))
    (home / "devices").write_text("R58M\tdevice\n")
    monkeypatch.chdir(tmp_path)
    return home


def write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def measure(over: str, name: str = "board") -> Path:
    space = load_space("digits_mixed", input_shape=(8, 8, 1), classes=4)
    return measured.measure_over(
        space, "host_onnxruntime", Path("bundle"), over, QUICK, name=name, precision="float32", path=None
    )


@pytest.mark.parametrize("over", ["ssh://me@board:2222/~/bench", "adb", "adb:R58M"])
def test_a_bundle_is_sent_run_and_its_results_become_the_table(home, over, monkeypatch):
    if over.startswith("adb"):
        monkeypatch.setattr("nas.measure.remote._FOLDER", "bench")
        monkeypatch.setattr("nas.measure.remote._folder", lambda path, otherwise: "bench")
    where = measure(over)
    table = Table.load(where, "float32")
    assert set(table.entries) == set(load_space("digits_mixed", input_shape=(8, 8, 1), classes=4).blocks())
    assert (where / "proof.json").exists()
    assert (where.parent / "device.toml").exists()
    (there,) = (home / "bench").iterdir()
    assert (there / "results.jsonl.fetched").exists()  # if it is wanted once more, it is measured once more
    assert not (there / RESULTS).exists()


def test_cut_off_anywhere_the_same_command_goes_on(home):
    over = "ssh://me@board:2222/~/bench"
    write(home / "bin" / "cp", '#!/bin/sh\n/bin/cp "$@" && touch $HOME/unplugged\n')
    with pytest.raises(LatencyError, match=r"scp failed with me@board: .*Broken pipe.*The same command goes on"):
        measure(over)
    assert sent(home)
    (home / "bin" / "cp").unlink()
    (home / "unplugged").unlink()
    # Next the program there ends in the middle of its rounds, with the connection.
    (home / "cut").touch()
    space = load_space("digits_mixed", input_shape=(8, 8, 1), classes=4)
    long = Latency(**{**{f: getattr(QUICK, f) for f in QUICK.__struct_fields__}, "seconds": 600.0})
    with pytest.raises(
        LatencyError, match=r"the connection to me@board was lost.*kept there.*The same command goes on"
    ):
        measured.measure_over(
            space, "host_onnxruntime", Path("bundle"), over, long, name="board", precision="float32", path=None
        )
    (there,) = (home / "bench").iterdir()
    before = read(there / RESULTS)
    assert before.rounds
    assert not before.complete
    (home / "cut").unlink()
    measure(over)
    after = read(Path("bundle") / RESULTS)
    assert after.complete
    assert after.rounds[: len(before.rounds)] == before.rounds
    assert len(sent(home)) == len(set(sent(home)))  # no model twice, in three calls


def sent(home: Path) -> list[str]:
    """Models that were copied to the other machine."""
    return re.findall(r"/bundle/(models/\S+)", (home / "log").read_text())


@pytest.mark.parametrize(
    ("python", "message"),
    [
        (None, "me@board has no `python3` that could be run.*Install Python 3.11"),
        ('echo \'{"version": [3, 8], "lacks": [], "files": {}}\'', "has Python 3.8; 3.11 or newer is needed"),
        (
            'echo \'{"version": [3, 12], "lacks": ["onnxruntime"], "files": {}}\'',
            "onnxruntime cannot be imported by its python3. Run there: python3 -m pip install onnxruntime",
        ),
    ],
)
def test_what_the_machine_lacks_is_told_with_the_command_that_brings_it(home, python, message):
    (home / "bin" / "python3").unlink()
    write(home / "bin" / "python", "#!/bin/sh\nexit 127\n")
    write(home / "bin" / "python3", f"#!/bin/sh\n{python or 'exit 127'}\n")
    with pytest.raises(DeviceError, match=message):
        measure("ssh://me@board:2222")


def test_a_refusal_there_is_told_here(home):
    measure("ssh://me@board:2222/~/bench")
    shutil.rmtree("latency_models")
    (there,) = (home / "bench").iterdir()
    (Path("bundle") / RESULTS).unlink()
    lines = (there / "results.jsonl.fetched").read_bytes().splitlines(keepends=True)
    (there / RESULTS).write_bytes(b"".join([*lines[:1], b"00000000 damaged\n", *lines[1:]]))
    with pytest.raises(LatencyError, match=r"me@board: .*results.jsonl, line 2: damaged"):
        measure("ssh://me@board:2222/~/bench")


@pytest.mark.parametrize(
    ("devices", "over", "message"),
    [
        ("", "adb", "adb sees no device. Attach one"),
        ("R58M\tdevice\nQ1\tdevice\n", "adb", "adb sees 2 devices: R58M, Q1. Name one: --over adb:SERIAL"),
        ("R58M\tdevice\n", "adb:Q1", "adb sees no device 'Q1'; it sees R58M"),
        ("R58M\tunauthorized\n", "adb", "sees R58M as 'unauthorized': allow USB debugging"),
    ],
)
def test_which_android_device_is_meant_must_be_clear(home, devices, over, message):
    (home / "devices").write_text(devices)
    with pytest.raises(DeviceError, match=message):
        transport_of(over)


def test_a_phone_without_python_is_told_of_termux(home):
    write(home / "bin" / "python3", "#!/bin/sh\nexit 127\n")
    write(home / "bin" / "python", "#!/bin/sh\nexit 127\n")
    with pytest.raises(DeviceError, match=r"R58M has no `python3`.*Termux.*adb forward.*ssh://localhost:8022"):
        measure("adb/tmp")
    (home / "unplugged").touch()
    with pytest.raises(DeviceError, match=r"R58M cannot be reached: error: device 'R58M' not found.*cable"):
        measure("adb/tmp")


@pytest.fixture
def phone(home, tmp_path, monkeypatch) -> Path:
    """The tool, for a phone or board without Python."""
    monkeypatch.setattr("nas.measure.remote._folder", lambda path, otherwise: "bench")
    for name in ("python", "python3"):
        write(home / "bin" / name, "#!/bin/sh\nexit 127\n")
    plan = measured.write_bundle(tiny.space(tmp_path), "host_litert", Path("bundle"), QUICK)
    files = {call["name"]: call["file"] for call in load_manifest(Path("bundle"))["calls"]}
    tool = fake_benchmark_model.write(tmp_path / "sdk", plan, files)
    return tool.rename(tool.with_name("android_aarch64_benchmark_model"))


def measure_by(over: str, device: str = "host_litert") -> Path:
    space = tiny.space(Path.cwd())
    return measured.measure_over(space, device, Path("bundle"), over, QUICK, name="phone", path="tiny.toml")


@pytest.mark.parametrize("over", ["adb:R58M", "ssh://me@board:2222"])
def test_without_python_benchmark_model_goes_along_and_measures(home, phone, over):
    table = Table.load(measure_by(f"{over}?benchmark_model={phone}"), "float32")
    for entry in table.entries.values():
        assert entry.latency_ms > 0.05  # of the fake, whose ops take 0.1 ms each
        assert entry.rounds == QUICK.min_rounds
    assert table.runtime_version.startswith("benchmark_model")
    (there,) = (home / "bench").iterdir()
    assert (there / "benchmark_model.log.fetched").exists()
    assert not (there / "benchmark_model.log").exists()
    log = (home / "log").read_text()
    assert "measure.py" not in log
    assert len(sent(home)) == len(set(sent(home))) > 10
    measure_by(f"{over}?benchmark_model={phone}")  # nothing is measured twice
    assert (home / "log").read_text() == log


def test_cut_off_the_same_command_goes_on_with_benchmark_model(home, phone):
    over = f"adb:R58M?benchmark_model={phone}&cpus=0x3"
    write(home / "bin" / "taskset", '#!/bin/sh\n[ "$1" = 3 ] && shift && exec "$@"\n')
    (home / "cut").touch()
    with pytest.raises(LatencyError, match=r"the connection to R58M was lost.*kept there.*The same command goes on"):
        measure_by(over)
    (there,) = (home / "bench").iterdir()
    assert "@ done 1" in (there / "benchmark_model.log").read_text()
    (home / "cut").unlink()
    before = sent(home)
    measure_by(over)
    log = (Path("bundle") / "benchmark_model.log").read_text()
    assert log.count("@ start") == 2
    assert log.count("@ done 1 ") == 1
    assert sent(home) == before
    assert "on CPUs of mask 3" in Path("latency_models/phone/device.toml").read_text()


def test_what_stands_in_the_way_of_benchmark_model_is_told(home, phone):
    with pytest.raises(DeviceError, match=r"R58M has no `python3`.*\?benchmark_model=PATH.*Or by Python: Termux"):
        measure_by("adb:R58M")
    with pytest.raises(DeviceError, match=r"no such file here.*https://storage.googleapis.com/"):
        measure_by("adb:R58M?benchmark_model=nowhere")
    for options in ("cpus=80", "benchmark_model=", "benchmark_model=x&cpus=7-8", "python=a b"):
        with pytest.raises(DeviceError, match=r"\?python= .* is needed, or \?benchmark_model=|no such file here"):
            transport_of(f"adb:R58M?{options}")
    write(phone, "#!/bin/sh\necho hello\n")
    with pytest.raises(LatencyError, match=r"R58M: .* is not a benchmark_model that runs here .* but: hello"):
        measure_by(f"adb:R58M?benchmark_model={phone}")
    (home / "unplugged").touch()
    with pytest.raises(DeviceError, match=r"R58M cannot be reached: .*See that its cable holds"):
        measure_by(f"adb:R58M?benchmark_model={phone}")
    (home / "unplugged").unlink()
    shutil.rmtree("bundle")
    with pytest.raises(DeviceError, match="runs models of LiteRT, not of onnxruntime: use --device host_litert"):
        measure_by(f"adb:R58M?benchmark_model={phone}", "host_onnxruntime")


def test_a_log_that_is_refused_is_measured_anew(home, phone, monkeypatch):
    over = f"adb:R58M?benchmark_model={phone}"
    with monkeypatch.context() as refusing:
        refusing.setattr(measured, "_evaluated", lambda *_, **__: (_ for _ in ()).throw(LatencyError("too uneven")))
        with pytest.raises(LatencyError, match="too uneven"):
            measure_by(over)
    assert (Path("bundle") / "benchmark_model.log.refused").exists()
    measure_by(over)
    assert (home / "log").read_text().count("exec env JSON=1") == 2


def test_a_machine_that_cannot_be_reached_or_entered_is_told(home, tmp_path):
    (home / "unplugged").touch()
    with pytest.raises(DeviceError, match=r"me@board cannot be reached: .*Broken pipe.*`ssh` enters by hand"):
        measure("ssh://me@board:2222")
    write(tmp_path / "bin" / "ssh", "#!/bin/sh\necho 'me@board: Permission denied (publickey).' >&2; exit 255\n")
    with pytest.raises(DeviceError, match=r"Permission denied.*let a key in \(ssh-copy-id\)"):
        measure("ssh://me@board:2222")


@pytest.mark.parametrize("tool", ["ssh", "adb"])
def test_a_missing_program_is_named(monkeypatch, tmp_path, tool):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=f"`{tool}` is not installed here"):
        transport_of("adb" if tool == "adb" else "ssh://board").run("true")


def test_the_way_is_read(home):
    assert transport_of("ssh://me@board:2222/~/bench/a") == Ssh("me@board", 2222, "bench/a")
    assert transport_of("ssh://board") == Ssh("board", None, "nas-measure")
    assert transport_of("ssh://board/") == Ssh("board", None, "nas-measure")
    assert transport_of("ssh://board/var/tmp/") == Ssh("board", None, "/var/tmp")
    assert transport_of("adb:R58M/data/x") == Adb("R58M", "/data/x")
    assert transport_of("adb").folder == "/data/local/tmp/nas-measure"
    assert transport_of("ssh://pi@board/~/b?python=venv/bin/python").python == "venv/bin/python"
    for wrong in (
        "board",
        "ssh://board?python=$(x)",
        "ssh://-oProxyCommand=x",
        "ssh://me@-x",
        "ssh://board/a b",
        "ssh://board/$(x)",
        "adb:-x",
    ):
        with pytest.raises(DeviceError, match="is needed"):
            transport_of(wrong)


@pytest.mark.slow
def test_over_a_real_ssh_server_of_this_machine(tmp_path, monkeypatch):
    server, keygen = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin"), shutil.which("ssh-keygen")
    if not server or not keygen or not hasattr(os, "geteuid"):
        pytest.skip("there is no sshd here")
    for key in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    (tmp_path / "allowed").write_text((tmp_path / "user.pub").read_text())
    config = f"""
        HostKey {tmp_path / "host"}
        ListenAddress 127.0.0.1:22022
        AuthorizedKeysFile {tmp_path / "allowed"}
        PidFile {tmp_path / "pid"}
        StrictModes no
        Subsystem sftp internal-sftp
        SetEnv NAS_LOCKS={tmp_path}
    """
    (tmp_path / "sshd_config").write_text(config)
    # ssh reads its settings from the home folder of the user, whatever HOME says: they are given by a wrapper.
    (tmp_path / "bin").mkdir()
    options = f"-F none -i {tmp_path / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile={tmp_path / 'known'}"
    for tool in ("ssh", "scp"):
        write(tmp_path / "bin" / tool, f'#!/bin/sh\nexec {shutil.which(tool)} {options} "$@"\n')
    Path("/run/sshd").mkdir(exist_ok=True)
    command = [server, "-D", "-e", "-f", str(tmp_path / "sshd_config")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        if "listening" not in line:
            pytest.skip(f"sshd does not start here: {line}")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        monkeypatch.chdir(tmp_path)
        table = Table.load(measure(f"ssh://127.0.0.1:22022{tmp_path}/there?python={sys.executable}"), "float32")
        assert table.entries
    finally:
        process.terminate()
        process.wait(30)
