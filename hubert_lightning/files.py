"""Files that appear whole or not at all; what kind of file one is; text of any usual encoding and compression."""

import bz2
import errno
import fcntl
import gzip
import io
import lzma
import os
import re
import secrets
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from hubert_lightning.errors import UserError

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
SMALL = 2**24
"""Bytes of a config, of metrics, of a lock or of what a run says of itself."""
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


UNFINISHED = re.compile(r"\..{1,40}\.[0-9a-f]{16}\.unfinished", re.DOTALL)
"""Names of files and folders that are not finished yet."""
LOCAL = re.compile(
    "ext[234]|xfs|btrfs|bcachefs|f2fs|zfs|tmpfs|ramfs|overlay|vfat|exfat|ntfs3?|fuseblk|apfs|jfs|reiserfs|hfsplus"
)
"""File systems of disks that belong to one machine, whose locks all processes see."""
MOUNTS = Path("/proc/self/mounts")
FORGOTTEN = 3600.0
"""Seconds after which what was not written to is a killed process's, where another machine's locks may not be seen."""
OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that only writing ends in."""
UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
"""Errors that say nothing of whether a file is damaged."""


class _Output(io.FileIO):
    """A file under a name that no other has, which takes the place of its path when it is finished.

    What is no regular file, such as /dev/stdout, is written to as it is. `error` keeps what writing failed with, to
    tell it from errors of whatever is read meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None
        self.is_named = False
        there = path.stat() if path.exists() else None
        if there is not None and stat.S_ISDIR(there.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        self.regular = there is None or stat.S_ISREG(there.st_mode)
        if not self.regular:
            super().__init__(path, "wb")
            return
        self.target = Path(os.path.realpath(path))  # a link stays, and what it leads to is replaced
        if self.target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        self.target.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.target.parent)
        self.unfinished, descriptor = _opened(self.target)
        super().__init__(descriptor, "wb")
        if there is not None:
            with suppress(OSError):  # disks of other systems know no modes
                os.fchmod(descriptor, stat.S_IMODE(there.st_mode))

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.error = error
            raise

    def finish(self) -> None:
        self.flush()
        if self.regular:
            os.fsync(self.fileno())

    def take_name(self) -> None:
        if self.regular:
            os.replace(self.unfinished, self.target)
            self.is_named = True
            sync_folder(self.target.parent)

    def remove_unfinished(self) -> None:
        """Remove what did not take its name."""
        if self.regular and not self.is_named:
            with suppress(OSError):
                self.unfinished.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name once it is on the disk; its folder is made.

    Until then it has a name that no other file has, and an old file stays as it is; so it does after an error. The new
    one gets the old one's permissions. Of a symbolic link, the file that it leads to is replaced.

    Args:
        path: Path of the file.

    Raises:
        UserError: The disk is full, or cannot be written to; or something else that is read meanwhile cannot be.
    """
    with replacing_all(path) as [file]:
        yield file


@contextmanager
def replacing_all(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Files to write to that belong together, each as in `replacing`; they take their names when all are on the disk.

    An old file with the last name goes first and the new one comes last, so that it is there with its own companions or
    not at all, even if the process is killed in between.

    Args:
        paths: Paths of the files; the last stands for all.

    Raises:
        UserError: As in `replacing`.
    """
    paths = tuple(map(Path, paths))
    outputs: list[_Output] = []
    files: list[BinaryIO] = []
    path = paths[0]  # the one that is at work
    try:
        for path in paths:
            outputs.append(_Output(path))
            files.append(io.BufferedWriter(outputs[-1], BUFFER))
        yield files
        for file, output in zip(files, outputs, strict=True):
            path = output.path
            file.flush()
            output.finish()
        with _set_aside(outputs[-1]) if len(outputs) > 1 else nullcontext():
            for output in outputs:
                path = output.path
                output.take_name()
    except OSError as error:
        failed = next((output.path for output in outputs if output.error is not None), None)
        ours = [*paths, *(output.unfinished for output in outputs if output.regular)]
        if failed is None and len(outputs) == len(paths) and _is_of_another(error, ours):
            raise _unread(error) from error
        raise _unwritten(failed or path, error) from error
    finally:
        for file, output in zip(files, outputs, strict=True):
            output.remove_unfinished()
            with suppress(OSError):
                file.close()


