"""Rows of untrusted manifests: types and numbers are checked before lhotse makes a cut."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unicodedata import combining

from lhotse.cut import Cut
from lhotse.serialization import deserialize_item

from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.json_file import DECODER, is_text, shown
from hubert_lightning.untrusted.text_file import open_text

MAX_SECONDS = 10.0**7
"""Longest recording in seconds: 116 days."""
SAMPLING_RATES = (1, 10**6)
"""Lowest and highest sampling rate of a manifest in Hz."""
MAX_CHANNELS = 1024
MAX_NAME = 4096
"""Characters of an id or a path."""
MAX_TEXT = 2**18
"""Characters of a transcript, which ten hours have."""
MAX_MARKS = 100
"""Unicode marks on one letter; their order takes quadratic time to find."""
MAX_ROW = 2**25
"""Characters of a row, which the phones of ten hours have."""
DURATION_TOLERANCE = 0.025
"""Seconds by which a duration may differ from the number of samples, as in lhotse."""
SHAR = re.compile(r"(?P<archive>.+):(?P<offset>\d{1,18}):(?P<size>[1-9]\d{0,17})", re.DOTALL)
"""Position of a recording in an archive: path, offset and size in bytes."""


def rows_of(path: Path) -> Iterator[tuple[int, Any]]:
    """Read JSON lines, compressed or not.

    Args:
        path: Path of the file.

    Yields:
        Number and content of each row.

    Raises:
        UserError: The file cannot be read, or a row is not JSON or longer than 32 MiB.
    """
    with open_text(path) as file:
        number = 0
        while line := file.readline(MAX_ROW + 1):
            number += 1
            if len(line) > MAX_ROW:
                raise UserError(f"line {number}: has more than {MAX_ROW} characters")
            try:
                yield number, DECODER.decode(line)
            except RecursionError as error:
                raise UserError(f"line {number}: nested too deep") from error
            except ValueError as error:
                raise UserError(f"line {number}: {error}") from error


def cut_of(row: Any) -> Cut:
    """Make a cut of a row.

    Args:
        row: JSON value.

    Returns:
        The cut.

    Raises:
        UserError: The row is no cut, or has an impossible value. The message is a reason for the caller's sentence.
    """
    if not isinstance(row, dict):
        raise UserError(f"{shown(row)} is not an object")
    if row.get("type") in ("MonoCut", "MultiCut", "Cut"):
        _check_cut(row)
    try:
        return deserialize_item(row)
    except Exception as error:  # lhotse guesses the type of an item, and raises errors of many types
        raise UserError(f"lhotse makes nothing of it, {type(error).__name__}: {shown(str(error))}") from error


def _check_cut(row: dict[str, Any]) -> None:
    _check_name(row.get("id"), "id")
    start, duration = _seconds(row.get("start"), "start"), _seconds(row.get("duration"), "duration")
    if duration <= 0:
        raise UserError(f"duration {duration} s")
    recording = row.get("recording")
    if not isinstance(recording, dict):
        raise UserError(f"{row['id']} has no recording")
    available = _check_recording(recording)
    channels = row.get("channel")
    used = channels if isinstance(channels, list) else [channels]
    if not used or not all(type(channel) is int and channel in available for channel in used):
        raise UserError(f"{row['id']} has channel {shown(channels)} of a recording with {shown(sorted(available))}")
    if start + duration > recording["duration"] + DURATION_TOLERANCE:
        raise UserError(f"{row['id']} ends at {start + duration:.3f} s of a recording of {recording['duration']:.3f} s")
    supervisions = row.get("supervisions", [])
    if not isinstance(supervisions, list):
        raise UserError(f"supervisions are {shown(supervisions)}")
    for supervision in supervisions:
        _check_supervision(supervision)
    _check_custom(row.get("custom"))


def _check_recording(recording: dict[str, Any]) -> set[int]:
    """Check a recording, and return its channels."""
    _check_name(recording.get("id"), "a recording's id")
    rate, samples = recording.get("sampling_rate"), recording.get("num_samples")
    if type(rate) is not int or not SAMPLING_RATES[0] <= rate <= SAMPLING_RATES[1]:
        raise UserError(f"sampling_rate is {shown(rate)}")
    if type(samples) is not int or not 0 < samples <= MAX_SECONDS * rate:
        raise UserError(f"num_samples is {shown(samples)}")
    duration = _seconds(recording.get("duration"), "a recording's duration")
    if abs(duration - samples / rate) > DURATION_TOLERANCE:
        raise UserError(f"a recording of {shown(duration)} s has {samples} samples at {rate} Hz")
    transforms = recording.get("transforms") or []
    if not isinstance(transforms, list) or not all(isinstance(transform, dict) for transform in transforms):
        raise UserError(f"transforms are {shown(transforms)}")
    if others := [transform for transform in transforms if transform.get("name") != "Resample"]:
        raise UserError(f"{shown(others[0].get('name'))} is not applied when audio is read; save the changed audio")
    sources = recording.get("sources")
    if not isinstance(sources, list) or not sources:
        raise UserError(f"sources are {shown(sources)}")
    return {channel for source in sources for channel in _check_source(source)}


def _check_source(source: Any) -> list[int]:
    if not isinstance(source, dict):
        raise UserError(f"a source is {shown(source)}")
    kind, location, channels = source.get("type"), source.get("source"), source.get("channels")
    if kind not in ("file", "shar"):
        raise UserError(f"audio of type {shown(kind)} is not read here, only files and Shar archives")
    name = _check_name(location, "a source")
    if kind == "shar" and not SHAR.fullmatch(name):
        raise UserError(f"{shown(location)} is not a part of a Shar archive, ARCHIVE:OFFSET:SIZE")
    if (
        not isinstance(channels, list)
        or not 0 < len(channels) <= MAX_CHANNELS
        or not all(type(channel) is int and 0 <= channel < MAX_CHANNELS for channel in channels)
        or len(set(channels)) < len(channels)
    ):
        raise UserError(f"a source's channels are {shown(channels)}")
    return channels


def _check_supervision(supervision: Any) -> None:
    if not isinstance(supervision, dict):
        raise UserError(f"a supervision is {shown(supervision)}")
    _check_name(supervision.get("id"), "a supervision's id")
    _number(supervision.get("start"), "a supervision's start")
    _seconds(supervision.get("duration"), "a supervision's duration")
    for name in ("text", "speaker", "language", "gender"):
        value = supervision.get(name)
        if value is not None and (not isinstance(value, str) or len(value) > MAX_TEXT or not is_text(value)):
            raise UserError(f"a supervision's {name} is {shown(value)}")
        if value and not value.isascii() and _has_many_marks(value):
            raise UserError(f"a supervision's {name} has more than {MAX_MARKS} marks on one letter")
    _check_custom(supervision.get("custom"))
    alignment = supervision.get("alignment") or {}
    if not isinstance(alignment, dict):
        raise UserError(f"an alignment is {shown(alignment)}")
    for items in alignment.values():
        if not isinstance(items, list):
            raise UserError(f"an alignment has {shown(items)}")
        for item in items:
            if not isinstance(item, list) or not 3 <= len(item) <= 4 or not isinstance(item[0], str):
                raise UserError(f"an alignment has {shown(item)}")
            _number(item[1], "a phone's start")
            _seconds(item[2], "a phone's duration")


def _has_many_marks(text: str) -> bool:
    count = 0
    for character in text:
        count = count + 1 if combining(character) else 0
        if count > MAX_MARKS:
            return True
    return False


def _check_custom(custom: Any) -> None:
    if custom is None:
        return
    if not isinstance(custom, dict):
        raise UserError(f"custom is {shown(custom)}")
    size = custom.get("bytes", 0)
    if type(size) is not int or size < 0:
        raise UserError(f"custom has bytes {shown(size)}")
    if (corpus := custom.get("corpus")) is not None:
        _check_name(corpus, "the corpus")


def _check_name(value: Any, what: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or "\0" in value or not is_text(value):
        raise UserError(f"{what} is {shown(value)}")
    return value


def _seconds(value: Any, what: str) -> float:
    seconds = _number(value, what)
    if seconds < 0:
        raise UserError(f"{what} is {shown(value)}")
    return seconds


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_SECONDS:
        raise UserError(f"{what} is {shown(value)}")
    return float(value)
