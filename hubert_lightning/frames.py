"""The clock. Every conversion between samples, seconds and frames happens here, once.

The seven convolutions see 25 ms of audio (400 samples at 16 kHz) and move by 20 ms (320 samples): frame `k` covers
samples `[k * HOP, k * HOP + WINDOW)`. MFCC frames have the same window and half the hop, so every other MFCC frame
covers the same samples as a frame of the encoder, whatever the length of the recording (tests/features/test_mfcc.py).
"""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 16_000
WINDOW = 400  # samples: 25 ms
HOP = 320  # samples: 20 ms

Count = TypeVar("Count", int, Tensor, np.ndarray)


def num_frames(num_samples: Count) -> Count:
    """Frames that the encoder makes of so many samples; 0 for audio shorter than one window."""
    frames = (num_samples - WINDOW) // HOP + 1
    return max(frames, 0) if isinstance(frames, int) else frames.clip(min=0)


def num_samples(num_frames: int) -> int:
    """The fewest samples of which the encoder makes so many frames."""
    return (num_frames - 1) * HOP + WINDOW


def frame_centres(num_frames: int) -> Tensor:
    """Seconds at which the frames of an utterance have their centres: (frames,) float64."""
    return (torch.arange(num_frames, dtype=torch.float64) * HOP + WINDOW / 2) / SAMPLE_RATE


def seconds_to_samples(seconds: float) -> int:
    """The number of samples nearest to so many seconds."""
    return round(seconds * SAMPLE_RATE)


def padding_mask(num_frames: Tensor, longest: int) -> Tensor:
    """Which frames of a padded batch are padding.

    num_frames: (batch,), frames before padding
    returns:    (batch, longest) bool, True where there is no audio
    """
    return torch.arange(longest, device=num_frames.device) >= num_frames[:, None]
