"""What a verb has made of which recording, and with what: so that its next start makes the rest and no more.

Several commands with the same settings may add to one text at once, such as the jobs of an array: each locks it for a
line, and adds to the one that has the name then.
"""

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hubert_lightning.errors import UserError
from hubert_lightning.files import remove_unfinished, replacing

VERSION = 1
"""Counts changes of this package after which the same model and settings make other outputs."""
IDENTITY = ("bytes", "modified", "text")


@dataclass
class _Text:
    """A text that is open, and what was read of it.

    Args:
        descriptor: Its file; none if there is none.
        settings: What its first line says; none if it says nothing.
        about: What that line says besides.
        places: Start and bytes of a recording's line, by its absolute path.
        identities: What tells whether a recording is still the one that it was.
        end: Bytes that were read.
        is_whole: Whether each line is whole, and the only one of its recording.
        is_cut: Whether the last line has no end.
    """

    descriptor: int | None = None
    settings: Any = None
    about: dict[str, Any] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    end: int = 0
    is_whole: bool = True
    is_cut: bool = False

    def read_on(self, settings: Mapping[str, Any]) -> None:
        """Read the lines that were added, unless the text is one of other settings."""
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
                self.is_whole = self.is_whole and isinstance(name, str) and name not in self.places
                if isinstance(name, str):
                    self.places[name], self.identities[name] = (self.end, len(line)), _identity_of(row)
                self.end, self.is_cut = self.end + len(line), not line.endswith(b"\n")

    def row(self, name: str) -> dict[str, Any]:
        """What the line of a recording says, empty if there is none."""
        if name not in self.places or self.descriptor is None:
            return {}
        start, size = self.places[name]
        return _parsed(os.pread(self.descriptor, size, start))

    def add(self, name: str, identity: dict[str, Any], line: bytes) -> None:
        """Add a line at the end; raises `OSError`."""
        assert self.descriptor is not None
        rest = memoryview(b"\n" + line if self.is_cut else line)
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]
        self.end, self.is_cut = os.lseek(self.descriptor, 0, os.SEEK_CUR), False
        self.places[name], self.identities[name] = (self.end - len(line), len(line)), identity

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = None


