"""The style of this package's figures, and their files."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8c8c8c"
"""Colours of figures: our result, what it is compared with, the baseline."""
COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00", GREY)
"""Colours of the lines of a figure, in order; they differ for colour-blind readers too (Okabe and Ito 2008)."""
COLUMN, PAGE = 3.4, 7.0
"""Widths of a figure in inches: one column of a paper, and both columns. The text of a figure is 8 points high."""
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
"""Formats in which a figure is written: for the screen, the web and a paper."""


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw figures in this package's style inside the block, or in the function that this decorates.

    Text is 8 points high, so that a figure of `COLUMN` inches fits a paper's column without scaling.
    """
    from matplotlib import rc_context
    from matplotlib.rcsetup import cycler

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
