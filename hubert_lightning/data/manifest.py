"""Manifests: lhotse `CutSet`s as JSONL, one line for each utterance, with all counts at 16 kHz."""

import gzip
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

from lhotse import CutSet
from lhotse.cut import Cut, MonoCut, MultiCut

from hubert_lightning.data.cut_rows import SHAR, cut_of, rows_of
from hubert_lightning.data.garbage import without_collection
from hubert_lightning.errors import UserError
from hubert_lightning.files import kind_of, replacing_all
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.interrupts import thread_pool
from hubert_lightning.untrusted.json_file import shown
from hubert_lightning.vocabulary import Vocabulary


def read_manifest(paths: Path | Sequence[Path]) -> CutSet:
    """Read the cuts of one or several manifests, in their order.

    Raises:
        UserError: As in `read_manifests`, or no manifest is named.
    """
    parts = read_manifests([Path(paths)] if isinstance(paths, (str, Path)) else paths)
    if not parts:
        raise UserError("no manifest is named; make one with `hubert prepare` and give its path")
    return CutSet([cut for part in parts for cut in part])


@without_collection()  # garbage collection would double the time for millions of objects
def read_manifests(paths: Sequence[Path]) -> list[list[Cut]]:
    """Read the cuts of each manifest.

    Args:
        paths: Manifests.

    Returns:
        Cuts of each manifest.

    Raises:
        UserError: A file is no manifest or empty, or an utterance occurs twice.
    """
    parts: list[list[Cut]] = []
    first_manifest: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.suffix == ".shar" and path.is_dir():
            raise UserError(f"{path}: a Shar corpus, which has neither words nor phones; give a manifest here")
        if path.is_dir() and any(path.glob("cuts.*.jsonl*")):
            raise UserError(f"{path}: a folder of Shar archives; run `hubert prepare shar` and give what it writes")
        if not path.is_file():
            raise UserError(f"{path}: no such manifest; make it with `hubert prepare`")
        items: list[Cut] = []
        for cut in _cuts_in(path):
            if not isinstance(cut, (MonoCut, MultiCut)):
                raise UserError(
                    f"{path}: holds a {type(cut).__name__}, not cuts of recordings; make it with `hubert prepare`"
                )
            if cut.id in first_manifest:
                raise UserError(
                    f"{cut.id}: in {first_manifest[cut.id]} and again in {path}; name each manifest once, or make them "
                    "again with `hubert prepare`, from folders that share no utterance"
                )
            first_manifest[cut.id] = path
            items.append(cut)
        if not items:
            raise UserError(f"{path}: an empty manifest; remove it and make it again with `hubert prepare`")
        parts.append(items)
    return parts


def _cuts_in(path: Path) -> Iterator[Cut]:
    number = 0
    try:
        for number, row in rows_of(path):  # noqa: B007
            yield cut_of(row)
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ").split("; ")[0]
        line = "" if reason.startswith("line ") or not number else f"line {number}: "
        raise UserError(f"{path}: not a cut manifest ({line}{reason}); make one with `hubert prepare`") from error


def write_manifest(cuts: Iterable[Cut], path: Path) -> None:
    """Write a manifest whole or not at all.

    Args:
        cuts: Cuts.
        path: File, compressed if its name ends in .gz.

    Raises:
        UserError: The disk is full or cannot be written to.
    """
    write_manifests({Path(path): cuts})


def write_manifests(manifests: Mapping[Path, Iterable[Cut]]) -> None:
    """Write manifests that belong together.

    Raises:
        UserError: As in `write_manifest`.
    """
    with replacing_all(*manifests) as files:
        for (path, cuts), file in zip(manifests.items(), files, strict=True):
            _write_cuts(cuts, path, file)


def _write_cuts(cuts: Iterable[Cut], path: Path, file: BinaryIO) -> None:
    compressed = path.suffix == ".gz"
    with gzip.GzipFile("", "wb", 6, file, mtime=0) if compressed else nullcontext(file) as lines:
        for cut in cuts:
            lines.write((json.dumps(cut.to_dict(), ensure_ascii=False) + "\n").encode())