class Journal:
    """A text beside outputs: a line of settings, and a line for each recording, added when its output is made.

    A recording is done if it was done with the settings of now, and its file has the size and the modification time
    that it had then. A line that was cut short counts for nothing. `about` is what the line of settings says besides.

    Args:
        path: Path of the text.
        settings: What outputs depend on besides their recordings: model, format, version.
        texts: What the output of a recording depends on besides, by its path.

    Raises:
        UserError: The text cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> None:
        self.path, self.texts = path, texts or {}
        self.settings = json.loads(json.dumps({"version": VERSION, **settings}))  # as they are read
        self._text = _Text()
        self._is_open = self._was_added = False  # to more lines
        self._is_apart = False  # a text of other settings has taken the name
        remove_unfinished(path.parent)  # also where all is done and nothing is written
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._text.descriptor = os.open(path, flags)
            self._text.read_on(self.settings)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise UserError(f"{path}: cannot be read ({error.strerror}); remove it") from error
        if self._text.settings != self.settings:
            self._take(_Text())

    @property
    def about(self) -> dict[str, Any]:
        """What the line of settings says besides."""
        return self._text.about

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._text.close()

    def __contains__(self, recording: Path) -> bool:
        """Whether a recording is done, as it is now."""
        known = self._text.identities.get(os.path.abspath(recording))
        return known is not None and known == self._now(recording)

    def __len__(self) -> int:
        return len(self._text.places)

    def identity(self, recording: Path) -> dict[str, Any]:
        """The least that the line of a recording says: what tells whether it is still the one that it was."""
        name = os.path.abspath(recording)
        return {"recording": name, **self._text.identities[name]}

    def row(self, recording: Path) -> dict[str, Any]:
        """What the line of a recording says, whatever the recording was then; empty if there is none."""
        return self._text.row(os.path.abspath(recording))

    def add(self, recording: Path, **more: Any) -> None:
        """Add the line of a recording.

        Raises:
            UserError: The disk is full, or cannot be written to.
        """
        name, identity = os.path.abspath(recording), self._now(recording)
        if identity is None:
            return
        line = _line({"recording": name, **identity, **more})
        with self._alone():
            try:
                self._text.add(name, identity, line)
            except OSError as error:
                raise _unwritten(self.path, error) from error
        self._was_added = True

    def finish(self, rows: Iterable[Mapping[str, Any]] | None = None, **about: Any) -> None:
        """Leave one line for each recording, of others with these settings, too, in the order of their paths.

        Nothing is written if nothing is new.

        Args:
            rows: What the lines say, and no others; as they are if not given.
            about: What the line of settings says besides.
        """
        if self._was_added or about != self.about:
            with self._alone():
                self._write(_rows(self._text) if rows is None else rows, about)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only one that writes to the text, and know what others with these settings have added to it."""
        self._join()
        try:
            yield
        finally:
            _lock(self._text, fcntl.LOCK_UN)

    def _join(self) -> None:
        """Lock the text that has the name, or make one that says the same and what this journal knows."""
        if self._is_open:
            _lock(self._text)
            if self._is_apart or _has_name(self._text, self.path):
                self._text.read_on(self.settings)
                return
            _lock(self._text, fcntl.LOCK_UN)
        there = _locked(self.path)
        try:
            there.read_on(self.settings)
            if there.settings == self.settings:
                if there.is_whole and self._text.places.keys() <= there.places.keys():
                    self._take(there)
                else:
                    self._write(_rows(there, self._text), there.about)
            elif self._is_open and there.settings is not None:
                self._is_apart = True
                _lock(self._text)
            else:
                self._write(_rows(self._text), self.about)
            self._is_open = True
        finally:
            if there is not self._text:
                there.close()

    def _write(self, rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
        """Write the text anew; it stays locked."""
        text = _Text(None, self.settings, dict(about))
        with replacing(self.path) as file:
            file.write(_line({"settings": self.settings, **about}))
            for row in rows:
                line = _line(row)
                text.places[row["recording"]] = file.tell(), len(line)
                text.identities[row["recording"]] = _identity_of(row)
                file.write(line)
            file.flush()
            text.end = file.tell()
            text.descriptor = os.dup(file.fileno())
        fcntl.fcntl(text.descriptor, fcntl.F_SETFL, fcntl.fcntl(text.descriptor, fcntl.F_GETFL) | os.O_APPEND)
        self._take(text)
        self._was_added = False

    def _take(self, text: _Text) -> None:
        self._text.close()
        self._text = text

    def _now(self, recording: Path) -> dict[str, Any] | None:
        """What tells whether a recording is still the one that it was; none if it is gone."""
        try:
            status = os.stat(recording)
        except OSError:
            return None
        text = self.texts.get(str(recording))
        return {"bytes": status.st_size, "modified": status.st_mtime_ns} | ({} if text is None else {"text": text})


def _identity_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in IDENTITY if name in row}


def _parsed(line: bytes) -> dict[str, Any]:
    """What a line says; nothing if it is not whole."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else {}


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _rows(*texts: _Text) -> Iterator[dict[str, Any]]:
    """The line of each recording, in the order of their paths; of several, that of the first text."""
    for name in sorted({name for text in texts for name in text.places}):
        yield next(text.row(name) for text in texts if name in text.places)


def _locked(path: Path) -> _Text:
    """The text that has a name, made if there is none, open to more lines, locked.

    Raises:
        UserError: It is no file, or cannot be written to.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            if path.is_symlink():
                path.unlink()  # none of ours is one, and it is not followed
            text = _Text(os.open(path, flags, 0o666))
            _lock(text)
            if _has_name(text, path):
                return text
            text.close()
    except OSError as error:
        raise _unwritten(path, error) from error


def _lock(text: _Text, how: int = fcntl.LOCK_EX) -> None:
    assert text.descriptor is not None
    with suppress(OSError):  # not every disk knows locks
        fcntl.flock(text.descriptor, how)


def _has_name(text: _Text, path: Path) -> bool:
    """Whether a text that is open is still the one that has the name."""
    assert text.descriptor is not None
    status = os.fstat(text.descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: no file; remove it")
    try:
        return os.path.samestat(status, os.lstat(path))
    except FileNotFoundError:
        return False


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror}); make room or correct that, and run again")
