"""Files that appear whole or not at all; what kind of file one is; text of any usual encoding and compression."""

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
"""The first bytes of compressed files."""
BUFFER = 2**18
"""Bytes that are read at once."""
GROWTH, LEAST = 300, 2**26
"""Times that a compressed text may be as large as its file, and bytes that it may have in any case; a manifest of a
million rows that differ in their id alone is 115 times as large."""
LONGEST_LINE = 2**26
"""Characters of a line."""
DAMAGED_ZIP = (OSError, EOFError, ValueError, RuntimeError, OverflowError, zlib.error, struct.error, zipfile.BadZipFile)
"""What zipfile ends in, depending on which byte is wrong (RuntimeError: it seems to need a password or a method)."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def printable(path: Path) -> str:
    """A path as text on one line, with escapes for what is no UTF-8 and for line breaks and tabs."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    return name.translate({ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"})


def composed(name: str) -> str:
    """A name in NFC: of Unicode's normal forms, file systems and programs choose one (macOS NFD)."""
    return unicodedata.normalize("NFC", name)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: a length, then JSON; raises as `check_regular` does."""
    check_regular(path)
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
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk, where the disk can tell."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_whole(archive: Path) -> bool:
    """Whether every byte of a zip archive, such as a checkpoint, is as it was written, by its checksums."""
    try:
        with zipfile.ZipFile(archive) as records:
            return records.testzip() is None
    except DAMAGED_ZIP:
        return False


def has_its_end(archive: Path) -> bool:
    """Whether a zip archive has the directory at its end, which a file that was cut short lacks; reads no more."""
    try:
        with zipfile.ZipFile(archive):
            return True
    except DAMAGED_ZIP:
        return False


def check_regular(path: Path) -> None:
    """Refuse what is there and is no file, such as a pipe, which would wait for whoever writes to it.

    Raises:
        ValueError: The path is that of a folder, a pipe, a socket or a device.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: {kind_of(path)}, which is not read here; give a file")


def kind_of(path: Path | str) -> str:
    """What a path is that is no regular file: opening a pipe waits for whoever writes to it, a device has no end.

    Raises:
        OSError: There is nothing.
    """
    mode = os.stat(path).st_mode
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((kind for is_one, kind in kinds.items() if is_one(mode)), "a device")


def compression(path: Path) -> str | None:
    """How a file is compressed, told by its first bytes.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path}: {kind_of(path)}, which is not read here; give a file")
        with path.open("rb") as file:
            first = file.read(8)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); correct the path") from error
    return next((name for start, name in COMPRESSIONS.items() if first.startswith(start)), None)


class _Reader(io.RawIOBase):
    """The bytes of a file; what is wrong with it is a sentence that names it."""

    def __init__(self, path: Path, how: str | None) -> None:
        super().__init__()
        self.most = max(GROWTH * path.stat().st_size, LEAST)
        openers: dict[str | None, Callable[..., Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
        self.path, self.how = path, how
        self.file = self._tried(openers.get(how, open), path, "rb")

    def _tried(self, read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{self.path}: compressed with {self.how}, and damaged ({error}); copy or download it again"
            ) from error
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror or error}); give a text file") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._tried(self.file.readinto, buffer))
        if self.how and self.file.tell() > self.most:
            raise ValueError(
                f"{self.path}: compressed with {self.how}, and more than {GROWTH} times as large as its file; "
                "decompress it where you trust it"
            )
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._tried(self.file.seek, offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


@contextmanager
def decompressed(path: Path) -> Iterator[BinaryIO]:
    """A file to read bytes from, without the compression of gzip, bzip2 or xz.

    Raises:
        ValueError: It cannot be read, is compressed in another way, or is not whole. Other errors of those who read it
            stay theirs.
    """
    how = compression(path)
    if how in ("zstd", "zip"):
        raise ValueError(f"{path}: compressed with {how}; decompress it, or compress it with gzip, bzip2 or xz")
    with _Reader(path, how) as raw, io.BufferedReader(raw, BUFFER) as file:
        yield file


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """A text to read, UTF-8 or UTF-16 with a byte order mark, which may be compressed; `newline` is that of `open`.

    Raises:
        ValueError: It cannot be read, or is no such text.
    """
    with decompressed(path) as file:
        encoding = "utf-16" if file.read(2) in UTF_16 else "utf-8-sig"
        file.seek(0)
        try:
            yield io.TextIOWrapper(file, encoding, newline=newline)
        except UnicodeError as error:  # a UTF-16 file cut short is one, too
            raise ValueError(f"{path}: is not UTF-8, nor UTF-16 with its mark; convert it") from error


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text, read as they are asked for, each ended by a line feed; raises as `open_text` does."""
    with open_text(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path}: a line of more than {LONGEST_LINE} characters; give a text of shorter lines")
            yield line
