"""Log-mel spectrograms to look at; no model is trained on them."""

from functools import cache

import torch
from torch import Tensor

from hubert_lightning.features.mel_filters import mel_filters
from hubert_lightning.frames import SAMPLE_RATE, WINDOW

SPECTROGRAM_HOP = 160
"""Samples between two columns: 10 ms."""
MELS = 80
FFT = 512
"""Samples of a Fourier transform; the window of 25 ms is padded to them."""


def log_mel(waveform: Tensor) -> Tensor:
    """Compute a log-mel spectrogram with 80 bands up to 8 kHz and a column every 10 ms.

    Args:
        waveform: (samples,), 16 kHz audio.

    Returns:
        (bands, columns), in dB below the loudest value, at least -80. Column k is centred at k · 10 ms.
    """
    spectrum = torch.stft(
        waveform,
        FFT,
        SPECTROGRAM_HOP,
        WINDOW,
        torch.hann_window(WINDOW),
        pad_mode="constant",  # any length; a reflection needs half a window
        return_complex=True,
    )
    power = spectrum.abs().square()  # (frequencies, columns)
    decibels = 10 * (_filters().T @ power).clamp(min=1e-10).log10()
    return (decibels - decibels.max()).clamp(min=-80)


def mel_band(hertz: float) -> float:
    """Return the position of a frequency among the bands of `log_mel`; bands count from 0, also between integers."""
    return _mel(hertz) / _mel(SAMPLE_RATE / 2) * (MELS + 1) - 1


def _mel(hertz: float) -> float:
    return float(2595 * torch.log10(torch.tensor(1 + hertz / 700, dtype=torch.float64)))  # as torchaudio's default


@cache
def _filters() -> Tensor:
    """Weights of the mel bands: (frequencies, bands)."""
    return mel_filters(MELS, FFT, SAMPLE_RATE)
