"""Files that appear whole or not at all."""

import errno
import fcntl
import io
import os
import re
import secrets
import shutil
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hubert_lightning.errors import WRITE_ERRNOS, UserError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BUFFER_SIZE = 2**18
"""Bytes that are read or written at once."""
SMALL_FILE = 2**24
"""Largest size in bytes of a config, a lock, metrics or another file of a few thousand bytes."""
UNFINISHED = re.compile(r"\..{1,40}\.[0-9a-f]{16}\.unfinished", re.DOTALL)
"""Names of unfinished files and folders."""
LOCAL_FILE_SYSTEMS = re.compile(
    "ext[234]|xfs|btrfs|bcachefs|f2fs|zfs|tmpfs|ramfs|overlay|vfat|exfat|ntfs3?|fuseblk|apfs|jfs|reiserfs|hfsplus"
)
"""File systems of disks that belong to one machine, whose locks all processes see."""
MOUNT_TABLE = Path("/proc/self/mounts")
ABANDONED_AFTER = 3600.0
"""Seconds without a write after which an unfinished file on a shared disk belongs to a killed process."""


def printable(path: Path) -> str:
    """Format a path as text on one line, with escapes for bytes that are not UTF-8, line breaks and tabs."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    return name.translate({ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"})


def composed(name: str) -> str:
    """Convert a file name to NFC: file systems and programs choose different normal forms of Unicode (macOS: NFD)."""
    return unicodedata.normalize("NFC", name)


def kind_of(path: Path | str) -> str:
    """Describe a path that is not a regular file: opening a pipe waits for a writer, and a device has no end.

    Raises:
        OSError: The path does not exist.
    """
    mode = os.stat(path).st_mode
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((kind for is_kind, kind in kinds.items() if is_kind(mode)), "a device")


def check_regular(path: Path) -> None:
    """Refuse a path that exists and is not a regular file, such as a pipe, which would wait for a writer.

    Raises:
        UserError: The path is a folder, a pipe, a socket or a device.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: {kind_of(path)}, which is not read here; give a file")


