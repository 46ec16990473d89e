"""Recordings that a verb was given: found in folders, examined, and of each what a model makes of it, or why nothing
was made, whatever is wrong with the others."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.audio_folder import AUDIO_SUFFIXES, count_skipped, skipped_sentence
from hubert_lightning.data.examine import examine
from hubert_lightning.data.probe import Sound
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError
from hubert_lightning.frames import num_frames

Rows = Callable[[Sequence[Sequence[Cut]]], Iterator[list[Tensor]]]
"""Groups of cuts → of each group in turn, for each of its cuts one row for each frame"""

Result = TypeVar("Result")


def listed(files: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the audio in them; each once, however its path is written."""
    found: dict[str, Path] = {}
    skipped = Counter[str]()
    for file in map(Path, files):
        if not file.is_dir():
            found.setdefault(os.path.realpath(file), file)
            continue
        # a leading dot marks what an operating system left there, not audio
        inside = [path for path in sorted(file.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        audio = [path for path in inside if path.suffix.lower() in AUDIO_SUFFIXES]
        if not audio:
            raise UserError(f"{file}: no audio in this folder; name files, or another folder")
        for path in audio:
            found.setdefault(os.path.realpath(path), path)
        count_skipped(skipped, inside)
    if skipped:
        print(f"hubert: {skipped_sentence(skipped)}", file=sys.stderr)
    return list(found.values())


def of_each(
    paths: Sequence[Path], rows_of: Rows, make: Callable[[Cut, Tensor], Result], frames_together: int
) -> Iterator[Result | RefusedFile]:
    """What is made of each recording's rows, or why nothing was, in whatever order they are ready.

    frames_together: of the recordings of a group at most, whose rows are in memory together; one may have more
    """
    cuts, refused, heard = examine(paths)
    _tell(cuts, heard)
    yield from _of_groups(rows_of, _grouped(cuts, frames_together), make)
    yield from refused


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager]:
    """What an encoder runs in: "float32", or "bfloat16" where torch finds that precise enough."""
    return partial(torch.autocast, device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext


def _of_groups(
    rows_of: Rows, groups: list[list[Cut]], make: Callable[[Cut, Tensor], Result]
) -> Iterator[Result | RefusedFile]:
    done = 0
    while done < len(groups):
        try:
            for of_group in rows_of(groups[done:]):
                for cut, rows in zip(groups[done], of_group, strict=True):
                    yield _made(make, cut, rows)
                done += 1
        except UserError as error:  # a file that was sound when it was examined; the others of its group are
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
        for remark in heard[cut.id].remarks:
            print(f"hubert: {cut.id}: {remark}", file=sys.stderr)
