"""Features of many cuts, streamed: batches of similar length, long recordings in windows, nothing kept.

What a cut's features are does not depend on what else is in its batch, nor on how many processes share the work.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from lhotse.cut import Cut
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from hubert_lightning import progress
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.corpora import Corpora
from hubert_lightning.data.workers import WatchedReads, quiet_worker
from hubert_lightning.features.mfcc import PARTS, SPLICED, mfcc, spliced
from hubert_lightning.frames import HOP, SAMPLE_RATE, num_frames, num_samples, seconds_to_samples
from hubert_lightning.model.hubert import HubertEncoder, Statistics
from hubert_lightning.model.statistics import statistics_of
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder

LONGEST = 5_000  # frames, 100 s: what is encoded at once (fairseq dump_hubert_feature: max_chunk)
OVERLAP = 500  # frames, 10 s, of neighbouring windows: each frame is at least 5 s from where its window is cut

Features = Callable[[Tensor, Tensor], Tensor]
"""waveform (batch, samples), length (batch,) → (batch, frames, …, dim), one row per 20 ms"""


class Window(NamedTuple):
    """Frames of a recording that are encoded at once.

    first: frame that the audio begins with
    last:  the one after the last that it has
    start: first frame whose features are taken from here, which others around it may hear
    end:   the one after the last whose features are taken
    """

    first: int
    last: int
    start: int
    end: int


class Piece(NamedTuple):
    """What is encoded at once, and of which cut in the list."""

    place: int
    window: Window


class Extractor(NamedTuple):
    """A function from audio to features, what labels made of them are said to come from, the shape of one frame's,
    the device that computes them, and, if norms over time are in them, the features of parts of recordings."""

    features: Features
    name: str
    shape: tuple[int, ...]
    device: torch.device = torch.device("cpu")
    features_of_parts: Callable[[Tensor, Tensor, Statistics], Tensor] | None = None

    def __call__(self, waveform: Tensor, length: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Features of a batch; with the statistics of the recordings of which its rows are parts, as they have them."""
        if statistics is None or self.features_of_parts is None:
            return self.features(waveform, length)
        return self.features_of_parts(waveform, length, statistics)


def mfcc_extractor(in_parts: bool = False) -> Extractor:
    """MFCC at the encoder's clock.

    Args:
        in_parts: Spliced over three frames, for product K-means of their parts.
    """

    def features(waveform: Tensor, length: Tensor) -> Tensor:
        rows = (mfcc(row[:samples]) for row, samples in zip(waveform, length.tolist(), strict=True))
        # K-means sees the 10 ms frames that the encoder has too: every other one, as the reference takes labels
        return pad_sequence([(spliced(row) if in_parts else row)[::2] for row in rows], batch_first=True)

    if in_parts:
        return Extractor(features, f"mfcc spliced over {SPLICED} frames", (max(part.stop for part in PARTS.values()),))
    return Extractor(features, "mfcc", (39,))


