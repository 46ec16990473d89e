"""Bars and lines of progress."""

import re
import sys
from collections.abc import Callable

import pytest
from helpers import in_terminal
from hypothesis import given
from hypothesis import strategies as st

from hubert_lightning import first_process, progress_bar
from hubert_lightning.progress_bar import hidden_bars, progress, short


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_bar, "clock", clock)
    return clock


def lines_of_work(clock: Clock, err: Callable[[], str], seconds: float, steps: int = 1000) -> list[str]:
    """The lines that work of some length prints without a terminal."""
    with progress("training", steps, "steps") as advance:
        for step in range(steps):
            clock.now += seconds / steps
            advance(note=f"loss {step}")
    return err().splitlines()


def test_without_a_terminal_short_work_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of_work(clock, lambda: capsys.readouterr().err, seconds=9) == []


def test_without_a_terminal_lines_come_at_growing_intervals(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of_work(clock, lambda: capsys.readouterr().err, seconds=3000)
    assert lines[0] == "training: 4 of 1000 steps, 50 min left, loss 3"  # after 10 s
    assert lines[1] == "training: 14 of 1000 steps, 49 min left, loss 13"  # no sooner than 30 s later
    assert lines[-1] == "training: 1000 steps in 50 min, loss 999"
    assert len(lines) < 60


@pytest.mark.parametrize("days", [0.01, 1, 20])
def test_work_of_any_length_prints_dozens_of_lines(
    days: float, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 10 < len(lines_of_work(clock, lambda: capsys.readouterr().err, 86400 * days, steps=20_000)) < 80


def test_the_time_left_follows_a_change_of_speed(clock: Clock) -> None:
    with progress("training", 1000, "steps") as advance:
        for step in range(200):
            clock.now += 1 if step < 50 else 4
            advance()
        assert advance.left == "53 min left"  # 800 steps of 4 s
        clock.now += 120
        assert advance.left == "51 min left"


def test_a_resumed_run_counts_its_own_steps(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 1000, "steps", done=900) as advance:
        for _ in range(100):
            clock.now += 10
            advance()
            assert "h" not in advance.left
    assert "training: 901 of 1000 steps\n" in (said := capsys.readouterr().err)
    assert said.endswith("training: 100 steps in 17 min\n")


def test_work_inside_other_work_is_named_beside_it(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 100, "steps") as advance:
        advance(note="loss 5")
        clock.now += 20
        with progress("quality of layers", 12, "layers") as inner:
            inner(3)
        clock.now += 100
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "training: 1 of 100 steps, loss 5, quality of layers: 3 of 12 layers",
        "training: 1 steps in 2 min, loss 5",
    ]


def test_work_that_fails_leaves_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress("reading", 10, keep=True):
        clock.now = 100 / 0
    assert capsys.readouterr().err == ""


def test_hidden_bars_print_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with hidden_bars():
        assert lines_of_work(clock, lambda: capsys.readouterr().err, seconds=3000) == []


def test_other_ranks_print_no_progress(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_process, "_of_ranks", True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert lines_of_work(clock, lambda: capsys.readouterr().err, seconds=3000) == []


@given(st.floats(0, 1e7))
def test_a_duration_is_short_and_right(seconds: float) -> None:
    units = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    text = short(seconds)
    assert len(text) < 12
    total = sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (\w+)", text))
    half_a_unit = 30 if seconds > 59 else 0.5 if seconds > 1 else 0.06
    assert total == pytest.approx(seconds, rel=0.05, abs=half_a_unit)


BAR = """
import multiprocessing, sys, time
from hubert_lightning import console, progress_bar

console.show_messages(of_ranks=False)
progress_bar.clock = lambda: 0.0
with progress_bar.progress("reading", 4, "files") as advance:
    for number in range(4):
        progress_bar.clock = lambda number=number: 20.0 * (number + 1)  # each call draws
        advance(note=f"note {number}")
        print("a message " + "x" * 60, file=sys.stderr) if number == 1 else None
        console.say("a long path " + "y" * 100) if number == 2 else None
        if number == 3:
            with console.above_bar():
                print("a result " + "z" * 100)
"""


def test_on_a_terminal_one_bar_is_drawn_below_the_messages() -> None:
    screen = in_terminal(sys.executable, "-c", BAR, columns=90)
    assert re.fullmatch(r"reading ━+ 0 of 4 files", screen.shown[0].strip())
    assert any("2 of 4 files" in shown and "note 1" in shown for shown in screen.shown)
    assert all(shown.count("reading") <= 1 for shown in screen.shown)
    lines = [line[:9] for line in screen.shown[-1].splitlines() if line]
    assert lines == ["a message", "a long pa", "a result ", "reading: "]
