"""The kind of a file, by its first bytes and its structure, without trust in its name."""

import stat
import struct
import zipfile
import zlib
from pathlib import Path

from hubert_lightning.errors import ACCESS_ERRNOS, UserError
from hubert_lightning.files import check_regular, kind_of

COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
"""First bytes of compressed files."""
ZIP_ERRORS = (OSError, EOFError, ValueError, RuntimeError, OverflowError, zlib.error, struct.error, zipfile.BadZipFile)
"""Errors that zipfile raises on a corrupt archive, depending on the byte (RuntimeError: it seems encrypted)."""


def compression(path: Path) -> str | None:
    """Find out how a file is compressed.

    Returns:
        Name of the compression, or None.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: {kind_of(path)}, which is not read here; give a file")
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path") from error
    return next((name for mark, name in COMPRESSIONS.items() if start.startswith(mark)), None)


def is_safetensors(path: Path) -> bool:
    """Check whether a file begins as safetensors do, with a length and JSON.

    Raises:
        UserError: The path is a folder, a pipe, a socket or a device.
    """
    check_regular(path)
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def is_whole_zip(archive: Path) -> bool:
    """Check every byte of a zip archive, such as a checkpoint, by its checksums.

    Raises:
        UserError: The archive cannot be read, which does not prove that it is corrupt.
    """
    try:
        with zipfile.ZipFile(archive) as records:
            return records.testzip() is None
    except ZIP_ERRORS as error:
        if isinstance(error, OSError) and error.errno in ACCESS_ERRNOS:
            raise UserError(f"{archive}: cannot be read ({error.strerror}); correct that, and run again") from error
        return False


def has_zip_directory(archive: Path) -> bool:
    """Check whether a zip archive ends with its directory, which a truncated file lacks; read no more than that."""
    try:
        with zipfile.ZipFile(archive):
            return True
    except ZIP_ERRORS:
        return False
