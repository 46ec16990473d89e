"""The encoder: waveform → convolutions → Transformer, one vector per frame of 20 ms (HuBERT §II-A, wav2vec 2.0 §2).

Values, gradients and initialisation are those of the reference code (tests/model/test_hubert.py).
"""

import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hubert_lightning.errors import UserError
from hubert_lightning.frames import num_frames, padding_mask
from hubert_lightning.hub import HubModel, ModelParts
from hubert_lightning.model.compilation import call_compiled, compilable, compile_methods
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.convolutions import (
    Convolution,
    Convolutions,
    WaveformStatistics,
    check_length,
    layer_norm_gelu,
    normalize,
    normalize_by,
    pieces_of,
)
from hubert_lightning.model.devices import without_waiting
from hubert_lightning.model.dropout import Dropout, attend_to, attention_bias, without_effect
from hubert_lightning.model.positions import PositionalConvolution
from hubert_lightning.model.products import Linear
from hubert_lightning.model.relative_positions import PositionGate, RelativePositions

__all__ = ["HubertEncoder", "PositionalConvolution", "TransformerLayer", "accepts_alone"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def accepts_alone(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Accept `alone`, the former name of `ignore_padding`, for one version, with a warning."""

    @wraps(method)
    def renamed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if "alone" in kwargs:
            message = "alone is now ignore_padding; the next version refuses alone"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            kwargs["ignore_padding"] = kwargs.pop("alone")
        return method(*args, **kwargs)

    return renamed


class HubertEncoder(nn.Module, HubModel):
    """Contextual features of 16 kHz audio, one frame per 20 ms, or as `config.clock` has it."""

    def __init__(self, config: EncoderConfig = EncoderConfig()) -> None:
        super().__init__()
        self.config = config
        self.convolutions = Convolutions(config)
        self.local_norm = nn.LayerNorm(config.conv_channels)
        self.projection = Linear(config.conv_channels, config.dim)
        self.input_dropout = Dropout(config.input_dropout)
        self.mask_embedding = nn.Parameter(torch.empty(config.dim))
        self.positions = PositionalConvolution(config)
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.relative_positions = RelativePositions(config) if config.position_buckets else None
        self.checkpointing = False
        """Whether the backward pass computes each layer again, which saves memory."""
        self.initialize()
        if config.feature_grad_mult == 0:
            self.convolutions.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, model: Path | str) -> "HubertEncoder":
        """Load a pre-trained encoder in eval mode, on the CPU.

        Args:
            model: Folder of `save_pretrained`, name on the Hugging Face hub, or any other model.

        Raises:
            UserError: The file is missing, corrupt or unsafe, or holds no HuBERT.
        """
        from hubert_lightning import load_hubert

        return load_hubert(model)

    def model_parts(self) -> ModelParts:
        """Return what the folder of the model holds."""
        return ModelParts(self)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw fresh weights as fairseq does.

        convolutions            Kaiming normal
        positional convolution  N(0, sqrt(4 / (kernel · dim))), bias 0
        Transformer linears     N(0, 0.02), bias 0
        relative positions      N(0, 0.02)
        mask embedding          U(0, 1)
        everything else         torch's own: projection U(±1 / sqrt(conv_channels)), norms 1 and 0
        """
        for module in self.convolutions.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)
        position = self.positions.conv
        std = (4 / (self.config.pos_kernel * self.config.dim)) ** 0.5
        weight = nn.init.normal_(torch.empty_like(position.weight), std=std)
        position.weight = nn.Parameter(weight) if self.config.pos_batch_norm else weight
        nn.init.zeros_(position.bias)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.relative_positions is not None:
            nn.init.normal_(self.relative_positions.embedding.weight, std=0.02)
        nn.init.uniform_(self.mask_embedding)

    @accepts_alone
    def forward(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        kept: Sequence[bool] | None = None,
        *,
        ignore_padding: bool = False,
    ) -> Tensor:
        """Compute the features of the last layer.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding; None if nothing is padded, which is faster.
            mask: (batch, frames) bool, frames to replace by the mask embedding.
            channel_mask: (batch, dim) bool, channels to set to zero in all frames.
            kept: (layers,), whether each layer is computed; drawn in training if not given.
            ignore_padding: Whether the group norm of Base and the batch norm of positions ignore padding; in the
                reference, they include padding.

        Returns:
            (batch, frames, dim); frames of padding have no meaning.
        """
        local = self.local_features(waveform, length, ignore_padding=ignore_padding)
        return self.contextual(local, self._num_frames(length), mask, channel_mask, kept, ignore_padding=ignore_padding)

    @accepts_alone
    def features(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        *,
        layer: int,
        ignore_padding: bool = False,
        statistics: WaveformStatistics | None = None,
    ) -> Tensor:
        """Compute the output of one Transformer layer; later layers are not computed.

        The output is the residual stream after the layer. With `pre_norm`, no norm is applied to it, not even
        after the last layer.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding.
            layer: Number of the layer, counted from 1.
            ignore_padding: Whether the features of an utterance are the same as in a batch of one; otherwise the group
                norm of Base and the batch norm of positions include padding, as in the reference.
            statistics: Statistics of the recordings that the waveforms are parts of, for the norms over time.

        Returns:
            (batch, frames, dim).

        Raises:
            UserError: The encoder has no such layer, or an utterance is shorter than a frame.
        """
        return self.features_of_layers(
            waveform, length, layers=[layer], ignore_padding=ignore_padding, statistics=statistics
        )[0]

    def features_of_layers(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        *,
        layers: Sequence[int],
        ignore_padding: bool = False,
        statistics: WaveformStatistics | None = None,
    ) -> list[Tensor]:
        """Compute the outputs of several Transformer layers in one pass, as `features`.

        Args:
            waveform, length, ignore_padding, statistics: As of `features`.
            layers: Numbers of the layers, counted from 1.

        Returns:
            (batch, frames, dim) of each layer, in the order of `layers`.

        Raises:
            UserError: The encoder lacks a layer, or an utterance is shorter than a frame.
        """
        for layer in layers:
            self.check_layer(layer)
        x, bias, positions = self._embed(waveform, length, ignore_padding, statistics)
        outputs = {}  # of these layers alone
        for number, block in enumerate(self.layers[: max(layers)], start=1):
            x = block(x, bias, positions)
            if number in layers:
                outputs[number] = x
        return [outputs[layer] for layer in layers]

    def check_layer(self, layer: int) -> None:
        """Check that the encoder has a layer.

        Raises:
            UserError: The number is below 1, or above the number of layers.
        """
        if not 1 <= layer <= len(self.layers):
            raise UserError(f"layer {layer} of an encoder of {len(self.layers)} layers; they count from 1")

    @accepts_alone
    def all_layers(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        *,
        ignore_padding: bool = False,
        with_input: bool = False,
    ) -> list[Tensor]:
        """Compute the features of every layer in one pass.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding.
            ignore_padding: Whether the features of an utterance are the same as in a batch of one.
            with_input: Whether the input of the first layer, "layer 0", comes before the layers (HuBERT fig. 2).

        Returns:
            (batch, frames, dim) for each layer, as `features` returns it.
        """
        x, bias, positions = self._embed(waveform, length, ignore_padding)
        outputs = [x] if with_input else []
        for block in self.layers:
            x = block(x, bias, positions)
            outputs.append(x)
        return outputs

    def local_features(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        *,
        ignore_padding: bool = False,
        statistics: WaveformStatistics | None = None,
    ) -> Tensor:
        """Compute the output of the convolutions, which the feature penalty is computed on.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding.
            ignore_padding: Whether the group norm ignores padding.
            statistics: Statistics of the recordings that the waveforms are parts of, for the norms over time.

        Returns:
            (batch, frames, conv_channels).

        Raises:
            UserError: An utterance is shorter than a frame, or `length` exceeds the batch.
        """
        check_length(waveform, length, self.config.clock.window)
        x = waveform
        if self.config.normalize_waveform and statistics is not None:
            x, statistics = normalize_by(waveform, statistics)
        elif self.config.normalize_waveform:
            x = normalize(waveform, length)
        if statistics is None:
            x = self.convolutions(x, length if ignore_padding else None)
        else:  # pieces take less memory, and no norm crosses their edges
            x = torch.cat(
                [self.convolutions(piece, None, statistics) for piece in pieces_of(x, self.config.clock)], dim=1
            )
        scale = self.config.feature_grad_mult
        if x.requires_grad and scale != 1:
            x.register_hook(lambda gradient: gradient * scale)  # type: ignore[no-untyped-call, unused-ignore]
        return x

    def contextual(
        self,
        local: Tensor,
        num_frames: Tensor | None = None,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        kept: Sequence[bool] | None = None,
        *,
        ignore_padding: bool = False,
    ) -> Tensor:
        """Compute the output of the last layer from the output of the convolutions.

        Args:
            local: (batch, frames, conv_channels).
            num_frames: (batch,), frames before padding; None if nothing is padded.
            mask: (batch, frames) bool, frames to replace by the mask embedding.
            channel_mask: (batch, dim) bool, channels to set to zero in all frames.
            kept: (layers,), whether each layer is computed; drawn in training if not given.
            ignore_padding: Whether the batch norm of positions ignores padding.

        Returns:
            (batch, frames, dim).
        """
        layers = self.contextual_layers(local, num_frames, mask, channel_mask, kept, ignore_padding=ignore_padding)
        return layers[-1]

    def contextual_layers(
        self,
        local: Tensor,
        num_frames: Tensor | None = None,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        kept: Sequence[bool] | None = None,
        intermediate: Collection[int] = (),
        *,
        ignore_padding: bool = False,
    ) -> list[Tensor]:
        """Compute the outputs of intermediate layers and of the last layer from the output of the convolutions.

        Args:
            local: (batch, frames, conv_channels).
            num_frames, mask, channel_mask, ignore_padding: As of `contextual`.
            kept: (layers,), as of `contextual`; the output of a skipped layer is its input.
            intermediate: Intermediate layers, counted from 1. With `pre_norm`, no norm is applied to their outputs.

        Returns:
            (batch, frames, dim) of each intermediate layer in ascending order, then of the last layer.
        """
        x, bias, positions = self._transformer_input(local, num_frames, mask, channel_mask, ignore_padding)
        kept = self.draw_kept() if kept is None else kept
        if self.relative_positions is not None and not any(kept):
            x = without_effect(x, self.relative_positions)
        outputs = []
        for number, (layer, keep) in enumerate(zip(self.layers, kept, strict=True), start=1):
            if not keep:
                x = without_effect(x, layer)
            elif self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, bias, positions, use_reentrant=False)
            else:
                x = layer(x, bias, positions)
            if number in intermediate:
                outputs.append(x)
        return [*outputs, self.norm(x) if self.config.pre_norm else x]

    def compile_parts(self) -> None:
        """Compile all that lies between convolutions, which torch would compile anew for every length.

        The layers share a graph. Compilation takes about a minute, and again at the first validation and the first
        batch of a single row.
        """
        compiled = partial(call_compiled, layer_norm_gelu, ((0, 1), (), ()))
        for convolution in self.convolutions:
            assert isinstance(convolution, Convolution)
            convolution.layer_norm_gelu = compiled
        compile_methods(self, self.positions, *self.layers)

    def draw_kept(self, generator: torch.Generator | None = None) -> list[bool]:
        """Draw the layers that a step computes.

        Args:
            generator: Source of the random numbers; torch's global one if not given.

        Returns:
            (layers,), whether each layer is computed. In training, each is skipped with probability `layer_drop`.
        """
        if not self.training or torch.compiler.is_exporting():
            return [True] * len(self.layers)
        # On the CPU, where reading the draw does not wait for a GPU
        kept: list[bool] = (torch.rand(len(self.layers), generator=generator) >= self.config.layer_drop).tolist()
        return kept

    def _embed(
        self,
        waveform: Tensor,
        length: Tensor | None,
        ignore_padding: bool,
        statistics: WaveformStatistics | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        local = self.local_features(waveform, length, ignore_padding=ignore_padding, statistics=statistics)
        return self._transformer_input(local, self._num_frames(length), ignore_padding=ignore_padding)

    def _num_frames(self, length: Tensor | None) -> Tensor | None:
        return None if length is None else num_frames(length, self.config.clock)

    def _transformer_input(
        self,
        local: Tensor,
        num_frames: Tensor | None,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        ignore_padding: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute the input of layer 1, (batch, frames, dim), and the other arguments of all layers."""
        x, bias = self._projected(local, num_frames, mask, channel_mask)
        positions = None if self.relative_positions is None else self.relative_positions(x.shape[1])
        convolved = self.positions(x, num_frames if ignore_padding else None)
        return self._positioned(x, convolved), bias, positions

    @compilable((0, 1), (0,), (0, 1), (0,))
    def _projected(
        self, local: Tensor, num_frames: Tensor | None, mask: Tensor | None, channel_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Project and mask the output of the convolutions."""
        x = self.input_dropout(self.projection(self.local_norm(local)))
        bias, precision = None, x.dtype
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_embedding.to(x.dtype), x)
        if channel_mask is not None:
            x = x.masked_fill(channel_mask[:, None], 0)
        if num_frames is not None:
            padding = padding_mask(without_waiting(num_frames, local.device), local.shape[1])
            x = x.masked_fill(padding[..., None], 0)
            bias = attention_bias(padding, precision)
        return x, bias

    @compilable((0, 1), (0, 1))
    def _positioned(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add the output of the positional convolution, both (batch, frames, dim)."""
        x = x + F.gelu(positions)
        output: Tensor = self.dropout(x if self.config.pre_norm else self.norm(x))
        return output


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with a residual connection and a norm before or after it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads, self.pre_norm = config.num_heads, config.pre_norm
        self.query_key_value = Linear(config.dim, 3 * config.dim)
        self.attention_output = Linear(config.dim, config.dim)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_input = Linear(config.dim, config.ffn_dim)
        self.ffn_output = Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.attention_dropout = config.attention_dropout
        self.activation_dropout = Dropout(config.activation_dropout)
        self.dropout = Dropout(config.dropout)
        self.position_gate = PositionGate(config) if config.position_buckets else None

    @compilable((0, 1), (0, 3), (1, 2))
    def forward(self, x: Tensor, bias: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """Compute the layer.

        Args:
            x: (batch, frames, dim).
            bias: (batch, 1, 1, frames) of `attention_bias`; None to attend to all frames.
            positions: (heads, frames, frames or more) of `RelativePositions`; None for an encoder without them.

        Returns:
            (batch, frames, dim).
        """
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x), bias, positions)
            return x + self.feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self.attention(x, bias, positions))
        output: Tensor = self.ffn_norm(x + self.feed_forward(x))
        return output

    def attention(self, x: Tensor, bias: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """Compute attention without norm and residual; shapes as in `forward`."""
        heads = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))  # (batch, frames, 3, heads, head dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, frames, head dim)
        if self.position_gate is not None and positions is not None:
            gated = self.position_gate(x, positions)
            bias = (gated if bias is None else gated + bias).type_as(query)
        x = attend_to(query, key, value, bias, self.attention_dropout if self.training else 0.0)
        output: Tensor = self.dropout(self.attention_output(x.transpose(1, 2).flatten(2)))
        return output

    def feed_forward(self, x: Tensor) -> Tensor:
        """Compute the feed-forward part without norm and residual: (batch, frames, dim) to (batch, frames, dim)."""
        output: Tensor = self.dropout(self.ffn_output(self.activation_dropout(F.gelu(self.ffn_input(x)))))
        return output
