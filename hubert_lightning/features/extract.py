"""Features of many cuts, streamed: batches of similar length, long recordings in windows, nothing kept.

What a cut's features are does not depend on what else is in its batch, nor on how many processes share the work.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist
from lhotse.cut import Cut
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from hubert_lightning import console
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.corpora import lengths_of
from hubert_lightning.data.workers import WatchedReads, quiet_worker
from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import Extractor
from hubert_lightning.features.windows import Window, windows
from hubert_lightning.frames import HOP, SAMPLE_RATE, num_frames, num_samples, seconds_to_samples
from hubert_lightning.model.convolutions import WaveformStatistics
from hubert_lightning.model.statistics import statistics_of


class Piece(NamedTuple):
    """What is encoded at once, and of which cut in the list."""

    place: int
    window: Window


def extract(
    extractor: Extractor,
    groups: Sequence[Sequence[Cut]],
    max_frames: int,
    what: str,
    num_workers: int = 0,
    windows_of: Callable[[Cut], list[Window]] | None = None,
    as_whole: bool = False,
) -> Iterator[tuple[int, Piece, Tensor]]:
    """Features of groups of cuts, group after group; inside a group in order of length.

    max_frames:  frames of a batch at most, padding counted; a single window may have more
    what:        the name of the progress bar, which tells hours of audio
    num_workers: processes that read audio
    windows_of:  how each recording is cut, if it takes looking at it; groups are then looked at one after the other
    as_whole:    windows are normalised as their whole recording is, which is read once more; otherwise each on its own
    returns:     group, piece, features from its window's start to its end: (frames, …, dim)
    """
    hours = sum(int(lengths_of(cuts).sum()) for cuts in groups) / SAMPLE_RATE / 3600
    with _progress() as bar:
        task = bar.add_task(what, total=hours, began=perf_counter())
        for some in _planned_together(groups, most=1 if windows_of else 100_000):
            batches = [(number, batch) for number in some for batch in _batches(groups[number], max_frames, windows_of)]
            waveforms = _Waveforms(groups, batches, as_whole and extractor.features_of_parts is not None)
            loader = DataLoader(
                WatchedReads(waveforms, waveforms.numbered, waveforms.id_of, num_workers),
                batch_size=None,
                num_workers=num_workers,
                worker_init_fn=quiet_worker if num_workers else None,
                generator=torch.Generator(),  # leaves the numbers alone that training draws
            )
            for place, ((number, pieces), read) in enumerate(zip(batches, loader, strict=True), start=1):
                console.note(f"making features ({what}, batch {place} of {len(batches)})")
                if isinstance(read, UserError):
                    raise read
                with torch.no_grad():
                    features = extractor(*read)
                for piece, rows in zip(pieces, features, strict=True):
                    first, _, start, end = piece.window
                    yield number, piece, rows[start - first : end - first]
                    bar.advance(task, (end - start) * HOP / SAMPLE_RATE / 3600)


def extract_cuts(
    extractor: Extractor,
    groups: Sequence[Sequence[Cut]],
    what: str,
    *,
    batch_duration: float | None = None,
    num_workers: int = 0,
    windows_of: Callable[[Cut], list[Window]] | None = None,
    as_whole: bool = False,
) -> Iterator[list[Tensor]]:
    """What `extract` gives, put together: group after group, in the order of its cuts, (frames, …) each, on the CPU.

    batch_duration: seconds that are encoded at once, padding counted; if not given, one recording at a time on a CPU,
        where more together take longer, and four minutes on a GPU

    Raises:
        UserError: Audio that cannot be read.
    """
    # Each length of audio has kernels of its own; oneDNN would keep a thousand of them, of Base in gigabytes
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if batch_duration is None:
        batch_duration = 0.0 if extractor.device.type == "cpu" else 240.0
    batch_frames = num_frames(seconds_to_samples(batch_duration))
    of_group: list[Tensor] = []
    missing = 0  # frames
    for number, piece, rows in extract(extractor, groups, batch_frames, what, num_workers, windows_of, as_whole):
        if not of_group:
            of_group = [
                rows.new_empty(num_frames(cut.num_samples), *rows.shape[1:], device="cpu") for cut in groups[number]
            ]
            missing = sum(map(len, of_group))
        of_group[piece.place][piece.window.start : piece.window.end] = rows
        missing -= len(rows)
        if not missing:  # told at once: reading the next group may fail
            yield of_group
            of_group = []


def _planned_together(groups: Sequence[Sequence[Cut]], most: int) -> Iterator[list[int]]:
    """Numbers of groups that have about so many cuts together: of all of a large corpus, plans would fill memory."""
    some: list[int] = []
    cuts = 0
    for number, group in enumerate(groups):
        some.append(number)
        cuts += len(group)
        if cuts >= most:
            yield some
            some, cuts = [], 0
    yield some


def _batches(
    cuts: Sequence[Cut], max_frames: int, windows_of: Callable[[Cut], list[Window]] | None
) -> list[list[Piece]]:
    cut_up = windows_of or (lambda cut: windows(num_frames(cut.num_samples)))
    pieces = [Piece(place, window) for place, cut in enumerate(cuts) for window in cut_up(cut)]
    pieces.sort(key=lambda piece: (_frames(piece), cuts[piece.place].id, piece.window.first))
    batches: list[list[Piece]] = []
    for piece in pieces:
        if not batches or (len(batches[-1]) + 1) * _frames(piece) > max_frames:
            batches.append([])
        batches[-1].append(piece)
    return batches


def _frames(piece: Piece) -> int:
    return piece.window.last - piece.window.first


class _Waveforms(Dataset[tuple[Tensor, Tensor, WaveformStatistics | None] | UserError]):
    """Batch number → waveform (batch, samples), zeros after the end, length (batch,), and the statistics of the
    recordings if these are parts of them; or what was wrong, since an error that a worker raises arrives as its
    traceback."""

    def __init__(
        self, groups: Sequence[Sequence[Cut]], batches: Sequence[tuple[int, list[Piece]]], as_whole: bool
    ) -> None:
        self.groups, self.batches, self.as_whole = groups, batches, as_whole
        self.counted: tuple[str, WaveformStatistics] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, WaveformStatistics | None] | UserError:
        group, pieces = self.batches[number]
        cuts = [self.groups[group][piece.place] for piece in pieces]
        parts = [_frames(piece) < num_frames(cut.num_samples) for cut, piece in zip(cuts, pieces, strict=True)]
        try:
            waveforms = [self._read(cut, piece) for cut, piece in zip(cuts, pieces, strict=True)]
            of_wholes = [self._statistics(cut) for cut in cuts] if self.as_whole and any(parts) else []
        except UserError as error:
            return error
        length = torch.tensor([len(waveform) for waveform in waveforms])
        statistics = WaveformStatistics(*map(torch.cat, zip(*of_wholes, strict=True))) if of_wholes else None
        return pad_sequence(waveforms, batch_first=True), length, statistics

    def numbered(self, number: int) -> Sequence[int]:
        """A number for each cut of a batch, which `id_of` knows of the first few."""
        start = number * WatchedReads.MOST
        return range(start, start + len(self.batches[number][1]))

    def id_of(self, number: int) -> str:
        group, pieces = self.batches[number // WatchedReads.MOST]
        return self.groups[group][pieces[number % WatchedReads.MOST].place].id

    def _statistics(self, cut: Cut) -> WaveformStatistics:
        """Of a whole recording, whose windows follow one another."""
        if self.counted is None or self.counted[0] != cut.id:
            self.counted = cut.id, statistics_of(_in_blocks(cut))
        return self.counted[1]

    def _read(self, cut: Cut, piece: Piece) -> Tensor:
        first, last, _, _ = piece.window
        whole = num_frames(cut.num_samples) == last  # samples after the last frame count in norms over time
        return read_waveform(cut, first * HOP, None if whole else num_samples(last - first))


def _in_blocks(cut: Cut, seconds: int = 60) -> Iterator[Tensor]:
    block = seconds * SAMPLE_RATE
    for first in range(0, cut.num_samples, block):
        yield read_waveform(cut, first, min(block, cut.num_samples - first))


class _TimesRealTime(ProgressColumn):
    def render(self, task: Task) -> Text:
        passed = perf_counter() - task.fields["began"]
        return Text(f"{task.completed * 3600 / passed:.0f} × real time")


def _progress() -> Progress:
    hours = TextColumn("{task.completed:.2f} of {task.total:.2f} h")
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        hours,
        _TimesRealTime(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=False,  # where results go, which others may read
        transient=True,
        disable=dist.is_initialized() and dist.get_rank() > 0,
    )
