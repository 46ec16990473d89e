"""Progress bars: the first rank of a run draws one, or prints lines where there is no terminal."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hubert_lightning.first_process import prints

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

REDRAWN = 0.1
"""Seconds between two drawings of a bar."""
FIRST_LINE, BETWEEN_LINES, MOST_LINES = 10, 30, 50
"""Without a terminal: seconds before the first line on work in progress, the fewest between two lines, and the lines of
equal parts of the work."""


class Bar:
    """Work in progress, shown as a bar on a terminal and as a line now and then elsewhere.

    Attributes:
        description: The work, such as "reading TextGrids".
        total: Amount of work, None if it is not known.
        unit: Unit of the amount.
        done: Amount that is done.
        note: Text beside the bar.
    """

    def __init__(self, description: str, total: float | None, unit: str, done: float = 0) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self.note = ""
        self.at_most = False
        self._first = done
        self._began = self._latest = clock()
        self._anchors: list[tuple[float, float]] = []

    def __call__(self, amount: float = 1, note: str = "") -> None:
        """Advance the bar.

        Args:
            amount: Work done since the last call, in the bar's unit.
            note: Text beside the bar, such as the best result so far; an empty text keeps the one before.
        """
        self.done += amount
        self.note = note or self.note
        self._latest = clock()
        self._keep_anchor()
        _display.show(self)

    @property
    def amount(self) -> str:
        """The amount of work that is done, such as "1200 of 5000 steps"."""
        digits = 2 if isinstance(self.total, float) else 0
        if self.total is None:
            return f"{self.done:.{digits}f} {self.unit}".strip() if self.unit else ""
        if self.unit:
            return f"{self.done:.{digits}f} of {self.total:.{digits}f} {self.unit}"
        return f"{100 * self.done / self.total if self.total else 100:.0f} %"

    @property
    def seconds_left(self) -> float | None:
        """The expected time until the work is done, by the speed in the last half of the time; None if unknown."""
        if self.total is None or not self._anchors:
            return None
        moment, done = self._anchors[0]
        if self._latest - moment < 1 or self.done <= done:
            return None
        left = (self._latest - moment) * (self.total - self.done) / (self.done - done)
        return max(left - (clock() - self._latest), 0)

    @property
    def left(self) -> str:
        """The expected time until the work is done, such as "12 min left"; empty if it is not known."""
        seconds = self.seconds_left
        return "" if seconds is None else f"{'at most ' * self.at_most}{short(seconds)} left"

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return clock() - self._began

    def line(self, *more: str) -> str:
        """The state of the work on one line."""
        facts = ", ".join(filter(None, (self.amount, self.left, self.note, *more)))
        return f"{self.description}: {facts}" if facts else self.description

    def end(self) -> str:
        """What was done, in which time."""
        digits = 2 if isinstance(self.total, float) else 0
        done = f"{self.done - self._first:.{digits}f} {self.unit} in " if self.unit else ""
        return ", ".join(filter(None, (f"{self.description}: {done}{short(self.seconds)}", self.note)))

    def _keep_anchor(self) -> None:
        """Keep two moments of the past: the older one is half to three quarters of the time ago."""
        if not self._anchors:
            self._anchors = [(self._latest, self.done)]
        elif self._latest - self._began > 2 * (self._anchors[-1][0] - self._began):
            self._anchors = [self._anchors[-1], (self._latest, self.done)]


@contextmanager
def progress(
    description: str | None,
    total: float | None,
    unit: str = "",
    done: float = 0,
    *,
    at_most: bool = False,
    keep: bool = False,
) -> Iterator[Bar]:
    """Show the progress of a block on standard error: a bar on a terminal, else a line at growing intervals.

    Standard output stays free for results. Of the ranks of a run, the first one shows the bar. There is one bar: work
    inside other work is named beside the bar of the outer one. Work that lasts leaves a line with its duration.

    Args:
        description: The work, such as "reading TextGrids"; nothing is shown if it is None.
        total: Amount of work, None if it is not known; two decimals are shown of a float, none of an integer.
        unit: Unit of the amount, such as "h" or "files"; a percentage is shown if not given.
        done: Amount that an earlier process did.
        at_most: Whether the work may end before the amount is done.
        keep: Whether short work leaves a line too.

    Yields:
        Function that advances the bar.
    """
    bar = Bar(description or "", total, unit, done)
    if description is None:
        yield bar
        return
    bar.at_most = at_most
    _display.open(bar)
    try:
        yield bar
    except BaseException:
        _display.close(bar, "")
        raise
    _display.close(bar, bar.end() if keep or bar.seconds >= FIRST_LINE else "")


@contextmanager
def erased_bar() -> Iterator[None]:
    """Erase the bar, if there is one, while the block prints."""
    with _display.erased():
        yield


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Show no progress inside the block."""
    _display.hidden += 1
    try:
        yield
    finally:
        _display.hidden -= 1


