"""What a verb has made of which recording, and with what: so that its next start makes the rest and no more."""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from hubert_lightning.files import replacing

VERSION = 1
"""Counts changes of this package after which the same model and settings make other outputs."""
IDENTITY = ("bytes", "modified", "text")


class Journal:
    """A text beside outputs: a line of settings, and a line for each recording, added when its output is made.

    A recording is done if it was done with the settings of now, and its file has the size and the modification time
    that it had then. A line that was cut short counts for nothing. `about` is what the line of settings says besides.

    Args:
        path: Path of the text.
        settings: What outputs depend on besides their recordings: model, format, version.
        texts: What the output of a recording depends on besides, by its path.

    Raises:
        ValueError: The text cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> None:
        self.path, self.texts = path, texts or {}
        self.settings = json.loads(json.dumps({"version": VERSION, **settings}))  # as they are read
        self.about: dict[str, Any] = {}
        self._places: dict[str, tuple[int, int]] = {}  # start and bytes of a recording's line, by its absolute path
        self._identities: dict[str, dict[str, Any]] = {}
        self._descriptor: int | None = None  # of the text that was read or written here, whatever takes its name
        self._is_open = self._was_added = False  # to more lines
        self._is_whole = self._read()

    def _read(self) -> bool:
        """Read what there is; whether more can be added after it."""
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(os.dup(self._descriptor), "rb") as file:
                settings = _parsed(file.readline())
                if settings.pop("settings", None) != self.settings:
                    return False
                self.about, whole, start = settings, True, file.tell()
                for line in file:
                    row = _parsed(line)
                    name = row.get("recording")
                    whole = whole and isinstance(name, str) and name not in self._places
                    if isinstance(name, str):
                        self._places[name], self._identities[name] = (start, len(line)), _identity_of(row)
                    start += len(line)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return False
            raise ValueError(f"{self.path}: cannot be read ({error.strerror}); remove it") from error
        return whole

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._keep(None)

    def __contains__(self, recording: Path) -> bool:
        """Whether a recording is done, as it is now."""
        known = self._identities.get(os.path.abspath(recording))
        return known is not None and known == self._now(recording)

    def __len__(self) -> int:
        return len(self._places)

    def identity(self, recording: Path) -> dict[str, Any]:
        """The least that the line of a recording says: what tells whether it is still the one that it was."""
        name = os.path.abspath(recording)
        return {"recording": name, **self._identities[name]}

    def row(self, recording: Path) -> dict[str, Any]:
        """What the line of a recording says, whatever the recording was then; empty if there is none."""
        place = self._places.get(os.path.abspath(recording))
        if place is None or self._descriptor is None:
            return {}
        start, size = place
        return _parsed(os.pread(self._descriptor, size, start))

    def add(self, recording: Path, **more: Any) -> None:
        """Add the line of a recording.

        Raises:
            ValueError: The disk is full, or cannot be written to.
        """
        name, identity = os.path.abspath(recording), self._now(recording)
        if identity is None:
            return
        self._open()
        assert self._descriptor is not None
        line = _line({"recording": name, **identity, **more})
        try:
            place, rest = (os.lseek(self._descriptor, 0, os.SEEK_END), len(line)), memoryview(line)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror}); make room, and run again") from error
        self._places[name], self._identities[name], self._was_added = place, identity, True

    def finish(self, rows: Iterable[Mapping[str, Any]] | None = None, **about: Any) -> None:
        """Leave one line for each recording, in the order of their paths, if anything is new.

        Args:
            rows: What the lines say; as they are if not given.
            about: What the line of settings says besides.
        """
        if self._was_added or about != self.about:
            self._write(self._rows() if rows is None else rows, about)

    def _rows(self) -> Iterable[dict[str, Any]]:
        return (self.row(Path(name)) for name in sorted(self._places))

    def _open(self) -> None:
        """Have the text open to more lines: as it is, or anew without what was cut short or is of other settings."""
        if self._is_open:
            return
        if self._is_whole and self._descriptor is not None:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                raise ValueError(f"{self.path}: cannot be written ({error.strerror}); correct that") from error
            if os.path.sameopenfile(descriptor, self._descriptor):
                self._keep(descriptor)
            else:
                os.close(descriptor)
        if not self._is_open:
            self._write(self._rows(), self.about)

    def _write(self, rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
        if self.path.is_symlink():
            self.path.unlink()  # none of ours is one, and it is not followed
        places: dict[str, tuple[int, int]] = {}
        with replacing(self.path) as file:
            file.write(_line({"settings": self.settings, **about}))
            for row in rows:
                line = _line(row)
                places[row["recording"]] = file.tell(), len(line)
                file.write(line)
            file.flush()
            descriptor = os.dup(file.fileno())
        self._keep(descriptor)
        self._places, self.about, self._was_added = places, dict(about), False

    def _keep(self, descriptor: int | None) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._is_open = descriptor, descriptor is not None

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
