"""The table of a CSVLogger after a restart: rows up to the checkpoint are kept, later ones are logged again."""

import csv
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lightning.pytorch.loggers import CSVLogger

from hubert_lightning.console import is_first_process
from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular, write_whole
from hubert_lightning.training.lightning_internals import METRICS_TABLE, continue_table

log = logging.getLogger(__name__)

LONGEST_ROW = 2**16
"""Largest number of bytes in a row of metrics.csv."""


def keep_rows(logger: CSVLogger, checkpoint: dict[str, Any]) -> None:
    """Keep the rows of metrics.csv up to the step of a checkpoint; a CSVLogger removes the table when it starts.

    The row of the checkpoint's own step is missing if the run was killed between saving and logging it. The table is
    replaced whole here. Later, the CSVLogger itself rewrites it in place when a metric is logged for the first time.

    Args:
        logger: Logger that has logged nothing yet.
        checkpoint: Content of the checkpoint.

    Raises:
        UserError: The table cannot be read; or the disk is full or read-only.
    """
    table = Path(logger.log_dir) / METRICS_TABLE
    if not is_first_process() or not table.exists():
        return
    rows = _rows(table)
    last = checkpoint["global_step"] - 1  # the Trainer counts from 0
    repeated = last if checkpoint.get("validation_due") else None
    kept = [row for row in rows if int(row["step"]) <= last and not (int(row["step"]) == repeated and _validated(row))]
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


def _validated(row: dict[str, str]) -> bool:
    return any(value and name.startswith("val/") for name, value in row.items())
