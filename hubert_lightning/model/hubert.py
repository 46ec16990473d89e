"""The encoder: waveform → seven convolutions → Transformer, one vector per 20 ms (HuBERT §II-A, wav2vec 2.0 §2).

Values, gradients and initialisation are those of the reference code (tests/model/test_hubert.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hubert_lightning.errors import UserError
from hubert_lightning.frames import num_frames, padding_mask
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.convolutions import (
    KERNELS,
    Convolution,
    Convolutions,
    Statistics,
    _check_length,
    _layer_norm_gelu,
    _normalize,
    _normalize_by,
    pieces_of,
)
from hubert_lightning.model.dropout import Dropout, attend_to, without_effect


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
            raise UserError(f"layer {layer} of an encoder of {len(self.layers)} layers; they count from 1")

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
            x = torch.cat([self.convolutions(piece, None, statistics) for piece in pieces_of(x)], dim=1)
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
