"""The encoder: waveform → seven convolutions → Transformer, one vector per 20 ms (HuBERT §II-A, wav2vec 2.0 §2).

Values, gradients and initialisation are those of the reference code (tests/test_hubert.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hubert_lightning.frames import HOP, WINDOW, num_frames, num_samples, padding_mask
from hubert_lightning.model.dropout import Dropout, attend_to, without_effect

KERNELS = (10, 3, 3, 3, 3, 2, 2)  # together they see WINDOW samples
STRIDES = (5, 2, 2, 2, 2, 2, 2)  # and move by HOP samples: the clock, not an option
LARGEST, MOST_PARAMETERS = 2**20, 10**11  # beyond which a size is a slip of the pen
PIECE = 1_500  # frames, 30 s, that are convolved at once where norms over time are given


@dataclass(frozen=True)
class EncoderConfig:
    """Size and regularisation of an encoder. Defaults: HuBERT Base.

    Args:
        conv_channels: Channels of the seven convolutions.
        conv_norm: "group" normalises each channel of the first convolution over time (Base); "layer" normalises the
            channels of every convolution at each frame (Large and XLarge), so that padding changes nothing.
        conv_bias: Give the convolutions a bias.
        dim: Width of the Transformer.
        num_layers: Transformer layers.
        num_heads: Attention heads.
        ffn_dim: Width of the feed-forward layers.
        pre_norm: Normalise before attention and feed-forward (Large and XLarge), not after them (Base).
        pos_kernel: Frames that the positional convolution sees.
        pos_groups: Groups of channels that the positional convolution keeps apart.
        normalize_waveform: Give each utterance zero mean and unit variance (Large and XLarge).
        dropout: Of what attention and feed-forward add, and of the Transformer's input.
        attention_dropout: Of the attention weights.
        activation_dropout: After the activation of the feed-forward layers.
        input_dropout: Of the projected convolution output.
        layer_drop: Chance of a layer to be left out of a training step.
        feature_grad_mult: Scales the gradient that reaches the convolutions; 0 freezes them.
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
    normalize_waveform: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    input_dropout: float = 0.1
    layer_drop: float = 0.05
    feature_grad_mult: float = 0.1

    def __post_init__(self) -> None:
        for name in ("conv_channels", "dim", "num_layers", "num_heads", "ffn_dim", "pos_kernel", "pos_groups"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; an encoder needs at least 1, and {LARGEST} are more than it can "
                    "have"
                )
        for name in ("dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a probability, at least 0 and below 1")
        for name in ("num_heads", "pos_groups"):
            if self.dim % getattr(self, name):
                raise ValueError(f"dim {self.dim} is not divisible by {name} {getattr(self, name)}; change one of them")
        if self.conv_norm not in ("group", "layer"):
            raise ValueError(f"conv_norm is {self.conv_norm!r}; choose 'group' or 'layer'")
        if not 0 <= self.feature_grad_mult < float("inf"):
            raise ValueError(f"feature_grad_mult is {self.feature_grad_mult}; it is 0 (frozen convolutions) or more")
        parameters = self.num_layers * self.dim * (4 * self.dim + 2 * self.ffn_dim) + 17 * self.conv_channels**2
        if parameters > MOST_PARAMETERS:
            raise ValueError(
                f"dim {self.dim}, num_layers {self.num_layers}, ffn_dim {self.ffn_dim} and conv_channels "
                f"{self.conv_channels} make {parameters / 1e9:.0f} billion parameters; lower one of them"
            )


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


