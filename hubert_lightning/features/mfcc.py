"""The features of iteration 1: mel-frequency cepstra and their derivatives."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_lightning.features.mel_filters import kaldi_mel_filters
from hubert_lightning.frames import SAMPLE_RATE, WINDOW

MFCC_DIM = 39
SPLICED_FRAMES = 3
"""Frames, 10 ms apart, that spliced features consist of."""
MfccPart = Literal["cepstra", "delta", "delta_delta"]
MFCC_PARTS: dict[MfccPart, slice] = {"cepstra": slice(0, 39), "delta": slice(39, 78), "delta_delta": slice(78, 117)}
"""Columns of spliced features, one codebook of product K-means each (HuBERT table VI)."""

# Kaldi's defaults: compute-mfcc-feats, feature-window.h
SHIFT = 160  # samples: 10 ms
FFT = 512  # samples: the next power of two of a window
MEL_BINS = 23
CEPSTRA = 13
DELTA_FRAMES = 2  # on each side
PREEMPHASIS = 0.97
LIFTER = 22.0
LOWEST = 20.0  # Hz
BLOCK_FRAMES = 256
"""Frames whose spectra are computed at once: their intermediate results stay in a processor's cache."""


def mfcc(waveform: Tensor) -> Tensor:
    """Compute 39 features per 10 ms: 13 cepstra, their Δ and ΔΔ, neither mean nor variance normalised.

    `mfcc(waveform)[::2]` has the frames of the encoder. The values are, to the last bit, those of torchaudio's
    `compliance.kaldi.mfcc` and `compute_deltas` in one thread, which take twice the time (tests/features/test_mfcc.py).

    Args:
        waveform: (samples,), 16 kHz audio in [-1, 1], at least one window (25 ms).

    Returns:
        (frames at 10 ms, 39).
    """
    tables = _tables()
    with _one_thread():
        # fairseq dump_mfcc_feature: Kaldi's defaults (25 ms window, 10 ms shift, 23 mel bins), C0 instead of energy
        mel = _power(waveform, tables.window) @ tables.mel
        logarithms = mel.clamp_(min=torch.finfo(torch.float32).eps).log_()  # (frames, bins)
        cepstra = (logarithms @ tables.dct).mul_(tables.lifter).T  # (13, frames)
        deltas = _slope(cepstra)
        return torch.cat([cepstra, deltas, _slope(deltas)]).T


def spliced(features: Tensor) -> Tensor:
    """Join the MFCCs of each frame with those of the frames before and after it.

    Args:
        features: (frames, 39), all frames of a recording, 10 ms apart.

    Returns:
        (frames, 117), cepstra of three frames, then their Δ, then their ΔΔ: `MFCC_PARTS`.
    """
    # The outermost frame is repeated, as by Kaldi's splice-feats; the paper does not describe the ends
    padded = torch.cat([features[:1], features, features[-1:]])
    return padded.unfold(0, SPLICED_FRAMES, 1).flatten(1)


class _Tables(NamedTuple):
    window: Tensor  # (samples,), Povey's
    mel: Tensor  # (frequencies, bins)
    dct: Tensor  # (bins, cepstra)
    lifter: Tensor  # (cepstra,)


@cache
def _tables() -> _Tables:
    filters = kaldi_mel_filters(MEL_BINS, FFT, SAMPLE_RATE, LOWEST)
    coefficient = torch.arange(float(CEPSTRA))[:, None]
    dct = torch.cos(math.pi / MEL_BINS * (torch.arange(float(MEL_BINS)) + 0.5) * coefficient).mul_(
        math.sqrt(2 / MEL_BINS)
    )  # DCT-II, (cepstra, bins)
    dct[0] = math.sqrt(1 / MEL_BINS)
    lifter = 1 + 0.5 * LIFTER * torch.sin(math.pi * torch.arange(CEPSTRA) / LIFTER)
    window = torch.hann_window(WINDOW, periodic=False).pow(0.85)
    return _Tables(window, F.pad(filters, (0, 1)).T, dct.T, lifter)


def _slope(features: Tensor) -> Tensor:
    """Slope of a line fitted to five frames, the outermost ones repeated at the ends; (dim, frames) in and out."""
    padded = F.pad(features[None], (DELTA_FRAMES, DELTA_FRAMES), mode="replicate")
    kernel = torch.arange(-DELTA_FRAMES, DELTA_FRAMES + 1.0).repeat(len(features), 1, 1)
    return F.conv1d(padded, kernel, groups=len(features))[0] / float(kernel[0].square().sum())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: the last bits of a product, and so labels, would depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _power(waveform: Tensor, window: Tensor) -> Tensor:
    """Power spectrum of each window, centred, pre-emphasised and tapered: (frames, frequencies)."""
    windows = waveform.unfold(0, WINDOW, SHIFT)  # (frames, samples)
    power = torch.empty(len(windows), FFT // 2 + 1)
    size = min(BLOCK_FRAMES, len(windows))
    centred, emphasis, tapered = torch.empty(size, WINDOW), torch.empty(size, WINDOW), torch.zeros(size, FFT)
    for first in range(0, len(windows), BLOCK_FRAMES):
        block = windows[first : first + BLOCK_FRAMES]
        x, scaled, y = centred[: len(block)], emphasis[: len(block)], tapered[: len(block)]
        torch.sub(block, block.mean(dim=1, keepdim=True), out=x)
        torch.mul(x, PREEMPHASIS, out=scaled)
        torch.sub(x[:, :1], scaled[:, :1], out=y[:, :1])  # the first sample follows itself
        torch.sub(x[:, 1:], scaled[:, :-1], out=y[:, 1:WINDOW])
        y[:, :WINDOW].mul_(window)
        torch.abs(torch.fft.rfft(y), out=power[first : first + BLOCK_FRAMES])
    return power.square_()