def fingerprint(cuts: Iterable[Cut]) -> str:
    """Identify the audio of a manifest by each cut's id, length and position in its recording, in any order.

    Paths and transcripts do not count, so labels stay valid when a corpus is moved or transcribed.
    """
    lines = sorted(
        f"{cut.id}\t{cut.num_samples}\t{round(cut.start * cut.sampling_rate)}\t{cut.channel}\n" for cut in cuts
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def check_audio(cuts: Iterable[Cut]) -> None:
    """Refuse cuts that training cannot use, without decoding them.

    Raises:
        UserError: A cut is not counted at 16 kHz, or its file is missing, empty, or has another size than when
            `hubert prepare` decoded it.
    """
    sizes: dict[str, tuple[str, int | None]] = {}  # of each file: the id of a cut, and its size in bytes if known
    ends: dict[str, tuple[str, int]] = {}  # of each Shar archive: the id of the last cut, and the end of its audio
    for cut in cuts:
        if cut.sampling_rate != SAMPLE_RATE:
            raise UserError(
                f"{cut.id}: the manifest counts samples at {cut.sampling_rate} Hz, not at {SAMPLE_RATE} Hz; make it "
                "with `hubert prepare`, or call `.resample(16000)` on its cuts"
            )
        for source in cut.recording.sources:
            if source.type == "file":
                sizes[source.source] = (cut.id, (cut.custom or {}).get("bytes"))
            elif source.type == "shar" and (part := SHAR.fullmatch(source.source)):
                end = int(part["offset"]) + int(part["size"])
                if end > ends.get(part["archive"], ("", 0))[1]:
                    ends[part["archive"]] = cut.id, end
            elif source.type != "memory":
                raise UserError(
                    f"{cut.id}: audio of type {shown(source.type)} is not read here, only files and Shar archives; "
                    "save it to a file, and run `hubert prepare` again"
                )
    with thread_pool() as pool:  # a network file system answers many requests at once
        for (path, (cut_id, expected)), size in zip(sizes.items(), pool.map(_size, sizes), strict=True):
            _check_file(cut_id, path, size)
            if size == 0 or size != (expected or size):
                raise UserError(
                    f"{cut_id}: {path} has {size} bytes"
                    + (f", {expected} when it was prepared" if expected else "")
                    + "; restore it, or run `hubert prepare` again to leave it out"
                )
    for archive, (cut_id, end) in ends.items():
        size = _size(archive)
        _check_file(cut_id, archive, size)
        if (size or 0) < end:
            raise UserError(
                f"{cut_id}: {archive} has {size} bytes, and its audio ends at byte {end}; restore it, or export it "
                "again"
            )


def _check_file(cut_id: str, path: str, size: int | None) -> None:
    """Refuse a missing path, and one that is not a regular file."""
    if size is None:
        raise UserError(f"{cut_id}: {path} is not there; mount or restore it, or run `hubert prepare` again")
    if size < 0:
        raise UserError(f"{cut_id}: {path} is {kind_of(path)}, not an audio file; run `hubert prepare` again")


def _size(path: str) -> int | None:
    """Size of a file in bytes; -1 for a path that is not a regular file, None for a missing one."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def transcript(cut: Cut, vocabulary: Vocabulary) -> str:
    """Normalised transcript of a cut; empty if the manifest has none."""
    return vocabulary.normalise(" ".join(segment.text or "" for segment in cut.supervisions))


def place_of(cut: Cut) -> dict[str, str | int | float | None]:
    """State where the audio of a cut lies, so that it can be found without its manifest.

    Args:
        cut: Cut of a recording.

    Returns:
        "source", the path of the audio file, None for audio in an archive or in several files; "channel", None for the
        mean of several channels; "start" in the file and "duration", in seconds.
    """
    channels = [cut.channel] if isinstance(cut.channel, int) else cut.channel
    recorded = cut.recording.sources if cut.has_recording else []
    sources = [source for source in recorded if set(source.channels) & set(channels)]
    in_file = len(sources) == 1 and sources[0].type == "file"
    return {
        "source": str(sources[0].source) if in_file else None,
        "channel": channels[0] if len(channels) == 1 else None,
        "start": float(cut.start),
        "duration": float(cut.duration),
    }


def speaker_of(cut: Cut) -> str:
    """The first speaker of a cut; empty if the manifest has none."""
    return next((segment.speaker for segment in cut.supervisions if segment.speaker), "")
