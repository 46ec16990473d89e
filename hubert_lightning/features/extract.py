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

from hubert_lightning import current_work
from hubert_lightning.data.corpora import lengths_of
from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import Extractor
from hubert_lightning.features.loading import LoadedBatch, Loading, Piece, batches_of, loader
from hubert_lightning.features.transfers import copied_ahead, given_later
from hubert_lightning.features.windows import Window
from hubert_lightning.frames import CLOCK, SAMPLE_RATE, Clock, num_frames, seconds_to_samples
from hubert_lightning.progress_bar import progress

GPU_BATCH_DURATION = 240.0
"""Seconds that a GPU encodes at once by default, where they take less than a quarter of its memory."""
BYTES_OF_SECOND = 25e6
"""Memory of a second that is encoded, at most; Base needs 15 MB in float32 and 8 MB in bfloat16."""

OfRows = Callable[[Tensor], Tensor]
"""A function of rows of features (rows, …), each of which it treats alone."""


class Extracted(NamedTuple):
    """Features of a batch.

    Args:
        group: Index of the group of its cuts.
        pieces: Pieces of the batch.
        counts: Number of rows of each piece.
        rows: (rows, …), one piece after the other.
    """

    group: int
    pieces: list[Piece]
    counts: Sequence[int]
    rows: Tensor


def extract(
    extractor: Extractor,
    groups: Sequence[Sequence[Cut]],
    max_frames: int,
    description: str | None,
    num_workers: int = 0,
    windows_of: Callable[[Cut], list[Window]] | None = None,
    as_whole: bool = False,
    ranks: int = 1,
    then: OfRows | None = None,
) -> Iterator[tuple[int, Piece, Tensor]]:
    """Compute features of groups of cuts, group after group; inside a group in order of length.

    Args:
        extractor: Function that computes the features.
        groups: Groups of cuts.
        max_frames: Largest number of frames of a batch, padding included; a single window may have more.
        description: Label of the progress bar, which shows hours of audio; no bar if None.
        num_workers: Number of processes that read audio.
        windows_of: Function that cuts a recording into windows. If it is given, it may read the audio, so groups are
            cut one by one.
        as_whole: Whether windows are normalised by the statistics of their recording, which is then read twice;
            otherwise each window is normalised by its own.
        ranks: Number of ranks that share the work; the bar shows the hours of all, as if they were equally fast.
        then: Function of the features, computed on their device.

    Yields:
        Index of the group, piece, and features (frames, …) from the start to the end of its window, on the CPU.

    Raises:
        UserError: Audio cannot be read.
    """
    loading = Loading(num_workers, windows_of, as_whole=as_whole)
    for batch in extract_batches(extractor, groups, max_frames, description, loading, ranks, then):
        for piece, rows in zip(batch.pieces, torch.split(batch.rows, list(batch.counts)), strict=True):
            yield batch.group, piece, rows


def extract_batches(
    extractor: Extractor,
    groups: Sequence[Sequence[Cut]],
    max_frames: int,
    description: str | None,
    loading: Loading,
    ranks: int = 1,
    then: OfRows | None = None,
    to_host: bool = True,
) -> Iterator[Extracted]:
    """Compute features of groups of cuts, batch after batch; on a GPU, the host waits once for each.

    Args:
        extractor: Function that computes the features.
        groups: Groups of cuts.
        max_frames: Largest number of frames of a batch, as of `extract`.
        description: Label of the progress bar, which shows hours of audio; no bar if None.
        loading: How batches are loaded.
        ranks: Number of ranks that share the work, as of `extract`.
        then: Function of the features, computed on their device: on a CPU for one piece at a time.
        to_host: Whether features are copied to the host; otherwise they stay on the device.

    Raises:
        UserError: Audio cannot be read.
    """
    loading = loading._replace(
        in_workers=extractor.in_workers,
        as_whole=loading.as_whole and extractor.uses_statistics,
        clock=extractor.clock,
        layout=extractor.layout,
        window_frames=extractor.window_frames,
    )
    hours = ranks * sum(int(lengths_of(cuts).sum()) for cuts in groups) / SAMPLE_RATE / 3600
    done, began = 0.0, perf_counter()
    with progress(description, hours, "h") as advance:
        for numbers in _planned_together(groups, most=1 if loading.windows_of else 100_000):
            batches = [
                (number, batch)
                for number in numbers
                for batch in batches_of(
                    groups[number], max_frames, loading.windows_of, extractor.clock, loading.window_frames
                )
            ]
            loaded = loader(groups, batches, loading, pin=extractor.device.type == "cuda")
            computed = _computed(extractor, batches, copied_ahead(loaded, extractor.device), description, then)
            for of_batch, rows in given_later(computed, extractor.device, to_host):
                yield Extracted(*of_batch, rows)
                duration = extractor.clock.duration(ranks * sum(map(_own_frames, of_batch[1])))
                done += duration
                advance(duration / 3600, f"{done / (perf_counter() - began):.0f} × real time")


