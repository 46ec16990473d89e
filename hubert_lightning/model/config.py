"""Size and regularisation of the encoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hubert_lightning.errors import UserError
from hubert_lightning.frames import HOPS, WINDOW, Clock

KERNELS = (10, 3, 3, 3, 3, 2, 2)
STRIDES = (5, 2, 2, 2, 2, 2, 2)
"""Kernels and strides of the seven convolutions of HuBERT: a frame of 25 ms every 20 ms."""
MAX_SIZE, MAX_PARAMETERS = 2**20, 10**11  # a larger size is a typing error


@dataclass(frozen=True)
class EncoderConfig:
    """Size and regularisation of an encoder. Defaults: HuBERT Base.

    Args:
        conv_channels: Channels of the convolutions.
        conv_norm: "group" normalises each channel of the first convolution over time (Base); "layer" normalises the
            channels of every convolution at each frame (Large and XLarge), so that padding changes nothing.
        conv_bias: Whether the convolutions have a bias.
        dim: Width of the Transformer.
        num_layers: Transformer layers.
        num_heads: Attention heads.
        ffn_dim: Width of the feed-forward layers.
        pre_norm: Whether norms come before attention and feed-forward (Large and XLarge) or after them (Base).
        pos_kernel: Frames under the kernel of the positional convolution.
        pos_groups: Channel groups of the positional convolution.
        pos_batch_norm: Whether a batch norm comes before the positional convolution, in place of the norm of its
            weights, as in mHuBERT of 25 Hz. Its statistics stay those of the weights that training starts from; a new
            model has mean 0 and variance 1.
        normalize_waveform: Whether each utterance gets zero mean and unit variance (Large and XLarge).
        dropout: Dropout of the outputs of attention and feed-forward, and of the Transformer's input.
        attention_dropout: Dropout of the attention weights.
        activation_dropout: Dropout after the activation of the feed-forward layers.
        input_dropout: Dropout of the projected convolution output.
        layer_drop: Probability that a training step skips a layer.
        feature_grad_mult: Factor of the gradient that reaches the convolutions; 0 freezes them.
        position_buckets: Buckets of distances between frames, whose gated scores are added to those of attention, 320
            in WavLM; 0 for none, as in HuBERT.
        position_distance: Distance in frames from which on all distances share a bucket.
        conv_kernels: Samples, or frames of the convolution before it, under the kernel of each convolution.
        conv_strides: Stride of each convolution. Their product is the samples from one frame to the next: 320 (50
            frames a second) or 640 (25 frames a second).
    """

    conv_channels: int = 512
    conv_norm: Literal["group", "layer"] = "group"
    conv_bias: bool = False
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    pre_norm: bool = False
    pos_kernel: int = 128
    pos_groups: int = 16
    pos_batch_norm: bool = False
    normalize_waveform: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    input_dropout: float = 0.1
    layer_drop: float = 0.05
    feature_grad_mult: float = 0.1
    position_buckets: int = 0
    position_distance: int = 800
    conv_kernels: tuple[int, ...] = KERNELS
    conv_strides: tuple[int, ...] = STRIDES

    def __post_init__(self) -> None:
        for name in ("conv_channels", "dim", "num_layers", "num_heads", "ffn_dim", "pos_kernel", "pos_groups"):
            if not 1 <= getattr(self, name) <= MAX_SIZE:
                raise UserError(f"{name} is {getattr(self, name)}; give a number from 1 to {MAX_SIZE}")
        for name in ("dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is a probability, at least 0 and below 1")
        for name in ("num_heads", "pos_groups"):
            if self.dim % getattr(self, name):
                raise UserError(f"dim {self.dim} is not divisible by {name} {getattr(self, name)}; change one of them")
        if self.conv_norm not in ("group", "layer"):
            raise UserError(f"conv_norm is {self.conv_norm!r}; choose 'group' or 'layer'")
        if not 0 <= self.feature_grad_mult < float("inf"):
            raise UserError(f"feature_grad_mult is {self.feature_grad_mult}; it is 0 (frozen convolutions) or more")
        buckets, distance = self.position_buckets, self.position_distance
        if buckets and (not 4 <= buckets <= MAX_SIZE or buckets % 4):
            raise UserError(f"position_buckets is {buckets}; give a multiple of 4, 320 in WavLM, or 0 for none")
        if distance < 0 or (buckets and not buckets // 4 < distance <= MAX_SIZE):
            raise UserError(
                f"position_distance is {distance} for {buckets} position_buckets; give more than {buckets // 4} "
                "frames, 800 in WavLM"
            )
        if buckets and self.pos_batch_norm:
            raise UserError(
                f"pos_batch_norm with {buckets} position_buckets: no system has both; leave one of them out"
            )
        for name in ("conv_kernels", "conv_strides"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or not all(type(value) is int for value in values):
                raise UserError(f"{name} is {values!r:.40}; give a list of whole numbers, one for each convolution")
            object.__setattr__(self, name, tuple(values))  # a list where JSON or YAML held it
        check_convolutions(self.conv_kernels, self.conv_strides)
        parameters = self.num_layers * self.dim * (4 * self.dim + 2 * self.ffn_dim)
        parameters += (1 + sum(self.conv_kernels[1:])) * self.conv_channels**2
        if parameters > MAX_PARAMETERS:
            raise UserError(
                f"dim {self.dim}, num_layers {self.num_layers}, ffn_dim {self.ffn_dim} and conv_channels "
                f"{self.conv_channels} make {parameters / 1e9:.0f} billion parameters; lower one of them"
            )

    @property
    def clock(self) -> Clock:
        """Window and hop of the frames."""
        return clock_of(self.conv_kernels, self.conv_strides)


def clock_of(kernels: Sequence[int], strides: Sequence[int]) -> Clock:
    """Compute the window and the hop, in samples, of convolutions in sequence."""
    hop, window = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        window += (kernel - 1) * hop
        hop *= stride
    return Clock(hop, window)


def check_convolutions(kernels: Sequence[int], strides: Sequence[int]) -> None:
    """Check kernels and strides of convolutions.

    Raises:
        UserError: Their numbers differ, a kernel skips samples, or labels could not follow the frames.
    """
    if len(kernels) != len(strides) or not kernels:
        raise UserError(
            f"{len(kernels)} conv_kernels and {len(strides)} conv_strides; give one of each for every convolution"
        )
    if not all(1 <= stride <= kernel <= MAX_SIZE for kernel, stride in zip(kernels, strides, strict=True)):
        raise UserError(
            f"conv_kernels {list(kernels)} with conv_strides {list(strides)}: a kernel shorter than its stride skips "
            "what lies between; give kernels at least as long as their strides, which are 1 or more"
        )
    if (hop := math.prod(strides)) not in HOPS:
        raise UserError(
            f"conv_strides {list(strides)} move by {hop} samples; give strides whose product is {HOPS[0]} (50 frames a "
            f"second) or {HOPS[1]} (25 frames a second), since labels have these rates"
        )
    if (window := clock_of(kernels, strides).window) < WINDOW:
        raise UserError(
            f"conv_kernels {list(kernels)} with conv_strides {list(strides)} see {window} samples, less than the "
            f"{WINDOW} of the MFCCs that the first labels are made of; give larger kernels"
        )
