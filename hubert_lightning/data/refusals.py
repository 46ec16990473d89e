"""Files that cannot be used, listed with their reasons."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from hubert_lightning.files import printable, write_whole

MAX_PRINTED = 20


class RefusedFile(NamedTuple):
    """A file that is not used.

    Attributes:
        path: Path of the file.
        reason: Reason and remedy, for the user.
    """

    path: Path
    reason: str


class FileRemark(NamedTuple):
    """Something unusual about a file that is used.

    Attributes:
        path: Path of the file.
        remark: Kind, a colon, and a sentence.
    """

    path: Path
    remark: str


def write_listing(rows: Sequence[RefusedFile | FileRemark], path: Path) -> None:
    """Write a line for each file: its path, a tab and its reason or remark. Remove the listing if there are none.

    Raises:
        UserError: The disk is full or cannot be written to.
    """
    lines = [f"{printable(file)}\t{' '.join(sentence.split())}\n" for file, sentence in rows]
    if lines:
        write_whole(path, "".join(lines).encode())
    else:
        path.unlink(missing_ok=True)


def print_refusals(refusals: Sequence[RefusedFile], console: Console) -> None:
    """Print the first few files with their reasons, and the number of the others."""
    for path, reason in refusals[:MAX_PRINTED]:
        console.print(f"  {escape(printable(path))}: {escape(reason)}", soft_wrap=True)
    if len(refusals) > MAX_PRINTED:
        console.print(f"  and {len(refusals) - MAX_PRINTED} more")
