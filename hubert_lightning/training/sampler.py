"""Which utterances make a batch, and which rank takes it."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class BatchPlan(NamedTuple):
    """Which cuts make a batch (their places in the manifest), the seed of all that is random about it, and the seed
    that it shares with the other batches of its optimiser step."""

    cuts: tuple[int, ...]
    seed: int
    step_seed: int = 0


BUCKET = 1.04
"""Lengths within 4 % of one another are of one bucket, and are cropped or padded to the same length: kernels that are
chosen or compiled for a shape are chosen once. On two CPU cores, steps on lengths of their own take twice as long."""


def bucket_of(frames: np.ndarray) -> np.ndarray:
    """The bucket that so many frames, 1 or more, fall in."""
    return np.floor(np.log(frames) / np.log(BUCKET) + 1e-9).astype(int)


def shortest_of_bucket(bucket: int) -> int:
    """Frames of the shortest cut that falls in this bucket or a later one."""
    return math.ceil(BUCKET**bucket - 1e-9)


def padded_frames(frames: int) -> int:
    """To how many frames a batch is padded in fine-tuning, whose longest utterance has so many."""
    return shortest_of_bucket(int(bucket_of(np.array(frames))) + 1)


class PlannedBatches(Sampler[BatchPlan]):
    """Batches of cuts of similar length, drawn anew each epoch, the same number of them on every rank.

    Lengths fall into buckets 4 % wide. Within a bucket the cuts are shuffled; the sorted buckets are then
    dealt into batches of at most `max_frames`, and the batches shuffled. So an epoch has every cut once, and each
    epoch has the same number of batches.

    Optimiser step s trains on the next `world_size * accumulate` batches of the epoch, whichever rank gets them: eight
    ranks take the steps that one takes which accumulates eight. Repeating a few batches fills the epoch's last step.

    A corpus of more than `block_cuts` is planned block by block, each of neighbouring cuts, in another order each
    epoch: neither are all of its cuts in memory, nor are they read from all over the disk.

    Args:
        frames: Frames that each cut contributes.
        max_frames: Frames of a batch at most, padding counted.
        corpora: How many of the cuts, which follow one another, are of each corpus; all are of one if not given.
        weights: Each corpus's share of an epoch, which has as many frames as all cuts together. Cuts of a corpus with
            fewer come several times; of one with more, others in each epoch. Every cut comes once if not given.
        seed: Of every epoch's order and every batch's own seed.
        position: Batches that this rank has trained on since the first; the trainer knows, also after a restart.
        shuffle: False keeps one order and one seed per batch for good, so that validations compare.
        rank: Which part of the batches to give.
        world_size: Number of such parts.
        accumulate: Batches on each rank that make one optimiser step.
        even: Whether all ranks need as many batches without shuffling too, for which the first are repeated.
        block_cuts: Cuts of a block, about.
    """

    def __init__(
        self,
        frames: Sequence[int] | np.ndarray,
        max_frames: int,
        *,
        corpora: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        position: Callable[[], int] = lambda: 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        even: bool = False,
        block_cuts: int = 1_000_000,
    ) -> None:
        self.seed, self.position, self.shuffle = seed, position, shuffle
        self.rank, self.world_size = rank, world_size
        self.step_size = world_size * accumulate if shuffle else world_size
        self.even = even or shuffle
        frames, corpora = np.asarray(frames), corpora or [len(frames)]
        starts = np.cumsum([0, *corpora])
        times = [1.0] * len(corpora)
        if weights is not None:
            of_corpus = np.add.reduceat(frames.astype(np.int64), starts[:-1])
            times = (np.array(weights) / sum(weights) * of_corpus.sum() / of_corpus).tolist()
        number = max(1, round(len(frames) / block_cuts))
        # Of every corpus, each block has as large a part, so that they are mixed all the time
        ends = [np.linspace(*corpus, number + 1).astype(int) for corpus in pairwise(starts)]
        self._blocks = [
            _Block(frames, [slice(of[block], of[block + 1]) for of in ends], times, max_frames)
            for block in range(number)
        ]
        self._batches = sum(len(block.ends) for block in self._blocks)

    def __len__(self) -> int:
        if self._repeats:
            return -(-self._batches // self.step_size) * self.step_size // self.world_size
        return len(range(self.rank, self._batches, self.world_size))

    @property
    def _repeats(self) -> bool:
        """In training all ranks need as many batches; in validation none may count twice, but each needs one."""
        return self.even or self._batches < self.world_size

    def __iter__(self) -> Iterator[BatchPlan]:
        epoch, done = divmod(self.position(), len(self)) if self.shuffle else (0, 0)
        return self._plans(epoch, done)

    def plan(self, epoch: int) -> list[BatchPlan]:
        """This rank's batches of one epoch; in training the last few may repeat the first to fill the last step."""
        return list(self._plans(epoch))

    def _plans(self, epoch: int, done: int = 0) -> Iterator[BatchPlan]:
        """What follows in an epoch after so many batches of this rank; a block is planned when it is reached."""
        place, step_seed = 0, 0  # among the batches of all ranks
        for number in self._order_of_blocks(epoch):
            block = self._blocks[number]
            if place + len(block.ends) <= done * self.world_size // self.step_size * self.step_size:
                place += len(block.ends)
                continue
            rng = np.random.default_rng([self.seed, epoch, number])
            for cuts, seed in block.deal(rng, self.shuffle):
                if place % self.step_size == 0:
                    step_seed = seed
                turn, rank = divmod(place, self.world_size)
                if rank == self.rank and done <= turn < len(self):
                    yield BatchPlan(cuts, seed, step_seed)
                place += 1

    def _order_of_blocks(self, epoch: int) -> list[int]:
        order = np.arange(len(self._blocks))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        rounds = -(-len(self) * self.world_size // self._batches) if self._repeats else 1
        return np.tile(order, rounds).tolist()


class _Block:
    """Cuts that batches are dealt from at a time, some of each corpus; in every epoch as many batches of as many cuts.

    frames: of all cuts of all corpora
    parts:  where the block's cuts of each corpus are
    times:  how often a cut of each corpus comes in an epoch
    """

    def __init__(self, frames: np.ndarray, parts: list[slice], times: Sequence[float], max_frames: int) -> None:
        self.frames, self.parts, self.times = frames, parts, times
        sizes = np.sort(np.concatenate([frames[part] for part in parts]))
        drawn, counts = np.unique(bucket_of(frames[self._draw(np.random.default_rng(0))]), return_counts=True)
        longest = sizes[np.searchsorted(bucket_of(sizes), drawn, side="right") - 1]
        self.ends = _deal(counts.tolist(), longest.tolist(), max_frames)
        """Where each batch ends, among the cuts that are drawn in the order of their buckets."""

    def deal(self, rng: np.random.Generator, shuffle: bool) -> Iterator[tuple[tuple[int, ...], int]]:
        """Cuts and seed of every batch of an epoch."""
        drawn = self._draw(rng)
        tie = rng.random(len(drawn)) if shuffle else drawn
        batches = np.split(drawn[np.lexsort([tie, bucket_of(self.frames[drawn])])], self.ends[:-1])
        seeds = rng.integers(2**62, size=len(batches)).tolist()
        turn = rng.permutation(len(batches)) if shuffle else np.arange(len(batches))
        for batch in turn.tolist():
            yield tuple(batches[batch].tolist()), seeds[batch]

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """Cuts of an epoch: of every corpus and bucket as many in each, at random which."""
        drawn = []
        for part, times in zip(self.parts, self.times, strict=True):
            cuts = np.arange(part.start, part.stop)
            if times != 1 and len(cuts):
                buckets = bucket_of(self.frames[part])
                cuts = cuts[np.lexsort([rng.random(len(cuts)), buckets])]
                counts = np.unique(buckets, return_counts=True)[1]
                wanted = np.diff(np.round(np.cumsum(counts) * times).astype(int), prepend=0)
                of_bucket = np.split(cuts, np.cumsum(counts)[:-1])
                cuts = np.concatenate([np.resize(of, count) for of, count in zip(of_bucket, wanted, strict=True)])
            drawn.append(cuts)
        return np.concatenate(drawn)


def _deal(counts: Sequence[int], longest: Sequence[int], max_frames: int) -> list[int]:
    """Where each batch ends if cuts are dealt in order, so many of each size, to batches of `max_frames` at most."""
    ends, start, end = [], 0, 0
    for count, size in zip(counts, longest, strict=True):
        room, first, end = max(max_frames // size, 1), end, end + count
        while end - start > room:
            start = max(start + room, first)  # what is in the batch already may be more than its longest allows
            ends.append(start)
    return [*ends, end]
