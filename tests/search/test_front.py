import csv
import math

import pytest

from nas.errors import LimitError, RunError
from nas.search import Front, Trial


def trial(number, correct, latency_ms, failure=None):
    return Trial(number, (number, 1), correct, 100, {"latency_ms": latency_ms}, failure)


TRIALS = [
    trial(0, 50, 1.0),
    trial(1, 80, 2.0),
    trial(2, 79, 3.0),  # dominated
    trial(3, 90, 6.0),
    trial(4, None, 0.1, "crashed"),
    trial(5, 80, 2.0),  # a copy
]


@pytest.fixture
def front():
    return Front.of(TRIALS)


def test_front_is_undominated_and_sorted(front):
    assert [t.trial for t in front] == [0, 1, 3]
    assert len(front) == 3


def test_best_within_a_limit(front):
    assert front.best(latency_ms=5).trial == 1
    assert front.best(latency_ms=2.0).trial == 1
    assert front.best().trial == 3
    with pytest.raises(LimitError, match="latency_ms >= 1"):
        front.best(latency_ms=0.5)
    with pytest.raises(LimitError, match="error, latency_ms"):
        front.best(latency=3)


def test_knee_is_where_it_bends(front):
    assert front.knee().trial == 1
    assert Front.of(TRIALS[:1]).knee().trial == 0


def test_empty_front_says_so():
    front = Front.of([TRIALS[4]])
    assert repr(front) == "Front(0 trials of 1: error, latency_ms)"
    assert "0 trials" in front._repr_html_()
    with pytest.raises(LimitError, match="empty"):
        front.knee()
    assert len(Front.of([])) == 0


def test_csv_has_the_columns_in_order(front, tmp_path):
    front.write_csv(tmp_path / "front.csv")
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    assert list(rows[0]) == ["trial", "top1", "correct", "total", "latency_ms", "genotype"]
    assert rows[1] == {
        "trial": "1",
        "top1": "0.8",
        "correct": "80",
        "total": "100",
        "latency_ms": "2.0",
        "genotype": "1-1",
    }
    with pytest.raises(RunError, match="cannot write"):
        front.write_csv(tmp_path / "none" / "front.csv")


def test_shown(front):
    assert "0.8000" in repr(front)
    assert front._repr_html_().count("<tr>") == 4


def test_frame(front):
    pandas = pytest.importorskip("pandas")
    assert isinstance(front.to_frame(), pandas.DataFrame)
    assert list(front.to_frame()["trial"]) == [0, 1, 3]


def test_trial_is_a_value():
    assert math.isnan(TRIALS[4].top1)
    assert TRIALS[1].costs == {"error": 0.2, "latency_ms": 2.0}
    assert hash(TRIALS[0]) == hash(trial(0, 50, 1.0))


def test_the_front_of_one_device_of_several():
    def on_two(number, correct, here, there):
        return Trial(number, (number,), correct, 100, {"latency_ms": here, "latency_ms@there": there})

    trials = [on_two(0, 50, 1.0, 9.0), on_two(1, 60, 2.0, 5.0), on_two(2, 55, 3.0, 1.0), on_two(3, 40, 4.0, 8.0)]
    assert [t.trial for t in Front.of(trials)] == [0, 1, 2]
    assert [t.trial for t in Front.of(trials, ("error", "latency_ms"))] == [0, 1]
    there = Front.of(trials, ("error", "latency_ms@there"))
    assert [t.trial for t in there] == [2, 1]  # fastest first, on that device
    assert there.best(**{"latency_ms@there": 2.0}).trial == 2
    with pytest.raises(LimitError, match="latency_ms@there"):
        Front.of(trials, ("error", "latency_ms@their"))


def test_trials_on_fewer_images_are_no_part_of_a_front():
    few = Trial(9, (9, 9), 10, 10, {"latency_ms": 0.5})
    assert few not in Front.of([*TRIALS, few])
    assert len(Front.of([few])) == 1
