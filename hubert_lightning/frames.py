"""The clock: every conversion between samples, seconds and frames.

The seven convolutions of HuBERT see 25 ms of audio (400 samples at 16 kHz) and move by 20 ms (320 samples). This is the
clock of every function here unless another one is given: that of an encoder of 25 Hz (`EncoderConfig.clock`), or of
labels. Frame `k` covers samples `[k * hop, k * hop + window)`. MFCC frames have the same window and half the hop, so
every other MFCC frame covers the same samples as a frame of the encoder, whatever the length of the recording
(tests/features/test_mfcc.py).
"""

from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 16_000
WINDOW = 400  # samples: 25 ms
HOP = 320  # samples: 20 ms

Count = TypeVar("Count", int, Tensor, np.ndarray)


class Clock(NamedTuple):
    """Frames of an encoder, or of other features.

    Args:
        hop: Samples from the start of a frame to the start of the next.
        window: Samples that a frame covers.
    """

    hop: int = HOP
    window: int = WINDOW

    @property
    def seconds(self) -> float:
        """Seconds from one frame to the next."""
        return self.hop / SAMPLE_RATE

    def duration(self, frames: int) -> float:
        """Seconds from the start of a frame to the start of the one that comes a number of frames later."""
        return frames * self.hop / SAMPLE_RATE

    @property
    def described(self) -> str:
        """The clock in words, for messages."""
        milliseconds = 1000 / SAMPLE_RATE
        return f"a frame of {self.window * milliseconds:g} ms every {self.hop * milliseconds:g} ms"


CLOCK = Clock()
"""Clock of the encoders of the paper, 50 frames a second."""
MFCC_CLOCK = Clock(160, 400)
"""Clock of MFCCs, 100 frames a second."""
HOPS = (320, 640)
"""Hops of encoders, in samples: 50 or 25 frames a second."""


def num_frames(num_samples: Count, clock: Clock = CLOCK) -> Count:
    """Number of frames that the encoder computes from a number of samples.

    Args:
        num_samples: Number of samples at 16 kHz, or several.
        clock: Clock of the encoder.

    Returns:
        Number of frames; 0 for audio shorter than one window.
    """
    frames = (num_samples - clock.window) // clock.hop + 1
    return max(frames, 0) if isinstance(frames, int) else frames.clip(min=0)


def num_samples(num_frames: int, clock: Clock = CLOCK) -> int:
    """Smallest number of samples from which the encoder computes a number of frames."""
    return (num_frames - 1) * clock.hop + clock.window


def in_frames(frames: int, clock: Clock) -> int:
    """Number of frames of a clock that last as long as a number of frames of 20 ms."""
    return frames * HOP // clock.hop


def frame_centres(num_frames: int, clock: Clock = CLOCK) -> Tensor:
    """Centres of the frames of an utterance in seconds: (frames,) float64."""
    return (torch.arange(num_frames, dtype=torch.float64) * clock.hop + clock.window / 2) / SAMPLE_RATE


def frames_inside(fine: Clock, coarse: Clock) -> tuple[int, int]:
    """Find the frames of a fine clock whose windows lie inside a frame of a coarse one.

    Frame `k` of the coarse clock has the fine frames `[ratio * k, ratio * k + count)` inside. The centre of these
    frames is the centre of frame `k`, to within half a fine hop.

    Args:
        fine: Clock of features.
        coarse: Clock that they are brought to.

    Returns:
        Ratio of the hops, and the count of frames inside; a count of 0 if there are none, or if the hop of the coarse
        clock is no multiple of that of the fine one.
    """
    ratio, rest = divmod(coarse.hop, fine.hop)
    return ratio, 0 if rest else max((coarse.window - fine.window) // fine.hop + 1, 0)


def seconds_to_samples(seconds: float) -> int:
    """Number of samples at 16 kHz nearest to a duration."""
    return round(seconds * SAMPLE_RATE)


def padding_mask(num_frames: Tensor, longest: int) -> Tensor:
    """Mark the padding of a batch.

    Args:
        num_frames: (batch,), frames before padding.
        longest: Number of frames of the padded batch.

    Returns:
        (batch, longest) bool, true for padding.
    """
    return torch.arange(longest, device=num_frames.device) >= num_frames[:, None]