class _Display:
    """The bars of this process: the first one is drawn, those inside it are named beside it.

    Only calls draw, no thread: a worker that is forked while a thread holds the lock of a stream would wait for ever.
    """

    def __init__(self) -> None:
        self.bars: list[Bar] = []
        self.hidden = 0
        self._live: Live | None = None
        self._drawn = -math.inf
        self._line, self._line_done = -math.inf, 0.0

    def open(self, bar: Bar) -> None:
        self.bars.append(bar)
        if len(self.bars) > 1 or self.hidden or not prints():
            return
        from rich.file_proxy import FileProxy  # stands for standard error while another bar of rich is drawn

        self._line, self._line_done = -math.inf, bar.done
        console = _stderr_console()
        if (console.is_interactive or console.is_jupyter) and not isinstance(sys.stderr, FileProxy):
            self._console = console
            self._draw()

    def _draw(self) -> None:
        from rich.live import Live

        self._live = Live(
            get_renderable=self._drawing,
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start(refresh=True)
        self._drawn = clock()

    def show(self, bar: Bar) -> None:
        if bar not in self.bars or self.hidden or not prints():
            return
        now = clock()
        if self._live is not None:
            if now - self._drawn >= REDRAWN:
                self._drawn = now
                self._live.refresh()
        elif self._line_is_due(self.bars[0]):
            self._line, self._line_done = now, self.bars[0].done
            _print(self.bars[0].line(*(inner.line() for inner in self.bars[1:])))

    @contextmanager
    def erased(self) -> Iterator[None]:
        """Erase the bar while the block runs."""
        if self._live is None:
            yield
            return
        self._live.stop()
        self._live = None
        try:
            yield
        finally:
            self._draw()

    def close(self, bar: Bar, sentence: str) -> None:
        if bar not in self.bars:  # in a forked process
            return
        if bar is self.bars[0] and self._live is not None:
            self._live.stop()
            self._live = None
        inner = bar is not self.bars[0]
        self.bars.remove(bar)
        if sentence and not inner and not self.hidden:
            _print(sentence)

    def after_fork(self) -> None:
        """Leave the terminal to the parent process."""
        self.bars, self._live = [], None
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            setattr(sys, name, getattr(stream, "rich_proxied_file", stream))

    def _line_is_due(self, bar: Bar) -> bool:
        """Whether to print a line: after 10 s, then at each doubling of the time and at each fiftieth of the work."""
        now = clock()
        if self._line == -math.inf:
            return now - bar._began >= FIRST_LINE
        if now - self._line < BETWEEN_LINES:
            return False
        doubled = now - bar._began >= 2 * (self._line - bar._began)
        return doubled or (bar.total is not None and bar.done - self._line_done >= bar.total / MOST_LINES)

    def _drawing(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self.bars:
            return Text()
        bar, *inner = self.bars
        before, after = f"{bar.description} ", f" {'  '.join(filter(None, (bar.amount, bar.left)))}"
        room = self._console.width - len(before) - len(after)
        first = Table.grid()
        first.add_row(
            Text(before, no_wrap=True, overflow="ellipsis"),
            ProgressBar(bar.total, bar.done, width=max(min(room, 40), 1), pulse=bar.total is None),
            Text(after, no_wrap=True, overflow="ellipsis"),
        )
        notes = ", ".join(filter(None, (bar.note, *(each.line() for each in inner))))
        second = Text(notes, style="dim", no_wrap=True, overflow="ellipsis")
        return Group(first, second) if notes else first


_display = _Display()
os.register_at_fork(after_in_child=_display.after_fork)


def _print(sentence: str) -> None:
    """Print a line on standard error, while no bar is drawn."""
    if prints():
        print(sentence, file=sys.stderr, flush=True)


def _stderr_console() -> "Console":
    """A console on standard error. Its cursor stays visible: a process that is killed cannot show it again."""
    from rich.console import Console

    class VisibleCursor(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False

    return VisibleCursor(stderr=True)


def clock() -> float:
    """Return the time in seconds since an arbitrary moment, as of progress."""
    return time.monotonic()


def short(seconds: float) -> str:
    """Format a duration in few letters: "40 s", "12 min", "3 h 05 min", "2 d 4 h"."""
    if seconds < 59.5:
        return f"{seconds:.{int(seconds < 0.95)}f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
