"""Journals: which recordings a verb has finished, and with which settings, so that its next start skips them.

Several commands with the same settings may write to one journal at once, such as the jobs of a SLURM array. Each
command locks the file while it adds a line. If another command has replaced the file meanwhile, the line goes to the
new file.
"""

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Self

from hubert_lightning.errors import UserError
from hubert_lightning.files import remove_unfinished, replacing

VERSION = 1
"""Increased whenever this package computes other outputs from the same model and settings."""
IDENTITY = ("bytes", "modified", "text")
"""Entries of a line that identify the content of a recording: size, modification time, digest of its known text."""
EARLIER = "earlier"
"""Entry of a line that was written with other settings, with what identified the recording, which is not finished."""


@dataclass
class _JournalFile:
    """An open journal file, and an index of its lines.

    Args:
        descriptor: File descriptor; None if there is no file.
        settings: Settings in the first line; None if that line cannot be read.
        about: Other entries of the first line.
        spans: Offset and size in bytes of each recording's line, by the absolute path of the recording.
        identities: Size, modification time and text of each recording when it was finished (`IDENTITY`).
        name_output: Function from the path of a recording to its output, for lines that do not name it.
        outputs: Output of each recording.
        owners: Recording to which each output belongs.
        end: Number of bytes read so far.
        is_whole: Whether every line is complete and no recording has two lines.
        is_cut: Whether the last line lacks its line feed.
    """

    descriptor: int | None = None
    settings: Any = None
    about: dict[str, Any] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    name_output: Callable[[str], str] | None = None
    outputs: dict[str, str] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    end: int = 0
    is_whole: bool = True
    is_cut: bool = False

    def read_on(self, settings: Mapping[str, Any]) -> None:
        """Read the lines added since the last call, unless the file has other settings."""
        if self.descriptor is None or os.fstat(self.descriptor).st_size <= self.end:
            return
        with os.fdopen(os.dup(self.descriptor), "rb") as file:
            file.seek(self.end)
            if not self.end:
                first = file.readline()
                self.about = _parsed(first)
                self.settings = self.about.pop("settings", None)
                if self.settings != settings:
                    return
                self.end = len(first)
            for line in file:
                row = _parsed(line)
                name = row.get("recording")
                self.is_whole = self.is_whole and isinstance(name, str) and name not in self.spans
                if isinstance(name, str):
                    self.note(row, self.end, len(line))
                self.end, self.is_cut = self.end + len(line), not line.endswith(b"\n")

    def note(self, row: Mapping[str, Any], start: int, size: int) -> None:
        """Index a line; a recording that had the same output before loses its line."""
        name = row["recording"]
        self.spans[name], self.identities[name] = (start, size), _identity_of(row)
        output = row.get("output") or (self.name_output(name) if self.name_output else None)
        if not isinstance(output, str):
            return
        if (former := self.outputs.get(name)) is not None and self.owners.get(former) == name:
            del self.owners[former]
        self.outputs[name] = output
        if "output" not in row:
            self.owners.setdefault(output, name)
            return
        owner = self.owners.get(output)
        if owner is not None and owner != name:
            del self.spans[owner], self.identities[owner], self.outputs[owner]
            self.is_whole = False
        self.owners[output] = name

    def row(self, name: str) -> dict[str, Any]:
        """Read the line of a recording; empty if there is none."""
        if name not in self.spans or self.descriptor is None:
            return {}
        start, size = self.spans[name]
        return _parsed(os.pread(self.descriptor, size, start))

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a line at the end; raises `OSError`."""
        line = _line(row)
        assert self.descriptor is not None
        rest = memoryview(b"\n" + line if self.is_cut else line)
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]
        self.end, self.is_cut = os.lseek(self.descriptor, 0, os.SEEK_CUR), False
        self.note(row, self.end - len(line), len(line))

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = None


class Journal:
    """A JSON lines file beside the outputs: first the settings, then one line per finished recording.

    `recording in journal` is true if the recording was finished with the present settings, and its file still has the
    same size and modification time. Truncated lines are ignored.

    Args:
        path: Path of the journal.
        settings: Everything that all outputs depend on: model, format, version.
        texts: Digest of the known text that the output of a recording depends on, by the path of the recording.
        audio: Audio file of each recording, by the path that names it here, where a file has several utterances; the
            path itself if not given.
        name_output: Function from the path of a recording to its output, if each has an output of its own, which `add`
            names; for lines of earlier versions, which do not. Lines that were written with other settings are kept,
            for what they say of the outputs.

    Raises:
        UserError: The journal cannot be read.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        texts: Mapping[str, str] | None = None,
        audio: Mapping[str, str] | None = None,
        name_output: Callable[[str], str] | None = None,
    ) -> None:
        self.path, self.texts, self.audio = path, texts or {}, audio or {}
        self.settings = json.loads(json.dumps({"version": VERSION, **settings}))  # as JSON returns them
        self.name_output = name_output
        self._file = self._new_file()
        self._other = self._new_file()  # of other settings
        self._free: dict[str, str] = {}  # outputs that may be taken, with their recordings
        self._is_open = False  # for writing
        self._was_added = False  # a line since the file was last written as a whole
        self._is_apart = False  # a journal of other settings has replaced this file
        remove_unfinished(path.parent)  # also if every recording is finished and nothing is written
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._file.descriptor = os.open(path, flags)
            self._file.read_on(self.settings)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise UserError(f"{path}: cannot be read ({error.strerror}); remove it") from error
        if self._file.settings != self.settings:
            if name_output is None:
                self._file.close()
            else:
                self._other = self._file
                self._other.read_on(self._other.settings)
            self._file = self._new_file()

    @property
    def about(self) -> dict[str, Any]:
        """Entries of the first line other than the settings."""
        return self._file.about

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._other.close()

    def __contains__(self, recording: Path) -> bool:
        """Whether a recording is finished and unchanged since."""
        recorded = self._file.identities.get(os.path.abspath(recording))
        return recorded is not None and recorded == self._current_identity(recording)

    def __len__(self) -> int:
        return len(self._file.spans)

    def identity(self, recording: Path) -> dict[str, Any]:
        """Return path, size, modification time and text of a finished recording: the entries that every line has."""
        name = os.path.abspath(recording)
        return {"recording": name, **self._file.identities[name]}

    def row(self, recording: Path) -> dict[str, Any]:
        """Read the line of a recording, even if the recording has changed since; empty if there is none."""
        return self._file.row(os.path.abspath(recording))

    def row_of_any_settings(self, recording: Path | str) -> dict[str, Any]:
        """Read the line of a recording, also if it was written with other settings; empty if there is none."""
        return self.row(Path(recording)) or self._other.row(os.path.abspath(recording))

    def owner(self, output: str) -> str | None:
        """Find the recording to which an output belongs, also if it was written with other settings."""
        return self._file.owners.get(output) or self._other.owners.get(output)

    def free(self, output: str) -> None:
        """Let another recording take an output."""
        if owner := self.owner(output):
            self._free[output] = owner

    def is_same(self, row: Mapping[str, Any], recording: Path) -> bool:
        """Whether a recording has the size, modification time and text of a line's, of any settings."""
        identity: dict[str, Any] = row.get(EARLIER, _identity_of(row))
        return identity == self._current_identity(recording)

    def add(self, recording: Path, **more: Any) -> str | None:
        """Add the line of a recording, unless its output belongs to another recording.

        Args:
            recording: Path of the recording.
            **more: Other entries of the line: "output" is the file of this recording alone.

        Returns:
            The other recording to which the output belongs.

        Raises:
            UserError: The disk is full, or cannot be written to.
        """
        name, identity = os.path.abspath(recording), self._current_identity(recording)
        if identity is None:
            return None
        with self._alone():
            owner = self._file.owners.get(more.get("output", ""))
            if owner not in (None, name, self._free.get(more.get("output", ""))):
                return owner
            try:
                self._file.add({"recording": name, **identity, **more})
            except OSError as error:
                raise _unwritten(self.path, error) from error
        self._was_added = True
        return None

    def finish(self, rows: Iterable[Mapping[str, Any]] | None = None, **about: Any) -> None:
        """Rewrite the journal with one line per recording, sorted by path, lines of other commands included.

        Nothing is written if nothing is new.

        Args:
            rows: Content of all lines; the present lines if not given.
            **about: Entries of the first line other than the settings.
        """
        if self._was_added or about != self.about:
            with self._alone():
                self._write(_rows(self._file) if rows is None else rows, about)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the journal, and read the lines that other commands with these settings have added."""
        self._join()
        try:
            yield
        finally:
            _lock(self._file, fcntl.LOCK_UN)

    def _join(self) -> None:
        """Lock the file at the path; rewrite it if it lacks lines of this journal or is of other settings."""
        if self._is_open:
            _lock(self._file)
            if self._is_apart or _has_name(self._file, self.path):
                self._file.read_on(self.settings)
                return
            _lock(self._file, fcntl.LOCK_UN)
        current = _locked(self.path, self._new_file())
        try:
            current.read_on(self.settings)
            if current.settings == self.settings:
                if current.is_whole and self._file.spans.keys() <= current.spans.keys():
                    self._take(current)
                else:
                    self._write(_rows(current, self._file), current.about)
            elif self._is_open and current.settings is not None:
                self._is_apart = True
                _lock(self._file)
            else:
                self._write(chain(_rows(self._file), self._earlier(current)), self.about)
            self._is_open = True
        finally:
            if current is not self._file:
                current.close()

    def _earlier(self, replaced: _JournalFile) -> Iterator[dict[str, Any]]:
        """Lines of a file of other settings, without those of recordings that have a line with these settings."""
        if self.name_output is None:
            return
        replaced.read_on(replaced.settings)
        for row in _rows(replaced):
            if row["recording"] not in self._file.spans:
                yield {EARLIER: _identity_of(row)} | {key: row[key] for key in row if key not in IDENTITY}

    def _new_file(self) -> _JournalFile:
        return _JournalFile(name_output=self.name_output)

    def _write(self, rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
        """Rewrite the file; it stays locked."""
        renewed = _JournalFile(None, self.settings, dict(about), name_output=self.name_output)
        with replacing(self.path) as file:
            file.write(_line({"settings": self.settings, **about}))
            for row in rows:
                line = _line(row)
                renewed.note(row, file.tell(), len(line))
                file.write(line)
            file.flush()
            renewed.end = file.tell()
            renewed.descriptor = os.dup(file.fileno())
        descriptor_flags = fcntl.fcntl(renewed.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(renewed.descriptor, fcntl.F_SETFL, descriptor_flags | os.O_APPEND)
        self._take(renewed)
        self._was_added = False

    def _take(self, file: _JournalFile) -> None:
        self._file.close()
        self._file = file

    def _current_identity(self, recording: Path) -> dict[str, Any] | None:
        """Size, modification time and text of a recording as it is now; None if its file is missing."""
        try:
            status = os.stat(self.audio.get(str(recording), recording))
        except OSError:
            return None
        text = self.texts.get(str(recording))
        return {"bytes": status.st_size, "modified": status.st_mtime_ns} | ({} if text is None else {"text": text})


def _identity_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in IDENTITY if name in row}


def _parsed(line: bytes) -> dict[str, Any]:
    """Parse a line; empty if it is truncated or corrupt."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else {}


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _rows(*files: _JournalFile) -> Iterator[dict[str, Any]]:
    """Lines of all recordings, sorted by path; if several files have a line, the first file's."""
    for name in sorted({name for file in files for name in file.spans}):
        yield next(file.row(name) for file in files if name in file.spans)


def _locked(path: Path, file: _JournalFile) -> _JournalFile:
    """Open and lock the journal at a path for appending, as a file without lines; create it if it is missing.

    Raises:
        UserError: The path is not a regular file, or cannot be written to.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            if path.is_symlink():
                path.unlink()  # a journal is never a link, and links are not followed
            file.descriptor = os.open(path, flags, 0o666)
            _lock(file)
            if _has_name(file, path):
                return file
            file.close()
    except OSError as error:
        raise _unwritten(path, error) from error


def _lock(file: _JournalFile, how: int = fcntl.LOCK_EX) -> None:
    assert file.descriptor is not None
    with suppress(OSError):  # some file systems have no locks
        fcntl.flock(file.descriptor, how)


def _has_name(file: _JournalFile, path: Path) -> bool:
    """Whether an open file is still the one at the path."""
    assert file.descriptor is not None
    status = os.fstat(file.descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: no file; remove it")
    try:
        return os.path.samestat(status, os.lstat(path))
    except FileNotFoundError:
        return False


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror}); make room or correct that, and run again")
