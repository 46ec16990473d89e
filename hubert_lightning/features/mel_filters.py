"""Triangular filters that are equally wide on the mel scale."""

import torch
from torch import Tensor


def kaldi_mel_filters(num_filters: int, fft: int, sample_rate: int, lowest: float) -> Tensor:
    """Filters as Kaldi has them: triangles on the mel scale, up to half the sample rate.

    Args:
        num_filters: Number of filters.
        fft: Samples of a Fourier transform.
        sample_rate: Sample rate in Hz.
        lowest: Lower end of the first filter, in Hz.

    Returns:
        (filters, fft / 2), without the frequency of half the sample rate, where the last filter ends.
    """
    ends = _mel(torch.tensor([lowest, sample_rate / 2], dtype=torch.float64))
    width = float(ends[1] - ends[0]) / (num_filters + 1)  # of half a filter
    first = torch.arange(num_filters)[:, None]
    left, centre, right = (float(ends[0]) + (first + sides) * width for sides in (0, 1.0, 2.0))
    mel = _mel(sample_rate / fft * torch.arange(fft // 2))[None]
    return torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)


def mel_filters(num_filters: int, fft: int, sample_rate: int) -> Tensor:
    """Filters from 0 Hz to half the sample rate, as by torchaudio's `melscale_fbanks`: triangles in Hz.

    Args:
        num_filters: Number of filters.
        fft: Samples of a Fourier transform.
        sample_rate: Sample rate in Hz.

    Returns:
        (fft / 2 + 1, filters).
    """
    frequency = torch.linspace(0, sample_rate // 2, fft // 2 + 1)[:, None]
    highest = 2595 * torch.log10(torch.tensor(1 + sample_rate / 2 / 700, dtype=torch.float64))
    mel = torch.linspace(0.0, float(highest), num_filters + 2)
    corner = 700 * (10 ** (mel / 2595) - 1)  # Hz
    rising = (frequency - corner[:-2]) / (corner[1:-1] - corner[:-2])
    falling = (corner[2:] - frequency) / (corner[2:] - corner[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def _mel(hertz: Tensor) -> Tensor:
    return 1127.0 * (1.0 + hertz / 700.0).log()
