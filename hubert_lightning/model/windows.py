"""The first convolution, whose windows of samples are multiplied with all channels at once, and its norm over time.

A window takes another sample that is 1, by which the weights have a row for shifts: a bias, or what a norm subtracts.
"""

from contextlib import nullcontext
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_lightning.frames import CLOCK, Clock, num_frames
from hubert_lightning.model.config import KERNELS, STRIDES, EncoderConfig
from hubert_lightning.model.devices import without_waiting
from hubert_lightning.model.products import in_autocast


class WindowLayout(NamedTuple):
    """Windows of the first convolution.

    Args:
        kernel: Samples of a window.
        stride: Samples from one window to the next.
        clock: Clock of all convolutions in sequence.
    """

    kernel: int = KERNELS[0]
    stride: int = STRIDES[0]
    clock: Clock = CLOCK

    @classmethod
    def of(cls, config: EncoderConfig) -> Self:
        """Describe the windows of an encoder."""
        return cls(config.conv_kernels[0], config.conv_strides[0], config.clock)

    @property
    def factor(self) -> int:
        """Product of the other strides: windows of an utterance come in multiples of it."""
        return self.clock.hop // self.stride

    @property
    def columns(self) -> int:
        """Columns of a matrix of windows: samples, a 1, and zeros, since matrix units multiply multiples of eight."""
        return -(-(self.kernel + 1) // 8) * 8

    @property
    def more_frames(self) -> int:
        """Frames after the last whose windows the last one sees too, at least one."""
        return max(1, (self.clock.window - 1) // self.clock.hop)


STANDARD = WindowLayout()


class WaveformStatistics(NamedTuple):
    """Statistics of recordings that norms over time need, so that a part is normalised as in the whole recording.

    `model/statistics.py` computes them.

    Args:
        mean: (batch,), mean of the samples.
        variance: (batch,), variance of the samples.
        window_mean: (batch, kernel), mean of the windows of the first convolution, after `mean` is subtracted.
        window_covariance: (batch, kernel, kernel), covariance of these windows.
    """

    mean: Tensor
    variance: Tensor
    window_mean: Tensor
    window_covariance: Tensor


def windows_convolved(waveform: Tensor, weight: Tensor, bias: Tensor | None, layout: WindowLayout = STANDARD) -> Tensor:
    """Convolve waveforms by the first convolution.

    Args:
        waveform: (batch, samples).
        weight: (channels, 1, kernel).
        bias: (channels,).
        layout: Windows of the convolution.

    Returns:
        (batch, factor · (frames + 1), channels).
    """
    shift = torch.zeros_like(weight[:, 0, 0]) if bias is None else bias
    matrix = torch.cat([weight[:, 0].T, shift[None]])
    return _multiplied(_windows(waveform, layout), matrix.expand(len(waveform), *matrix.shape), layout)


def normed_over_time(
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: nn.GroupNorm,
    length: Tensor | None = None,
    statistics: WaveformStatistics | None = None,
    layout: WindowLayout = STANDARD,
) -> Tensor:
    """Convolve waveforms and normalise each channel over time.

    The mean and variance of each channel follow from those of the windows. So the weights are scaled instead of the
    outputs, which are 50 times as many: convolution, norm and GELU take half of the time. A bias has no effect.

    Args:
        waveform: (batch, samples).
        weight: (channels, 1, kernel).
        bias: (channels,).
        norm: Group norm with a group for each channel.
        length: (batch,), samples before padding, which the statistics ignore.
        statistics: Statistics of the whole recordings.
        layout: Windows of the convolution.

    Returns:
        (batch, factor · (frames + 1), channels).
    """
    if length is not None:
        length = without_waiting(length, waveform.device)
    if statistics is not None:
        level = statistics.mean[:, None].to(waveform.dtype)
    elif length is None:
        level = waveform.mean(dim=1, keepdim=True)
    else:
        inside = torch.arange(waveform.shape[1], device=waveform.device) < length[:, None]
        level = torch.where(inside, waveform, 0).sum(dim=1, keepdim=True) / length[:, None]
    windows = _windows(waveform - level.to(waveform.dtype), layout)  # as the norm would do with the outputs
    # Variances are differences, here of few numbers; float64 is also what autocast leaves alone
    exact = torch.float32 if waveform.device.type == "mps" else torch.float64
    if statistics is None:
        num_windows = ((waveform.shape[1] if length is None else length) - layout.kernel) // layout.stride + 1
        mean, covariance = _moments(windows, num_windows, exact, layout)
    else:
        mean, covariance = statistics.window_mean.to(exact), statistics.window_covariance.to(exact)
    kernel = weight[:, 0].to(exact)  # (channels, kernel)
    variance = torch.einsum("ck,bkl,cl->bc", kernel, covariance, kernel).clamp(min=0)
    scale = norm.weight * (variance + norm.eps).rsqrt()  # (batch, channels)
    shift = norm.bias - scale * (mean @ kernel.T)
    if bias is not None:  # which the norm subtracts again
        shift = shift + scale * (bias - bias)
    matrix = torch.cat([(kernel * scale[:, :, None]).transpose(1, 2), shift[:, None]], dim=1)
    return _multiplied(windows, matrix.to(waveform.dtype), layout)


def _windows(waveform: Tensor, layout: WindowLayout) -> Tensor:
    """Cut waveforms into windows, (batch, factor · (frames + 2), columns): all that they have, and some of zeros."""
    batch, samples = waveform.shape
    kernel, stride = layout.kernel, layout.stride
    count = layout.factor * (num_frames(samples, layout.clock) + layout.more_frames + 1)
    windows = F.pad(waveform, (0, stride * (count - 1) + kernel - samples)).unfold(1, kernel, stride)
    rest = F.pad(waveform.new_ones(1), (0, layout.columns - kernel - 1))
    return torch.cat([windows, rest.expand(batch, count, -1)], dim=-1)


def _multiplied(windows: Tensor, matrix: Tensor, layout: WindowLayout) -> Tensor:
    """Multiply windows, (batch, factor · (frames + 2), columns), by matrices, (batch, kernel + 1, channels)."""
    matrix = F.pad(matrix, (0, 0, 0, layout.columns - layout.kernel - 1))
    chunks = windows[:, : -layout.factor].view(len(windows), layout.factor, -1, layout.columns)
    convolved: Tensor = chunks @ matrix[:, None]
    return convolved.flatten(1, 2)


def _moments(
    windows: Tensor, num_windows: int | Tensor, exact: torch.dtype, layout: WindowLayout
) -> tuple[Tensor, Tensor]:
    """Compute mean and covariance of the first windows of each utterance.

    Args:
        windows: (batch, factor · (frames + 2), columns).
        num_windows: Their number, the same for all or (batch,).
        exact: Type in which the sums of parts are added.
        layout: Windows of the convolution.

    Returns:
        (batch, kernel) and (batch, kernel, kernel).
    """
    end = num_windows[:, None] if isinstance(num_windows, Tensor) else num_windows
    counted = torch.arange(windows.shape[1], device=windows.device) < end
    wide = torch.promote_types(windows.dtype, torch.float32)
    # Chunks of a frame's windows, so that sums over time fill a GPU and are the same whatever padding follows
    chunks = torch.where(counted[..., None], windows.to(wide), 0).view(len(windows), -1, layout.factor, layout.columns)
    with torch.autocast(windows.device.type, enabled=False) if in_autocast(windows) else nullcontext():
        products = (chunks.transpose(2, 3) @ chunks).sum(dim=1, dtype=exact)  # (batch, columns, columns)
    count = end[..., None] if isinstance(end, Tensor) else end
    kernel = layout.kernel
    moments = products[:, : kernel + 1, :kernel] / count
    mean = moments[:, kernel]
    return mean, moments[:, :kernel] - mean[:, :, None] * mean[:, None]
