"""The convolutions from samples to frames (wav2vec 2.0 §2): seven of them, with a frame per 20 ms, in every paper."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_lightning.errors import UserError
from hubert_lightning.frames import Clock, num_frames, num_samples, padding_mask
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.devices import without_waiting
from hubert_lightning.model.products import strided_convolution
from hubert_lightning.model.windows import WaveformStatistics, WindowLayout, normed_over_time, windows_convolved

__all__ = ["WaveformStatistics"]

PIECE_SAMPLES = 480_000  # 30 s, convolved at once where the statistics of norms over time are given


class Convolutions(nn.ModuleList):
    """The convolutions in sequence.

    They are matrix products over activations whose channels lie side by side in memory, so nothing is transposed. Each
    utterance has a frame more than it needs: then all lengths are divided without a remainder, and the rows of a batch
    are those of one matrix.

    Args:
        config: Size of the encoder.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(Convolution(config, index) for index in range(len(config.conv_kernels)))
        self.clock = config.clock

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
        x = waveform
        for convolution in self:
            x = convolution(x, length, statistics)
        return x[:, : num_frames(waveform.shape[1], self.clock)]


class Convolution(nn.Module):
    """One of the convolutions: strided convolution, norm, GELU."""

    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__()
        channels, self.stride = config.conv_channels, config.conv_strides[index]
        kernel = config.conv_kernels[index]
        self.conv = nn.Conv1d(1 if index == 0 else channels, channels, kernel, self.stride, bias=config.conv_bias)
        self.layout = WindowLayout.of(config)
        self.layer_norm_gelu: Callable[[Tensor, Tensor, Tensor], Tensor] = layer_norm_gelu
        self.norm: nn.Module = nn.Identity()
        if config.conv_norm == "layer":
            self.norm = nn.LayerNorm(channels)
        elif index == 0:
            self.norm = nn.GroupNorm(channels, channels)

    def forward(self, x: Tensor, length: Tensor | None = None, statistics: WaveformStatistics | None = None) -> Tensor:
        """Convolve and normalise.

        Args:
            x: (batch, frames, channels); (batch, samples) for the first convolution.
            length: (batch,), samples of the waveforms; the group norm then ignores frames whose window has padding.
            statistics: Statistics of the whole recordings, for the group norm.

        Returns:
            (batch, fewer frames, channels). Frames that the convolutions after it do not need have no meaning.
        """
        conv, norm = self.conv, self.norm
        if isinstance(norm, nn.GroupNorm):
            return F.gelu(normed_over_time(x, conv.weight, conv.bias, norm, length, statistics, self.layout))
        if x.dim() == 2:
            x = windows_convolved(x, conv.weight, conv.bias, self.layout)
        else:
            x = strided_convolution(x, conv.weight, conv.bias, self.stride)
        return self.layer_norm_gelu(x, norm.weight, norm.bias) if isinstance(norm, nn.LayerNorm) else F.gelu(x)


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


def pieces_of(waveform: Tensor, clock: Clock) -> Iterator[Tensor]:
    """Cut waveforms into pieces on the frame grid: the frames of the pieces, concatenated, are those of the whole.

    Args:
        waveform: (batch, samples).
        clock: Clock of the convolutions.

    Yields:
        (batch, samples of the piece), which overlap.
    """
    frames, most = num_frames(waveform.shape[1], clock), PIECE_SAMPLES // clock.hop
    for first in range(0, frames, most):
        start = first * clock.hop
        yield waveform[:, start : start + num_samples(min(most, frames - first), clock)]


def normalize(waveform: Tensor, length: Tensor | None, epsilon: float = 1e-5) -> Tensor:
    """Give each utterance zero mean and unit variance over its own samples, in float32; padding becomes 0.

    Args:
        waveform: (batch, samples).
        length: (batch,), samples before padding.
        epsilon: Number that is added to the variance.

    Returns:
        (batch, samples).
    """
    x = waveform.float()
    if length is None:
        return F.layer_norm(x, x.shape[1:], eps=epsilon).type_as(
            waveform
        )  # fairseq fairseq_dataset: layer_norm of the audio
    length = without_waiting(length, x.device)
    padding = padding_mask(length, x.shape[1])
    mean = x.masked_fill(padding, 0).sum(dim=1, keepdim=True) / length[:, None]
    centred = (x - mean).masked_fill(padding, 0)
    variance = centred.square().sum(dim=1, keepdim=True) / length[:, None]
    return (centred * (variance + epsilon).rsqrt()).type_as(waveform)


def normalize_by(
    waveform: Tensor, whole: WaveformStatistics, epsilon: float = 1e-5
) -> tuple[Tensor, WaveformStatistics]:
    """Normalise parts of recordings by the mean and variance of the whole recordings.

    Args:
        waveform: (batch, samples).
        whole: Statistics of the whole recordings.
        epsilon: Number that is added to the variance.

    Returns:
        (batch, samples), and the statistics of the normalised recordings.
    """
    scale = (whole.variance + epsilon).rsqrt()[:, None]
    x = (waveform - whole.mean[:, None]) * scale
    windows = whole.window_mean * scale, whole.window_covariance * scale[..., None].square()
    mean, variance = torch.zeros_like(whole.mean), torch.ones_like(whole.variance)
    return x.type_as(waveform), WaveformStatistics(mean, variance, *windows)


def check_length(waveform: Tensor, length: Tensor | None, window: int) -> None:
    """Check that each utterance has a frame, and no more samples than the batch.

    Args:
        waveform: (batch, samples).
        length: (batch,), samples before padding; not checked on a GPU, which would have to be waited for.
        window: Samples of a frame.

    Raises:
        UserError: An utterance is too short, or its length exceeds the batch.
    """
    longest = waveform.shape[1]
    if longest < window:
        raise UserError(f"{longest} samples are shorter than one frame of {window}; leave such utterances out")
    if length is None or length.device.type != "cpu" or torch.compiler.is_exporting():
        return
    for row, samples in enumerate(length.tolist()):
        if not window <= samples <= longest:
            raise UserError(
                f"row {row} has length {samples}; give a length from {window} to {longest}, the samples of the batch"
            )
