"""Means and variances of a recording that comes in pieces, in memory that does not grow: what norms over time need."""

from collections.abc import Iterable

import torch
from torch import Tensor

from hubert_lightning.model.convolutions import KERNELS, STRIDES, Statistics


class RunningStatistics:
    """Of all samples that were added so far, in whatever pieces they came."""

    def __init__(self) -> None:
        kernel = KERNELS[0]
        self.num_samples, self.num_windows = 0, 0
        self.sums = torch.zeros(2, dtype=torch.float64)  # of samples and of their squares
        self.window_sum = torch.zeros(kernel, dtype=torch.float64)
        self.window_products = torch.zeros(kernel, kernel, dtype=torch.float64)
        self.rest = torch.zeros(0, dtype=torch.float64)  # samples from where the next window begins

    def add(self, waveform: Tensor) -> None:
        """waveform: (samples,), those that follow"""
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

    def statistics(self, batch: int = 1) -> Statistics:
        """For a batch of so many parts of this recording, at least one window of which was added: float64."""
        mean, square = self.sums / self.num_samples
        windows = self.window_sum / self.num_windows
        covariance = self.window_products / self.num_windows - windows.outer(windows)
        of_one = (mean, (square - mean.square()).clamp(min=0), windows - mean, covariance)
        return Statistics(*(value.expand(batch, *value.shape) for value in of_one))


def statistics_of(pieces: Iterable[Tensor]) -> Statistics:
    """Those of a recording, for a batch of one part of it.

    pieces: (samples,) each, one after the other
    """
    running = RunningStatistics()
    for piece in pieces:
        running.add(piece)
    return running.statistics()
