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
PIECE_FRAMES = 1_500  # 30 s, convolved at once where the statistics of norms over time are given


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


class Convolutions(nn.ModuleList):
    """The seven convolutions in sequence."""

    def forward(
        self, waveform: Tensor, length: Tensor | None = None, statistics: WaveformStatistics | None = None
    ) -> Tensor:
        """Compute the frames of a batch.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding, which the group norm then ignores.
            statistics: Statistics of the whole recordings, for the group norm.

        Returns:
            (batch, frames, channels).
        """
        x = waveform[:, None]  # (batch, channels, frames)
        for convolution in self:
            x = convolution(x, length, statistics)
        return x.transpose(1, 2)


class Convolution(nn.Module):
    """One of the seven convolutions: strided convolution, norm, GELU."""

    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__()
        channels = config.conv_channels
        self.conv = nn.Conv1d(
            1 if index == 0 else channels, channels, KERNELS[index], STRIDES[index], bias=config.conv_bias
        )
        self.over_channels = config.conv_norm == "layer"
        self.layer_norm_gelu: Callable[[Tensor, Tensor, Tensor], Tensor] = layer_norm_gelu
        self.norm: nn.Module = nn.Identity()
        if self.over_channels:
            self.norm = nn.LayerNorm(channels)
        elif index == 0:
            self.norm = nn.GroupNorm(channels, channels)

    def forward(self, x: Tensor, length: Tensor | None = None, statistics: WaveformStatistics | None = None) -> Tensor:
        """Convolve and normalise.

        Args:
            x: (batch, channels, frames).
            length: (batch,), samples of the waveforms; the group norm then ignores frames whose window has padding.
            statistics: Statistics of the whole recordings, for the group norm.

        Returns:
            (batch, channels, fewer frames).
        """
        if not isinstance(self.norm, nn.GroupNorm) and not self.over_channels:
            return F.gelu(self.conv(x))
        if not self.over_channels:
            if length is None or statistics is not None:
                return F.gelu(self._normed_over_time(x, statistics))
            rows = zip(x, length.tolist(), strict=True)
            unpadded = [self._normed_over_time(row[None, :, :samples])[0] for row, samples in rows]
            longest = (x.shape[-1] - KERNELS[0]) // STRIDES[0] + 1
            return F.gelu(torch.stack([F.pad(row, (0, longest - row.shape[-1])) for row in unpadded]))
        # As an image of height 1, whose channels lie side by side in memory: a norm over channels then moves nothing,
        # which makes the seven three times as fast on a CPU.
        weight = self.conv.weight[:, :, None].contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x[:, :, None], weight, self.conv.bias, stride=(1, *self.conv.stride))
        x = x[:, :, 0].transpose(1, 2)  # (batch, frames, channels)
        assert isinstance(self.norm, nn.LayerNorm)
        return self.layer_norm_gelu(x, self.norm.weight, self.norm.bias).transpose(1, 2)

    def _normed_over_time(self, x: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        """Convolve waveforms and normalise over time.

        The mean and variance of each channel follow from those of the windows. So the weights are scaled instead of the
        outputs, which are 50 times as many: convolution, norm and GELU take half of the time.

        Args:
            x: (batch, 1, samples).
            statistics: Statistics of the whole recordings.

        Returns:
            (batch, channels, frames).
        """
        norm, waveform, dtype = self.norm, x[:, 0], x.dtype
        assert isinstance(norm, nn.GroupNorm)
        if self.conv.bias is not None and statistics is None:  # given statistics include the bias
            normed: Tensor = norm(self.conv(x))
            return normed
        level = waveform.mean(dim=1, keepdim=True) if statistics is None else statistics.mean[:, None].to(dtype)
        centred = waveform - level  # as the norm would do with the outputs
        windows = centred.unfold(1, KERNELS[0], STRIDES[0])  # (batch, frames, kernel)
        # Variances are differences, here of few numbers; float64 is also what autocast leaves alone
        exact = torch.float32 if waveform.device.type == "mps" else torch.float64
        weight = self.conv.weight[:, 0].to(exact)  # (channels, kernel)
        if statistics is None:
            rows = windows.to(exact)
            mean = rows.mean(dim=1)  # (batch, kernel)
            covariance = rows.transpose(1, 2) @ rows / rows.shape[1] - mean[:, :, None] * mean[:, None]
        else:
            mean, covariance = statistics.window_mean.to(exact), statistics.window_covariance.to(exact)
        variance = torch.einsum("ck,bkl,cl->bc", weight, covariance, weight).clamp(min=0)
        scale = norm.weight * (variance + norm.eps).rsqrt()  # (batch, channels)
        weight, shift = weight * scale[:, :, None], norm.bias - scale * (mean @ weight.T)
        return torch.baddbmm(shift[:, :, None].to(dtype), weight.to(dtype), windows.transpose(1, 2))


def layer_norm_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise over channels, and apply GELU.

    Args:
        x: (batch, frames, channels).
        weight: (channels,).
        bias: (channels,).

    Returns:
        (batch, frames, channels).
    """
    return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias))


def pieces_of(waveform: Tensor) -> Iterator[Tensor]:
    """Cut waveforms into pieces on the frame grid: the frames of the pieces, concatenated, are those of the whole.

    Args:
        waveform: (batch, samples).

    Yields:
        (batch, samples of the piece), which overlap.
    """
    frames = num_frames(waveform.shape[1])
    for first in range(0, frames, PIECE_FRAMES):
        yield waveform[:, first * HOP : first * HOP + num_samples(min(PIECE_FRAMES, frames - first))]


def normalize(waveform: Tensor, length: Tensor | None) -> Tensor:
    """Give each utterance zero mean and unit variance over its own samples, in float32; padding becomes 0.

    Args:
        waveform: (batch, samples).
        length: (batch,), samples before padding.

    Returns:
        (batch, samples).
    """
    x = waveform.float()
    if length is None:
        return F.layer_norm(x, x.shape[1:]).type_as(waveform)  # fairseq fairseq_dataset: layer_norm of the audio
    padding = padding_mask(length, x.shape[1])
    mean = x.masked_fill(padding, 0).sum(dim=1, keepdim=True) / length[:, None]
    centred = (x - mean).masked_fill(padding, 0)
    variance = centred.square().sum(dim=1, keepdim=True) / length[:, None]
    return (centred * (variance + 1e-5).rsqrt()).type_as(waveform)


def normalize_by(waveform: Tensor, whole: WaveformStatistics) -> tuple[Tensor, WaveformStatistics]:
    """Normalise parts of recordings by the mean and variance of the whole recordings.

    Args:
        waveform: (batch, samples).
        whole: Statistics of the whole recordings.

    Returns:
        (batch, samples), and the statistics of the normalised recordings.
    """
    scale = (whole.variance + 1e-5).rsqrt()[:, None]
    x = (waveform - whole.mean[:, None]) * scale
    windows = whole.window_mean * scale, whole.window_covariance * scale[..., None].square()
    mean, variance = torch.zeros_like(whole.mean), torch.ones_like(whole.variance)
    return x.type_as(waveform), WaveformStatistics(mean, variance, *windows)


def check_length(waveform: Tensor, length: Tensor | None) -> None:
    """Check that each utterance has a frame, and no more samples than the batch.

    Args:
        waveform: (batch, samples).
        length: (batch,), samples before padding; not checked on a GPU, which would have to be waited for.

    Raises:
        UserError: An utterance is too short, or its length exceeds the batch.
    """
    longest = waveform.shape[1]
    if longest < WINDOW:
        raise UserError(f"{longest} samples are shorter than one frame of {WINDOW}; leave such utterances out")
    if length is None or length.device.type != "cpu" or torch.compiler.is_exporting():
        return
    for row, samples in enumerate(length.tolist()):
        if not WINDOW <= samples <= longest:
            raise UserError(
                f"row {row} has length {samples}; give a length from {WINDOW} to {longest}, the samples of the batch"
            )
