"""Windows of long recordings: of equal length, or cut where the recording is quietest.

The place of a cut depends only on the audio around it. So a part of a recording is cut at the same places as the whole
recording, except near its ends, and gets the same words.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lhotse.cut import Cut
from scipy.ndimage import minimum_filter1d

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.frames import CLOCK, Clock, in_frames, num_frames, num_samples

# Frames of 20 ms; `in_frames` converts them to another clock
WINDOW_FRAMES = 5_000
"""Frames, 100 s, that are encoded at once (fairseq dump_hubert_feature: max_chunk)."""
OVERLAP_FRAMES = 500
"""Frames, 10 s, that neighbouring windows share: each frame is at least 5 s from where its window is cut."""
LOUDNESS_FRAMES = 25
"""Frames, half a second, over which loudness is averaged."""
MARGIN_FRAMES = 100
"""Frames, 2 s, that the encoder sees at least on either side of the frames that are taken from a window."""
ROUND_FRAMES = 100
"""Frames of which windows have a multiple where they can, since kernels are compiled for each length."""
LOUDNESS_BLOCK_FRAMES = 30_000
"""Frames, ten minutes, whose loudness is measured at once."""


class Window(NamedTuple):
    """Frames of a recording that are encoded at once.

    Args:
        first: First frame of the audio.
        last: Frame after the last of the audio.
        start: First frame whose features are taken from this window; neighbouring windows may see it too.
        end: Frame after the last whose features are taken.
    """

    first: int
    last: int
    start: int
    end: int


def windows(frames: int, longest: int | None = None, overlap: int | None = None, clock: Clock = CLOCK) -> list[Window]:
    """Cut a recording into windows of equal length; from start to end, they cover every frame once.

    Every window of a long recording has `longest` frames, the last too, and begins on the frame grid.

    Args:
        frames: Number of frames of the recording.
        longest: Number of frames of a window; `WINDOW_FRAMES` if not given.
        overlap: Number of frames that neighbouring windows share; `OVERLAP_FRAMES` if not given.
        clock: Clock of the frames.
    """
    longest = in_frames(WINDOW_FRAMES, clock) if longest is None else longest
    overlap = in_frames(OVERLAP_FRAMES, clock) if overlap is None else overlap
    if frames <= longest:
        return [Window(0, frames, 0, frames)]
    firsts = [*range(0, frames - longest, longest - overlap), frames - longest]
    joints = [0, *((before + longest + after) // 2 for before, after in pairwise(firsts)), frames]
    return [Window(first, first + longest, *span) for first, span in zip(firsts, pairwise(joints), strict=True)]


def quiet_windows(cut: Cut, longest: int, clock: Clock = CLOCK) -> list[Window]:
    """Cut a recording at the quietest place of every few seconds, so that no word is cut.

    Args:
        cut: Recording.
        longest: Largest number of frames of a window, margins included; most windows have about half.
        clock: Clock of the frames.

    Returns:
        Windows; from start to end, they cover every frame once.

    Raises:
        UserError: The audio cannot be read.
    """
    frames = num_frames(cut.num_samples, clock)
    if frames <= longest:
        return [Window(0, frames, 0, frames)]
    margin, rounded = min(in_frames(MARGIN_FRAMES, clock), longest // 4), in_frames(ROUND_FRAMES, clock)
    joints = _joints(_loudness(cut, frames, clock), longest - 2 * margin)
    cuts = []
    for start, end in pairwise(joints):
        size = min(-(-(end - start + 2 * margin) // rounded) * rounded, longest)
        first = max(start - margin, 0)
        last = min(first + size, frames)
        cuts.append(Window(first, last, start, end))
    return cuts


def _joints(loudness: np.ndarray, longest: int) -> list[int]:
    """Frames at which windows meet, from 0 to the number of frames."""
    reach = max(longest // 3, 1)
    quietest = np.flatnonzero(loudness == minimum_filter1d(loudness, 2 * reach + 1, mode="nearest"))
    joints = [0]
    for frame in [*quietest.tolist(), len(loudness)]:
        while frame - joints[-1] > longest:  # the loudness only rises or only falls here
            earliest = joints[-1] + longest // 2
            joints.append(earliest + int(np.argmin(loudness[earliest : joints[-1] + longest])))
        last = frame == len(loudness)
        if last or (frame - joints[-1] >= reach // 2 and len(loudness) - frame >= reach // 2):
            joints.append(frame)
    return joints


def _loudness(cut: Cut, frames: int, clock: Clock) -> np.ndarray:
    """Variance of half a second around each frame, (frames,); a constant offset has none."""
    moments = []
    for first in range(0, frames, LOUDNESS_BLOCK_FRAMES):
        count = min(LOUDNESS_BLOCK_FRAMES, frames - first)
        read = read_waveform(cut, first * clock.hop, num_samples(count, clock))
        waveform = read[: count * clock.hop].view(count, clock.hop).double()
        moments.append(torch.stack([waveform.mean(dim=1), waveform.square().mean(dim=1)]))
    averaged = in_frames(LOUDNESS_FRAMES, clock) | 1  # odd
    margin = averaged // 2
    padded = F.pad(torch.cat(moments, dim=1)[None], (margin, margin), mode="replicate")
    mean, square = F.avg_pool1d(padded, averaged, stride=1)[0].numpy()
    loudness: np.ndarray = np.maximum(square - mean**2, 0)  # in float64, which has the digits for it
    return loudness
