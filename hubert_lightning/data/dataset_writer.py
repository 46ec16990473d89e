"""Hugging Face datasets, written row by row as a folder of parquet tables."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.files import new_folder

ROWS_OF_A_GROUP = 256
"""Rows that are in memory together."""
ROWS_OF_A_FILE = 100_000

Row = Mapping[str, Any]
COLUMNS = {
    "id": "string",
    "units": "[int32]",
    "durations": "[int32]",
    "bpe": "[int32]",
    "speaker": "string",
    "text": "string",
    "duration": "float64",
    "language": "string",
    "audio": "string",
}
"""Columns of units and their types, those in brackets as lists."""


def check_dataset(output: Path) -> None:
    """Check that a dataset can be written.

    Args:
        output: Folder of the dataset.

    Raises:
        UserError: datasets is not installed, or the folder exists.
    """
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise UserError('datasets is not installed; run `pip install "hubert-lightning[datasets]"`') from error
    if output.exists():
        raise UserError(f"{output}: exists already; remove it, or choose another folder for the dataset")


@contextmanager
def dataset_writer(output: Path, columns: Mapping[str, str]) -> Iterator[Callable[[Row], None]]:
    """Yield a function that writes a row; the folder appears whole at the end.

    `datasets.load_dataset(OUTPUT)` reads the tables `train-00000.parquet`, … of the folder.

    Args:
        output: Folder to write.
        columns: Type of each column by its name, as in `COLUMNS`.

    Raises:
        UserError: As in `check_dataset`, or the disk is full or cannot be written to.
    """
    check_dataset(output)
    from datasets import Features, List, Value
    from pyarrow import Table
    from pyarrow.parquet import ParquetWriter

    features = Features(
        {name: List(Value(kind.strip("[]"))) if kind.startswith("[") else Value(kind) for name, kind in columns.items()}
    )
    schema = features.arrow_schema
    rows: list[Row] = []
    num_rows = 0
    with new_folder(output) as folder:
        writer: Any = None

        def flush() -> None:
            nonlocal writer, num_rows
            if writer is not None and num_rows >= ROWS_OF_A_FILE * _number(folder):
                writer.close()
                writer = None
            if writer is None:
                writer = ParquetWriter(folder / f"train-{_number(folder):05d}.parquet", schema)
            writer.write_table(Table.from_pylist([dict(row) for row in rows], schema=schema))
            num_rows += len(rows)
            rows.clear()

        def write(row: Row) -> None:
            rows.append(row)
            if len(rows) == ROWS_OF_A_GROUP:
                flush()

        try:
            yield write
            if rows or writer is None:
                flush()
        finally:
            if writer is not None:
                writer.close()


def _number(folder: Path) -> int:
    """Number of tables in a folder."""
    return sum(1 for _ in folder.glob("*.parquet"))