@contextmanager
def _set_aside(output: _Output) -> Iterator[None]:
    """No file with the name of an output, until that takes it, or something fails."""
    if not output.regular or not output.target.exists():
        yield
        return
    aside = unfinished_name(output.target)
    os.rename(output.target, aside)
    try:
        yield
    except BaseException:
        os.rename(aside, output.target)
        raise
    aside.unlink()


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears whole or not at all; raises as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


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
    except DAMAGED_ZIP as error:
        if isinstance(error, OSError) and error.errno in UNREADABLE:
            raise UserError(f"{archive}: cannot be read ({error.strerror}); correct that, and run again") from error
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
        UserError: The path is that of a folder, a pipe, a socket or a device.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: {kind_of(path)}, which is not read here; give a file")


def read_regular(path: Path, largest: int = SMALL) -> bytes:
    """Read a file that is known to be small.

    Args:
        path: Path of the file.
        largest: Bytes that it may have.

    Raises:
        UserError: It is a pipe, a device or a folder, or larger.
        OSError: It is not there, or cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise UserError(
            f"{path}: has more than {largest} bytes, where such a file has a few thousand; restore or remove it"
        )
    return content


def kind_of(path: Path | str) -> str:
    """What a path is that is no regular file: opening a pipe waits for whoever writes to it, a device has no end.

    Raises:
        OSError: There is nothing.
    """
    mode = os.stat(path).st_mode
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((kind for is_one, kind in kinds.items() if is_one(mode)), "a device")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name, that nothing may have, once all that is in it is on the disk.

    Args:
        path: Path of the folder.

    Raises:
        UserError: The disk is full, or cannot be written to; or something else that is read meanwhile cannot be.
    """
    unfinished, descriptor = path, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent)
        unfinished = unfinished_name(path)
        unfinished.mkdir()
        descriptor = os.open(unfinished, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        unfinished.rename(path)
    except OSError as error:
        if descriptor is not None and _is_of_another(error, [path, unfinished]):
            raise _unread(error) from error
        raise _unwritten(path, error) from error
    finally:
        if unfinished != path:
            shutil.rmtree(unfinished, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def also_named(path: Path, name: Path) -> None:
    """Let a file have another name, too, at once: by a link, or as a copy where the disk knows none.

    Raises:
        UserError: As in `replacing`.
    """
    check_regular(path)
    if name.exists() and name.samefile(path):
        return
    remove_unfinished(name.parent)
    link = unfinished_name(name)
    with path.open("rb") as source:
        with suppress(OSError):
            fcntl.flock(source, fcntl.LOCK_SH)
        try:
            os.link(path, link)
        except OSError:
            with replacing(name) as file:
                shutil.copyfileobj(source, file)
        else:
            os.replace(link, name)


def unfinished_name(path: Path) -> Path:
    """A name in the same folder that no file has, and by which what a killed process leaves is known and removed."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.unfinished")


def _opened(path: Path) -> tuple[Path, int]:
    """A new file beside another, locked as long as it is open, with permissions as `open` gives them."""
    while True:
        unfinished = unfinished_name(path)
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # not every disk knows locks; there, nobody can remove it either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # else it was taken for a killed process's
            return unfinished, descriptor
        os.close(descriptor)


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """A new file beside another, which nobody takes for a killed process's, and which is removed in the end.

    Args:
        path: Path of the other file, which need not exist.

    Raises:
        OSError: The file cannot be made.
    """
    unfinished, descriptor = _opened(path)
    try:
        yield unfinished
    finally:
        unfinished.unlink(missing_ok=True)
        os.close(descriptor)


def is_unfinished(path: Path) -> bool:
    """Whether a file or folder is one that was not finished, by its name."""
    return UNFINISHED.fullmatch(path.name) is not None


@cache  # a folder of many outputs is not searched for each
def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left in a folder; once in the life of a process.

    Those that write keep their files locked, so that a file which can be locked is a dead process's; on a disk that
    several machines share, which may keep locks of their own, it must be an hour old, too.
    """
    left = []
    with suppress(OSError), os.scandir(folder) as entries:
        left = [Path(entry) for entry in entries if is_unfinished(Path(entry)) and not entry.is_symlink()]
    if left and not _is_local(folder):
        left = _forgotten(folder, left)
    for path in left:
        with suppress(OSError):
            how = os.O_RDONLY if path.is_dir() else os.O_RDWR  # some disks lock only what is open to write
            descriptor = os.open(path, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def _is_local(folder: Path) -> bool:
    """Whether a folder is on a disk of this machine, as far as a table of mounts tells."""
    try:
        mounts = MOUNTS.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return True  # no Linux
    here, kinds = Path(os.path.realpath(folder)), [(0, "")]
    for _, point, kind, *_ in (line.split(" ") for line in mounts):
        point = re.sub(r"\\([0-7]{3})", lambda escaped: chr(int(escaped[1], 8)), point)
        if here.is_relative_to(point):
            kinds.append((len(point), kind))
    longest = max(length for length, _ in kinds)
    return LOCAL.fullmatch([kind for length, kind in kinds if length == longest][-1]) is not None


def _forgotten(folder: Path, left: Sequence[Path]) -> list[Path]:
    """The files and folders that nobody has written to for long, by the clock of their disk."""
    try:
        with unfinished_file(folder / "now") as made:
            now = made.stat().st_mtime
            return [path for path in left if now - max(map(_written, (path, *path.rglob("*")))) > FORGOTTEN]
    except OSError:
        return []


def _written(path: Path) -> float:
    return path.lstat().st_mtime


def _is_of_another(error: OSError, ours: Sequence[Path]) -> bool:
    """Whether an error is of another file than some that are written, or of those in some folders."""
    if error.filename is None or error.errno in OF_WRITING:
        return isinstance(error, BrokenPipeError)
    return not any(Path(os.fsdecode(error.filename)).is_relative_to(path) for path in ours)


def _unread(error: OSError) -> Exception:
    if error.filename is None:
        return error
    return UserError(f"{os.fsdecode(error.filename)}: cannot be read ({error.strerror}); correct that, and run again")


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}); what was finished before is kept, so make room and "
        "run the same command again"
    )


