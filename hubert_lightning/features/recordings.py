"""The recordings of a verb: their files, and the result of each or the reason why it failed."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.audio_folder import audio_by_folder, skipped_sentence
from hubert_lightning.data.examine import examine
from hubert_lightning.data.probe import Sound
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import Precision
from hubert_lightning.frames import num_frames

Rows = Callable[[Sequence[Sequence[Cut]]], Iterator[list[Tensor]]]
"""A function from groups of cuts to the rows (frames, …) of each group's cuts, group after group."""

Result = TypeVar("Result")


def listed(files: Sequence[Path]) -> list[Path]:
    """Find the audio files of a verb's arguments.

    Args:
        files: Files, and folders in which all audio files are used, including those in subfolders.

    Returns:
        Each file once, even if several paths lead to it.

    Raises:
        UserError: A folder holds no audio.
    """
    recordings = find_recordings(files)
    if recordings.refused:
        raise UserError(f"{recordings.refused[0].path}: {recordings.refused[0].reason}")
    if recordings.skipped:
        print(f"hubert: {skipped_sentence(recordings.skipped)}", file=sys.stderr)
    return recordings.paths


class Recordings(NamedTuple):
    """The audio files among files and folders.

    Args:
        paths: Each audio file once, even if several paths lead to it.
        skipped: Number of other files in the folders, by suffix.
        refused: Folders without audio.
    """

    paths: list[Path]
    skipped: Counter[str]
    refused: list[RefusedFile]


def find_recordings(files: Sequence[Path | str]) -> Recordings:
    """Find audio files, also those in folders and their subfolders, without printing."""
    paths: dict[str, Path] = {}
    skipped = Counter[str]()
    refused: list[RefusedFile] = []
    for file in map(Path, files):
        if not file.is_dir():
            paths.setdefault(os.path.realpath(file), file)
            continue
        audio = sorted(path for _, paths in audio_by_folder(file, skipped) for path in paths)
        if not audio:
            refused.append(RefusedFile(file, "no audio in this folder; name files, or another folder"))
        for path in audio:
            paths.setdefault(os.path.realpath(path), path)
    return Recordings(list(paths.values()), skipped, refused)


def of_each(
    paths: Sequence[Path], rows_of: Rows, make: Callable[[Cut, Tensor], Result], frames_together: int
) -> Iterator[Result | RefusedFile]:
    """Compute the result of each recording; a recording that fails does not stop the others.

    Args:
        paths: Audio files.
        rows_of: Function that computes the rows of each recording.
        make: Function from a recording and its rows to its result.
        frames_together: Largest number of frames of the recordings whose rows are in memory together; a single
            recording may have more.

    Yields:
        Result of a recording, or the reason why there is none, in no particular order.
    """
    cuts, refused, sounds = examine(paths)
    _print_remarks(cuts, sounds)
    yield from of_cuts(cuts, rows_of, make, frames_together)
    yield from refused


def of_cuts(
    cuts: Sequence[Cut], rows_of: Rows, make: Callable[[Cut, Tensor], Result], frames_together: int
) -> Iterator[Result | RefusedFile]:
    """Compute the result of each cut as `of_each` does of each file; the path of a refused file is the id of its cut.

    Args:
        cuts: Recordings that have been examined, or whose audio is in memory.
        rows_of: Function that computes the rows of each recording.
        make: Function from a recording and its rows to its result.
        frames_together: Largest number of frames of the recordings whose rows are in memory together.
    """
    yield from _of_groups(rows_of, _grouped(cuts, frames_together), make)


def autocast(device: torch.device, precision: str) -> Precision:
    """Return the context in which an encoder computes.

    Args:
        device: Device that computes.
        precision: "float32", or "bfloat16" for the operations that torch finds precise enough in it.
    """
    return partial(torch.autocast, device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext


def _of_groups(
    rows_of: Rows, groups: list[list[Cut]], make: Callable[[Cut, Tensor], Result]
) -> Iterator[Result | RefusedFile]:
    done = 0
    while done < len(groups):
        try:
            for rows_of_cuts in rows_of(groups[done:]):
                for cut, rows in zip(groups[done], rows_of_cuts, strict=True):
                    yield _made(make, cut, rows)
                done += 1
        except UserError as error:  # a file has become unreadable; try the files of its group one by one
            if len(groups[done]) == 1:
                yield RefusedFile(Path(groups[done][0].id), str(error))
            else:
                yield from _of_groups(rows_of, [[cut] for cut in groups[done]], make)
            done += 1


def _made(make: Callable[[Cut, Tensor], Result], cut: Cut, rows: Tensor) -> Result | RefusedFile:
    try:
        return make(cut, rows)
    except UserError as error:
        return RefusedFile(Path(cut.id), str(error))


def _grouped(cuts: Sequence[Cut], frames_together: int) -> list[list[Cut]]:
    """Group recordings whose rows fit in memory together, so that short ones can fill a batch."""
    groups: list[list[Cut]] = []
    frames = 0
    for cut in cuts:
        frames += num_frames(cut.num_samples)
        if not groups or frames > frames_together:
            groups.append([])
            frames = num_frames(cut.num_samples)
        groups[-1].append(cut)
    return groups


def _print_remarks(cuts: Sequence[Cut], sounds: Mapping[str, Sound]) -> None:
    for cut in cuts:
        for remark in sounds[cut.id].remarks:
            print(f"hubert: {cut.id}: {remark}", file=sys.stderr)
