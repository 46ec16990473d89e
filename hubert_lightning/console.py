"""Output for people: messages on standard error, and progress bars.

A run of several processes prints each message once.
"""

import logging
import math
import os
import select
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

LAUNCHER_RANKS = ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables by which SLURM, LSF and MPI number the processes that they start, over all nodes."""
NOISE = (
    "💡 Tip:",  # advertisements
    "`Trainer(limit_val_batches=",  # repeats the user's own setting at each start
    "`weights_only` was not set",  # Lightning's own choice
    "GPU available:",  # a GPU that is not used has a warning
    "TPU available:",
    "LOCAL_RANK:",
    "Initializing distributed:",  # our own message names ranks that do not start
    "-" * 100 + "\ndistributed_backend",
    "Restoring states from the checkpoint",  # the run's first line says where it resumes
    "Restored all states from the checkpoint",
    "`Trainer.fit` stopped: `max_steps",  # its last line says what was done
)
"""Beginnings of library messages that are of no use to a user of this package."""
REDRAWN = 0.1
"""Seconds between two drawings of a bar."""
FIRST_LINE, BETWEEN_LINES, MOST_LINES = 10, 30, 50
"""Without a terminal: seconds before the first line on work in progress, the fewest between two lines, and the lines of
equal parts of the work."""
SECONDS_BEFORE_REPEATING = 3
"""Time that ranks other than the first wait before they print why they end."""
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(10), *range(11, 32), *range(127, 160))}
"""Control characters, except line feeds, and their printed form."""


def show_messages(of_ranks: bool) -> None:
    """Print this package's information and warnings on standard error, and hide messages that are noise.

    Without this call, as in a notebook, Python's defaults hold: warnings are shown, information is not.

    Args:
        of_ranks: Whether the processes that a launcher started are ranks of one run, of which only the first one
            prints; otherwise each process is a job of its own.
    """
    global _of_ranks
    _of_ranks = of_ranks
    package = logging.getLogger("hubert_lightning")
    if not any(isinstance(handler, _FirstRankHandler) for handler in package.handlers):
        package.addHandler(_FirstRankHandler())
    package.setLevel(logging.INFO)
    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(library)
        if any(type(handler) is logging.StreamHandler for handler in logger.handlers):
            logger.handlers = [_FirstRankHandler()]  # Lightning's own would print into the bar


_of_ranks = False


def prints() -> bool:
    """Whether this process prints the messages that are the same on all ranks."""
    return not _of_ranks or is_first_process()


def print_refusal(sentence: str) -> None:
    """Print why a command ends; if several ranks fail with the same message, only the first one prints it."""
    if not prints():
        time.sleep(SECONDS_BEFORE_REPEATING)  # meanwhile the launcher of a failed first rank ends this process
    # a name in a file may hold control characters
    print(f"hubert: {sentence.translate(CONTROLS)}", file=sys.stderr)


def output_is_closed() -> bool:
    """Whether the reader of standard output has closed the pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class _FirstRankHandler(logging.Handler):
    """Prints the messages of a run's first process, except noise: the other processes log the same ones."""

    def emit(self, record: logging.LogRecord) -> None:
        if not record.getMessage().startswith(NOISE):
            say(self.format(record))


def is_first_process() -> bool:
    """Whether this process is rank 0 of its run, or the only process; known before the ranks have connected.

    torchrun sets RANK; rank 0 need not be on the first node. Otherwise the number from SLURM, LSF or MPI counts, unless
    Lightning has started this process: Lightning sets the number of the node and that of the process on the node.
    """
    if rank := os.environ.get("RANK"):
        return rank == "0"
    launcher_rank = next(filter(None, map(os.environ.get, LAUNCHER_RANKS)), None)
    if "LOCAL_RANK" not in os.environ and launcher_rank:
        return launcher_rank == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


@dataclass
class Progress:
    """The current work of this process.

    Args:
        what: The work, as in "while {what}".
        count: Pieces of work begun since the process started; a count that does not grow is a stall.
        in_steps: Whether the work is batches of training, validation or test, which take seconds; other work, such as
            K-means, takes hours.
    """

    what: str = "starting"
    count: int = 0
    in_steps: bool = False


now = Progress()


def note(what: str, in_steps: bool = False) -> None:
    """Record the piece of work that begins."""
    now.what, now.in_steps = what, in_steps
    now.count += 1


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
            say(self.bars[0].line(*(inner.line() for inner in self.bars[1:])))

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
            say(sentence)

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


class Stages:
    """Announces the stages of a long command, with the time left of all of them.

    Args:
        seconds: Expected duration of each stage by its name, in order. The measured durations of finished stages
            correct the estimates of the others.
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._seconds = dict(seconds)
        self._names = list(seconds)
        self._began: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """Print that a stage begins, such as "stage 3 of 8: iteration 1, about 2 minutes (6 minutes left of all)".

        Args:
            name: Name of the stage.
        """
        number = self._names.index(name)
        self._began[name] = clock()
        following = self._names[number:]
        factor = self._factor(number)
        stage, left = factor * self._seconds[name], factor * sum(self._seconds[later] for later in following)
        say(f"stage {number + 1} of {len(self._names)}: {name}, about {minutes(stage)} ({minutes(left)} left of all)")

    def _factor(self, number: int) -> float:
        """Measured time of the stages before this one, relative to the expected time; 1 if too little is measured."""
        expected = sum(self._seconds[name] for name in self._names[:number])
        if expected < 0.05 * sum(self._seconds.values()) or not self._began:
            return 1.0
        return (clock() - min(self._began.values())) / expected


def stages(seconds: Mapping[str, float]) -> Stages:
    """Return the stages of a command; `begin` announces each one.

    Args:
        seconds: Expected duration of each stage by its name, in order.
    """
    return Stages(seconds)


def minutes(seconds: float) -> str:
    """Format a duration for a reader: "40 seconds", "1 minute", "12 minutes", "3 h 5 min"."""
    if seconds < 45:
        return f"{max(round(seconds / 5) * 5, 5)} seconds"
    rounded = max(round(seconds / 60), 1)
    if rounded < 120:
        return f"{rounded} minute{'s' * (rounded > 1)}"
    return f"{rounded // 60} h {rounded % 60} min"


def say(sentence: str) -> None:
    """Print a message on standard error, on the first rank, above the progress bar if there is one."""
    if prints():
        with _display.erased():
            print(sentence, file=sys.stderr, flush=True)


@contextmanager
def above_bar() -> Iterator[None]:
    """Print results of any length in the block, above the bar if both are on a terminal."""
    with _display.erased() if sys.stdout.isatty() else nullcontext():
        yield