def layer_extractor(
    path: Path | str,
    layer: int,
    device: torch.device,
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> Extractor:
    """One layer, counted from 1, of the encoder in a checkpoint, each utterance as if it were alone."""
    encoder = load_encoder(path).to(device)
    encoder.check_layer(layer)

    def features(waveform: Tensor, length: Tensor, statistics: Statistics | None = None) -> Tensor:
        if statistics is None and len(waveform) == 1 and num_frames(waveform.shape[1]) > LONGEST:
            statistics = statistics_of([waveform[0]])  # with which it is convolved in pieces
        if statistics is not None:
            exact = torch.float32 if device.type == "mps" else torch.float64  # variances are differences
            statistics = Statistics(*(value.to(device, exact) for value in statistics))
        padded = length_if_padded(length, device)
        with precision():
            return encoder.features(waveform.to(device), padded, layer=layer, alone=True, statistics=statistics)

    name = f"layer {layer} of encoder {encoder_fingerprint(encoder)}"
    return Extractor(features, name, (encoder.config.dim,), device, features_of_parts=features)


def all_layers_extractor(
    encoder: HubertEncoder, precision: Callable[[], AbstractContextManager] = nullcontext
) -> Extractor:
    """Every layer of an encoder: (batch, frames, layers, dim)."""
    device = encoder.mask_embedding.device

    def features(waveform: Tensor, length: Tensor) -> Tensor:
        padded = length_if_padded(length, device)
        with precision():
            return torch.stack(encoder.all_layers(waveform.to(device), padded, alone=True), dim=2)

    shape = (len(encoder.layers), encoder.config.dim)
    return Extractor(features, "all layers of an encoder", shape, device)


def length_if_padded(length: Tensor, device: torch.device) -> Tensor | None:
    """Lengths (batch,) on a device, or none where no row is padded, which is faster."""
    return None if bool((length == length[0]).all()) else length.to(device)


def windows(frames: int, longest: int | None = None, overlap: int | None = None) -> list[Window]:
    """How a recording is cut to be encoded: from start to end, its windows cover every frame once.

    Every window of a long recording is `longest` frames, the last too, and begins on the frame grid.

    longest: `LONGEST` if not given
    overlap: frames that neighbouring windows share; `OVERLAP` if not given
    """
    longest = LONGEST if longest is None else longest
    overlap = OVERLAP if overlap is None else overlap
    if frames <= longest:
        return [Window(0, frames, 0, frames)]
    firsts = [*range(0, frames - longest, longest - overlap), frames - longest]
    joints = [0, *((before + longest + after) // 2 for before, after in pairwise(firsts)), frames]
    return [Window(first, first + longest, *of) for first, of in zip(firsts, pairwise(joints), strict=True)]


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
    hours = sum(int(_samples(cuts).sum()) for cuts in groups) / SAMPLE_RATE / 3600
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
                progress.note(f"making features ({what}, batch {place} of {len(batches)})")
                if isinstance(read, ValueError):
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
        ValueError: Audio that cannot be read.
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


def _samples(cuts: Sequence[Cut]) -> np.ndarray:
    return cuts.num_samples if isinstance(cuts, Corpora) else np.array([cut.num_samples for cut in cuts], np.int64)


def sample_frames(
    extractor: Extractor,
    cuts: Sequence[Cut],
    max_frames: int,
    seed: int,
    *,
    batch_frames: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    local_ranks: int = 1,
) -> tuple[Tensor, Tensor]:
    """A uniform sample of the frames of randomly chosen utterances, four times as much audio as is kept.

    Neighbouring frames are alike, so they come from more utterances than would be enough; not from all, since a large
    corpus would then be encoded twice. Which frames they are depends on the seed, the cuts and how many are asked for.

    local_ranks: how many ranks share this machine's memory
    returns:     (about max_frames / world_size, dim) float32, and the place of each row in the sample of all ranks

    Raises:
        ValueError: More than this machine's memory holds.
    """
    cuts, chosen = choose_frames(cuts, max_frames, seed)
    ends = np.cumsum([len(frames) for frames in chosen])
    mine = range(rank, len(cuts), world_size)
    places = [torch.arange(int(ends[place]) - len(chosen[place]), int(ends[place])) for place in mine]
    rows = chosen_features(
        extractor,
        [cuts[place] for place in mine],
        [chosen[place] for place in mine],
        batch_frames,
        num_workers,
        local_ranks=local_ranks,
    )
    return rows, torch.cat([torch.empty(0, dtype=torch.long), *places])


def choose_frames(cuts: Sequence[Cut], max_frames: int, seed: int) -> tuple[list[Cut], list[np.ndarray]]:
    """The cuts that `sample_frames` encodes, and which frames of each it keeps."""
    cuts = cuts.by_id() if isinstance(cuts, Corpora) else sorted(cuts, key=lambda cut: cut.id)
    drawn = np.random.default_rng(seed).permutation(len(cuts))
    ends = np.cumsum(num_frames(_samples(cuts)[drawn]))
    drawn = drawn[: int(np.searchsorted(ends, 4 * max_frames)) + 1]
    share = max_frames / ends[len(drawn) - 1]
    some = [cuts[place] for place in drawn.tolist()]
    return some, [_chosen(cut, share, seed) for cut in some]


def _chosen(cut: Cut, share: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, crc32(cut.id.encode())])
    return np.flatnonzero(rng.random(num_frames(cut.num_samples)) < share)


def chosen_features(
    extractor: Extractor,
    cuts: Sequence[Cut],
    chosen: Sequence[np.ndarray],
    batch_frames: int,
    num_workers: int = 0,
    dtype: torch.dtype = torch.float32,
    local_ranks: int = 1,
) -> Tensor:
    """Features of some frames of each cut, one cut after the other: (rows, …, dim), on the CPU.

    Raises:
        ValueError: More than the machine's memory holds, of which each of `local_ranks` takes as much.
    """
    starts = np.cumsum([0, *(len(frames) for frames in chosen)])
    _check_memory(local_ranks * int(starts[-1]), math.prod(extractor.shape) * dtype.itemsize)
    rows = torch.empty(int(starts[-1]), *extractor.shape, dtype=dtype)
    for _, piece, features in extract(extractor, [cuts], batch_frames, "K-means sample", num_workers):
        frames = chosen[piece.place]
        start, end = piece.window.start, piece.window.end
        first, last = np.searchsorted(frames, [start, end])
        wanted = torch.from_numpy(frames[first:last] - start).to(features.device)
        rows[starts[piece.place] + first : starts[piece.place] + last] = features[wanted].to("cpu", dtype)
    return rows


def _check_memory(rows: int, bytes_of_row: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if rows * bytes_of_row > 0.9 * memory:
        raise ValueError(
            f"a sample of {rows} frames takes {rows * bytes_of_row / 1e9:.0f} GB, and this machine has "
            f"{memory / 1e9:.0f}; lower max_frames, or share the work among more machines"
        )


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


class _Waveforms(Dataset[tuple[Tensor, Tensor, Statistics | None] | ValueError]):
    """Batch number → waveform (batch, samples), zeros after the end, length (batch,), and the statistics of the
    recordings if these are parts of them; or what was wrong, since an error that a worker raises arrives as its
    traceback."""

    def __init__(
        self, groups: Sequence[Sequence[Cut]], batches: Sequence[tuple[int, list[Piece]]], as_whole: bool
    ) -> None:
        self.groups, self.batches, self.as_whole = groups, batches, as_whole
        self.counted: tuple[str, Statistics] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Statistics | None] | ValueError:
        group, pieces = self.batches[number]
        cuts = [self.groups[group][piece.place] for piece in pieces]
        parts = [_frames(piece) < num_frames(cut.num_samples) for cut, piece in zip(cuts, pieces, strict=True)]
        try:
            waveforms = [self._read(cut, piece) for cut, piece in zip(cuts, pieces, strict=True)]
            of_wholes = [self._statistics(cut) for cut in cuts] if self.as_whole and any(parts) else []
        except ValueError as error:
            return ValueError(str(error))
        length = torch.tensor([len(waveform) for waveform in waveforms])
        statistics = Statistics(*map(torch.cat, zip(*of_wholes, strict=True))) if of_wholes else None
        return pad_sequence(waveforms, batch_first=True), length, statistics

    def numbered(self, number: int) -> Sequence[int]:
        """A number for each cut of a batch, which `id_of` knows of the first few."""
        start = number * WatchedReads.MOST
        return range(start, start + len(self.batches[number][1]))

    def id_of(self, number: int) -> str:
        group, pieces = self.batches[number // WatchedReads.MOST]
        return self.groups[group][pieces[number % WatchedReads.MOST].place].id

    def _statistics(self, cut: Cut) -> Statistics:
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