def compression(path: Path) -> str | None:
    """How a file is compressed, told by its first bytes.

    Raises:
        UserError: It cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: {kind_of(path)}, which is not read here; give a file")
        with path.open("rb") as file:
            first = file.read(8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path") from error
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
            raise UserError(
                f"{self.path}: compressed with {self.how}, and damaged ({error}); copy or download it again"
            ) from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error}); give a text file") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._tried(self.file.readinto, buffer))
        if self.how and self.file.tell() > self.most:
            raise UserError(
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
        UserError: It cannot be read, is compressed in another way, or is not whole. Other errors of those who read it
            stay theirs.
    """
    how = compression(path)
    if how in ("zstd", "zip"):
        raise UserError(f"{path}: compressed with {how}; decompress it, or compress it with gzip, bzip2 or xz")
    with _Reader(path, how) as raw, io.BufferedReader(raw, BUFFER) as file:
        yield file


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """A text to read, UTF-8 or UTF-16 with a byte order mark, which may be compressed; `newline` is that of `open`.

    Raises:
        UserError: It cannot be read, or is no such text.
    """
    with decompressed(path) as file:
        encoding = "utf-16" if file.read(2) in UTF_16 else "utf-8-sig"
        file.seek(0)
        try:
            yield io.TextIOWrapper(file, encoding, newline=newline)
        except UnicodeError as error:  # a UTF-16 file cut short is one, too
            raise UserError(f"{path}: is not UTF-8, nor UTF-16 with its mark; convert it") from error


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text, read as they are asked for, each ended by a line feed; raises as `open_text` does."""
    with open_text(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}: a line of more than {LONGEST_LINE} characters; give a text of shorter lines")
            yield line
