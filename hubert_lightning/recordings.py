"""Recordings that a verb was given: found in folders, examined, decoded by ffmpeg where that is needed; and of each
what a model makes of it, or why nothing was made, whatever is wrong with the others."""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import audioread
import numpy as np
import soundfile
import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.preparation import SUFFIXES, Refusal, Sound, examine
from hubert_lightning.frames import SAMPLE_RATE, num_frames

ONLY_FFMPEG = {".m4a", ".mp4", ".aac", ".wma", ".webm", ".mkv", ".mov", ".avi", ".amr", ".3gp", ".wv", ".ape"}

Rows = Callable[[Sequence[Sequence[Cut]]], Iterator[list[Tensor]]]
"""Groups of cuts → of each group in turn, for each of its cuts one row for each frame"""

Result = TypeVar("Result")


def listed(files: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the audio in them; each once."""
    found: dict[Path, None] = {}
    for file in map(Path, files):
        if file.is_dir():
            known = SUFFIXES | ONLY_FFMPEG
            inside = [path for path in sorted(file.rglob("*")) if path.suffix.lower() in known and path.is_file()]
            # a leading dot marks what an operating system left there, not audio
            inside = [path for path in inside if not path.name.startswith(".")]
            if not inside:
                raise ValueError(f"{file}: no audio in this folder; name files, or another folder")
            found |= dict.fromkeys(inside)
        else:
            found[file] = None
    return list(found)


def of_each(
    paths: Sequence[Path], rows_of: Rows, make: Callable[[Cut, Tensor], Result], frames_together: int
) -> Iterator[Result | Refusal]:
    """What is made of each recording's rows, or why nothing was, in whatever order they are ready.

    frames_together: of the recordings of a group at most, whose rows are in memory together; one may have more
    """
    cuts, refused, heard = examine(paths)
    _tell(cuts, heard)
    yield from _of_groups(rows_of, _grouped(cuts, frames_together), make)
    for refusal in refused:
        if refusal.reason.startswith("unreadable"):  # by libsndfile; one at a time, so that they do not fill the disk
            with TemporaryDirectory() as folder:
                yield from _of_converted(refusal, Path(folder) / "audio.w64", rows_of, make)
        else:
            yield refusal


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager]:
    """What an encoder runs in: "float32", or "bfloat16" where torch finds that precise enough."""
    return partial(torch.autocast, device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext


def _of_groups(
    rows_of: Rows, remaining: list[list[Cut]], make: Callable[[Cut, Tensor], Result]
) -> Iterator[Result | Refusal]:
    while remaining:
        done = 0
        try:
            for of_group in rows_of(remaining):
                for cut, rows in zip(remaining[done], of_group, strict=True):
                    yield _made(make, cut, rows)
                done += 1
            remaining = []
        except ValueError as error:  # a file that was sound when it was examined; the others of its group are
            group, *others = remaining[done:]
            if len(group) == 1:
                yield Refusal(Path(group[0].id), str(error))
                remaining = others
            else:
                remaining = [*([cut] for cut in group), *others]


def _of_converted(
    refusal: Refusal, converted: Path, rows_of: Rows, make: Callable[[Cut, Tensor], Result]
) -> Iterator[Result | Refusal]:
    """The same of a file that libsndfile cannot read, decoded by ffmpeg or the system."""
    if reason := _decoded(refusal.path, converted):
        yield Refusal(refusal.path, f"{refusal.reason}; {reason}")
        return
    cuts, broken, heard = examine([converted])
    if broken:
        yield Refusal(refusal.path, broken[0].reason)
        return
    name = str(refusal.path)
    cut = cuts[0].with_id(name)
    _tell([cut], {name: heard[str(converted)]})
    yield from _of_groups(rows_of, [[cut]], make)


def _made(make: Callable[[Cut, Tensor], Result], cut: Cut, rows: Tensor) -> Result | Refusal:
    try:
        return make(cut, rows)
    except ValueError as error:
        return Refusal(Path(cut.id), str(error))


def _grouped(cuts: Sequence[Cut], frames_together: int) -> list[list[Cut]]:
    """Files whose rows fit in memory together, so that short ones can fill a batch."""
    groups: list[list[Cut]] = []
    frames = 0
    for cut in cuts:
        of_cut = num_frames(cut.num_samples)
        if not groups or frames + of_cut > frames_together:
            groups.append([])
            frames = 0
        groups[-1].append(cut)
        frames += of_cut
    return groups


def _tell(cuts: Sequence[Cut], heard: Mapping[str, Sound]) -> None:
    for cut in cuts:
        sound = heard[cut.id]
        if sound.silent:
            print(f"hubert: {cut.id}: silent, every sample is 0", file=sys.stderr)
        elif sound.sampling_rate < SAMPLE_RATE:
            print(
                f"hubert: {cut.id}: recorded at {sound.sampling_rate} Hz; a model that learnt from 16 kHz errs more",
                file=sys.stderr,
            )


def _decoded(path: Path, converted: Path) -> str | None:
    """Write audio that ffmpeg or the system decodes as a file that libsndfile reads; what is missing if that fails."""
    try:
        with (
            audioread.audio_open(path) as audio,
            soundfile.SoundFile(converted, "w", audio.samplerate, audio.channels, "PCM_16", format="W64") as file,
        ):
            for block in audio:
                file.write(np.frombuffer(block, dtype="<i2").reshape(-1, audio.channels))
    except (audioread.DecodeError, EOFError):
        if shutil.which("ffmpeg"):
            return "ffmpeg cannot read it either; record or copy it again"
        return "install ffmpeg, which reads other formats, or convert it to wav or flac"
    except (OSError, soundfile.SoundFileError) as error:
        return f"it could not be converted to {converted} ({error}); make room there"
    return None
