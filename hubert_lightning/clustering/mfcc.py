"""The features of iteration 1: mel-frequency cepstra and how they move."""

from typing import Literal

import torch
from torch import Tensor
from torchaudio.compliance import kaldi
from torchaudio.functional import compute_deltas

from hubert_lightning.frames import SAMPLE_RATE

Part = Literal["cepstra", "delta", "delta_delta"]
PARTS: dict[Part, slice] = {"cepstra": slice(0, 13), "delta": slice(13, 26), "delta_delta": slice(26, 39)}
"""Columns of what the features are made of: the codebooks of product K-means (HuBERT §IV-E)."""


def mfcc(waveform: Tensor) -> Tensor:
    """39 features per 10 ms: 13 cepstra, their Δ and ΔΔ, neither mean nor variance normalised.

    Take every other row for the frames of the encoder: `mfcc(waveform)[::2]`.

    waveform: (samples,), 16 kHz audio in [-1, 1], at least one window (25 ms) of it
    returns:  (frames at 10 ms, 39)
    """
    # fairseq dump_mfcc_feature: Kaldi's defaults (25 ms window, 10 ms shift, 23 mel bins), C0 instead of energy
    cepstra = kaldi.mfcc(waveform[None], sample_frequency=SAMPLE_RATE, use_energy=False).T  # (13, frames)
    deltas = compute_deltas(cepstra)
    return torch.cat([cepstra, deltas, compute_deltas(deltas)]).T
