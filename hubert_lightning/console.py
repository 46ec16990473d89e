"""Output for people: messages on standard error, progress bars, and the style of figures.

A run of several processes prints each message once.
"""

import logging
import os
import select
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAUNCHER_RANKS = ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables by which SLURM, LSF and MPI number the processes that they start, over all nodes."""
NOISE = (
    "💡 Tip:",  # advertisements
    "`Trainer(limit_val_batches=",  # repeats the user's own setting at each start
    "`weights_only` was not set",  # Lightning's own choice
)
"""Beginnings of library messages that are of no use to a user of this package."""
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8c8c8c"
"""Colours of figures: our result, what it is compared with, the baseline."""
COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00", GREY)
"""Colours of the lines of a figure, in order; they differ for colour-blind readers too (Okabe and Ito 2008)."""
COLUMN, PAGE = 3.4, 7.0
"""Widths of a figure in inches: one column of a paper, and both columns. The text of a figure is 8 points high."""
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
"""Formats in which a figure is written: for the screen, the web and a paper."""

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
        for handler in logging.getLogger(library).handlers:
            handler.addFilter(_is_no_noise)


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
    """Prints the messages of a run's first process: the other processes log the same ones."""

    def emit(self, record: logging.LogRecord) -> None:
        if prints():
            print(self.format(record), file=sys.stderr, flush=True)


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


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)


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


class Bar(Protocol):
    """Advances a progress bar."""

    def __call__(self, amount: float = 1, note: str = "") -> None:
        """Advance the bar.

        Args:
            amount: Work done since the last call, in the bar's unit.
            note: Text beside the bar, such as the best result so far; an empty text keeps the one before.
        """


@contextmanager
def progress(description: str, total: float, unit: str = "") -> Iterator[Bar]:
    """Show a progress bar on standard error while the block runs, and remove it at the end.

    Standard output stays free for results. Of the ranks of a run, the first one shows the bar.

    Args:
        description: The work, such as "reading TextGrids".
        total: Amount of work; two decimals are shown of a float, none of an integer.
        unit: Unit of the amount, such as "h" or "files"; a percentage is shown if not given.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    digits = 2 if isinstance(total, float) else 0
    amount = TextColumn(f"{{task.completed:.{digits}f}} of {{task.total:.{digits}f}} {unit}")
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        amount if unit else TaskProgressColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Bars(*columns, console=console, redirect_stdout=False, transient=True, disable=not prints()) as bars:
        task = bars.add_task(description, total=total, note="")

        def advance(amount: float = 1, note: str = "") -> None:
            bars.advance(task, amount)
            if note:
                bars.update(task, note=note)

        yield advance


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
        self._began[name] = time.monotonic()
        following = self._names[number:]
        factor = self._factor(number)
        stage, left = factor * self._seconds[name], factor * sum(self._seconds[later] for later in following)
        say(f"stage {number + 1} of {len(self._names)}: {name}, about {minutes(stage)} ({minutes(left)} left of all)")

    def _factor(self, number: int) -> float:
        """Measured time of the stages before this one, relative to the expected time; 1 if too little is measured."""
        expected = sum(self._seconds[name] for name in self._names[:number])
        if expected < 0.05 * sum(self._seconds.values()) or not self._began:
            return 1.0
        return (time.monotonic() - min(self._began.values())) / expected


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
        print(sentence, file=sys.stderr, flush=True)


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw figures in this package's style inside the block, or in the function that this decorates.

    Text is 8 points high, so that a figure of `COLUMN` inches fits a paper's column without scaling.
    """
    from cycler import cycler
    from matplotlib import rc_context

    style: dict[Any, Any] = {  # matplotlib types its keys one by one
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "figure.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "axes.grid": False,
        "axes.prop_cycle": cycler(color=COLOURS),
        "lines.linewidth": 1.2,
        "lines.markersize": 3.5,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "figure.constrained_layout.use": True,
        "figure.figsize": (COLUMN, 2.4),
        "savefig.dpi": 200,
        "svg.fonttype": "path",  # the same letters on every machine
        "svg.hashsalt": "hubert_lightning",  # the same file on every call
        "pdf.fonttype": 42,  # TrueType, as publishers ask
    }
    with rc_context(style):
        yield


def figure_files(figure: "Figure", path: Path) -> dict[Path, bytes]:
    """Render a figure as PNG, SVG and PDF.

    Args:
        figure: Figure, drawn inside `figure_style`.
        path: Path of one of the files; the others have the same name and their own suffix.

    Returns:
        Content of each file by its path, the PNG first.
    """
    return {path.with_suffix(suffix): _rendered(figure, suffix.removeprefix(".")) for suffix in FIGURE_SUFFIXES}


def png_of(figure: "Figure") -> bytes:
    """Render a figure as PNG in this package's style: no frame above and to the right of the axes, 200 dots an inch."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return _rendered(figure, "png")


def _rendered(figure: "Figure", format: str) -> bytes:
    without_date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    content = BytesIO()
    with figure_style():
        figure.savefig(content, format=format, metadata=without_date.get(format))
    return content.getvalue()
