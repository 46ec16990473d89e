"""The table of the metrics that every fit keeps in its folder, `metrics.csv`, written by a CSVLogger.

After a restart, rows up to the checkpoint are kept, and later ones are logged again.
"""

import csv
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lightning.pytorch.loggers import CSVLogger, Logger

from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular, write_whole
from hubert_lightning.first_process import is_first_process
from hubert_lightning.training.lightning_internals import METRICS_TABLE, continue_table

log = logging.getLogger(__name__)

RECORD = "record.json"
"""File with the settings of a run as they were built, which all loggers get."""
LONGEST_ROW = 2**16
"""Largest number of bytes in a row of metrics.csv."""
FLUSHED_STEPS = 1
"""The table is written at each log, so that a run can be watched by its file, and a kill loses one row at most."""
FORMER_NAMES = {
    **{f"train/{name}": f"speed/{name}" for name in ("audio_seconds_per_second", "data_wait", "mfu", "waste")},
    **{f"val/{name}_perplexity": f"units/{name}_perplexity" for name in ("label", "predicted")},
}
"""Names of metrics in the tables of earlier versions, and the names since."""


def table_logger(folder: Path) -> CSVLogger:
    """Return the logger of the table in a run's folder."""
    return CSVLogger(folder, name="", version="", flush_logs_every_n_steps=FLUSHED_STEPS)


def keeps_table(logger: Logger, folder: Path) -> bool:
    """Return whether a logger writes the table in a run's folder."""
    return isinstance(logger, CSVLogger) and Path(logger.log_dir) == folder


def read_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the metrics of a fit, of all its starts.

    Runs of earlier versions, with a table for each start and other names, are read as well.

    Args:
        run: Folder of a run with one iteration.

    Returns:
        Steps, counted from 1, and values of each metric, in the order of the steps; empty without a table. A metric of
        the K-means rounds has rounds in place of steps.

    Raises:
        UserError: A table cannot be read.
    """
    tables = (
        [run / METRICS_TABLE]
        if (run / METRICS_TABLE).exists()
        else sorted(
            [*run.glob(f"version_*/{METRICS_TABLE}"), *run.glob(f"lightning_logs/version_*/{METRICS_TABLE}")],
            key=lambda path: int(path.parent.name.rpartition("_")[2]) if path.parent.name[8:].isdecimal() else 0,
        )
    )
    metrics: dict[str, dict[int, float]] = {}
    for table in tables:
        for row in _rows(table):
            for name, text in row.items():
                value = _number(text) if name and name not in ("step", "epoch") else None
                if value is not None:
                    metrics.setdefault(FORMER_NAMES.get(name, name), {})[int(row["step"]) + 1] = value
    return {name: sorted(values.items()) for name, values in sorted(metrics.items())}


def _number(text: object) -> float | None:
    try:
        return float(text) if isinstance(text, str) else None
    except ValueError:
        return None


def keep_rows(logger: CSVLogger, checkpoint: dict[str, Any]) -> dict[int, set[str]]:
    """Keep the rows of metrics.csv up to the step of a checkpoint; a CSVLogger removes the table when it starts.

    The row of the checkpoint's own step is missing if the run was killed between saving and logging it. The table is
    replaced whole here. Later, the CSVLogger itself rewrites it in place when a metric is logged for the first time.

    Args:
        logger: Logger that has logged nothing yet.
        checkpoint: Content of the checkpoint.

    Returns:
        Names of the metrics in the other rows, by step, on rank 0.

    Raises:
        UserError: The table cannot be read; or the disk is full or read-only.
    """
    table = Path(logger.log_dir) / METRICS_TABLE
    if not is_first_process() or not table.exists():
        return {}
    rows = _rows(table)
    last = checkpoint["global_step"] - 1  # the Trainer counts from 0
    repeated = last if checkpoint.get("validation_due") else None
    kept = [
        row
        for row in rows
        if _of_labels(row) or (int(row["step"]) <= last and not (int(row["step"]) == repeated and _validated(row)))
    ]
    names = sorted({name for row in kept for name, value in row.items() if name and value})
    if kept:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        write_whole(table, text.getvalue().encode())
    else:
        table.unlink()
    continue_table(logger, str(table), names)
    others, kept_ids = dict[int, set[str]](), set(map(id, kept))
    for row in rows:
        if id(row) not in kept_ids:
            others.setdefault(int(row["step"]), set()).update(name for name, value in row.items() if name and value)
    return others


def _rows(table: Path) -> list[dict[str, str]]:
    """The rows of a table that are intact and have a step."""
    check_regular(table)
    try:
        with table.open("rb") as file:
            rows = list(csv.DictReader(_lines(file)))
    except (OSError, csv.Error) as error:
        raise UserError(f"{table}: cannot be read ({error}); move it away, and run the same command again") from error
    intact = [row for row in rows if "\ufffd" not in str(row)]
    if len(intact) < len(rows):
        log.warning("%s: %d corrupt rows are left out", table, len(rows) - len(intact))
    return [row for row in intact if (row.get("step") or "").isdecimal() and row["step"].isascii()]


def _lines(file: BinaryIO) -> Iterator[str]:
    while line := file.readline(LONGEST_ROW):
        if len(line) == LONGEST_ROW:
            raise csv.Error(f"a row of more than {LONGEST_ROW} bytes")
        yield line.decode(errors="replace")


def _of_labels(row: dict[str, str]) -> bool:
    """Whether a row was logged before the first step; its number may be that of a K-means round."""
    return any(value and name.startswith("labels/") for name, value in row.items())


def _validated(row: dict[str, str]) -> bool:
    return any(value and name.startswith("val/") for name, value in row.items())
