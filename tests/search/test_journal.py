import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import zlib

import pytest

from nas.cli import main
from nas.errors import JournalError
from nas.search.journal import Journal, read, salvage

HEADER = {"problem": "abc", "seed": 3, "config": {"lag": 2}}
RECORDS = [{"trial": k, "genotype": [k, 1], "costs": {"error": 0.1 * k, "latency_ms": None}} for k in range(5)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "folder" / "journal.jsonl"
    with Journal(path, HEADER) as journal:
        for record in RECORDS:
            journal.append(record)
    return path


@pytest.fixture
def quick_disk(monkeypatch):
    """For thousands of files whose end in a power cut is not the question."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_what_is_committed_is_read_back(path):
    header, records = read(path)
    assert header == {"schema": 1, **HEADER}
    assert records == RECORDS
    assert [json.loads(line)["record"] for line in path.read_text().splitlines()] == [header, *records]


def test_what_is_not_committed_is_not_there(path):
    with Journal(path, HEADER) as journal:
        journal.append({"trial": 5})
        assert len(read(path)[1]) == 5
        journal.commit()
        assert len(read(path)[1]) == 6


def test_truncated_at_every_byte_the_exact_prefix_survives_and_goes_on(path, quick_disk):
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        left = max(0, sum(end <= size for end in ends) - 1)
        with Journal(path, HEADER) as journal:
            assert journal.records == RECORDS[:left]
            journal.append({"trial": left})
        assert read(path)[1] == [*RECORDS[:left], {"trial": left}]


def test_a_flipped_bit_is_refused_with_the_byte_and_what_precedes_is_salvaged(path, quick_disk):
    """All but the very last byte: without it the last line looks torn, and the exact prefix is left."""
    whole = b"".join(path.read_bytes().splitlines(keepends=True)[:4])
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    new = path.with_name("journal.salvaged.jsonl")
    for position in range(len(whole) - 1):
        left = sum(end <= position for end in ends)  # lines before the damage
        for bit in range(8):
            damaged = whole[:position] + bytes([whole[position] ^ (1 << bit)]) + whole[position + 1 :]
            path.write_bytes(damaged)
            with pytest.raises(JournalError, match=f"byte {ends[left - 1] if left else 0}[:,]"):
                read(path)
        with pytest.raises(JournalError, match=f"byte {ends[left - 1] if left else 0}[:,]"):
            Journal(path, HEADER)
        if left:
            salvage(path)
            assert new.read_bytes() == whole[: ends[left - 1]]
            new.unlink()
        else:
            with pytest.raises(JournalError, match="Nothing can be salvaged"):
                salvage(path)
        assert path.read_bytes() == damaged
    path.write_bytes(whole[:-1] + b"\x0b")
    assert read(path)[1] == RECORDS[:2]


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 0, 1), (0, 2, 3), (1, 2)])
def test_lines_that_were_moved_doubled_or_lost_are_damage_too(path, order):
    header, *lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + b"".join(lines[k] for k in order))
    intact = next(i for i, k in enumerate(order) if i != k)
    byte = len(header) + sum(map(len, lines[:intact]))
    with pytest.raises(JournalError, match=f"byte {byte}, after {intact} intact records"):
        read(path)
    assert salvage(path).records == intact
    path.write_bytes(b"".join(lines))
    with pytest.raises(JournalError, match="byte 0: this is not a journal"):
        read(path)


def test_zeros_after_a_power_cut_are_a_torn_line(path):
    with path.open("ab") as file:
        file.write(bytes(100))
    assert read(path)[1] == RECORDS


def test_damage_names_the_command_that_salvages_and_its_lines_lead_back_to_the_search(path, nas):
    whole = path.read_bytes()
    position = whole.index(b'"trial":2')
    damaged = whole[:position] + b"X" + whole[position + 1 :]
    path.write_bytes(damaged)
    start = whole.rindex(b"\n", 0, position) + 1
    with pytest.raises(JournalError, match=rf"byte {start}, after 2 intact records") as e:
        Journal(path, HEADER)
    (command,) = (part for part in str(e.value).split("`") if part.startswith("nas "))
    assert shlex.split(command) == ["nas", "doctor", "--salvage", str(path)]
    told = nas(*shlex.split(command)[1:])
    assert f"2 records, bytes 0 to {start}, are intact" in told
    assert f"Left out: 3 lines of {len(whole) - start} bytes" in told
    assert path.read_bytes() == damaged
    subprocess.run(told.splitlines()[-1], shell=True, check=True)
    assert path.with_name("journal.damaged.jsonl").read_bytes() == damaged
    with Journal(path, HEADER) as journal:
        assert journal.records == RECORDS[:2]


def test_salvage_takes_a_run_folder_and_overwrites_nothing(path, tmp_path, nas):
    run = tmp_path / "run"
    (run / "search").mkdir(parents=True)
    shutil.copy(path, run / "search")
    new = tmp_path / "new.jsonl"
    told = nas("doctor", "--salvage", run, "--out", new)
    assert "5 records" in told
    assert "it is whole" in told
    assert "5 records" in nas("doctor", "--salvage", path.parent)  # of a search by a function
    assert new.read_bytes() == path.read_bytes()
    assert "exists already" in nas("doctor", "--salvage", run, "--out", new, code=2)
    assert "no meaning" in nas("doctor", "--out", new, code=2)
    assert "cannot read this journal" in nas("doctor", "--salvage", tmp_path / "none", code=2)
    assert "cannot write" in nas("doctor", "--salvage", path, "--out", tmp_path / "none" / "new", code=2)


def test_a_second_writer_is_refused_also_from_another_process(path):
    code = "import sys; from nas.search.journal import Journal; Journal(sys.argv[1], {})"
    with Journal(path, HEADER):
        with pytest.raises(JournalError, match="another process"):
            Journal(path, HEADER)
        other = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=with_nas())
        assert "another process is writing" in other.stderr
    Journal(path, HEADER).close()


def test_another_search_is_refused_and_says_what_differs(path):
    with pytest.raises(JournalError, match="seed: the journal has 3, this search 4") as e:
        Journal(path, {**HEADER, "seed": 4})
    assert "config" not in str(e.value)
    Journal(path, HEADER).close()  # and the lock is free again


@pytest.mark.parametrize("content", ["hello", "hello\n", '{"crc":1,"record":{}}\n', "[1]\nnull\n"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(JournalError, match="not a journal"):
        Journal(path, HEADER)
    assert path.read_text() == content


def test_a_missing_or_empty_journal_cannot_be_read(tmp_path):
    with pytest.raises(JournalError, match="cannot read"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(JournalError, match="not a journal"):
        read(tmp_path / "empty.jsonl")


def test_a_folder_or_a_file_in_the_way_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file" / "journal.jsonl", tmp_path / "file" / "run" / "journal.jsonl"):
        with pytest.raises(JournalError, match=r"cannot write the journal: .* choose another path"):
            Journal(path, HEADER)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_system_without_file_locks_reads_journals_and_says_that_it_cannot_write_them(path):
    code = """if True:
        import sys
        sys.modules["fcntl"] = None  # as on Windows
        from nas.errors import JournalError
        from nas.search import read_trials  # the whole room is imported
        from nas.search.journal import Journal, read
        print(len(read(sys.argv[1])[1]))
        try:
            Journal(sys.argv[1], {})
        except JournalError as e:
            print(e)
    """
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=with_nas())
    assert done.returncode == 0, done.stderr
    count, told = done.stdout.splitlines()
    assert int(count) == len(RECORDS)
    assert "Search on Linux or macOS" in told


def test_a_journal_of_another_schema_says_which_and_stays(path):
    header, _ = read(path)
    for schema, age in ((0, "an older version"), (3, "another version"), (None, "another version")):
        other = {**header, "schema": schema} if schema is not None else HEADER
        body = json.dumps(other, sort_keys=True, separators=(",", ":"))
        lines = path.read_bytes().splitlines(keepends=True)
        lines[0] = f'{{"crc":{zlib.crc32(body.encode())},"record":{body}}}\n'.encode()
        path.write_bytes(b"".join(lines))
        for opens in (read, lambda path: Journal(path, HEADER)):
            with pytest.raises(JournalError, match=rf"schema {schema}, by {age}.*knows 1 and 2\. Go on with"):
                opens(path)
        assert path.read_bytes() == b"".join(lines)


def test_a_journal_that_may_be_of_an_older_version_is_refused_with_that(path):
    whole = path.read_bytes()
    with pytest.raises(JournalError, match="older version of nas began this journal"):
        Journal(path, {**HEADER, "problem": "abcd"})
    with pytest.raises(JournalError, match=r"skipped: the journal has None, this search .*likely of another version"):
        Journal(path, {**HEADER, "skipped": []})
    with pytest.raises(JournalError) as e:
        Journal(path, {**HEADER, "problem": "abcd", "seed": 4})
    assert "version" not in str(e.value)
    assert path.read_bytes() == whole


def test_a_file_that_may_not_grow_loses_nothing_wherever_the_room_ends(path):
    """As a full disk, to the byte: a write that is cut off leaves half a line, which the next to open drops."""
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    more = [{"trial": 5 + k} for k in range(9)]
    for room in (0, 1, 27, 60, 100):
        path.write_bytes(whole)
        journal = Journal(path, HEADER)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, hard))
        try:
            with pytest.raises(JournalError, match=r"cannot write the journal: File too large\. What was committed is"):
                write(journal, more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.stat().st_size == len(whole) + room
        fit = room // len(b'{"crc":1234567890,"record":{"trial":5}}\n')
        with Journal(path, HEADER) as journal:
            assert journal.records == RECORDS + more[:fit]
        assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_folder_is_a_clear_error(path, begun, monkeypatch):
    whole = path.read_bytes()
    path.chmod(0o444)
    if not begun:
        path.unlink()
    path.parent.chmod(0o555)
    monkeypatch.chdir(path.parent)
    root = os.geteuid() == 0
    try:
        if root:  # who may write anywhere
            os.seteuid(65534)
        with pytest.raises(JournalError, match=r"cannot write the journal: Permission denied\. What was committed is"):
            Journal(path.name, HEADER)
    finally:
        if root:
            os.seteuid(0)
        path.parent.chmod(0o755)
    assert path.exists() is begun
    assert not begun or path.read_bytes() == whole


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_disk_is_a_clear_error(path, monkeypatch):
    journal = Journal(path, HEADER)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._file)
    os.close(full)
    journal.append({"trial": 5})
    with pytest.raises(JournalError, match=r"No space left.*the same command goes on"):
        journal.commit()
    assert read(path)[1] == RECORDS


def write(journal, records):
    for record in records:
        journal.append(record)
        journal.commit()


def with_nas():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.fixture
def nas(capsys):
    """Runs a command line; gives what it says."""

    def run(*arguments, code=0):
        with pytest.raises(SystemExit) as e:
            main([str(a) for a in arguments])
        assert e.value.code == code
        return "".join(capsys.readouterr())

    return run
