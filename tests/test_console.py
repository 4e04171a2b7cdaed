"""What a person sees while a job runs."""

import io

import pytest

from nas import console
from nas.console import Console
from nas.pipeline.train import _shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only by `clock.append`; the last is now."""
    times = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: times[-1])
    return times


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_a_line_fits_the_terminal_so_that_it_can_be_rewritten(monkeypatch, clock, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    shown = Console(terminal)
    clock.append(1.0)
    shown.progress(1, 10, {"value": "x" * 300})
    line = terminal.getvalue().removeprefix("\r\033[K")
    assert len(line) == min(columns - 1, 150)


def test_the_figures_of_a_supernet_fit_one_line():
    kinds = ("largest", "random", "smallest")
    values = (
        {f"loss_{k}": 12.3456 for k in kinds}
        | {f"top1_{k}": 1.0 for k in kinds}
        | {"images/s": 123456.7, "waiting": 1.0}
    )
    stream = io.StringIO()
    Console(stream, plain_seconds=0).progress(1234567, 7654321, _shown(values | {"gradient_norm": 1.0}))
    line = stream.getvalue().rstrip("\n")
    assert (
        "images/s 123457  waiting 100%  loss/top-1 largest 12.346/100.0%  random 12.346/100.0%  smallest 12.346/100.0%"
        in line
    )
    assert len(line) <= 150
    assert _shown({"loss_random": 1.0, "top1_random": 0.5, "images/s": 9.6, "waiting": 0.021}) == {
        "images/s": "10",
        "waiting": "2%",
        "loss/top-1": "random 1.000/50.0%",
    }


def test_the_time_left_follows_from_what_this_process_did_and_not_from_its_compiling(clock):
    stream = io.StringIO()
    shown = Console(stream, plain_seconds=0)
    shown.start("train")
    clock.append(100.0)  # compiling, and going on from step 800
    shown.progress(810, 1000)
    clock.append(110.0)
    shown.progress(820, 1000)
    clock.append(190.0)
    shown.progress(900, 1000)
    shown.progress(1000, 1000)
    told = [line.split("eta ")[1].strip() for line in stream.getvalue().splitlines()[1:]]
    assert told == ["?", "3:00", "1:40", "0:00"]


def test_what_is_waited_for_is_told_at_once_and_stays(clock):
    terminal = Terminal()
    shown = Console(terminal)
    shown.start("measure")
    shown.share("waiting for process 12", 0.0, float("inf"))
    clock.append(1.0)
    shown.share("timing (12 rounds)", 0.25, 90.0)
    assert terminal.getvalue() == "measure\n  waiting for process 12\n\r\033[K   25%  eta 1:30  timing (12 rounds)"
