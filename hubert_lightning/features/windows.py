"""Windows of long recordings: of equal length, or cut where the recording is quietest.

Where a cut falls is decided by the audio around it alone: a part of a recording is cut where the whole is, but at its
ends, and so has the same words.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lhotse.cut import Cut
from scipy.ndimage import minimum_filter1d

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.frames import HOP, num_frames, num_samples

LONGEST = 5_000  # frames, 100 s: what is encoded at once (fairseq dump_hubert_feature: max_chunk)
OVERLAP = 500  # frames, 10 s, of neighbouring windows: each frame is at least 5 s from where its window is cut
PAUSE = 25  # frames, half a second, over which loudness is averaged
MARGIN = 100  # frames, 2 s, that a window hears on either side of what is taken from it, or some more
ROUND = 100  # frames: windows have a multiple of these where they can, since kernels are made for each length
AT_ONCE = 30_000  # frames, ten minutes, whose loudness is measured at once


class Window(NamedTuple):
    """Frames of a recording that are encoded at once.

    first: frame that the audio begins with
    last:  the one after the last that it has
    start: first frame whose features are taken from here, which others around it may hear
    end:   the one after the last whose features are taken
    """

    first: int
    last: int
    start: int
    end: int


def windows(frames: int, longest: int | None = None, overlap: int | None = None) -> list[Window]:
    """How a recording is cut to be encoded: from start to end, its windows cover every frame once.

    Every window of a long recording is `longest` frames, the last too, and begins on the frame grid.

    longest: `LONGEST` if not given
    overlap: frames that neighbouring windows share; `OVERLAP` if not given
    """
    longest = LONGEST if longest is None else longest
    overlap = OVERLAP if overlap is None else overlap
    if frames <= longest:
        return [Window(0, frames, 0, frames)]
    firsts = [*range(0, frames - longest, longest - overlap), frames - longest]
    joints = [0, *((before + longest + after) // 2 for before, after in pairwise(firsts)), frames]
    return [Window(first, first + longest, *of) for first, of in zip(firsts, pairwise(joints), strict=True)]


def quiet_windows(cut: Cut, longest: int) -> list[Window]:
    """How a recording is cut to be transcribed: wherever it is quieter than for some seconds around.

    longest: frames that a window has at most, with its margins; most have about half
    """
    frames = num_frames(cut.num_samples)
    if frames <= longest:
        return [Window(0, frames, 0, frames)]
    margin = min(MARGIN, longest // 4)
    joints = _joints(_loudness(cut, frames), longest - 2 * margin)
    found = []
    for start, end in pairwise(joints):
        size = min(-(-(end - start + 2 * margin) // ROUND) * ROUND, longest)
        first = max(start - margin, 0)
        last = min(first + size, frames)
        found.append(Window(first, last, start, end))
    return found


def _joints(loudness: np.ndarray, longest: int) -> list[int]:
    """The frames from which to which each window's are taken: 0, …, all."""
    reach = max(longest // 3, 1)
    quietest = np.flatnonzero(loudness == minimum_filter1d(loudness, 2 * reach + 1, mode="nearest"))
    joints = [0]
    for frame in [*quietest.tolist(), len(loudness)]:
        while frame - joints[-1] > longest:  # it gets quieter and quieter, or louder and louder
            earliest = joints[-1] + longest // 2
            joints.append(earliest + int(np.argmin(loudness[earliest : joints[-1] + longest])))
        last = frame == len(loudness)
        if last or (frame - joints[-1] >= reach // 2 and len(loudness) - frame >= reach // 2):
            joints.append(frame)
    return joints


def _loudness(cut: Cut, frames: int) -> np.ndarray:
    """Variance of half a second around each frame, (frames,): a constant offset is not loud."""
    moments = []
    for first in range(0, frames, AT_ONCE):
        count = min(AT_ONCE, frames - first)
        waveform = read_waveform(cut, first * HOP, num_samples(count))[: count * HOP].view(count, HOP).double()
        moments.append(torch.stack([waveform.mean(dim=1), waveform.square().mean(dim=1)]))
    around = F.pad(torch.cat(moments, dim=1)[None], (PAUSE // 2, PAUSE // 2), mode="replicate")
    mean, square = F.avg_pool1d(around, PAUSE, stride=1)[0].numpy()
    return np.maximum(square - mean**2, 0)  # in float64, which has the digits for it
