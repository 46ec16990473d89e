"""The seven convolutions from samples to frames of 20 ms (wav2vec 2.0 §2)."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_lightning.errors import UserError
from hubert_lightning.frames import HOP, WINDOW, num_frames, num_samples, padding_mask
from hubert_lightning.model.config import EncoderConfig

KERNELS = (10, 3, 3, 3, 3, 2, 2)  # together they see WINDOW samples


STRIDES = (5, 2, 2, 2, 2, 2, 2)  # and move by HOP samples: the clock, not an option


PIECE = 1_500  # frames, 30 s, that are convolved at once where norms over time are given


class Statistics(NamedTuple):
    """What norms over time take from a waveform. Given those of a whole recording, a part of it is normalised as there;
    `model/statistics.py` counts them.

    mean:              (batch,), of the samples
    variance:          (batch,)
    window_mean:       (batch, kernel), of what the first convolution sees at once, once `mean` is subtracted
    window_covariance: (batch, kernel, kernel)
    """

    mean: Tensor
    variance: Tensor
    window_mean: Tensor
    window_covariance: Tensor


class Convolutions(nn.ModuleList):
    """The seven, one after the other."""

    def forward(self, waveform: Tensor, length: Tensor | None = None, statistics: Statistics | None = None) -> Tensor:
        """(batch, samples) → (batch, frames, channels); with `length` (batch,) the group norm leaves out padding, with
        `statistics` it goes by those"""
        x = waveform[:, None]  # (batch, channels, frames)
        for convolution in self:
            x = convolution(x, length, statistics)
        return x.transpose(1, 2)


class Convolution(nn.Module):
    """One of the seven: strided convolution, norm, GELU."""

    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__()
        channels = config.conv_channels
        self.conv = nn.Conv1d(
            1 if index == 0 else channels, channels, KERNELS[index], STRIDES[index], bias=config.conv_bias
        )
        self.over_channels = config.conv_norm == "layer"
        self.layer_norm_gelu: Callable[..., Tensor] = _layer_norm_gelu
        self.norm: nn.Module = nn.Identity()
        if self.over_channels:
            self.norm = nn.LayerNorm(channels)
        elif index == 0:
            self.norm = nn.GroupNorm(channels, channels)

    def forward(self, x: Tensor, length: Tensor | None = None, statistics: Statistics | None = None) -> Tensor:
        """(batch, channels, frames) → (batch, channels, fewer frames); with `length` (batch,), of the waveforms, the
        group norm is over the frames that hear no padding; with `statistics` it is that of the whole recordings"""
        if not isinstance(self.norm, nn.GroupNorm) and not self.over_channels:
            return F.gelu(self.conv(x))
        if not self.over_channels:
            if length is None or statistics is not None:
                return F.gelu(self._normed_over_time(x, statistics))
            rows = zip(x, length.tolist(), strict=True)
            alone = [self._normed_over_time(row[None, :, :samples])[0] for row, samples in rows]
            longest = (x.shape[-1] - KERNELS[0]) // STRIDES[0] + 1
            return F.gelu(torch.stack([F.pad(row, (0, longest - row.shape[-1])) for row in alone]))
        # As an image of height 1, whose channels lie side by side in memory: a norm over channels then moves nothing,
        # which makes the seven three times as fast on a CPU.
        weight = self.conv.weight[:, :, None].contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x[:, :, None], weight, self.conv.bias, stride=(1, *self.conv.stride))
        x = x[:, :, 0].transpose(1, 2)  # (batch, frames, channels)
        return self.layer_norm_gelu(x, self.norm.weight, self.norm.bias).transpose(1, 2)

    def _normed_over_time(self, x: Tensor, statistics: Statistics | None = None) -> Tensor:
        """The convolution of waveforms, normalised over time: (batch, 1, samples) → (batch, channels, frames).

        The mean and variance of each channel follow from those of the windows, so that weights are scaled instead of
        what comes out of them, which is 50 times as much: half of the time of convolution, norm and GELU.
        """
        norm, waveform, dtype = self.norm, x[:, 0], x.dtype
        assert isinstance(norm, nn.GroupNorm)
        if self.conv.bias is not None and statistics is None:  # given them, it needs no bias, which is in the mean
            return norm(self.conv(x))
        level = waveform.mean(dim=1, keepdim=True) if statistics is None else statistics.mean[:, None].to(dtype)
        centred = waveform - level  # as the norm would do with what comes out
        windows = centred.unfold(1, KERNELS[0], STRIDES[0])  # (batch, frames, kernel)
        # Variances are differences, here of few numbers; float64 is also what autocast leaves alone
        exact = torch.float32 if waveform.device.type == "mps" else torch.float64
        weight = self.conv.weight[:, 0].to(exact)  # (channels, kernel)
        if statistics is None:
            few = windows.to(exact)
            mean = few.mean(dim=1)  # (batch, kernel)
            covariance = few.transpose(1, 2) @ few / few.shape[1] - mean[:, :, None] * mean[:, None]
        else:
            mean, covariance = statistics.window_mean.to(exact), statistics.window_covariance.to(exact)
        variance = torch.einsum("ck,bkl,cl->bc", weight, covariance, weight).clamp(min=0)
        scale = norm.weight * (variance + norm.eps).rsqrt()  # (batch, channels)
        weight, shift = weight * scale[:, :, None], norm.bias - scale * (mean @ weight.T)
        return torch.baddbmm(shift[:, :, None].to(dtype), weight.to(dtype), windows.transpose(1, 2))


def _layer_norm_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias))


def pieces_of(waveform: Tensor) -> Iterator[Tensor]:
    """Parts that begin on the frame grid, so that their frames, one after the other, are those of the whole."""
    frames = num_frames(waveform.shape[1])
    for first in range(0, frames, PIECE):
        yield waveform[:, first * HOP : first * HOP + num_samples(min(PIECE, frames - first))]


def _normalize(waveform: Tensor, length: Tensor | None) -> Tensor:
    """Zero mean and unit variance of each utterance over its own samples, in float32; padding is 0."""
    x = waveform.float()
    if length is None:
        return F.layer_norm(x, x.shape[1:]).type_as(waveform)  # fairseq fairseq_dataset: layer_norm of the audio
    padding = padding_mask(length, x.shape[1])
    mean = x.masked_fill(padding, 0).sum(dim=1, keepdim=True) / length[:, None]
    centred = (x - mean).masked_fill(padding, 0)
    variance = centred.square().sum(dim=1, keepdim=True) / length[:, None]
    return (centred * (variance + 1e-5).rsqrt()).type_as(waveform)


def _normalize_by(waveform: Tensor, whole: Statistics) -> tuple[Tensor, Statistics]:
    """Zero mean and unit variance of the recording of which the waveform is a part, and what its statistics become."""
    scale = (whole.variance + 1e-5).rsqrt()[:, None]
    x = (waveform - whole.mean[:, None]) * scale
    windows = whole.window_mean * scale, whole.window_covariance * scale[..., None].square()
    return x.type_as(waveform), Statistics(torch.zeros_like(whole.mean), torch.ones_like(whole.variance), *windows)


def _check_length(waveform: Tensor, length: Tensor | None) -> None:
    longest = waveform.shape[1]
    if longest < WINDOW:
        raise UserError(f"{longest} samples are shorter than one frame of {WINDOW}; leave such utterances out")
    if length is None or length.device.type != "cpu" or torch.compiler.is_exporting():  # a GPU's would be waited for
        return
    for row, samples in enumerate(length.tolist()):
        if not WINDOW <= samples <= longest:
            raise UserError(
                f"row {row} has length {samples}; it is from {WINDOW} to {longest}, the samples of the batch"
            )
