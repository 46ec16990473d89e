"""Text files of any usual encoding and compression, with limits on their size and the length of their lines."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from hubert_lightning.errors import UserError
from hubert_lightning.files import BUFFER_SIZE
from hubert_lightning.untrusted.file_kind import compression

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_GROWTH = 300
"""Largest ratio of a text to its compressed file; a manifest of a million rows that differ only in their id has 115."""
ALWAYS_ALLOWED_SIZE = 2**26
"""Size in bytes that a text may have, however small its compressed file is."""
LONGEST_LINE = 2**26
"""Characters of a line."""
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""First bytes of a text in UTF-16."""

Result = TypeVar("Result")


class _Reader(io.RawIOBase):
    """The bytes of a file, decompressed; its errors are sentences that name the file."""

    def __init__(self, path: Path, method: str | None) -> None:
        super().__init__()
        self.path, self.method = path, method
        self.max_size = max(MAX_GROWTH * path.stat().st_size, ALWAYS_ALLOWED_SIZE)
        self.file = self._read(lambda: self._opened(path, method))

    @staticmethod
    def _opened(path: Path, method: str | None) -> io.BufferedIOBase:
        if method == "gzip":
            return gzip.GzipFile(path)
        if method == "bzip2":
            return bz2.BZ2File(path)
        return lzma.LZMAFile(path) if method == "xz" else path.open("rb")

    def _read(self, read: Callable[[], Result]) -> Result:
        try:
            return read()
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{self.path}: compressed with {self.method}, and corrupt ({error}); copy or download it again"
            ) from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error}); give a text file") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        count = self._read(lambda: self.file.readinto(buffer))
        if self.method and self.file.tell() > self.max_size:
            raise UserError(
                f"{self.path}: compressed with {self.method}, and more than {MAX_GROWTH} times as large as its file; "
                "decompress it where you trust it"
            )
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._read(lambda: self.file.seek(offset, whence))

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


@contextmanager
def decompressed(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, decompressed from gzip, bzip2 or xz.

    Raises:
        UserError: The file cannot be read, is compressed in another way, or is corrupt. Errors that the caller raises
            while it reads pass unchanged.
    """
    method = compression(path)
    if method in ("zstd", "zip"):
        raise UserError(f"{path}: compressed with {method}; decompress it, or compress it with gzip, bzip2 or xz")
    with _Reader(path, method) as raw, io.BufferedReader(raw, BUFFER_SIZE) as file:
        yield file


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """Open a text in UTF-8, or UTF-16 with a byte order mark, which may be compressed.

    Args:
        path: Path of the text.
        newline: Treatment of line ends, as in `open`.

    Raises:
        UserError: The file cannot be read, or is not such a text.
    """
    with decompressed(path) as file:
        encoding = "utf-16" if file.read(2) in UTF_16_MARKS else "utf-8-sig"
        file.seek(0)
        try:
            yield io.TextIOWrapper(file, encoding, newline=newline)
        except UnicodeError as error:  # also a truncated UTF-16 file
            raise UserError(f"{path}: is not UTF-8, nor UTF-16 with its mark; convert it") from error


def lines_of(path: Path) -> Iterator[str]:
    """Read the lines of a text one by one, each with its line feed.

    Raises:
        UserError: As in `open_text`, or a line is too long.
    """
    with open_text(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}: a line of more than {LONGEST_LINE} characters; give a text of shorter lines")
            yield line
