"""A bounded, uniform sample of frames, for K-means."""

import math
import os
from collections.abc import Sequence
from functools import partial
from zlib import crc32

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.balance import Balance, as_corpora
from hubert_lightning.data.corpora import Corpora, lengths_of
from hubert_lightning.errors import UserError
from hubert_lightning.features.extract import extract_batches
from hubert_lightning.features.extractors import Extractor
from hubert_lightning.features.loading import Loading, Piece
from hubert_lightning.frames import CLOCK, Clock, num_frames


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
    balance: Balance = Balance(),
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
        balance: Shares of languages and corpora in the sample.

    Returns:
        (rows, dim) float32, about max_frames / world_size rows, where `chosen_features` puts them, and (rows,), the
        index of each in the sample of all ranks, on the CPU.

    Raises:
        UserError: The sample does not fit in this machine's memory; or audio cannot be read.
    """
    cuts, chosen = choose_frames(cuts, max_frames, seed, balance, extractor.clock)
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


def choose_frames(
    cuts: Sequence[Cut],
    max_frames: int,
    seed: int,
    balance: Balance = Balance(),
    clock: Clock = CLOCK,
) -> tuple[list[Cut], list[np.ndarray]]:
    """Choose the cuts that `sample_frames` encodes, and the frames of each that it keeps.

    Args:
        cuts: Utterances.
        max_frames: Number of frames to keep.
        seed: Seed of the sample.
        balance: Shares of languages and corpora in the sample. Frames of a language that has fewer than its share are
            kept several times.
        clock: Clock of the features.

    Returns:
        The chosen cuts, and the frames of each in ascending order.
    """
    if balance:
        return _balanced(as_corpora(cuts), max_frames, seed, balance, clock)
    cuts = cuts.by_id() if isinstance(cuts, Corpora) else sorted(cuts, key=lambda cut: cut.id)
    drawn = np.random.default_rng(seed).permutation(len(cuts))
    ends = np.cumsum(num_frames(lengths_of(cuts)[drawn], clock))
    drawn = drawn[: int(np.searchsorted(ends, 4 * max_frames)) + 1]
    share = max_frames / ends[len(drawn) - 1]
    chosen = [cuts[number] for number in drawn.tolist()]
    return chosen, [_chosen(cut, share, seed, clock) for cut in chosen]


def _balanced(
    cuts: Corpora, max_frames: int, seed: int, balance: Balance, clock: Clock
) -> tuple[list[Cut], list[np.ndarray]]:
    """Choose from each language and corpus as `choose_frames` does from all cuts, each with its share of the frames."""
    groups, frames = balance.groups(cuts), num_frames(cuts.num_samples, clock)
    shares = balance.shares(groups, frames)
    ids = None if cuts.on_disk else list(cuts.ids())
    chosen: list[Cut] = []
    kept: list[np.ndarray] = []
    for number, (name, share) in enumerate(zip(groups.names, shares.tolist(), strict=True)):
        members = np.flatnonzero(groups.number == number)
        if ids is not None:  # whatever the order of the manifests
            members = np.array(sorted(members.tolist(), key=ids.__getitem__), np.int64)
        wanted = share * min(max_frames, int(frames.sum()))
        drawn = np.random.default_rng([seed, crc32(repr(name).encode())]).permutation(members)
        ends = np.cumsum(frames[drawn])
        drawn = drawn[: int(np.searchsorted(ends, 4 * wanted)) + 1]
        if len(drawn):
            cuts_of_group = [cuts[index] for index in drawn.tolist()]
            chosen += cuts_of_group
            kept += [_repeated(cut, wanted / ends[len(drawn) - 1], seed, clock) for cut in cuts_of_group]
    return chosen, kept


def _chosen(cut: Cut, share: float, seed: int, clock: Clock) -> np.ndarray:
    return np.flatnonzero(_draws(cut, seed, clock) < share)


def _repeated(cut: Cut, times: float, seed: int, clock: Clock) -> np.ndarray:
    """Frames of a cut, each kept so many times on average."""
    whole, part = divmod(times, 1)
    draws = _draws(cut, seed, clock)
    return np.repeat(np.arange(len(draws)), int(whole) + (draws < part))


def _draws(cut: Cut, seed: int, clock: Clock) -> np.ndarray:
    """A random number from 0 to 1 for each frame: (frames,)."""
    generator = np.random.default_rng([seed, crc32(cut.id.encode())])
    draws: np.ndarray = generator.random(num_frames(cut.num_samples, clock))
    return draws


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
        (rows, …, dim), one cut after the other: on the GPU that computes them if they fit there, or on the CPU.

    Raises:
        UserError: The rows do not fit in this machine's memory; or audio cannot be read.
    """
    starts = np.cumsum([0, *(len(frames) for frames in chosen)])
    rows = _empty((int(starts[-1]), *extractor.shape), dtype, extractor.device, local_ranks)
    loading = Loading(num_workers, frames_of=partial(_of_piece, chosen))
    batches = extract_batches(
        extractor,
        [cuts],
        batch_frames,
        "features for K-means",
        loading,
        ranks,
        then=partial(Tensor.to, dtype=dtype),
        to_host=rows.device.type == "cpu",
    )
    for _, pieces, counts, features in batches:
        firsts = [
            starts[piece.cut_index] + np.searchsorted(chosen[piece.cut_index], piece.window.start) for piece in pieces
        ]
        places = np.concatenate([np.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)])
        rows.index_copy_(0, _on(rows.device, torch.from_numpy(places)), features)
    return rows


def _of_piece(chosen: Sequence[np.ndarray], piece: Piece) -> np.ndarray:
    """Chosen frames of a piece."""
    frames = chosen[piece.cut_index]
    first, last = np.searchsorted(frames, [piece.window.start, piece.window.end])
    return frames[first:last]


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy to a device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, local_ranks: int) -> Tensor:
    """Allocate rows on the GPU that computes them if they take less than 40 % of its free memory, or on the host.

    Raises:
        UserError: They do not fit in the host's memory.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cuda" and size < 0.4 * torch.cuda.mem_get_info(device)[0]:  # K-means needs them twice
        return torch.empty(shape, dtype=dtype, device=device)
    _check_memory(local_ranks * shape[0], math.prod(shape[1:]) * dtype.itemsize)
    return torch.empty(shape, dtype=dtype)


def _check_memory(rows: int, bytes_of_row: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if rows * bytes_of_row > 0.9 * memory:
        raise UserError(
            f"a sample of {rows} frames takes {rows * bytes_of_row / 1e9:.0f} GB of memory, and this machine has "
            f"{memory / 1e9:.0f} GB; lower max_frames, or share the work among more machines"
        )