def read_regular(path: Path, max_size: int = SMALL_FILE) -> bytes:
    """Read a file that is known to be small.

    Args:
        path: Path of the file.
        max_size: Largest size in bytes.

    Returns:
        The content of the file.

    Raises:
        UserError: The path is a pipe, a device or a folder, or the file is larger.
        OSError: The file does not exist or cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(max_size + 1)
    if len(content) > max_size:
        raise UserError(
            f"{path}: has more than {max_size} bytes, where such a file has a few thousand; restore or remove it"
        )
    return content


class _Output(io.FileIO):
    """A file under a unique temporary name, which replaces its path when it is finished.

    A path that is not a regular file, such as /dev/stdout, is written to directly. `error` keeps the error of a failed
    write, to tell it from errors of files that are read meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None
        self.is_named = False
        old = path.stat() if path.exists() else None
        if old is not None and stat.S_ISDIR(old.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        self.regular = old is None or stat.S_ISREG(old.st_mode)
        if not self.regular:
            super().__init__(path, "wb")
            return
        self.target = Path(os.path.realpath(path))  # a link stays, and its target is replaced
        if self.target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        self.target.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished_once(self.target.parent)
        self.unfinished, descriptor = _open_unfinished(self.target)
        super().__init__(descriptor, "wb")
        if old is not None:
            with suppress(OSError):  # disks of other systems have no modes
                os.fchmod(descriptor, stat.S_IMODE(old.st_mode))

    def write(self, content: "ReadableBuffer", /) -> int:
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

    def remove_if_unnamed(self) -> None:
        if self.regular and not self.is_named:
            with suppress(OSError):
                self.unfinished.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, which is renamed to the path once it is on the disk.

    Until then it has a unique temporary name, and an old file stays as it is, also after an error. The new file gets
    the permissions of the old one. Missing folders are created. If the path is a symbolic link, its target is replaced.

    Args:
        path: Path of the file.

    Raises:
        UserError: The disk is full or cannot be written to, or another file that is read meanwhile cannot be read.
    """
    with replacing_all(path) as [file]:
        yield file


@contextmanager
def replacing_all(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Open files that belong together, each as in `replacing`; they get their names when all are on the disk.

    The old file at the last path is removed first, and the new one is renamed last. So if the process is killed in
    between, the last file is either missing or beside the files that belong to it.

    Args:
        paths: Paths of the files; the last one stands for all.

    Raises:
        UserError: As in `replacing`.
    """
    paths = tuple(map(Path, paths))
    outputs: list[_Output] = []
    files: list[BinaryIO] = []
    current = paths[0]
    try:
        for current in paths:
            outputs.append(_Output(current))
            files.append(io.BufferedWriter(outputs[-1], BUFFER_SIZE))
        yield files
        for file, output in zip(files, outputs, strict=True):
            current = output.path
            file.flush()
            output.finish()
        with _set_aside(outputs[-1]) if len(outputs) > 1 else nullcontext():
            for output in outputs:
                current = output.path
                output.take_name()
    except OSError as error:
        failed = next((output.path for output in outputs if output.error is not None), None)
        written = [*paths, *(output.unfinished for output in outputs if output.regular)]
        if failed is None and len(outputs) == len(paths) and _is_of_another_file(error, written):
            raise _read_error(error) from error
        raise _write_error(failed or current, error) from error
    finally:
        for file, output in zip(files, outputs, strict=True):
            output.remove_if_unnamed()
            with suppress(OSError):
                file.close()


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together, as `replacing_all`.

    Args:
        contents: Content of each file by its path.

    Raises:
        UserError: The disk is full or cannot be written to.
    """
    with replacing_all(*contents) as files:
        for file, content in zip(files, contents.values(), strict=True):
            file.write(content)


@contextmanager
def _set_aside(output: _Output) -> Iterator[None]:
    """Rename the old file of an output; remove it at the end, or restore it after an error."""
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
    """Write a file that appears whole or not at all.

    Args:
        path: Path of the file.
        content: Content of the file.

    Raises:
        UserError: As in `replacing`.
    """
    with replacing(path) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in a folder are on the disk, where the file system supports that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create a folder to fill, which gets its name once all its content is on the disk.

    Args:
        path: Path of the folder, which must not exist.

    Raises:
        UserError: The disk is full or cannot be written to, or another file that is read meanwhile cannot be read.
    """
    unfinished, descriptor = path, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished_once(path.parent)
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
        if descriptor is not None and _is_of_another_file(error, [path, unfinished]):
            raise _read_error(error) from error
        raise _write_error(path, error) from error
    finally:
        if unfinished != path:
            shutil.rmtree(unfinished, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def also_named(path: Path, name: Path) -> None:
    """Give a file a second name in one step: a hard link, or a copy where the disk has no links.

    Args:
        path: Path of the file.
        name: Second path, which is replaced if it exists.

    Raises:
        UserError: As in `replacing`.
    """
    check_regular(path)
    if name.exists() and name.samefile(path):
        return
    remove_unfinished_once(name.parent)
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
    """Make a unique temporary name in the same folder, by which `remove_unfinished` knows it."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.unfinished")


def _open_unfinished(path: Path) -> tuple[Path, int]:
    """Open a new file beside a path, locked while it is open, with the permissions that `open` gives."""
    while True:
        unfinished = unfinished_name(path)
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # where the disk has no locks, no other process removes the file either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # else another process removed it before it was locked
            return unfinished, descriptor
        os.close(descriptor)


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """Create a file beside a path, locked against `remove_unfinished`, and remove it at the end.

    Args:
        path: Path in the same folder, which need not exist.

    Raises:
        OSError: The file cannot be created.
    """
    unfinished, descriptor = _open_unfinished(path)
    try:
        yield unfinished
    finally:
        unfinished.unlink(missing_ok=True)
        os.close(descriptor)


def is_unfinished(path: Path) -> bool:
    """Check by its name whether a file or folder is unfinished."""
    return UNFINISHED.fullmatch(path.name) is not None


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files of killed processes from a folder.

    A process locks the files that it writes, so a file that can be locked belongs to a dead process. On a disk that
    several machines share, where locks may not be seen by all, the file must also be an hour old.
    """
    paths = []
    with suppress(OSError), os.scandir(folder) as entries:
        paths = [Path(entry) for entry in entries if is_unfinished(Path(entry)) and not entry.is_symlink()]
    if paths and not _is_local(folder):
        paths = _abandoned(folder, paths)
    for path in paths:
        with suppress(OSError):
            mode = os.O_RDONLY if path.is_dir() else os.O_RDWR  # some disks lock only files that are open to write
            descriptor = os.open(path, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


remove_unfinished_once = cache(remove_unfinished)
"""The same, once in the life of this process: a folder of many outputs is searched once, not for each."""


def _is_local(folder: Path) -> bool:
    """Whether a folder is on a disk of this machine, according to the table of mounts."""
    try:
        mounts = MOUNT_TABLE.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return True  # not Linux
    folder, file_systems = Path(os.path.realpath(folder)), [(0, "")]
    for _, point, file_system, *_ in (line.split(" ") for line in mounts):
        point = re.sub(r"\\([0-7]{3})", lambda escaped: chr(int(escaped[1], 8)), point)
        if folder.is_relative_to(point):
            file_systems.append((len(point), file_system))
    longest = max(length for length, _ in file_systems)
    last = [file_system for length, file_system in file_systems if length == longest][-1]
    return LOCAL_FILE_SYSTEMS.fullmatch(last) is not None


def _abandoned(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """The paths without a recent write, by the clock of their disk."""
    try:
        with unfinished_file(folder / "now") as file:
            now = file.stat().st_mtime
            return [path for path in paths if now - max(map(_write_time, (path, *path.rglob("*")))) > ABANDONED_AFTER]
    except OSError:
        return []


def _write_time(path: Path) -> float:
    return path.lstat().st_mtime


def _is_of_another_file(error: OSError, written: Sequence[Path]) -> bool:
    """Whether an error concerns none of the files that are written, nor files in folders that are written."""
    if error.filename is None or error.errno in WRITE_ERRNOS:
        return isinstance(error, BrokenPipeError)
    return not any(Path(os.fsdecode(error.filename)).is_relative_to(path) for path in written)


def _read_error(error: OSError) -> Exception:
    if error.filename is None:
        return error
    return UserError(f"{os.fsdecode(error.filename)}: cannot be read ({error.strerror}); correct that, and run again")


def _write_error(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}); finished files are kept, so make room and "
        "run the same command again"
    )
