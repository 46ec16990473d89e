"""The clock: every conversion between samples, seconds and frames.

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
    """Number of frames that the encoder computes from a number of samples.

    Args:
        num_samples: Number of samples at 16 kHz, or several.

    Returns:
        Number of frames; 0 for audio shorter than one window.
    """
    frames = (num_samples - WINDOW) // HOP + 1
    return max(frames, 0) if isinstance(frames, int) else frames.clip(min=0)


def num_samples(num_frames: int) -> int:
    """Smallest number of samples from which the encoder computes a number of frames."""
    return (num_frames - 1) * HOP + WINDOW


def frame_centres(num_frames: int) -> Tensor:
    """Centres of the frames of an utterance in seconds: (frames,) float64."""
    return (torch.arange(num_frames, dtype=torch.float64) * HOP + WINDOW / 2) / SAMPLE_RATE


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
