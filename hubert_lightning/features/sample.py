"""A bounded, uniform sample of frames, for K-means."""

import math
import os
from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.corpora import Corpora, lengths_of
from hubert_lightning.errors import UserError
from hubert_lightning.features.extract import extract
from hubert_lightning.features.extractors import Extractor
from hubert_lightning.frames import num_frames


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
        UserError: More than this machine's memory holds.
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
    ends = np.cumsum(num_frames(lengths_of(cuts)[drawn]))
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
        UserError: More than the machine's memory holds, of which each of `local_ranks` takes as much.
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
        raise UserError(
            f"a sample of {rows} frames takes {rows * bytes_of_row / 1e9:.0f} GB, and this machine has "
            f"{memory / 1e9:.0f}; lower max_frames, or share the work among more machines"
        )
