"""The features of iteration 1: mel-frequency cepstra and their derivatives."""

from typing import Literal

import torch
from torch import Tensor
from torchaudio.compliance import kaldi
from torchaudio.functional import compute_deltas

from hubert_lightning.frames import SAMPLE_RATE

MFCC_DIM = 39
SPLICED_FRAMES = 3
"""Frames, 10 ms apart, that spliced features consist of."""
MfccPart = Literal["cepstra", "delta", "delta_delta"]
MFCC_PARTS: dict[MfccPart, slice] = {"cepstra": slice(0, 39), "delta": slice(39, 78), "delta_delta": slice(78, 117)}
"""Columns of spliced features, one codebook of product K-means each (HuBERT table VI)."""


def mfcc(waveform: Tensor) -> Tensor:
    """Compute 39 features per 10 ms: 13 cepstra, their Δ and ΔΔ, neither mean nor variance normalised.

    `mfcc(waveform)[::2]` has the frames of the encoder.

    Args:
        waveform: (samples,), 16 kHz audio in [-1, 1], at least one window (25 ms).

    Returns:
        (frames at 10 ms, 39).
    """
    # fairseq dump_mfcc_feature: Kaldi's defaults (25 ms window, 10 ms shift, 23 mel bins), C0 instead of energy
    cepstra = kaldi.mfcc(waveform[None], sample_frequency=SAMPLE_RATE, use_energy=False).T  # (13, frames)
    deltas = compute_deltas(cepstra)
    return torch.cat([cepstra, deltas, compute_deltas(deltas)]).T


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
