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
    """Compute the features of a uniform sample of frames, from randomly chosen utterances.

    The chosen utterances have four times as many frames as the sample. Fewer utterances would give many similar,
    neighbouring frames; with all utterances, a large corpus would be encoded twice. The sample depends only on the
    seed, the cuts and `max_frames`.

    Args:
        extractor: Function that computes the features.
        cuts: Utterances.
        max_frames: Number of frames of the sample of all ranks.
        seed: Seed of the sample.
        batch_frames: Largest number of frames of a batch, padding included.
        num_workers: Number of processes that read audio.
        rank: Rank of this process.
        world_size: Number of ranks, which encode different utterances.
        local_ranks: Number of ranks that share this machine's memory.

    Returns:
        (rows, dim) float32, about max_frames / world_size rows, and (rows,), the index of each in the sample of all
        ranks.

    Raises:
        UserError: The sample does not fit in this machine's memory; or audio cannot be read.
    """
    cuts, chosen = choose_frames(cuts, max_frames, seed)
    ends = np.cumsum([len(frames) for frames in chosen])
    own_cuts = range(rank, len(cuts), world_size)
    indices = [torch.arange(int(ends[number]) - len(chosen[number]), int(ends[number])) for number in own_cuts]
    rows = chosen_features(
        extractor,
        [cuts[number] for number in own_cuts],
        [chosen[number] for number in own_cuts],
        batch_frames,
        num_workers,
        local_ranks=local_ranks,
        ranks=world_size,
    )
    return rows, torch.cat([torch.empty(0, dtype=torch.long), *indices])


def choose_frames(cuts: Sequence[Cut], max_frames: int, seed: int) -> tuple[list[Cut], list[np.ndarray]]:
    """Choose the cuts that `sample_frames` encodes, and the frames of each that it keeps.

    Args:
        cuts: Utterances.
        max_frames: Number of frames to keep.
        seed: Seed of the sample.

    Returns:
        The chosen cuts, and the frames of each in ascending order.
    """
    cuts = cuts.by_id() if isinstance(cuts, Corpora) else sorted(cuts, key=lambda cut: cut.id)
    drawn = np.random.default_rng(seed).permutation(len(cuts))
    ends = np.cumsum(num_frames(lengths_of(cuts)[drawn]))
    drawn = drawn[: int(np.searchsorted(ends, 4 * max_frames)) + 1]
    share = max_frames / ends[len(drawn) - 1]
    chosen = [cuts[number] for number in drawn.tolist()]
    return chosen, [_chosen(cut, share, seed) for cut in chosen]


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
    ranks: int = 1,
) -> Tensor:
    """Compute the features of chosen frames of each cut.

    Args:
        extractor: Function that computes the features.
        cuts: Utterances.
        chosen: Frames of each cut in ascending order.
        batch_frames: Largest number of frames of a batch, padding included.
        num_workers: Number of processes that read audio.
        dtype: Type of the result.
        local_ranks: Number of ranks on this machine, each of which needs as much memory.
        ranks: Number of ranks that share the work, as of `extract`.

    Returns:
        (rows, …, dim), one cut after the other, on the CPU.

    Raises:
        UserError: The rows do not fit in this machine's memory; or audio cannot be read.
    """
    starts = np.cumsum([0, *(len(frames) for frames in chosen)])
    _check_memory(local_ranks * int(starts[-1]), math.prod(extractor.shape) * dtype.itemsize)
    rows = torch.empty(int(starts[-1]), *extractor.shape, dtype=dtype)
    work = extract(extractor, [cuts], batch_frames, "features for K-means", num_workers, ranks=ranks)
    for _, piece, features in work:
        frames = chosen[piece.cut_index]
        start, end = piece.window.start, piece.window.end
        first, last = np.searchsorted(frames, [start, end])
        kept = torch.from_numpy(frames[first:last] - start).to(features.device)
        offset = starts[piece.cut_index]
        rows[offset + first : offset + last] = features[kept].to("cpu", dtype)
    return rows


def _check_memory(rows: int, bytes_of_row: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if rows * bytes_of_row > 0.9 * memory:
        raise UserError(
            f"a sample of {rows} frames takes {rows * bytes_of_row / 1e9:.0f} GB of memory, and this machine has "
            f"{memory / 1e9:.0f} GB; lower max_frames, or share the work among more machines"
        )
