"""Resampling by a windowed sinc, with the values of torchaudio's `transforms.Resample`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ZERO_CROSSINGS = 6
"""Zero crossings of the sinc on each side of its centre."""
ROLL_OFF = 0.99
"""Cutoff frequency, as a share of the lower Nyquist frequency."""


class Resampler:
    """Conversion from one sample rate to another.

    Every output sample is a weighted sum of input samples. The weights repeat after as many output samples as the new
    rate has in lowest terms: one row of the kernel for each.

    Args:
        rate: Sample rate of the input, in Hz.
        new_rate: Sample rate of the output, in Hz.
    """

    def __init__(self, rate: int, new_rate: int) -> None:
        divisor = math.gcd(rate, new_rate)
        self.stride, self.num_phases = rate // divisor, new_rate // divisor
        cutoff = ROLL_OFF * min(self.stride, self.num_phases)
        self.width = math.ceil(ZERO_CROSSINGS * self.stride / cutoff)  # samples
        sample = torch.arange(-self.width, self.width + self.stride, dtype=torch.float64) / self.stride
        phase = torch.arange(0, -self.num_phases, -1)[:, None, None] / self.num_phases
        time = ((phase + sample) * cutoff).clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS)  # in zero crossings
        window = torch.cos(time * math.pi / ZERO_CROSSINGS / 2) ** 2  # Hann's
        self.kernel = (torch.sinc(time) * window * (cutoff / self.stride)).float()  # (phases, 1, samples)

    def __call__(self, waveform: Tensor) -> Tensor:
        """Resample audio.

        Args:
            waveform: (..., samples), float32.

        Returns:
            (..., samples at the new rate, rounded up).
        """
        if self.stride == self.num_phases:
            return waveform
        rows = waveform.reshape(math.prod(waveform.shape[:-1]), 1, waveform.shape[-1])
        phases = F.conv1d(F.pad(rows, (self.width, self.width + self.stride)), self.kernel, stride=self.stride)
        num_samples = -(-waveform.shape[-1] * self.num_phases // self.stride)
        return phases.transpose(1, 2).flatten(1)[:, :num_samples].reshape(*waveform.shape[:-1], num_samples)
