"""What features, units and labels need of an encoder, whatever system it comes from."""

from collections.abc import Iterator, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from hubert_lightning.frames import Clock
from hubert_lightning.model.convolutions import WaveformStatistics


class EncoderSize(Protocol):
    """Size of an encoder."""

    @property
    def dim(self) -> int:
        """Width of the Transformer."""

    @property
    def num_layers(self) -> int:
        """Number of Transformer layers."""

    @property
    def clock(self) -> Clock:
        """Clock of the features."""


class SpeechEncoder(Protocol):
    """A function from 16 kHz audio to the hidden layers of an encoder, one frame per 20 ms.

    `HubertEncoder` is one; `TransformersEncoder` is any other speech encoder of transformers.
    """

    @property
    def config(self) -> EncoderSize:
        """Size of the encoder."""

    def __call__(self, waveform: Tensor, length: Tensor | None = None) -> Tensor:
        """Compute the output of the encoder, with the norm after its last layer if it has one.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding.

        Returns:
            (batch, frames, dim).
        """

    def features(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        *,
        layer: int,
        ignore_padding: bool = False,
        statistics: WaveformStatistics | None = None,
    ) -> Tensor:
        """Compute the output of one Transformer layer, without a norm after it; later layers are not computed.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding.
            layer: Number of the layer, counted from 1.
            ignore_padding: Whether the features of an utterance are the same as in a batch of one.
            statistics: Statistics of the recordings that the waveforms are parts of, for norms over time.

        Returns:
            (batch, frames, dim).
        """

    def features_of_layers(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        *,
        layers: Sequence[int],
        ignore_padding: bool = False,
        statistics: WaveformStatistics | None = None,
    ) -> list[Tensor]:
        """Compute the outputs of several Transformer layers in one pass, in the order of `layers`.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding.
            layers: Numbers of the layers, counted from 1.
            ignore_padding: Whether the features of an utterance are the same as in a batch of one.
            statistics: Statistics of the recordings that the waveforms are parts of, for norms over time.

        Returns:
            (batch, frames, dim) for each of the layers.
        """

    def all_layers(
        self,
        waveform: Tensor,
        length: Tensor | None = None,
        *,
        ignore_padding: bool = False,
        with_input: bool = False,
    ) -> list[Tensor]:
        """Compute the output of every layer in one pass.

        Args:
            waveform: (batch, samples).
            length: (batch,), samples before padding.
            ignore_padding: Whether the features of an utterance are the same as in a batch of one.
            with_input: Whether the input of the first layer, "layer 0", comes before the layers.

        Returns:
            (batch, frames, dim) for each layer, as `features` returns it.
        """

    def check_layer(self, layer: int) -> None:
        """Raise a UserError if the encoder has no such layer."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the weights."""

    def to(self, device: torch.device) -> Self:
        """Move the weights to a device."""

    def eval(self) -> Self:
        """Switch dropout off."""


def device_of(encoder: SpeechEncoder) -> torch.device:
    """Return the device that an encoder computes on."""
    return next(iter(encoder.parameters())).device
