"""The first convolution, whose windows of ten samples are multiplied with all channels at once, and its norm over time.

A window takes another sample that is 1, by which the weights have a row for shifts: a bias, or what a norm subtracts.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_lightning.frames import num_frames
from hubert_lightning.model.devices import without_waiting
from hubert_lightning.model.products import in_autocast

KERNELS = (10, 3, 3, 3, 3, 2, 2)  # together they see WINDOW samples
STRIDES = (5, 2, 2, 2, 2, 2, 2)  # and move by HOP samples: the clock, not an option
KERNEL, STRIDE = KERNELS[0], STRIDES[0]
ALIGNED = 16
"""Columns of a matrix of windows: ten samples, a 1, and zeros, since matrix units multiply multiples of eight."""
FACTOR = 64
"""Windows of an utterance come in multiples of this number, the product of the other strides."""


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


def windows_convolved(waveform: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve waveforms by the first convolution.

    Args:
        waveform: (batch, samples).
        weight: (channels, 1, kernel).
        bias: (channels,).

    Returns:
        (batch, 64 · (frames + 1), channels).
    """
    shift = torch.zeros_like(weight[:, 0, 0]) if bias is None else bias
    matrix = torch.cat([weight[:, 0].T, shift[None]])
    return _multiplied(_windows(waveform), matrix.expand(len(waveform), *matrix.shape))


def normed_over_time(
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: nn.GroupNorm,
    length: Tensor | None = None,
    statistics: WaveformStatistics | None = None,
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

    Returns:
        (batch, 64 · (frames + 1), channels).
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
    windows = _windows(waveform - level.to(waveform.dtype))  # as the norm would do with the outputs
    # Variances are differences, here of few numbers; float64 is also what autocast leaves alone
    exact = torch.float32 if waveform.device.type == "mps" else torch.float64
    if statistics is None:
        num_windows = ((waveform.shape[1] if length is None else length) - KERNEL) // STRIDE + 1
        mean, covariance = _moments(windows, num_windows, exact)
    else:
        mean, covariance = statistics.window_mean.to(exact), statistics.window_covariance.to(exact)
    kernel = weight[:, 0].to(exact)  # (channels, kernel)
    variance = torch.einsum("ck,bkl,cl->bc", kernel, covariance, kernel).clamp(min=0)
    scale = norm.weight * (variance + norm.eps).rsqrt()  # (batch, channels)
    shift = norm.bias - scale * (mean @ kernel.T)
    if bias is not None:  # which the norm subtracts again
        shift = shift + scale * (bias - bias)
    matrix = torch.cat([(kernel * scale[:, :, None]).transpose(1, 2), shift[:, None]], dim=1)
    return _multiplied(windows, matrix.to(waveform.dtype))


def _windows(waveform: Tensor) -> Tensor:
    """Cut waveforms into windows, (batch, 64 · (frames + 2), 16): all that they have, and some of zeros."""
    batch, samples = waveform.shape
    count = FACTOR * (num_frames(samples) + 2)
    windows = F.pad(waveform, (0, STRIDE * (count - 1) + KERNEL - samples)).unfold(1, KERNEL, STRIDE)
    rest = F.pad(waveform.new_ones(1), (0, ALIGNED - KERNEL - 1))
    return torch.cat([windows, rest.expand(batch, count, -1)], dim=-1)


def _multiplied(windows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply windows, (batch, 64 · (frames + 2), 16), with a matrix of each utterance, (batch, 11, channels)."""
    matrix = F.pad(matrix, (0, 0, 0, ALIGNED - KERNEL - 1))
    convolved: Tensor = _in_chunks(windows[:, :-FACTOR]) @ matrix[:, None]
    return convolved.flatten(1, 2)


def _in_chunks(windows: Tensor) -> Tensor:
    return windows.view(len(windows), FACTOR, -1, ALIGNED)


def _moments(windows: Tensor, num_windows: int | Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute mean and covariance of the first windows of each utterance.

    Args:
        windows: (batch, 64 · (frames + 2), 16).
        num_windows: Their number, the same for all or (batch,).
        exact: Type in which the sums of parts are added.

    Returns:
        (batch, kernel) and (batch, kernel, kernel).
    """
    end = num_windows[:, None] if isinstance(num_windows, Tensor) else num_windows
    counted = torch.arange(windows.shape[1], device=windows.device) < end
    wide = torch.promote_types(windows.dtype, torch.float32)
    # Chunks of 64 windows, so that sums over time fill a GPU and are the same whatever padding follows
    chunks = torch.where(counted[..., None], windows.to(wide), 0).view(len(windows), -1, FACTOR, ALIGNED)
    with torch.autocast(windows.device.type, enabled=False) if in_autocast(windows) else nullcontext():
        products = (chunks.transpose(2, 3) @ chunks).sum(dim=1, dtype=exact)  # (batch, 16, 16)
    count = end[..., None] if isinstance(end, Tensor) else end
    moments = products[:, : KERNEL + 1, :KERNEL] / count
    mean = moments[:, KERNEL]
    return mean, moments[:, :KERNEL] - mean[:, :, None] * mean[:, None]
