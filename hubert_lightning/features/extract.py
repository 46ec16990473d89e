"""Features of many cuts, streamed: in batches of similar length, long recordings in windows, never stored on disk.

A cut's features do not depend on the other cuts of its batch, nor on how many processes share the work.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from lhotse.cut import Cut
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
    """A window of a cut, which is encoded at once.

    Args:
        cut_index: Index of the cut in its group.
        window: Frames of the cut.
    """

    cut_index: int
    window: Window


def extract(
    extractor: Extractor,
    groups: Sequence[Sequence[Cut]],
    max_frames: int,
    description: str,
    num_workers: int = 0,
    windows_of: Callable[[Cut], list[Window]] | None = None,
    as_whole: bool = False,
    ranks: int = 1,
) -> Iterator[tuple[int, Piece, Tensor]]:
    """Compute features of groups of cuts, group after group; inside a group in order of length.

    Args:
        extractor: Function that computes the features.
        groups: Groups of cuts.
        max_frames: Largest number of frames of a batch, padding included; a single window may have more.
        description: Label of the progress bar, which shows hours of audio.
        num_workers: Number of processes that read audio.
        windows_of: Function that cuts a recording into windows. If it is given, it may read the audio, so groups are
            cut one by one.
        as_whole: Whether windows are normalised by the statistics of their recording, which is then read twice;
            otherwise each window is normalised by its own.
        ranks: Number of ranks that share the work; the bar shows the hours of all, as if they were equally fast.

    Yields:
        Index of the group, piece, and features (frames, …, dim) from the start to the end of its window.

    Raises:
        UserError: Audio cannot be read.
    """
    hours = ranks * sum(int(lengths_of(cuts).sum()) for cuts in groups) / SAMPLE_RATE / 3600
    done, began = 0.0, perf_counter()
    with console.progress(description, hours, "h") as advance:
        for numbers in _planned_together(groups, most=1 if windows_of else 100_000):
            batches = [
                (number, batch) for number in numbers for batch in _batches(groups[number], max_frames, windows_of)
            ]
            waveforms = _Waveforms(groups, batches, as_whole and extractor.uses_statistics)
            loader = DataLoader(
                WatchedReads(waveforms, waveforms.numbered, waveforms.id_of, num_workers),
                batch_size=None,
                num_workers=num_workers,
                worker_init_fn=quiet_worker if num_workers else None,
                generator=torch.Generator(),  # does not change the random numbers of training
            )
            for count, ((number, pieces), batch) in enumerate(zip(batches, loader, strict=True), start=1):
                console.note(f"making features ({description}, batch {count} of {len(batches)})")
                if isinstance(batch, UserError):
                    raise batch
                with torch.no_grad():
                    features = extractor(*batch)
                for piece, rows in zip(pieces, features, strict=True):
                    first, _, start, end = piece.window
                    yield number, piece, rows[start - first : end - first]
                    duration = ranks * (end - start) * HOP / SAMPLE_RATE
                    done += duration
                    advance(duration / 3600, f"{done / (perf_counter() - began):.0f} × real time")


def extract_cuts(
    extractor: Extractor,
    groups: Sequence[Sequence[Cut]],
    description: str,
    *,
    batch_duration: float | None = None,
    num_workers: int = 0,
    windows_of: Callable[[Cut], list[Window]] | None = None,
    as_whole: bool = False,
) -> Iterator[list[Tensor]]:
    """Compute features of groups of cuts, and join the windows of each cut.

    Args:
        extractor: Function that computes the features.
        groups: Groups of cuts.
        description: Label of the progress bar.
        batch_duration: Seconds that are encoded at once, padding included. If not given: one recording on a CPU, where
            larger batches take longer, and four minutes on a GPU.
        num_workers: Number of processes that read audio.
        windows_of: Function that cuts a recording into windows, as of `extract`.
        as_whole: Whether windows are normalised as their whole recording, as of `extract`.

    Yields:
        Features (frames, …) of each cut of a group, in the order of its cuts, on the CPU.

    Raises:
        UserError: Audio cannot be read.
    """
    # Each length of audio has its own kernels; oneDNN would cache a thousand of them, gigabytes for Base
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if batch_duration is None:
        batch_duration = 0.0 if extractor.device.type == "cpu" else 240.0
    batch_frames = num_frames(seconds_to_samples(batch_duration))
    rows_of_cuts: list[Tensor] = []
    missing = 0  # frames
    for number, piece, rows in extract(extractor, groups, batch_frames, description, num_workers, windows_of, as_whole):
        if not rows_of_cuts:
            rows_of_cuts = [
                rows.new_empty(num_frames(cut.num_samples), *rows.shape[1:], device="cpu") for cut in groups[number]
            ]
            missing = sum(map(len, rows_of_cuts))
        rows_of_cuts[piece.cut_index][piece.window.start : piece.window.end] = rows
        missing -= len(rows)
        if not missing:  # before the next group is read, which may fail
            yield rows_of_cuts
            rows_of_cuts = []


def _planned_together(groups: Sequence[Sequence[Cut]], most: int) -> Iterator[list[int]]:
    """Indices of groups that have about `most` cuts together: the plan of a large corpus would fill the memory."""
    numbers: list[int] = []
    cuts = 0
    for number, group in enumerate(groups):
        numbers.append(number)
        cuts += len(group)
        if cuts >= most:
            yield numbers
            numbers, cuts = [], 0
    yield numbers


def _batches(
    cuts: Sequence[Cut], max_frames: int, windows_of: Callable[[Cut], list[Window]] | None
) -> list[list[Piece]]:
    split = windows_of or (lambda cut: windows(num_frames(cut.num_samples)))
    pieces = [Piece(index, window) for index, cut in enumerate(cuts) for window in split(cut)]
    pieces.sort(key=lambda piece: (_frames(piece), cuts[piece.cut_index].id, piece.window.first))
    batches: list[list[Piece]] = []
    for piece in pieces:
        if not batches or (len(batches[-1]) + 1) * _frames(piece) > max_frames:
            batches.append([])
        batches[-1].append(piece)
    return batches


def _frames(piece: Piece) -> int:
    return piece.window.last - piece.window.first


class _Waveforms(Dataset[tuple[Tensor, Tensor, WaveformStatistics | None] | UserError]):
    """Batch number → waveform (batch, samples), zeros after the end; length (batch,); and the statistics of the
    recordings, if the rows are parts of them. Errors are returned, because errors that workers raise become tracebacks.
    """

    def __init__(
        self, groups: Sequence[Sequence[Cut]], batches: Sequence[tuple[int, list[Piece]]], as_whole: bool
    ) -> None:
        self.groups, self.batches, self.as_whole = groups, batches, as_whole
        self._latest: tuple[str, WaveformStatistics] | None = None  # of the cut whose statistics were computed last

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, WaveformStatistics | None] | UserError:
        group, pieces = self.batches[number]
        cuts = [self.groups[group][piece.cut_index] for piece in pieces]
        parts = [_frames(piece) < num_frames(cut.num_samples) for cut, piece in zip(cuts, pieces, strict=True)]
        try:
            waveforms = [self._read(cut, piece) for cut, piece in zip(cuts, pieces, strict=True)]
            statistics = [self._statistics(cut) for cut in cuts] if self.as_whole and any(parts) else []
        except UserError as error:
            return error
        length = torch.tensor([len(waveform) for waveform in waveforms])
        of_batch = WaveformStatistics(*map(torch.cat, zip(*statistics, strict=True))) if statistics else None
        return pad_sequence(waveforms, batch_first=True), length, of_batch

    def numbered(self, number: int) -> Sequence[int]:
        """Return a number for each cut of a batch, from which `id_of` finds the cut's id."""
        start = number * WatchedReads.MOST
        return range(start, start + len(self.batches[number][1]))

    def id_of(self, number: int) -> str:
        """Return the id of a cut by the number that `numbered` gave it."""
        group, pieces = self.batches[number // WatchedReads.MOST]
        return str(self.groups[group][pieces[number % WatchedReads.MOST].cut_index].id)

    def _statistics(self, cut: Cut) -> WaveformStatistics:
        """WaveformStatistics of a whole recording, whose windows follow one another."""
        if self._latest is None or self._latest[0] != cut.id:
            self._latest = cut.id, statistics_of(_in_blocks(cut))
        return self._latest[1]

    def _read(self, cut: Cut, piece: Piece) -> Tensor:
        first, last, _, _ = piece.window
        is_end = num_frames(cut.num_samples) == last  # norms over time also use the samples after the last frame
        return read_waveform(cut, first * HOP, None if is_end else num_samples(last - first))


def _in_blocks(cut: Cut, seconds: int = 60) -> Iterator[Tensor]:
    block = seconds * SAMPLE_RATE
    for first in range(0, cut.num_samples, block):
        yield read_waveform(cut, first, min(block, cut.num_samples - first))
