"""Pictures, audio and tables for loggers: W&B, TensorBoard, and any logger with a method `log_image` like W&B's."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

from hubert_lightning.errors import check_installed
from hubert_lightning.figure_style import png_of
from hubert_lightning.frames import SAMPLE_RATE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = Mapping[str, "Figure"]
"""Figures by their captions."""


def pictorial_loggers(trainer: Trainer) -> list[Logger]:
    """Return the loggers of a Trainer that take pictures; empty on ranks other than the first."""
    return [logger for logger in trainer.loggers if trainer.is_global_zero and _takes_pictures(logger)]


def check_drawing(trainer: Trainer) -> None:
    """Check that pictures can be drawn if a logger takes them; on all ranks, so that none waits for one that ended.

    Raises:
        UserError: The package that draws is not installed.
    """
    if any(map(_takes_pictures, trainer.loggers)):
        check_installed("matplotlib", "or choose another trainer.logger")


def logged_step(trainer: Trainer) -> int:
    """Return the step with which Lightning logs the metrics of a validation, so that pictures have the same axis."""
    return max(trainer.global_step - 1, 0)


def log_figures(loggers: Iterable[Logger], name: str, draw: Callable[[], Drawn], step: int) -> None:
    """Draw figures, and log them.

    Args:
        loggers: Loggers that take pictures; without any, nothing is drawn.
        name: Name of the group of figures, such as "units/utterances".
        draw: Function that draws.
        step: Step of the log.
    """
    loggers = list(loggers)
    if not loggers:
        return
    images = {caption: Image.open(io.BytesIO(png_of(figure))).convert("RGB") for caption, figure in draw().items()}
    for number, (caption, image) in enumerate(images.items(), start=1):
        key = name if len(images) == 1 else f"{name}/{number}"  # W&B shows pictures of one key in one size
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(key, np.array(image), step, dataformats="HWC")
            else:
                any_logger: Any = logger  # has W&B's method
                any_logger.log_image(key=key, images=[image], step=step, caption=[caption])


def log_audio(loggers: Iterable[Logger], name: str, waveforms: Mapping[str, np.ndarray], step: int) -> None:
    """Log 16 kHz audio to the loggers that take it.

    Args:
        loggers: Loggers that take pictures.
        name: Name of the group.
        waveforms: (samples,) in [-1, 1], by captions.
        step: Step of the log.
    """
    for number, (caption, waveform) in enumerate(waveforms.items(), start=1):
        key = name if len(waveforms) == 1 else f"{name}/{number}"
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_audio(key, waveform[None], step, sample_rate=SAMPLE_RATE)
            elif hasattr(logger, "log_audio"):
                logger.log_audio(key=key, audios=[waveform], step=step, caption=[caption], sample_rate=[SAMPLE_RATE])


class Sound(np.ndarray):
    """A cell of a table with 16 kHz audio: (samples,) float32 in [-1, 1]."""


class Markup(str):
    """A cell of a table with HTML, for loggers that show it; `plain` is its text for others."""

    plain: str

    def __new__(cls, html: str, plain: str) -> "Markup":
        cell = super().__new__(cls, html)
        cell.plain = plain
        return cell


def log_table(loggers: Iterable[Logger], name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Log a table: with players and HTML in W&B, as text in TensorBoard.

    Args:
        loggers: Loggers that take pictures.
        name: Name of the table.
        rows: Cells by the names of the columns, the same in every row: texts, numbers, `Sound`, `Markup`, or None.
        step: Step of the log.
    """
    if not rows:
        return
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, _markdown(rows), step)
        elif hasattr(logger, "log_table"):
            media = _package_of(logger)
            data = [[_cell(value, media) for value in row.values()] for row in rows]
            logger.log_table(key=name, columns=[*rows[0]], data=data, step=step)


def log_page(loggers: Iterable[Logger], name: str, html: str, step: int) -> None:
    """Log HTML to W&B, which keeps it in the run's folder, unlike the cells of a table.

    Args:
        loggers: Loggers that take pictures.
        name: Name of the page.
        html: Content of the page.
        step: Step of the log.
    """
    for logger in loggers:
        if hasattr(media := _package_of(logger), "Html"):
            page: Any = {name: media.Html(html, inject=False)}
            logger.log_metrics(page, step)


def _package_of(logger: Logger) -> Any:
    """Return the package that a logger logs by, such as wandb, which this package does not import."""
    return import_module(type(logger.experiment).__module__.split(".")[0])  # type: ignore[attr-defined]


def _takes_pictures(logger: Logger) -> bool:
    if isinstance(logger, DummyLogger):  # of fast_dev_run; has every method
        return False
    return isinstance(logger, TensorBoardLogger) or hasattr(logger, "log_image")


def _cell(value: Any, media: Any) -> Any:
    """Wrap audio and HTML in the classes of the logger's package (wandb.Audio, wandb.Html)."""
    if isinstance(value, Sound) and hasattr(media, "Audio"):
        return media.Audio(np.asarray(value), sample_rate=SAMPLE_RATE)
    if isinstance(value, Markup):
        return media.Html(str(value), inject=False) if hasattr(media, "Html") else value.plain
    return value


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [name for name in rows[0] if not any(isinstance(row[name], Sound) for row in rows)]
    lines = [columns, ["---"] * len(columns), *([_text(row[name]) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    text = value.plain if isinstance(value, Markup) else "" if value is None else str(value)
    return escape(" ".join(text.split())).replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
