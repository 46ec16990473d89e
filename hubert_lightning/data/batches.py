"""From cuts to batches: load, crop on the frame grid, pad, mask.

Everything random about a batch (crops, masks, and the dropout of the step that trains on it) is drawn from its plan's
seed, so a batch is a function of its plan: the same whichever worker makes it, and the same again after a restart.
"""

import math
from collections.abc import Callable, Iterator, Sequence
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
from hubert_lightning.data.labels import LabelStore
from hubert_lightning.data.masking import span_mask
from hubert_lightning.data.text import Vocabulary, normalise
from hubert_lightning.frames import HOP, num_frames, num_samples


class PretrainingBatch(NamedTuple):
    """Audio cropped to one length, its clusters, and the frames to hide from the model.

    waveform: (batch, samples)
    cluster:  (batch, streams, frames), K-means ids; one stream, but for ensembles and product codes
    mask:     (batch, frames) bool, True where the model must predict unseen; as many in every row
    num_masked: of each row
    id:       cut ids
    offered:  frames that the cuts have, each counted up to the longest crop; those of the batch are no more
    seed:     of dropout
    step_seed: of what all batches of an optimiser step must agree on: which layers are dropped
    """

    waveform: Tensor
    cluster: Tensor
    mask: Tensor
    num_masked: int
    id: tuple[str, ...] = ()
    offered: int = 1
    seed: int = 0
    step_seed: int = 0


class TranscribedBatch(NamedTuple):
    """Padded audio and its transcripts.

    waveform:     (batch, samples), zeros after the end
    length:       (batch,), samples before padding
    token:        (batch, tokens), blank after the end
    num_tokens:   (batch,)
    mask:         (batch, frames) bool, or None where nothing is to be hidden
    channel_mask: (batch, dim) bool, or None
    text:         transcripts as in the manifest, normalised
    id:           cut ids
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

    Args:
        frames: Frames that each cut contributes.
        max_frames: Frames of a batch at most, padding counted.
        seed: Of every epoch's order and every batch's own seed.
        position: Batches that this rank has trained on since the first; the trainer knows, also after a restart.
        shuffle: False keeps one order and one seed per batch for good, so that validations compare.
        rank: Which part of the batches to give.
        world_size: Number of such parts.
        accumulate: Batches on each rank that make one optimiser step.
    """

    def __init__(
        self,
        frames: Sequence[int],
        max_frames: int,
        *,
        seed: int = 0,
        position: Callable[[], int] = lambda: 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.seed, self.position, self.shuffle = seed, position, shuffle
        self.rank, self.world_size = rank, world_size
        self.step_size = world_size * accumulate if shuffle else world_size
        sizes = np.asarray(frames)
        buckets = bucket_of(sizes)
        longest = {bucket: int(sizes[buckets == bucket].max()) for bucket in np.unique(buckets)}
        self._buckets = buckets
        self._ends: list[int] = []
        start = 0
        ascending = [longest[bucket] for bucket in np.sort(buckets)]
        for place, size in enumerate(ascending):
            if (place + 1 - start) * size > max_frames and place > start:
                self._ends.append(place)
                start = place
        self._ends.append(len(ascending))

    def __len__(self) -> int:
        if self._repeats:
            return -(-len(self._ends) // self.step_size) * self.step_size // self.world_size
        return len(range(self.rank, len(self._ends), self.world_size))

    @property
    def _repeats(self) -> bool:
        """In training all ranks need as many batches; in validation none may count twice, but each needs one."""
        return self.shuffle or len(self._ends) < self.world_size

    def __iter__(self) -> Iterator[BatchPlan]:
        epoch, done = divmod(self.position(), len(self)) if self.shuffle else (0, 0)
        return iter(self.plan(epoch)[done:])

    def plan(self, epoch: int) -> list[BatchPlan]:
        """This rank's batches of one epoch; in training the last few may repeat the first to fill the last step."""
        rng = np.random.default_rng([self.seed, epoch])
        tie = rng.random(len(self._buckets)) if self.shuffle else np.arange(len(self._buckets))
        order = np.lexsort([tie, self._buckets])
        batches = np.split(order, self._ends[:-1])
        seeds = rng.integers(2**62, size=len(batches))
        turn = rng.permutation(len(batches)) if self.shuffle else np.arange(len(batches))
        if self._repeats:
            turn = np.resize(turn, len(self) * self.world_size)
        mine = range(self.rank, len(turn), self.world_size)
        first = [turn[place - place % self.step_size] for place in mine]  # batch of the step that each belongs to
        return [
            BatchPlan(tuple(batches[turn[place]].tolist()), int(seeds[turn[place]]), int(seeds[of_step]))
            for place, of_step in zip(mine, first, strict=True)
        ]


class PretrainingBatches(Dataset[PretrainingBatch]):
    """Makes the pre-training batch of a plan. Crops start on the frame grid, so label k belongs to frame k exactly."""

    def __init__(
        self, cuts: CutSet, labels: LabelStore, *, max_crop_frames: int, mask_prob: float, mask_length: int
    ) -> None:
        self.cuts, self.labels = list(cuts), labels
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
            offered=sum(min(available, self.max_crop_frames) for available in frames),
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
        texts = tuple(transcript(cut) for cut in cuts)
        tokens = [torch.tensor(self.vocabulary.encode(text), dtype=torch.long) for text in texts]
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
        return TranscribedBatch(
            waveform=waveform,
            length=torch.tensor([len(waveform) for waveform in waveforms]),
            token=pad_sequence(tokens, batch_first=True),
            num_tokens=torch.tensor([len(token) for token in tokens]),
            mask=mask,
            channel_mask=channel_mask,
            text=texts,
            id=tuple(cut.id for cut in cuts),
            seed=plan.seed,
            step_seed=plan.step_seed,
        )


def transcript(cut: Cut) -> str:
    """The normalised words of a cut; empty where the manifest has none."""
    return normalise(" ".join(segment.text or "" for segment in cut.supervisions))
