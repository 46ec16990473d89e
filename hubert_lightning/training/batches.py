"""Batches of cuts: read, crop on the frame grid, pad, mask.

The seed of the plan draws everything random in a batch (crops, mixing, masks, and the dropout of its step). So a batch
is a function of its plan: the same from any worker, and again after a restart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lhotse import CutSet
from lhotse.cut import Cut
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import speaker_of, transcript
from hubert_lightning.frames import CLOCK, Clock, num_frames, num_samples
from hubert_lightning.training.masking import span_mask
from hubert_lightning.training.mixing import Mixer
from hubert_lightning.training.sampler import BatchPlan, bucket_of, padded_frames, shortest_of_bucket
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.vocabulary import Vocabulary


class PretrainingBatch(NamedTuple):
    """Audio cropped to one length, its cluster labels, and the frames to mask.

    Args:
        waveform: (batch, samples), 16 kHz audio.
        cluster: (batch, streams, frames), K-means ids; several streams for ensembles and product codes.
        mask: (batch, frames) bool, True where a frame is masked; the same number in every row.
        num_masked: Masked frames of each row.
        id: (batch,), cut ids.
        waste: Fraction of the audio, up to the longest crop, that is cropped away.
        seed: Seed of dropout.
        step_seed: Seed of the dropped layers, the same for all batches of an optimizer step.
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

    The numbers of frames and tokens stay on the host, where the CTC loss reads them without waiting for a GPU.

    Args:
        waveform: (batch, samples), zeros after the end of an utterance.
        length: (batch,), samples before padding.
        token: (batch, tokens), each row ended by a word boundary, blanks after it.
        num_frames: (batch,), frames before padding.
        num_tokens: (batch,), tokens before padding.
        mask: (batch, frames) bool, True where a frame is masked; None to mask no frame.
        channel_mask: (batch, dim) bool, True where a channel is masked; None to mask no channel.
        text: (batch,), transcripts as the vocabulary writes them.
        id: (batch,), cut ids.
        speaker: (batch,), speaker of each cut, empty if the manifest names none.
        waste: Fraction of the waveforms that is padding.
        seed: Seed of dropout.
        step_seed: Seed of the dropped layers, the same for all batches of an optimizer step.
    """

    waveform: Tensor
    length: Tensor
    token: Tensor
    num_frames: tuple[int, ...]
    num_tokens: tuple[int, ...]
    mask: Tensor | None
    channel_mask: Tensor | None
    text: tuple[str, ...]
    id: tuple[str, ...]
    speaker: tuple[str, ...]
    waste: float = 0.0
    seed: int = 0
    step_seed: int = 0


class PretrainingBatches(Dataset[PretrainingBatch]):
    """The pre-training batch of each plan. Crops start on the frame grid, so label k belongs to frame k exactly.

    Args:
        cuts: Utterances that plans index.
        labels: Cluster labels of all of them.
        max_crop_frames: Maximum number of frames of a row.
        mask_prob: Fraction of frames that the mask spans would cover if they did not overlap.
        mask_length: Frames in a mask span.
        max_frames: Maximum number of frames of a batch of several rows, which are cropped to it; None if plans keep it
            by themselves.
        mixer: Adds speech, noise and rooms to the audio; None to leave it clean.
        clock: Clock of the encoder.
    """

    def __init__(
        self,
        cuts: Sequence[Cut],
        labels: LabelStore,
        *,
        max_crop_frames: int,
        mask_prob: float,
        mask_length: int,
        max_frames: int | None = None,
        mixer: Mixer | None = None,
        clock: Clock = CLOCK,
    ) -> None:
        self.cuts, self.labels, self.max_frames, self.mixer = cuts, labels, max_frames, mixer
        self.clock = clock
        self.max_crop_frames, self.mask_prob, self.mask_length = max_crop_frames, mask_prob, mask_length

    def __getitem__(self, plan: BatchPlan) -> PretrainingBatch:
        rng = torch.Generator().manual_seed(plan.seed)
        cuts = [self.cuts[index] for index in plan.cuts]
        frames = [num_frames(cut.num_samples, self.clock) for cut in cuts]
        shortest = min(frames)  # one length for all: no padding, no attention mask
        if shortest >= self.max_crop_frames:
            size = self.max_crop_frames
        else:
            size = shortest_of_bucket(int(bucket_of(np.array(shortest))))
        if self.max_frames is not None and len(cuts) > 1:
            size = min(size, self.max_frames // len(cuts))
        waveforms, clusters = [], []
        for cut, available in zip(cuts, frames, strict=True):
            first = int(torch.randint(available - size + 1, (), generator=rng))
            waveforms.append(read_waveform(cut, first * self.clock.hop, num_samples(size, self.clock)))
            clusters.append(torch.from_numpy(self.labels[cut.id][:, first : first + size].astype(np.int64)))
        if self.mixer is not None:
            waveforms = self.mixer.mixed(waveforms, plan.cuts, plan.seed)
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
    """The fine-tuning batch of each plan.

    Training pads a batch to the end of its bucket, so that shapes recur; otherwise it is padded to its longest
    utterance.

    Args:
        cuts: Utterances that plans index.
        vocabulary: Vocabulary of the model.
        training: Whether the model trains on the batches.
        channels: Channels of the projected convolution output.
        mask_prob: Fraction of frames that the mask spans would cover if they did not overlap; 0 masks none.
        mask_length: Frames in a mask span.
        channel_mask_prob: Fraction of channels that the mask spans would cover if they did not overlap; 0 masks none.
        channel_mask_length: Channels in a mask span.
        mixer: Adds speech, noise and rooms to the audio; None to leave it clean.
        clock: Clock of the encoder.
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
        mixer: Mixer | None = None,
        clock: Clock = CLOCK,
    ) -> None:
        self.clock, self.mixer = clock, mixer
        self.cuts, self.vocabulary, self.channels = list(cuts), vocabulary, channels
        self.mask_prob, self.mask_length = mask_prob, mask_length
        self.channel_mask_prob, self.channel_mask_length = channel_mask_prob, channel_mask_length
        self.training = training

    def __getitem__(self, plan: BatchPlan) -> TranscribedBatch:
        rng = torch.Generator().manual_seed(plan.seed)
        cuts = [self.cuts[index] for index in plan.cuts]
        waveforms = [read_waveform(cut) for cut in cuts]
        if self.mixer is not None:
            waveforms = self.mixer.mixed(waveforms, plan.cuts, plan.seed)
        texts = tuple(transcript(cut, self.vocabulary) for cut in cuts)
        tokens = [torch.tensor(self.vocabulary.targets(text)) for text in texts]
        clock = self.clock
        frames = [num_frames(len(waveform), clock) for waveform in waveforms]
        mask = channel_mask = None
        if self.mask_prob > 0:
            mask = span_mask(frames, self.mask_prob, self.mask_length, rng)
        if self.channel_mask_prob > 0:
            channels = [self.channels] * len(cuts)
            channel_mask = span_mask(channels, self.channel_mask_prob, self.channel_mask_length, rng, min_spans=0)
        waveform = pad_sequence(waveforms, batch_first=True)
        if self.training:
            padded = num_samples(padded_frames(max(frames)), clock)
            waveform = F.pad(waveform, (0, max(padded - waveform.shape[1], 0)))
            if mask is not None:
                mask = F.pad(mask, (0, num_frames(waveform.shape[1], clock) - mask.shape[1]))
        length = torch.tensor([len(waveform) for waveform in waveforms])
        return TranscribedBatch(
            waveform=waveform,
            length=length,
            token=pad_sequence(tokens, batch_first=True),
            num_frames=tuple(frames),
            num_tokens=tuple(len(token) for token in tokens),
            mask=mask,
            channel_mask=channel_mask,
            text=texts,
            id=tuple(cut.id for cut in cuts),
            speaker=tuple(speaker_of(cut) for cut in cuts),
            waste=1 - int(length.sum()) / waveform.numel(),
            seed=plan.seed,
            step_seed=plan.step_seed,
        )
