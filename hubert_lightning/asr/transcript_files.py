"""Transcript files: selection of the recordings without one, and writing."""

import hashlib
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
    return Journal(
        Path(output) / f".made-{format}.jsonl",
        settings,
        texts,
        name_output=lambda recording: _on_any_disk(Path(recording).with_suffix(SUFFIXES_OF_FORMATS[format]).name),
    )


def transcript_paths(
    paths: Sequence[Path], files: Sequence[Path], format: TranscriptFormat, output: Path | None
) -> dict[str, Path]:
    """Name the transcript of each recording: talk.txt of talk.wav.

    Recordings that would have the same name are called by their paths, with their suffixes: talk.wav.txt, and
    monday/talk.wav.txt. So is talk.wav.flac beside them, which would be talk.wav.txt as well.

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
    common = os.path.commonpath(folders)
    names = {path: path.with_suffix(suffix).name for path in paths}
    long: set[Path] = set()
    while twice := _of_one_name(names) - long:
        long |= twice
        names |= {path: os.path.relpath(path, common) + suffix for path in twice}
    return {str(path): Path(output) / name for path, name in names.items()}


def _of_one_name(names: Mapping[Path, str]) -> set[Path]:
    """Recordings whose transcripts would have the name of another's."""
    number = Counter(map(_on_any_disk, names.values()))
    return {path for path, name in names.items() if number[_on_any_disk(name)] > 1}


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
    status, output = _status(transcript), _output(transcript, journal)
    if recording not in journal or status is None:
        return False
    row = journal.row(recording)
    return status != row.get("before") and row.get("output", output) == output


def _output(transcript: Path, journal: Journal) -> str:
    """Name of a transcript in the journal."""
    return _on_any_disk(os.path.relpath(transcript, journal.path.parent))


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
) -> None:
    """Check the names of the transcripts before any work.

    Args:
        paths: Recordings.
        names: Path of each transcript.
        format: Format of the transcripts.
        output: Folder of the transcripts.

    Raises:
        UserError: Two transcripts would have the same name, or there is no folder for them.
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


def check_replaced(paths: Sequence[Path], names: Mapping[str, Path], journal: Journal | None) -> None:
    """Check the files that transcripts would replace, before any work.

    Args:
        paths: Recordings that are transcribed.
        names: Path of each transcript.
        journal: Record of the folder.

    Raises:
        UserError: A file is the transcript of another recording, was changed after it was written, or lies beside its
            audio and is not known to be its transcript.
    """
    if journal is None:
        return
    changed = []
    for path in paths:
        transcript = names[str(path)]
        output = _output(transcript, journal)
        row, owner = journal.row_of_any_settings(path), journal.owner(output)
        if owner is not None and owner != os.path.abspath(path):
            row_of_owner = journal.row_of_any_settings(owner)
            was_moved = not Path(owner).exists() and journal.is_same(row_of_owner, path)
            if transcript.is_file() and not was_moved:
                raise UserError(
                    f"{transcript}: the transcript of {owner}, which that of {path} would replace; give both in one "
                    "command, or choose another --output"
                )
            journal.free(output)
            row = row_of_owner
        if not transcript.is_file() or row.get("before") == _status(transcript):
            continue
        is_own = bool(row) and row.get("output", output) == output
        if is_own and "digest" in row:
            if _digest(transcript) != row["digest"]:
                changed.append(transcript)
        elif transcript.parent.samefile(path.parent):  # lines of earlier versions do not tell a corrected transcript
            raise UserError(
                f"{path.parent / transcript.name}: lies beside its audio, and may be its transcript, which would be "
                "replaced; move it to another folder, or choose another --output"
            )
    if changed:
        others = f" (as were {len(changed) - 1} others)" if changed[1:] else ""
        raise UserError(
            f"{changed[0]}: was changed after it was written{others}, and would be replaced; move it to another "
            "folder, or choose another --output"
        )


def _digest(path: Path) -> str | None:
    """Digest of a transcript as it is now; None if it cannot be read."""
    try:
        return _digest_of(path.read_bytes())
    except OSError:
        return None


def _digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


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
            path, written = names[result.file], content.encode()
            if journal is not None:  # before the file is written, so that the file is known to be of this package
                entries = {"output": _output(path, journal), "digest": _digest_of(written), "before": _status(path)}
                if owner := journal.add(Path(result.file), **entries):
                    num_failed += 1
                    print(
                        f"hubert: {result.file}: {path} is the transcript of {owner}, which another command has "
                        "written meanwhile; give both in one command, or choose another --output",
                        file=sys.stderr,
                        flush=True,
                    )
                    continue
            write_whole(path, written)
        else:
            name = f"{result.file}\t" if format == "text" and num_files > 1 else ""
            with above_bar():
                print("".join(f"{name}{line}" for line in content.splitlines(keepends=True)), end="", flush=True)
    if num_failed:
        print(f"hubert: {num_failed} of {counted(num_files, 'file')} failed", file=sys.stderr)
    if journal is not None:
        journal.finish()
    return num_failed