def extract_cuts(
    extractor: Extractor,
    groups: Sequence[Sequence[Cut]],
    description: str | None,
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
        description: Label of the progress bar; no bar if None.
        batch_duration: Seconds that are encoded at once, padding included. If not given: one recording on a CPU, where
            larger batches take longer, and on a GPU as many as `frames_at_once`.
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
        batch_frames = frames_at_once(extractor.device, extractor.clock)
    else:
        batch_frames = num_frames(seconds_to_samples(batch_duration), extractor.clock)
    rows_of_cuts: list[Tensor] = []
    missing = 0  # frames
    for number, piece, rows in extract(extractor, groups, batch_frames, description, num_workers, windows_of, as_whole):
        if not rows_of_cuts:
            counts = [num_frames(cut.num_samples, extractor.clock) for cut in groups[number]]
            rows_of_cuts = [rows.new_empty(count, *rows.shape[1:]) for count in counts]
            missing = sum(map(len, rows_of_cuts))
        rows_of_cuts[piece.cut_index][piece.window.start : piece.window.end] = rows
        missing -= len(rows)
        if not missing:  # before the next group is read, which may fail
            yield rows_of_cuts
            rows_of_cuts = []


def frames_at_once(device: torch.device, clock: Clock = CLOCK) -> int:
    """Number of frames that a device encodes at once by default: a batch of one recording on a CPU, four minutes on a
    GPU, and less on one of less than 24 GB. It does not depend on what else the GPU holds, so labels do not either.
    """
    if device.type == "cpu":
        return 0
    duration = GPU_BATCH_DURATION
    if device.type == "cuda":
        duration = min(duration, 0.25 * torch.cuda.mem_get_info(device)[1] / BYTES_OF_SECOND)
    return num_frames(seconds_to_samples(duration), clock)


def _computed(
    extractor: Extractor,
    batches: Sequence[tuple[int, list[Piece]]],
    loaded: Iterator[LoadedBatch | UserError],
    description: str | None,
    then: OfRows | None,
) -> Iterator[tuple[tuple[int, list[Piece], Sequence[int]], Tensor]]:
    """Compute the batches: group, pieces and counts, and rows on the device."""
    for count, ((group, pieces), batch) in enumerate(zip(batches, loaded, strict=True), start=1):
        current_work.note(f"making features ({description}, batch {count} of {len(batches)})")
        if isinstance(batch, UserError):
            raise batch
        with torch.no_grad():
            rows = extractor.features(batch.rows, batch.length, batch.statistics).flatten(0, 1)
            rows = rows if batch.kept is None else rows.index_select(0, batch.kept)
            if then is not None:
                # A product's last bits depend on its number of rows: on a CPU, labels are the same in any batch
                parts = torch.split(rows, list(batch.counts)) if rows.device.type == "cpu" else [rows]
                rows = torch.cat([then(part) for part in parts])
        yield (group, pieces, batch.counts), rows


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


def _own_frames(piece: Piece) -> int:
    return piece.window.end - piece.window.start
