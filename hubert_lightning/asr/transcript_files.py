"""Transcript files: selection of the recordings without one, and writing."""

import sys
import unicodedata
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
from hubert_lightning.errors import UserError
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


def remaining(
    paths: Sequence[Path], format: TranscriptFormat, output: Path | None, journal: Journal | None
) -> list[Path]:
    """Select the recordings that have no transcript from this model and these settings.

    Args:
        paths: Recordings.
        format: Format of the transcripts.
        output: Folder of the transcripts.
        journal: Record of the folder.
    """
    if output is None or journal is None:
        return list(paths)
    missing = [path for path in paths if not _is_made(path, _transcript_path(path, format, output), journal)]
    if done := len(paths) - len(missing):
        print(
            f"hubert: skipped {done} of {len(paths)} files, finished before with the same model and settings",
            file=sys.stderr,
        )
    return missing


def _transcript_path(recording: Path, format: TranscriptFormat, output: Path) -> Path:
    return output / recording.with_suffix(SUFFIXES_OF_FORMATS[format]).name


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


def check_names(paths: Sequence[Path], format: TranscriptFormat, output: Path | None, journal: Journal | None) -> None:
    """Check the names of the transcripts before any work.

    Args:
        paths: Recordings.
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
    # on disks of Windows and macOS, names that differ in case or in the composition of letters are the same file
    names = [_transcript_path(path, format, output).name for path in paths]
    if twice := _same_name(paths, [unicodedata.normalize("NFC", name).casefold() for name in names]):
        raise UserError(
            f"{twice[0]} and {twice[1]}: both would be one file in {output}, as on any disk that does not distinguish "
            "capitals; transcribe them one after the other into folders of their own"
        )
    if format == "text" and output.exists():
        _check_transcripts_beside(paths, output, journal)


def _check_transcripts_beside(paths: Sequence[Path], output: Path, journal: Journal | None) -> None:
    """Refuse to replace a .txt file beside its audio that this package has not written."""
    folders = {path.parent for path in paths}
    same_folder = {folder for folder in folders if folder.exists() and folder.samefile(output)}
    for path in paths:
        text = path.with_suffix(".txt")
        if path.parent in same_folder and text.is_file() and (journal is None or not journal.row(path)):
            raise UserError(
                f"{text}: lies beside its audio, and may be its transcript, which would be replaced; choose another "
                "--output"
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
    output: Path | None,
    num_files: int,
    journal: Journal | None = None,
    style: SubtitleStyle = SubtitleStyle(),
) -> int:
    """Write transcripts, and print which recordings failed.

    Args:
        refused: Files and folders that were refused before.
        results: Transcripts, and refusals of recordings.
        format: Format of the transcripts.
        output: Folder of the transcripts; standard output if not given.
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
        if output is not None:
            path = _transcript_path(Path(result.file), format, Path(output))
            if journal is not None:  # before the file is written, so that the file is known to be of this package
                journal.add(Path(result.file), before=_status(path))
            write_whole(path, content.encode())
        else:
            name = f"{result.file}\t" if format == "text" and num_files > 1 else ""
            with above_bar():
                print("".join(f"{name}{line}" for line in content.splitlines(keepends=True)), end="", flush=True)
    if num_failed:
        print(f"hubert: {num_failed} of {num_files} files failed", file=sys.stderr)
    if journal is not None:
        journal.finish()
    return num_failed