class HubertEncoder(nn.Module):
    """Contextual features of 16 kHz audio, one frame per 20 ms."""

    def __init__(self, config: EncoderConfig = EncoderConfig()) -> None:
        super().__init__()
        self.config = config
        self.convolutions = Convolutions(Convolution(config, index) for index in range(len(KERNELS)))
        self.local_norm = nn.LayerNorm(config.conv_channels)
        self.projection = nn.Linear(config.conv_channels, config.dim)
        self.input_dropout = Dropout(config.input_dropout)
        self.mask_embedding = nn.Parameter(torch.empty(config.dim))
        self.positions = PositionalConvolution(config)
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.checkpointing = False
        """Whether a step computes each layer again in its backward pass, instead of keeping what it needs in memory."""
        self.initialize()
        if config.feature_grad_mult == 0:
            self.convolutions.requires_grad_(False)

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights, drawn as fairseq draws them.

        convolutions            Kaiming normal
        positional convolution  N(0, sqrt(4 / (kernel · dim))), bias 0
        Transformer linears     N(0, 0.02), bias 0
        mask embedding          U(0, 1)
        all else                torch's own: projection U(±1 / sqrt(conv_channels)), norms 1 and 0
        """
        for module in self.convolutions.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)
        position = self.positions.conv
        std = (4 / (self.config.pos_kernel * self.config.dim)) ** 0.5
        position.weight = nn.init.normal_(torch.empty_like(position.weight), std=std)
        nn.init.zeros_(position.bias)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.uniform_(self.mask_embedding)

    def forward(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        kept: Sequence[bool] | None = None,
        *,
        alone: bool = False,
    ) -> Tensor:
        """Features of the last layer.

        waveform:     (batch, samples)
        length:       (batch,), samples before padding; none if nothing is padded, which is faster
        mask:         (batch, frames) bool, frames to replace by the mask embedding
        channel_mask: (batch, dim) bool, channels to zero in all frames
        kept:         (layers,), whether each layer is computed; drawn anew in training if not given
        alone:        keep padding out of the group norm of Base, where it counts in the reference
        returns:      (batch, frames, dim); of frames that are padding, of no meaning
        """
        local = self.local_features(waveform, length, alone=alone)
        return self.contextual(local, None if length is None else num_frames(length), mask, channel_mask, kept)

    def features(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        *,
        layer: int,
        alone: bool = False,
        statistics: Statistics | None = None,
    ) -> Tensor:
        """Output of one Transformer layer, counted from 1; later layers are not computed.

        It is the residual stream after the layer: with `pre_norm`, before any norm, for the last layer too.

        waveform:   (batch, samples)
        length:     (batch,), samples before padding
        alone:      each utterance has the features that it would have without the others; otherwise the padding counts
            in the group norm of Base, as in the reference
        statistics: of the recordings that the waveforms are parts of, by which they are normalised
        returns:    (batch, frames, dim)
        """
        self.check_layer(layer)
        x, attend = self._embed(waveform, length, alone, statistics)
        for block in self.layers[:layer]:
            x = block(x, attend)
        return x

    def check_layer(self, layer: int) -> None:
        if not 1 <= layer <= len(self.layers):
            raise ValueError(f"layer {layer} of an encoder of {len(self.layers)} layers; they count from 1")

    def all_layers(self, waveform: Tensor, length: Tensor | None = None, *, alone: bool = False) -> list[Tensor]:
        """What `features` returns for layer 1, 2, …, computed once."""
        x, attend = self._embed(waveform, length, alone)
        outputs = []
        for block in self.layers:
            x = block(x, attend)
            outputs.append(x)
        return outputs

    def local_features(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        *,
        alone: bool = False,
        statistics: Statistics | None = None,
    ) -> Tensor:
        """Output of the convolutions, on which the feature penalty is computed.

        waveform:   (batch, samples)
        length:     (batch,), samples before padding
        alone:      keep padding out of the group norm
        statistics: of the recordings that the waveforms are parts of, by which they are normalised
        returns:    (batch, frames, conv_channels)
        """
        _check_length(waveform, length)
        x = waveform
        if self.config.normalize_waveform and statistics is not None:
            x, statistics = _normalize_by(waveform, statistics)
        elif self.config.normalize_waveform:
            x = _normalize(waveform, length)
        if statistics is None:
            x = self.convolutions(x, length if alone else None)
        else:  # in pieces, which take little memory: no norm looks beyond them
            x = torch.cat([self.convolutions(piece, None, statistics) for piece in _pieces(x)], dim=1)
        scale = self.config.feature_grad_mult
        if x.requires_grad and scale != 1:
            x.register_hook(lambda gradient: gradient * scale)
        return x

    def contextual(
        self,
        local: Tensor,
        num_frames: Tensor | None = None,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        kept: Sequence[bool] | None = None,
    ) -> Tensor:
        """Output of the last layer for the output of the convolutions.

        local:        (batch, frames, conv_channels)
        num_frames:   (batch,), frames before padding; none if nothing is padded
        mask:         (batch, frames) bool, frames to replace by the mask embedding
        channel_mask: (batch, dim) bool, channels to zero in all frames
        kept:         (layers,), whether each layer is computed; drawn anew in training if not given
        returns:      (batch, frames, dim)
        """
        x, attend = self._transformer_input(local, num_frames, mask, channel_mask)
        for layer, keep in zip(self.layers, self.draw_kept() if kept is None else kept, strict=True):
            if not keep:
                x = without_effect(x, layer)
            elif self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, attend, use_reentrant=False)
            else:
                x = layer(x, attend)
        return self.norm(x) if self.config.pre_norm else x

    def compile_parts(self) -> None:
        """Let torch compile what follows each convolution, the positional one, and one layer, whose code the others
        share; takes a minute or so, and again for a second length, from which on any will do."""
        compiled = torch.compile(_layer_norm_gelu)
        for convolution in self.convolutions:
            assert isinstance(convolution, Convolution)
            convolution.layer_norm_gelu = compiled
        for part in (self.positions, *self.layers):
            part.compile()

    def draw_kept(self, generator: torch.Generator | None = None) -> list[bool]:
        """Which layers a step computes, (layers,): in training, each is dropped with the chance `layer_drop`."""
        if not self.training or torch.compiler.is_exporting():
            return [True] * len(self.layers)
        # On the CPU, where reading the draw does not wait for a GPU
        return (torch.rand(len(self.layers), generator=generator) >= self.config.layer_drop).tolist()

    def _embed(
        self, waveform: Tensor, length: Tensor | None, alone: bool, statistics: Statistics | None = None
    ) -> tuple[Tensor, Tensor | None]:
        local = self.local_features(waveform, length, alone=alone, statistics=statistics)
        return self._transformer_input(local, None if length is None else num_frames(length))

    def _transformer_input(
        self,
        local: Tensor,
        num_frames: Tensor | None,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What enters layer 1, (batch, frames, dim), and which frames it may attend to, (batch, 1, 1, frames)."""
        x = self.input_dropout(self.projection(self.local_norm(local)))
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_embedding.to(x.dtype), x)
        if channel_mask is not None:
            x = x.masked_fill(channel_mask[:, None], 0)
        attend = None
        if num_frames is not None:
            padding = padding_mask(num_frames, local.shape[1])
            x = x.masked_fill(padding[..., None], 0)
            attend = ~padding[:, None, None]
        x = x + self.positions(x)
        return self.dropout(x if self.config.pre_norm else self.norm(x)), attend


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


