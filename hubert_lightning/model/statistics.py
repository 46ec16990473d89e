"""Statistics of a recording for norms over time, computed from its pieces in constant memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

from hubert_lightning.model.convolutions import KERNELS, STRIDES, WaveformStatistics


class RunningStatistics:
    """Statistics of all samples added so far; the sizes of the pieces make no difference."""

    def __init__(self) -> None:
        kernel = KERNELS[0]
        self.num_samples, self.num_windows = 0, 0
        self.sums = torch.zeros(2, dtype=torch.float64)  # of samples and of their squares
        self.window_sum = torch.zeros(kernel, dtype=torch.float64)
        self.window_products = torch.zeros(kernel, kernel, dtype=torch.float64)
        self.rest = torch.zeros(0, dtype=torch.float64)  # samples from where the next window begins

    def add(self, waveform: Tensor) -> None:
        """Add the next samples.

        Args:
            waveform: (samples,).
        """
        samples = waveform.detach().to("cpu", torch.float64)
        self.num_samples += len(samples)
        self.sums += torch.stack([samples.sum(), samples.square().sum()])
        samples = torch.cat([self.rest, samples])
        if len(samples) >= KERNELS[0]:
            windows = samples.unfold(0, KERNELS[0], STRIDES[0])  # (windows, kernel)
            self.num_windows += len(windows)
            self.window_sum += windows.sum(dim=0)
            self.window_products += windows.T @ windows
            samples = samples[len(windows) * STRIDES[0] :]
        self.rest = samples.clone()

    def statistics(self, batch: int = 1) -> WaveformStatistics:
        """Compute the statistics, for a batch of parts of this recording.

        Args:
            batch: Parts in the batch.

        Returns:
            Statistics in float64, the same for every part. At least one window of samples has been added before.
        """
        mean, square = self.sums / self.num_samples
        windows = self.window_sum / self.num_windows
        covariance = self.window_products / self.num_windows - windows.outer(windows)
        values = (mean, (square - mean.square()).clamp(min=0), windows - mean, covariance)
        return WaveformStatistics(*(value.expand(batch, *value.shape) for value in values))


def statistics_of(pieces: Iterable[Tensor]) -> WaveformStatistics:
    """Compute the statistics of a recording, for a batch of one part of it.

    Args:
        pieces: (samples,) each, one after the other.
    """
    running = RunningStatistics()
    for piece in pieces:
        running.add(piece)
    return running.statistics()
