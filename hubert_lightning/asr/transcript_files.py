"""Transcript files: selection of the recordings without one, and writing."""

import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from hubert_lightning.asr.subtitles import SubtitleStyle
from hubert_lightning.asr.transcript_formats import (
    SUFFIXES_OF_FORMATS,
    Transcript,
    TranscriptFormat,
    ctm_recording,
    formatted,
)
from hubert_lightning.console import above_bar
from hubert_lightning.data.journal import Journal
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError, counted
from hubert_lightning.files import write_whole


def journal_of(
    output: Path | None,
    format: TranscriptFormat,
    settings: Mapping[str, Any],  # JSON values
    texts: Mapping[str, str] | None = None,
) -> Journal | None:
    """Open the record of the transcripts in a folder.

    Args:
        output: Folder of the transcripts; None for standard output, which has no record.
        format: Format of the transcripts.
        settings: Model and settings that transcripts depend on.
        texts: Digest of the known text of each recording, by its path.
    """
    if output is None or (Path(output).exists() and not Path(output).is_dir()):
        return None
    return Journal(Path(output) / f".made-{format}.jsonl", settings, texts)


def transcript_paths(
    paths: Sequence[Path], files: Sequence[Path], format: TranscriptFormat, output: Path | None
) -> dict[str, Path]:
    """Name the transcript of each recording: talk.txt of talk.wav.

    Recordings that would have the same name are called by their paths, with their suffixes: talk.wav.txt, and
    monday/talk.wav.txt.

    Args:
        paths: Recordings.
        files: Files and folders in which they were found; paths begin at the folder that holds all of these.
        format: Format of the transcripts.
        output: Folder of the transcripts; there are no names for standard output.

    Returns:
        Path of the transcript by that of the recording.
    """
    if output is None:
        return {}
    suffix = SUFFIXES_OF_FORMATS[format]
    folders = [os.path.abspath(file if Path(file).is_dir() else Path(file).parent) for file in files]
    short = {path: path.with_suffix(suffix).name for path in paths}
    number = Counter(_on_any_disk(name) for name in short.values())
    return {
        str(path): Path(output)
        / (name if number[_on_any_disk(name)] == 1 else os.path.relpath(path, os.path.commonpath(folders)) + suffix)
        for path, name in short.items()
    }


def _on_any_disk(name: str) -> str:
    """What identifies a file name also on disks of Windows and macOS, where case and composition do not matter."""
    return unicodedata.normalize("NFC", name).casefold()


def remaining(paths: Sequence[Path], names: Mapping[str, Path], journal: Journal | None) -> list[Path]:
    """Select the recordings that have no transcript from this model and these settings.

    Args:
        paths: Recordings.
        names: Path of each transcript.
        journal: Record of the folder of the transcripts.
    """
    if journal is None:
        return list(paths)
    missing = [path for path in paths if not _is_made(path, names[str(path)], journal)]
    if done := len(paths) - len(missing):
        print(
            f"hubert: skipped {done} of {counted(len(paths), 'file')}, finished before with the same model and "
            "settings",
            file=sys.stderr,
        )
    return missing


def _is_made(recording: Path, transcript: Path, journal: Journal) -> bool:
    """Whether a recording is finished, and its transcript file is not an older file of the same name."""
    status = _status(transcript)
    return recording in journal and status is not None and status != journal.row(recording).get("before")


def _status(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_ino, status.st_mtime_ns]


def check_names(
    paths: Sequence[Path],
    names: Mapping[str, Path],
    format: TranscriptFormat,
    output: Path | None,
    journal: Journal | None,
) -> None:
    """Check the names of the transcripts before any work.

    Args:
        paths: Recordings.
        names: Path of each transcript.
        format: Format of the transcripts.
        output: Folder of the transcripts.
        journal: Record of the folder.

    Raises:
        UserError: Two transcripts would have the same name, or one would replace another file.
    """
    if format == "ctm" and (twice := _same_name(paths, [ctm_recording(path) for path in paths])):
        raise UserError(
            f"{twice[0]} and {twice[1]}: both are called {ctm_recording(twice[1])} in ctm, which takes them for one "
            "recording; transcribe them one after the other, or rename one"
        )
    if output is None:
        if format in ("srt", "vtt", "tsv") and len(paths) > 1:
            raise UserError(f"{format} for {len(paths)} files needs a folder, one file each; name it with --output")
        return
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: a file, not a folder; choose another --output")
    if twice := _same_name(paths, [_on_any_disk(str(names[str(path)])) for path in paths]):
        raise UserError(
            f"{twice[0]} and {twice[1]}: both would be one file in {output} on disks that do not distinguish capitals; "
            "transcribe them one after the other into folders of their own"
        )
    made = set() if journal is None else journal.recordings_of_any_settings()
    for path in paths:
        transcript = names[str(path)]
        is_beside = transcript.is_file() and transcript.parent.samefile(path.parent)
        if is_beside and os.path.abspath(path) not in made:
            raise UserError(
                f"{path.parent / transcript.name}: lies beside its audio, and may be its transcript, which would be "
                "replaced; choose another --output"
            )


def _same_name(paths: Sequence[Path], names: Sequence[str]) -> tuple[Path, Path] | None:
    """Find the first two files with the same name."""
    seen: dict[str, Path] = {}
    for path, name in zip(paths, names, strict=True):
        if name in seen:
            return seen[name], path
        seen[name] = path
    return None


def write_all(
    refused: Sequence[RefusedFile],
    results: Iterator[Transcript | RefusedFile],
    format: TranscriptFormat,
    names: Mapping[str, Path],
    num_files: int,
    journal: Journal | None = None,
    style: SubtitleStyle = SubtitleStyle(),
) -> int:
    """Write transcripts, and print which recordings failed.

    Args:
        refused: Files and folders that were refused before.
        results: Transcripts, and refusals of recordings.
        format: Format of the transcripts.
        names: Path of each transcript; empty for standard output.
        num_files: Number of recordings, including finished ones.
        journal: Record of the folder.
        style: Limits of subtitles.

    Returns:
        Number of recordings that failed.
    """
    num_failed = 0
    for result in chain(refused, results):
        if isinstance(result, RefusedFile):
            num_failed += 1
            print(f"hubert: {result.path}: {result.reason}", file=sys.stderr, flush=True)
            continue
        content = formatted(result, format, style)
        if names:
            path = names[result.file]
            if journal is not None:  # before the file is written, so that the file is known to be of this package
                journal.add(Path(result.file), before=_status(path))
            write_whole(path, content.encode())
        else:
            name = f"{result.file}\t" if format == "text" and num_files > 1 else ""
            with above_bar():
                print("".join(f"{name}{line}" for line in content.splitlines(keepends=True)), end="", flush=True)
    if num_failed:
        print(f"hubert: {num_failed} of {counted(num_files, 'file')} failed", file=sys.stderr)
    if journal is not None:
        journal.finish()
    return num_failed