class PositionalConvolution(nn.Module):
    """Relative positions: a grouped convolution over the frames around each frame (wav2vec 2.0 §2)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        conv = nn.Conv1d(
            config.dim, config.dim, config.pos_kernel, padding=config.pos_kernel // 2, groups=config.pos_groups
        )
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)  # one gain for each position

    def __getstate__(self) -> dict[str, Any]:
        """Without the class that torch made for the weight norm, which cannot be pickled."""
        conv, parameters = self.conv, dict(self.conv.named_parameters())
        made = {name: getattr(conv, name) for name in ("in_channels", "kernel_size", "padding", "groups")}
        rest = {name: value for name, value in self.__dict__.items() if name != "_modules"}
        return {"rest": rest, "made": made, "parameters": parameters, "training": conv.training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["rest"], _modules={})
        channels = state["made"].pop("in_channels")
        conv = nn.utils.skip_init(nn.Conv1d, channels, channels, **state["made"])
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2).train(state["training"])
        for name, value in state["parameters"].items():
            owner, _, last = name.rpartition(".")
            setattr(self.conv.get_submodule(owner), last, value)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frames, dim) → (batch, frames, dim)"""
        frames = x.shape[1]
        # An even kernel makes one frame too many, the last
        return F.gelu(self._convolved(x.transpose(1, 2))[..., :frames].transpose(1, 2))

    def _convolved(self, x: Tensor) -> Tensor:
        conv = self.conv
        if x.device.type != "cpu":
            return conv(x)
        reduced = torch.is_autocast_enabled("cpu") or x.dtype == torch.bfloat16
        if not reduced or conv.in_channels // conv.groups >= 16:
            # As an image of height 1, whose channels lie side by side in memory, it takes half of the time
            weight = conv.weight[:, :, None].contiguous(memory_format=torch.channels_last)
            padding = (0, *conv.padding)
            return F.conv2d(x[:, :, None], weight, conv.bias, padding=padding, groups=conv.groups)[:, :, 0]
        # torch 2.13 on processors with AMX: in bfloat16, narrower groups come out as something else altogether
        with torch.autocast("cpu", enabled=False):
            weight, bias = conv.weight.float(), conv.bias.float()
            return F.conv1d(x.float(), weight, bias, padding=conv.padding, groups=conv.groups).type_as(x)


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with its norm before or after it and a residual around it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads, self.pre_norm = config.num_heads, config.pre_norm
        self.query_key_value = nn.Linear(config.dim, 3 * config.dim)
        self.attention_output = nn.Linear(config.dim, config.dim)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_input = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_output = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.attention_dropout = config.attention_dropout
        self.activation_dropout = Dropout(config.activation_dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Tensor | None) -> Tensor:
        """(batch, frames, dim) → (batch, frames, dim), attending where `attend` (batch, 1, 1, frames) is true"""
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x), attend)
            return x + self.feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self.attention(x, attend))
        return self.ffn_norm(x + self.feed_forward(x))

    def attention(self, x: Tensor, attend: Tensor | None) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))  # (batch, frames, 3, heads, head dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, frames, head dim)
        x = attend_to(query, key, value, attend, self.attention_dropout if self.training else 0.0)
        return self.dropout(self.attention_output(x.transpose(1, 2).flatten(2)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.ffn_output(self.activation_dropout(F.gelu(self.ffn_input(x)))))


def _pieces(waveform: Tensor) -> Iterator[Tensor]:
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
        raise ValueError(f"{longest} samples are shorter than one frame of {WINDOW}; leave such utterances out")
    if length is None or length.device.type != "cpu" or torch.compiler.is_exporting():  # a GPU's would be waited for
        return
    for row, samples in enumerate(length.tolist()):
        if not WINDOW <= samples <= longest:
            raise ValueError(
                f"row {row} has length {samples}; it is from {WINDOW} to {longest}, the samples of the batch"
            )
