"""From cuts to batches: load, crop on the frame grid, pad, mask.

Everything random about a batch (crops, masks, and the dropout of the step that trains on it) is drawn from its plan's
seed, so a batch is a function of its plan: the same whichever worker makes it, and the same again after a restart.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lhotse import CutSet
from lhotse.cut import Cut
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.frames import HOP, num_frames, num_samples
from hubert_lightning.training.masking import span_mask
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.vocabulary import Vocabulary


class PretrainingBatch(NamedTuple):
    """Audio cropped to one length, its clusters, and the frames to hide from the model.

    waveform: (batch, samples)
    cluster:  (batch, streams, frames), K-means ids; one stream, but for ensembles and product codes
    mask:     (batch, frames) bool, True where the model must predict unseen; as many in every row
    num_masked: of each row
    id:       cut ids
    waste:    share of the audio, counted up to the longest crop, that was cropped away
    seed:     of dropout
    step_seed: of what all batches of an optimiser step must agree on: which layers are dropped
    """

    waveform: Tensor
    cluster: Tensor
    mask: Tensor
    num_masked: int
    id: tuple[str, ...] = ()
    waste: float = 0.0
    seed: int = 0
    step_seed: int = 0


class TranscribedBatch(NamedTuple):
    """Padded audio and its transcripts.

    waveform:     (batch, samples), zeros after the end
    length:       (batch,), samples before padding
    token:        (batch, tokens), each row ended by a word boundary, blank after the end
    num_tokens:   (batch,)
    mask:         (batch, frames) bool, or None where nothing is to be hidden
    channel_mask: (batch, dim) bool, or None
    text:         transcripts as the vocabulary spells them
    id:           cut ids
    speaker:      of each cut; empty where the manifest does not say
    waste:        share of the waveforms that is padding
    seed:         of dropout
    step_seed:    of what all batches of an optimiser step must agree on: which layers are dropped
    """

    waveform: Tensor
    length: Tensor
    token: Tensor
    num_tokens: Tensor
    mask: Tensor | None
    channel_mask: Tensor | None
    text: tuple[str, ...]
    id: tuple[str, ...]
    speaker: tuple[str, ...]
    waste: float = 0.0
    seed: int = 0
    step_seed: int = 0


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


class PretrainingBatches(Dataset[PretrainingBatch]):
    """Makes the pre-training batch of a plan. Crops start on the frame grid, so label k belongs to frame k exactly."""

    def __init__(
        self, cuts: Sequence[Cut], labels: LabelStore, *, max_crop_frames: int, mask_prob: float, mask_length: int
    ) -> None:
        self.cuts, self.labels = cuts, labels
        self.max_crop_frames, self.mask_prob, self.mask_length = max_crop_frames, mask_prob, mask_length

    def __getitem__(self, plan: BatchPlan) -> PretrainingBatch:
        rng = torch.Generator().manual_seed(plan.seed)
        cuts = [self.cuts[place] for place in plan.cuts]
        frames = [num_frames(cut.num_samples) for cut in cuts]
        shortest = min(frames)  # one length for all: no padding, no attention mask
        if shortest >= self.max_crop_frames:
            size = self.max_crop_frames
        else:
            size = shortest_of_bucket(int(bucket_of(np.array(shortest))))
        waveforms, clusters = [], []
        for cut, available in zip(cuts, frames, strict=True):
            first = int(torch.randint(available - size + 1, (), generator=rng))
            waveforms.append(read_waveform(cut, first * HOP, num_samples(size)))
            clusters.append(torch.from_numpy(self.labels[cut.id][:, first : first + size].astype(np.int64)))
        mask = span_mask([size] * len(cuts), self.mask_prob, self.mask_length, rng, same_count=True)
        return PretrainingBatch(
            waveform=torch.stack(waveforms),
            cluster=torch.stack(clusters),
            mask=mask,
            num_masked=int(mask[0].sum()),
            id=tuple(cut.id for cut in cuts),
            waste=1 - size * len(cuts) / sum(min(available, self.max_crop_frames) for available in frames),
            seed=plan.seed,
            step_seed=plan.step_seed,
        )


class TranscribedBatches(Dataset[TranscribedBatch]):
    """Makes the fine-tuning batch of a plan; with `mask_prob` and `channel_mask_prob` 0 nothing is hidden.

    In training, it is padded to the end of its bucket; otherwise no more than the longest utterance needs.
    """

    def __init__(
        self,
        cuts: CutSet,
        vocabulary: Vocabulary,
        *,
        training: bool = False,
        channels: int = 0,
        mask_prob: float = 0.0,
        mask_length: int = 10,
        channel_mask_prob: float = 0.0,
        channel_mask_length: int = 64,
    ) -> None:
        self.cuts, self.vocabulary, self.channels = list(cuts), vocabulary, channels
        self.mask_prob, self.mask_length = mask_prob, mask_length
        self.channel_mask_prob, self.channel_mask_length = channel_mask_prob, channel_mask_length
        self.training = training

    def __getitem__(self, plan: BatchPlan) -> TranscribedBatch:
        rng = torch.Generator().manual_seed(plan.seed)
        cuts = [self.cuts[place] for place in plan.cuts]
        waveforms = [read_waveform(cut) for cut in cuts]
        texts = tuple(transcript(cut, self.vocabulary) for cut in cuts)
        tokens = [torch.tensor(self.vocabulary.targets(text)) for text in texts]
        frames = [num_frames(len(waveform)) for waveform in waveforms]
        mask = channel_mask = None
        if self.mask_prob > 0:
            mask = span_mask(frames, self.mask_prob, self.mask_length, rng)
        if self.channel_mask_prob > 0:
            channels = [self.channels] * len(cuts)
            channel_mask = span_mask(channels, self.channel_mask_prob, self.channel_mask_length, rng, min_spans=0)
        waveform = pad_sequence(waveforms, batch_first=True)
        if self.training:  # whose shapes should recur
            waveform = F.pad(waveform, (0, max(num_samples(padded_frames(max(frames))) - waveform.shape[1], 0)))
            if mask is not None:
                mask = F.pad(mask, (0, num_frames(waveform.shape[1]) - mask.shape[1]))
        length = torch.tensor([len(waveform) for waveform in waveforms])
        return TranscribedBatch(
            waveform=waveform,
            length=length,
            token=pad_sequence(tokens, batch_first=True),
            num_tokens=torch.tensor([len(token) for token in tokens]),
            mask=mask,
            channel_mask=channel_mask,
            text=texts,
            id=tuple(cut.id for cut in cuts),
            speaker=tuple(speaker_of(cut) for cut in cuts),
            waste=1 - int(length.sum()) / waveform.numel(),
            seed=plan.seed,
            step_seed=plan.step_seed,
        )


def transcript(cut: Cut, vocabulary: Vocabulary) -> str:
    """The words of a cut as a vocabulary spells them; empty where the manifest has none."""
    return vocabulary.normalise(" ".join(segment.text or "" for segment in cut.supervisions))


def speaker_of(cut: Cut) -> str:
    """The first speaker of a cut; empty where the manifest does not say."""
    return next((segment.speaker for segment in cut.supervisions if segment.speaker), "")
