"""Batches of audio for feature extraction: which parts of which recordings are encoded together, and their loading."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.workers import WatchedReads, quiet_worker
from hubert_lightning.errors import UserError
from hubert_lightning.features.windows import WINDOW_FRAMES, Window, windows
from hubert_lightning.frames import CLOCK, SAMPLE_RATE, Clock, in_frames, num_frames, num_samples
from hubert_lightning.model.convolutions import WaveformStatistics
from hubert_lightning.model.devices import keep_freed_memory
from hubert_lightning.model.statistics import statistics_of
from hubert_lightning.model.windows import STANDARD, WindowLayout


class Piece(NamedTuple):
    """A window of a cut, which is encoded at once.

    Args:
        cut_index: Index of the cut in its group.
        window: Frames of the cut.
    """

    cut_index: int
    window: Window


class LoadedBatch(NamedTuple):
    """A padded batch.

    Args:
        rows: (batch, samples), zeros after the end; or (batch, frames, …), if workers compute features.
        length: (batch,), samples before padding, on the CPU.
        statistics: Statistics of the recordings that the rows are parts of; None if they are whole, or not needed.
        kept: (rows,), the frames whose features are kept, counted over all rows of the batch; None for all.
        counts: Number of frames that are kept of each row.
    """

    rows: Tensor
    length: Tensor
    statistics: WaveformStatistics | None
    kept: Tensor | None
    counts: Sequence[int]


class Loading(NamedTuple):
    """How the batches of an extraction are loaded.

    Args:
        num_workers: Number of processes that read audio.
        windows_of: Function that cuts a recording into windows; windows of `window_frames` if not given.
        frames_of: Function from a piece to the frames of its recording that are kept, in ascending order; those from
            start to end of its window if not given.
        in_workers: Function of one waveform that workers compute, (samples,) to (frames, …).
        as_whole: Whether norms over time need the statistics of the recordings that the rows are parts of, which are
            then read twice.
        clock: Clock of the features.
        layout: Windows of the encoder's first convolution, of which the statistics are.
        window_frames: Number of frames of a window.
    """

    num_workers: int = 0
    windows_of: Callable[[Cut], list[Window]] | None = None
    frames_of: Callable[[Piece], np.ndarray] | None = None
    in_workers: Callable[[Tensor], Tensor] | None = None
    as_whole: bool = False
    clock: Clock = CLOCK
    layout: WindowLayout = STANDARD
    window_frames: int = WINDOW_FRAMES


def batches_of(
    cuts: Sequence[Cut],
    max_frames: int,
    windows_of: Callable[[Cut], list[Window]] | None,
    clock: Clock = CLOCK,
    window_frames: int = WINDOW_FRAMES,
) -> list[list[Piece]]:
    """Divide cuts into batches of pieces of similar length.

    Args:
        cuts: Cuts.
        max_frames: Largest number of frames of a batch, padding included; a single window may have more.
        windows_of: Function that cuts a recording into windows.
        clock: Clock of the features.
        window_frames: Number of frames of 20 ms of a window, where no such function is given.
    """
    longest = in_frames(window_frames, clock)
    split = windows_of or (lambda cut: windows(num_frames(cut.num_samples, clock), longest, clock=clock))
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


def loader(
    groups: Sequence[Sequence[Cut]],
    batches: Sequence[tuple[int, list[Piece]]],
    loading: Loading,
    pin: bool,
) -> DataLoader[LoadedBatch | UserError]:
    """Create a loader of batches, in order.

    Args:
        groups: Groups of cuts.
        batches: Index of the group, and pieces of each batch.
        loading: How they are loaded.
        pin: Whether batches are copied to page-locked memory, from which a GPU copies while it computes.

    Returns:
        Loader; an error of a file takes the place of its batch.
    """
    dataset = _Batches(groups, batches, loading)
    workers = loading.num_workers
    return DataLoader(
        WatchedReads(dataset, dataset.numbered, dataset.id_of, workers),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_quiet_computing_worker if loading.in_workers else quiet_worker,
        generator=torch.Generator(),  # does not change the random numbers of training
        pin_memory=pin,
    )


def _quiet_computing_worker(worker: int) -> None:
    keep_freed_memory()  # otherwise a third of the time of MFCCs goes to page faults
    quiet_worker(worker)


class _Batches(Dataset[LoadedBatch | UserError]):
    """Batch number → batch. Errors are returned, because errors that workers raise become tracebacks."""

    def __init__(
        self, groups: Sequence[Sequence[Cut]], batches: Sequence[tuple[int, list[Piece]]], loading: Loading
    ) -> None:
        self.groups, self.batches = groups, batches
        self.loading = loading._replace(windows_of=None)  # already applied; workers need not know it
        self._latest: tuple[str, WaveformStatistics] | None = None  # of the cut whose statistics were computed last

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> LoadedBatch | UserError:
        group, pieces = self.batches[number]
        cuts = [self.groups[group][piece.cut_index] for piece in pieces]
        try:
            waveforms = [_read(cut, piece, self.loading.clock) for cut, piece in zip(cuts, pieces, strict=True)]
            statistics = self._statistics(cuts, pieces, waveforms)
        except UserError as error:
            return error
        length = torch.tensor([len(waveform) for waveform in waveforms])
        in_workers = self.loading.in_workers
        with torch.no_grad():
            rows = waveforms if in_workers is None else [in_workers(waveform) for waveform in waveforms]
        kept, counts = self._kept(pieces)
        return LoadedBatch(pad_sequence(rows, batch_first=True), length, statistics, kept, counts)

    def numbered(self, number: int) -> Sequence[int]:
        """Return a number for each cut of a batch, from which `id_of` finds the cut's id."""
        start = number * WatchedReads.MOST
        return range(start, start + len(self.batches[number][1]))

    def id_of(self, number: int) -> str:
        """Return the id of a cut by the number that `numbered` gave it."""
        group, pieces = self.batches[number // WatchedReads.MOST]
        return str(self.groups[group][pieces[number % WatchedReads.MOST].cut_index].id)

    def _kept(self, pieces: Sequence[Piece]) -> tuple[Tensor | None, list[int]]:
        """Frames to keep, counted over the batch, and their number in each row."""
        frames_of = self.loading.frames_of or _all_frames
        frames = [frames_of(piece) for piece in pieces]
        counts = [len(of_piece) for of_piece in frames]
        longest = max(map(_frames, pieces))
        in_batch = np.concatenate(
            [
                of_piece - piece.window.first + row * longest
                for row, (piece, of_piece) in enumerate(zip(pieces, frames, strict=True))
            ]
        )
        if np.array_equal(in_batch, np.arange(longest * len(pieces))):
            return None, counts
        return torch.from_numpy(in_batch), counts

    def _statistics(
        self, cuts: Sequence[Cut], pieces: Sequence[Piece], waveforms: Sequence[Tensor]
    ) -> WaveformStatistics | None:
        if not self.loading.as_whole:
            return None
        clock, layout = self.loading.clock, self.loading.layout
        if any(_frames(piece) < num_frames(cut.num_samples, clock) for cut, piece in zip(cuts, pieces, strict=True)):
            of_cuts = [self._of_whole(cut) for cut in cuts]
            return WaveformStatistics(*map(torch.cat, zip(*of_cuts, strict=True)))
        if len(pieces) == 1 and _frames(pieces[0]) > in_frames(WINDOW_FRAMES, clock):
            return statistics_of(waveforms, layout)  # then the audio is convolved in pieces, which takes less memory
        return None

    def _of_whole(self, cut: Cut) -> WaveformStatistics:
        """Statistics of a whole recording, whose windows follow one another."""
        if self._latest is None or self._latest[0] != cut.id:
            self._latest = cut.id, statistics_of(_in_blocks(cut), self.loading.layout)
        return self._latest[1]


def _all_frames(piece: Piece) -> np.ndarray:
    return np.arange(piece.window.start, piece.window.end)


def _read(cut: Cut, piece: Piece, clock: Clock) -> Tensor:
    first, last, _, _ = piece.window
    is_end = num_frames(cut.num_samples, clock) == last  # norms over time also use the samples after the last frame
    return read_waveform(cut, first * clock.hop, None if is_end else num_samples(last - first, clock))


def _in_blocks(cut: Cut, seconds: int = 60) -> Iterator[Tensor]:
    block = seconds * SAMPLE_RATE
    for first in range(0, cut.num_samples, block):
        yield read_waveform(cut, first, min(block, cut.num_samples - first))
