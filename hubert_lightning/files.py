"""Files that appear whole or not at all; what kind of file one is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def printable(path: Path) -> str:
    """A path as text on one line, with escapes for what is no UTF-8 and for line breaks and tabs."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    return name.translate({ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"})


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: a length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name once it is closed and on the disk; its folder is made.

    Raises:
        ValueError: The disk is full, or cannot be written to; what had that name stays.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}); what was finished before is kept, so make room and run the "
            "same command again"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears whole or not at all; raises as `replacing` does."""
    with replacing(path) as file:
        file.write(content)
