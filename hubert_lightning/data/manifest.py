"""Manifests: lhotse `CutSet`s as JSONL, one line an utterance, every count at 16 kHz; read, written, checked."""

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
from lhotse.cut import Cut
from lhotse.cut.data import DataCut

from hubert_lightning.data.cut_rows import SHAR, cut_of, rows_of
from hubert_lightning.data.garbage import without_collection
from hubert_lightning.errors import UserError
from hubert_lightning.files import kind_of, replacing_all
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.interrupts import thread_pool
from hubert_lightning.untrusted.json_file import shown
from hubert_lightning.vocabulary import Vocabulary


def read_manifest(paths: Path | Sequence[Path]) -> CutSet:
    """All cuts of one or several manifests, in memory, in their order; raises as `read_manifests` does."""
    parts = read_manifests([Path(paths)] if isinstance(paths, (str, Path)) else paths)
    if not parts:
        raise UserError("no manifest is named; make one with `hubert prepare` and give its path")
    return CutSet([cut for part in parts for cut in part])


@without_collection()  # which takes as long again where millions of objects are made
def read_manifests(paths: Sequence[Path]) -> list[list[Cut]]:
    """The cuts of each manifest.

    Raises:
        UserError: A file is no manifest or empty, or an utterance is in two of them.
    """
    parts: list[list[Cut]] = []
    found_in: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.suffix == ".shar" and path.is_dir():
            raise UserError(f"{path}: a Shar corpus, which has neither words nor phones; give a manifest here")
        if path.is_dir() and any(path.glob("cuts.*.jsonl*")):
            raise UserError(f"{path}: a folder of Shar archives; run `hubert prepare shar` and give what it writes")
        if not path.is_file():
            raise UserError(f"{path}: no such manifest; make it with `hubert prepare`")
        items: list[Cut] = []
        for cut in _cuts_in(path):
            if not isinstance(cut, DataCut):
                raise UserError(
                    f"{path}: holds a {type(cut).__name__}, not cuts of recordings; make it with `hubert prepare`"
                )
            if cut.id in found_in:
                raise UserError(
                    f"{cut.id}: in {found_in[cut.id]} and again in {path}; name each manifest once, or make them "
                    "again with `hubert prepare`, from folders that share no utterance"
                )
            found_in[cut.id] = path
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
    except ValueError as error:
        said = str(error).removeprefix(f"{path}: ").split("; ")[0]
        place = "" if said.startswith("line ") or not number else f"line {number}: "
        raise UserError(f"{path}: not a cut manifest ({place}{said}); make one with `hubert prepare`") from error


def write_manifest(cuts: Iterable[Cut], path: Path) -> None:
    """Write a manifest whole or not at all.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    write_manifests({Path(path): cuts})


def write_manifests(manifests: Mapping[Path, Iterable[Cut]]) -> None:
    """Write manifests that belong together; raises as `write_manifest` does."""
    with replacing_all(*manifests) as files:
        for (path, cuts), file in zip(manifests.items(), files, strict=True):
            _write_cuts(cuts, path, file)


def _write_cuts(cuts: Iterable[Cut], path: Path, file: BinaryIO) -> None:
    compressed = path.suffix == ".gz"
    with gzip.GzipFile("", "wb", 6, file, mtime=0) if compressed else nullcontext(file) as lines:
        for cut in cuts:
            lines.write((json.dumps(cut.to_dict(), ensure_ascii=False) + "\n").encode())


def fingerprint(cuts: Iterable[Cut]) -> str:
    """Which audio a manifest is about: every cut's id, length and position in its recording, in any order.

    Paths and transcripts do not count: labels made before a corpus was moved or transcribed stay valid.
    """
    lines = sorted(
        f"{cut.id}\t{cut.num_samples}\t{round(cut.start * cut.sampling_rate)}\t{cut.channel}\n" for cut in cuts
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def check_audio(cuts: Iterable[Cut]) -> None:
    """Refuse cuts that training could not use, without decoding them.

    Raises:
        UserError: A cut that is not counted at 16 kHz, or whose file is gone, empty, or not as long as it was when
            `hubert prepare` decoded it.
    """
    sizes: dict[str, tuple[str, int | None]] = {}  # of every file: the cut that needs it, and its bytes if known
    least: dict[str, tuple[str, int]] = {}  # of every Shar archive: the cut that reaches farthest into it, and how far
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
                if end > least.get(part["archive"], ("", 0))[1]:
                    least[part["archive"]] = cut.id, end
            elif source.type != "memory":
                raise UserError(
                    f"{cut.id}: audio of type {shown(source.type)} is not read here, only files and Shar archives; "
                    "save it to a file, and run `hubert prepare` again"
                )
    with thread_pool() as pool:  # a network file system answers many questions at once
        for (path, (cut_id, expected)), found in zip(sizes.items(), pool.map(_size, sizes), strict=True):
            _check_file(cut_id, path, found)
            if found == 0 or found != (expected or found):
                raise UserError(
                    f"{cut_id}: {path} has {found} bytes"
                    + (f", {expected} when it was prepared" if expected else "")
                    + "; restore it, or run `hubert prepare` again to leave it out"
                )
    for archive, (cut_id, end) in least.items():
        found = _size(archive)
        _check_file(cut_id, archive, found)
        if (found or 0) < end:
            raise UserError(
                f"{cut_id}: {archive} has {found} bytes, and its audio ends at byte {end}; restore it, or export it "
                "again"
            )


def _check_file(cut_id: str, path: str, size: int | None) -> None:
    """Refuse what is not there, and what is no regular file."""
    if size is None:
        raise UserError(f"{cut_id}: {path} is not there; mount or restore it, or run `hubert prepare` again")
    if size < 0:
        raise UserError(f"{cut_id}: {path} is {kind_of(path)}, not an audio file; run `hubert prepare` again")


def _size(path: str) -> int | None:
    """Bytes of a file; -1 of what is no regular file, None of what is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def transcript(cut: Cut, vocabulary: Vocabulary) -> str:
    """The words of a cut as a vocabulary spells them; empty where the manifest has none."""
    return vocabulary.normalise(" ".join(segment.text or "" for segment in cut.supervisions))


def speaker_of(cut: Cut) -> str:
    """The first speaker of a cut; empty where the manifest does not say."""
    return next((segment.speaker for segment in cut.supervisions if segment.speaker), "")
