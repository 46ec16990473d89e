"""Audio files in a tree of folders, with the transcripts that lie beside them."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from hubert_lightning.errors import UserError
from hubert_lightning.files import composed
from hubert_lightning.untrusted.text_file import lines_of

# fmt: off
AUDIO_SUFFIXES = {
    ".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".spx", ".mp3", ".mp2", ".mpga", ".aif", ".aiff", ".aifc",
    ".au", ".snd", ".caf", ".w64", ".rf64", ".sph", ".nist", ".voc", ".m4a", ".m4b", ".m4p", ".mp4", ".m4v", ".mov",
    ".aac", ".aax", ".wma", ".asf", ".wmv", ".webm", ".weba", ".mka", ".mkv", ".avi", ".flv", ".mpg", ".mpeg", ".ts",
    ".amr", ".awb", ".3gp", ".3g2", ".gsm", ".g722", ".wv", ".ape", ".tta", ".ac3", ".eac3", ".dts", ".ra",
    ".rm", ".dss", ".vox",
}
# fmt: on
"""Suffixes of file names that count as audio when a folder is searched."""


class Segment(NamedTuple):
    """A part of a recording, before the recording is decoded.

    Attributes:
        recording: Id of the recording.
        start: Start in seconds.
        duration: Duration in seconds; None for all that follows.
        channels: Channels, counted from 0; None for all of them, which are averaged when they are read.
    """

    recording: str
    start: float = 0.0
    duration: float | None = None
    channels: tuple[int, ...] | None = None


class AudioFile(NamedTuple):
    """An audio file of a corpus, or a segment of one, before it is decoded.

    Attributes:
        path: Path of the file.
        id: Id of the utterance.
        speaker: Speaker, if known.
        text: Transcript, if there is one.
        refused: Reason why the file cannot be used, such as an unreadable transcript.
        segment: Part of the file; None for all of it.
        language: Language, if known.
        corpus: Corpus that the utterance belongs to, if it is named.
    """

    path: Path
    id: str
    speaker: str | None
    text: str | None
    refused: str | None = None
    segment: Segment | None = None
    language: str | None = None
    corpus: str | None = None


def audio_by_folder(root: Path, skipped: Counter[str]) -> Iterator[tuple[Path, list[Path]]]:
    """Find the audio files of each folder of a tree.

    Args:
        root: Folder at the top.
        skipped: Counts by suffix, to which files are added that are neither audio nor transcripts.

    Yields:
        Each folder with audio in it, and its audio files by name.
    """
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if (real_path := os.path.realpath(folder)) in seen:  # a link to a parent folder would never end
            subfolders.clear()
            continue
        seen.add(real_path)
        subfolders.sort()
        visible = [name for name in names if not name.startswith(".")]  # hidden files are made by operating systems
        audio = sorted(name for name in visible if Path(name).suffix.lower() in AUDIO_SUFFIXES)
        count_skipped(skipped, map(Path, visible))
        if audio:
            yield Path(folder), [Path(folder, name) for name in audio]


def transcribed(folder: Path, paths: list[Path]) -> Iterator[tuple[Path, tuple[str | None, str | None]]]:
    """Find the transcript of each audio file of a folder.

    A transcript lies beside its audio as `<same name>.txt`, or in a `*.trans.txt` of the folder, as in LibriSpeech.

    Args:
        folder: Folder of the audio files.
        paths: Audio files.

    Yields:
        Each audio file, with its transcript or None, and the reason why the transcript cannot be read or None.
    """
    listed: dict[str, str] = {}
    unreadable = None
    for path in sorted(folder.glob("*.trans.txt")):
        try:
            lines = [line.split(maxsplit=1) for line in lines_of(path)]
        except UserError:
            unreadable = f"its transcript is in {path.name}, which is not UTF-8: convert that"
            continue
        listed |= {composed(words[0]): " ".join(words[1].split()) for words in lines if len(words) == 2}
    for path in paths:
        beside = path.with_suffix(".txt")
        try:
            text = " ".join(word for line in lines_of(beside) for word in line.split()) if beside.is_file() else ""
        except UserError:
            yield path, (None, f"its transcript, {beside.name}, is not UTF-8: convert it, or move it away")
            continue
        text = text or listed.get(composed(path.stem), "")
        yield path, (text or None, None if text else unreadable)


def file_identity(path: Path) -> tuple[int, int]:
    """Device and inode of a file, which are the same for all its paths, also with links and `..`."""
    status = path.stat()
    return status.st_dev, status.st_ino


def count_skipped(skipped: Counter[str], paths: Iterable[Path]) -> None:
    """Count by their suffix the files that are neither audio nor transcripts."""
    suffixes = (path.suffix.lower() for path in paths)
    skipped.update(
        suffix or "without a suffix" for suffix in suffixes if suffix not in AUDIO_SUFFIXES and suffix != ".txt"
    )


def skipped_sentence(skipped: Mapping[str, int]) -> str:
    """Report the number of skipped files by suffix."""
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
    return f"skipped, since their names have no suffix of audio: {counts}"
