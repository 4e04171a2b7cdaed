import json
import os
import subprocess
import sys

import pytest

from nas.errors import JournalError
from nas.search.journal import Journal, read, recover

HEADER = {"problem": "abc", "seed": 3, "config": {"lag": 2}}
RECORDS = [{"trial": k, "genotype": [k, 1], "costs": {"error": 0.1 * k, "latency_ms": None}} for k in range(5)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "folder" / "journal.jsonl"
    with Journal(path, HEADER) as journal:
        for record in RECORDS:
            journal.append(record)
    return path


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


def test_truncated_at_every_byte_the_exact_prefix_survives_and_goes_on(path):
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        left = max(0, sum(end <= size for end in ends) - 1)
        with Journal(path, HEADER) as journal:
            assert journal.records == RECORDS[:left]
            journal.append({"trial": "next"})
        assert read(path)[1] == [*RECORDS[:left], {"trial": "next"}]


def test_a_flipped_bit_never_passes(path):
    """Either the exact prefix (when it hit the last line), or refused."""
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (0, 3, 6):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << bit)]) + whole[position + 1 :])
            try:
                _, records = read(path)
            except JournalError:
                continue
            assert len(records) < len(RECORDS)
            assert records == RECORDS[: len(records)]
            assert position >= whole.index(b'"trial":3')


def test_zeros_after_a_power_cut_are_a_torn_line(path):
    with path.open("ab") as file:
        file.write(bytes(100))
    assert read(path)[1] == RECORDS


def test_damage_in_the_middle_names_the_byte_and_can_be_recovered(path):
    whole = path.read_bytes()
    position = whole.index(b'"trial":2')
    path.write_bytes(whole[:position] + b"X" + whole[position + 1 :])
    start = whole.rindex(b"\n", 0, position) + 1
    with pytest.raises(JournalError, match=rf"byte {start}, after 2 intact records.*recover"):
        Journal(path, HEADER)
    assert recover(path) == 2
    assert read(path)[1] == RECORDS[:2]
    assert len(path.with_name("journal.jsonl.damaged").read_bytes()) == len(whole)


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


def test_a_folder_in_the_way_is_a_clear_error(tmp_path):
    with pytest.raises(JournalError, match="cannot write"):
        Journal(tmp_path, HEADER)


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


def with_nas():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
