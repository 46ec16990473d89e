"""Statistics of a recording for norms over time, computed from its pieces in constant memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

from hubert_lightning.model.convolutions import WaveformStatistics
from hubert_lightning.model.windows import STANDARD, WindowLayout


class RunningStatistics:
    """Statistics of all samples added so far; the sizes of the pieces make no difference.

    Args:
        layout: Windows of the encoder's first convolution.
    """

    def __init__(self, layout: WindowLayout = STANDARD) -> None:
        self.kernel, self.stride = layout.kernel, layout.stride
        self.num_samples, self.num_windows = 0, 0
        self.sums = torch.zeros(2, dtype=torch.float64)  # of samples and of their squares
        self.window_sum = torch.zeros(self.kernel, dtype=torch.float64)
        self.window_products = torch.zeros(self.kernel, self.kernel, dtype=torch.float64)
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
        if len(samples) >= self.kernel:
            windows = samples.unfold(0, self.kernel, self.stride)  # (windows, kernel)
            self.num_windows += len(windows)
            self.window_sum += windows.sum(dim=0)
            self.window_products += windows.T @ windows
            samples = samples[len(windows) * self.stride :]
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


def statistics_of(pieces: Iterable[Tensor], layout: WindowLayout = STANDARD) -> WaveformStatistics:
    """Compute the statistics of a recording, for a batch of one part of it.

    Args:
        pieces: (samples,) each, one after the other.
        layout: Windows of the encoder's first convolution.
    """
    running = RunningStatistics(layout)
    for piece in pieces:
        running.add(piece)
    return running.statistics()
