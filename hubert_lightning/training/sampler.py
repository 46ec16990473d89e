"""The plan of batches: which utterances form a batch, and which rank trains on it."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class BatchPlan(NamedTuple):
    """The utterances and the seeds of a batch.

    Args:
        cuts: Indices of the cuts.
        seed: Seed of everything random in this batch.
        step_seed: Seed that all batches of an optimizer step share.
    """

    cuts: tuple[int, ...]
    seed: int
    step_seed: int = 0


BUCKET_RATIO = 1.04
"""Lengths within 4 % of each other fall into one bucket and are cropped or padded to one length, so kernels that are
chosen or compiled for a shape are chosen once. On two CPU cores, steps with lengths of their own take twice as long."""


def bucket_of(frames: np.ndarray) -> np.ndarray:
    """Return the bucket of each number of frames, 1 or more."""
    bucket: np.ndarray = np.floor(np.log(frames) / np.log(BUCKET_RATIO) + 1e-9).astype(int)
    return bucket


def shortest_of_bucket(bucket: int) -> int:
    """Return the frames of the shortest cut that falls into this bucket or a later one."""
    return math.ceil(BUCKET_RATIO**bucket - 1e-9)


def padded_frames(frames: int) -> int:
    """Return the frames to which fine-tuning pads a batch whose longest utterance has this number of frames."""
    return shortest_of_bucket(int(bucket_of(np.array(frames))) + 1)


class PlannedBatches(Sampler[BatchPlan]):
    """Plans of batches of cuts of similar length, drawn anew in each epoch, the same number on every rank.

    Lengths fall into buckets 4 % wide. Within a bucket the cuts are shuffled; the sorted buckets are then dealt into
    batches of at most `max_frames`, and the batches shuffled. So an epoch has every cut once, and each epoch has the
    same number of batches.

    Where batches are cropped to their shortest cut, as many rows are dealt as then fit. One row more is dealt where it
    costs less than 4 % of the rows' length, and a batch would otherwise be less than 96 % full.

    An optimizer step trains on the next `world_size * accumulate` batches of the epoch, whichever ranks have them.
    So eight ranks take the same steps as one rank that accumulates eight batches. A few batches are repeated to fill
    the last step of the epoch.

    A corpus of more than `block_cuts` cuts is planned in blocks of neighbouring cuts, in a new order in each epoch. So
    only a part of its cuts is in memory, and the disk is read in nearby places.

    Args:
        frames: (cuts,), frames that each cut contributes.
        max_frames: Maximum number of frames of a batch, with padding.
        corpora: (corpora,), consecutive cuts that belong to each corpus; all belong to one if not given.
        weights: (corpora,), share of each corpus in an epoch, which has as many frames as all cuts together. Cuts of a
            small corpus are repeated; a large corpus contributes different cuts in each epoch. If not given, an epoch
            has every cut once.
        groups: (cuts,), number of the group of each cut, such as its language, instead of corpora.
        shares: (groups,), share of each group in an epoch, as weights are of corpora.
        seed: Seed of the order of every epoch and of the seed of every batch.
        position: Function that returns the batches that this rank has trained on, also before a restart.
        shuffle: Whether epochs differ; if not, one order and one seed for each batch make validations comparable.
        rank: Rank whose batches are planned.
        world_size: Number of ranks.
        accumulate: Batches on each rank that form an optimizer step.
        even: Whether all ranks need the same number of batches without shuffling as well; the first ones are repeated.
        block_cuts: Approximate number of cuts in a block.
        crop: Maximum number of frames of a row, if batches are cropped to the bucket of their shortest cut; None if
            they are padded to their longest one.
    """

    def __init__(
        self,
        frames: Sequence[int] | np.ndarray,
        max_frames: int,
        *,
        corpora: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        groups: np.ndarray | None = None,
        shares: Sequence[float] | np.ndarray | None = None,
        seed: int = 0,
        position: Callable[[], int] = lambda: 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        even: bool = False,
        block_cuts: int = 1_000_000,
        crop: int | None = None,
    ) -> None:
        self.seed, self.position, self.shuffle = seed, position, shuffle
        self.rank, self.world_size = rank, world_size
        self.step_size = world_size * accumulate if shuffle else world_size
        self.even = even or shuffle
        frames, corpora = np.asarray(frames), corpora or [len(frames)]
        by_group = None
        if groups is not None:
            by_group, corpora = _by_group(groups), np.bincount(groups).tolist()
        starts = np.cumsum([0, *corpora])
        repeats = [1.0] * len(corpora)
        wanted = weights if groups is None else shares
        if wanted is not None:
            in_order = frames if by_group is None else frames[by_group]
            corpus_frames = np.add.reduceat(in_order.astype(np.int64), starts[:-1])
            repeats = (np.array(wanted) / sum(wanted) * corpus_frames.sum() / corpus_frames).tolist()
        num_blocks = max(1, round(len(frames) / block_cuts))
        # Each block has an equal part of every corpus, so that they are mixed all the time
        bounds = [np.linspace(*corpus, num_blocks + 1).astype(int) for corpus in pairwise(starts)]
        self._blocks = []
        for block in range(num_blocks):
            slices = [slice(bound[block], bound[block + 1]) for bound in bounds]
            parts = slices if by_group is None else [by_group[part] for part in slices]
            self._blocks.append(_Block(frames, parts, repeats, max_frames, crop))
        self._num_batches = sum(len(block.ends) for block in self._blocks)

    def __len__(self) -> int:
        if self._repeats:
            return -(-self._num_batches // self.step_size) * self.step_size // self.world_size
        return len(range(self.rank, self._num_batches, self.world_size))

    @property
    def _repeats(self) -> bool:
        """Whether batches are repeated: in training all ranks need the same number, in validation each needs one."""
        return self.even or self._num_batches < self.world_size

    def __iter__(self) -> Iterator[BatchPlan]:
        epoch, done = divmod(self.position(), len(self)) if self.shuffle else (0, 0)
        return self._plans(epoch, done)

    def plan(self, epoch: int) -> list[BatchPlan]:
        """Return this rank's batches of one epoch; in training the last few may repeat the first."""
        return list(self._plans(epoch))

    def _plans(self, epoch: int, done: int = 0) -> Iterator[BatchPlan]:
        """Yield the batches of an epoch after the first `done` of this rank; plan a block when it is reached."""
        number, step_seed = 0, 0  # number of the batch among those of all ranks
        for block_number in self._order_of_blocks(epoch):
            block = self._blocks[block_number]
            if number + len(block.ends) <= done * self.world_size // self.step_size * self.step_size:
                number += len(block.ends)
                continue
            rng = np.random.default_rng([self.seed, epoch, block_number])
            for cuts, seed in block.deal(rng, self.shuffle):
                if number % self.step_size == 0:
                    step_seed = seed
                turn, rank = divmod(number, self.world_size)
                if rank == self.rank and done <= turn < len(self):
                    yield BatchPlan(cuts, seed, step_seed)
                number += 1

    def _order_of_blocks(self, epoch: int) -> list[int]:
        order = list(range(len(self._blocks)))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(order)).tolist()
        rounds = -(-len(self) * self.world_size // self._num_batches) if self._repeats else 1
        return order * rounds


class _Block:
    """The cuts that are dealt into batches together; every epoch has the same number of batches of the same sizes.

    Args:
        frames: (cuts,), frames of all cuts of all corpora.
        parts: (corpora,), cuts of each corpus that belong to the block: consecutive ones, or their indices.
        repeats: (corpora,), how often a cut of each corpus comes in an epoch.
        max_frames: Maximum number of frames of a batch, with padding.
        crop: Maximum number of frames of a row, if batches are cropped to the bucket of their shortest cut.
    """

    def __init__(
        self,
        frames: np.ndarray,
        parts: Sequence[slice | np.ndarray],
        repeats: Sequence[float],
        max_frames: int,
        crop: int | None,
    ) -> None:
        self.frames, self.parts, self.repeats, self.crop = frames, parts, repeats, crop
        drawn = self._buckets(frames[self._draw(np.random.default_rng(0))])
        buckets, counts = np.unique(drawn, return_counts=True)
        if crop is None:
            sizes = np.sort(np.concatenate([frames[part] for part in parts]))
            longest = sizes[np.searchsorted(bucket_of(sizes), buckets, side="right") - 1]
            self.ends = _batch_ends(counts.tolist(), longest.tolist(), max_frames)
        else:
            cropped = [min(shortest_of_bucket(bucket), crop) for bucket in buckets.tolist()]
            self.ends = _filled_ends(counts.tolist(), cropped, max_frames)
        """End of each batch among the drawn cuts in the order of their buckets."""

    def _buckets(self, frames: np.ndarray) -> np.ndarray:
        """Return the bucket of each cut; cuts that are as long as the longest row have one of their own."""
        buckets = bucket_of(frames)
        return buckets if self.crop is None else buckets + (frames >= self.crop)

    def deal(self, rng: np.random.Generator, shuffle: bool) -> Iterator[tuple[tuple[int, ...], int]]:
        """Yield the cuts and the seed of every batch of an epoch."""
        drawn = self._draw(rng)
        tie = rng.random(len(drawn)) if shuffle else drawn
        batches = np.split(drawn[np.lexsort([tie, self._buckets(self.frames[drawn])])], self.ends[:-1])
        seeds = rng.integers(2**62, size=len(batches)).tolist()
        order = rng.permutation(len(batches)) if shuffle else np.arange(len(batches))
        for number in order.tolist():
            yield tuple(batches[number].tolist()), seeds[number]

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the cuts of an epoch: random ones, but the same number from each corpus and bucket in every epoch."""
        drawn = []
        for part, repeats in zip(self.parts, self.repeats, strict=True):
            cuts = np.arange(part.start, part.stop) if isinstance(part, slice) else part
            if repeats != 1 and len(cuts):
                buckets = self._buckets(self.frames[part])
                cuts = cuts[np.lexsort([rng.random(len(cuts)), buckets])]
                counts = np.unique(buckets, return_counts=True)[1]
                wanted = np.diff(np.round(np.cumsum(counts) * repeats).astype(int), prepend=0)
                cuts_of_buckets = np.split(cuts, np.cumsum(counts)[:-1])
                resized = [np.resize(chosen, count) for chosen, count in zip(cuts_of_buckets, wanted, strict=True)]
                cuts = np.concatenate(resized)
            drawn.append(cuts)
        return np.concatenate(drawn)


def _by_group(groups: np.ndarray) -> np.ndarray:
    """Return the cuts (cuts,) sorted by their groups, in their order within a group, in as few bytes as possible."""
    small = groups.astype(np.uint16) if groups.max() < 2**16 else groups  # of which numpy sorts 20 million in a second
    order: np.ndarray = np.argsort(small, kind="stable").astype(np.uint32 if len(groups) < 2**32 else np.int64)
    return order


def _batch_ends(counts: Sequence[int], longest: Sequence[int], max_frames: int) -> list[int]:
    """Return the end of each batch when sorted cuts are dealt into batches of at most `max_frames`.

    Args:
        counts: (buckets,), number of cuts.
        longest: (buckets,), frames of the longest cut.
        max_frames: Maximum number of frames of a batch, with padding.
    """
    ends, start, end = [], 0, 0
    for count, size in zip(counts, longest, strict=True):
        room, first, end = max(max_frames // size, 1), end, end + count
        while end - start > room:
            start = max(start + room, first)  # the batch may already have more cuts than this bucket's longest allows
            ends.append(start)
    return [*ends, end]


def _filled_ends(counts: Sequence[int], cropped: Sequence[int], max_frames: int) -> list[int]:
    """Return the end of each batch when sorted cuts are dealt into batches that are cropped to their shortest cut.

    Args:
        counts: (buckets,), number of cuts.
        cropped: (buckets,), frames of the rows of a batch whose shortest cut is in the bucket.
        max_frames: Maximum number of frames of a batch.
    """
    rows = [_rows(size, max_frames) for size in cropped]
    bounds, ends, start = np.cumsum(counts), [], 0
    while start < bounds[-1]:
        start = min(start + rows[int(np.searchsorted(bounds, start, side="right"))], int(bounds[-1]))
        ends.append(start)
    return ends


def _rows(size: int, max_frames: int) -> int:
    """Return the number of rows of a batch, one more than fit if that crops little and fills much."""
    rows = max(max_frames // size, 1)
    fills_much = rows * size * BUCKET_RATIO < max_frames
    crops_little = max_frames // (rows + 1) * BUCKET_RATIO >= size
    return rows + 1 if fills_much and crops_little else rows
