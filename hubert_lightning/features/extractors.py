"""Functions from audio to features: MFCC, or hidden layers of an encoder."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hubert_lightning.features.mfcc import MFCC_DIM, MFCC_PARTS, SPLICED_FRAMES, mfcc, spliced
from hubert_lightning.features.windows import WINDOW_FRAMES
from hubert_lightning.frames import num_frames
from hubert_lightning.model.convolutions import WaveformStatistics
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.statistics import statistics_of
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder

MFCC = "mfcc"
MFCC_SPLICED = f"mfcc spliced over {SPLICED_FRAMES} frames"

Precision = Callable[[], AbstractContextManager[object]]
"""Context in which an encoder computes, such as torch.autocast."""


class Features(Protocol):
    """A function from a padded batch of audio to one row of features per 20 ms."""

    def __call__(self, waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        """Compute features.

        Args:
            waveform: (batch, samples), 16 kHz.
            length: (batch,), samples before padding.
            statistics: Statistics of the recordings that the rows are parts of, by which norms over time normalise;
                of the rows themselves if not given.

        Returns:
            (batch, frames, …, dim).
        """


class Extractor(NamedTuple):
    """A function from audio to features, and facts about these features.

    Args:
        features: The function.
        name: Name of the features, which a K-means fitted on them states as its source.
        shape: Shape of one frame's features.
        device: Device that computes.
        uses_statistics: Whether the features have norms over time, so that parts of a recording need its statistics.
        in_workers: Function of one waveform on the CPU, (samples,) to (frames, …), which the processes that read audio
            compute. If it is given, `features` gets its results, padded, in place of waveforms.
        encoder: Encoder that computes the features; None if there is none.
    """

    features: Features
    name: str
    shape: tuple[int, ...]
    device: torch.device = torch.device("cpu")
    uses_statistics: bool = False
    in_workers: Callable[[Tensor], Tensor] | None = None
    encoder: HubertEncoder | None = None

    def __call__(self, waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        """Compute features of a batch in this process, as `Features`."""
        if self.in_workers is not None:
            rows = [self.in_workers(row[:samples]) for row, samples in zip(waveform, length.tolist(), strict=True)]
            waveform = pad_sequence(rows, batch_first=True)
        return self.features(waveform, length, statistics if self.uses_statistics else None)


def mfcc_extractor(in_parts: bool = False) -> Extractor:
    """Create an extractor of MFCCs at the encoder's clock.

    Args:
        in_parts: Whether they are spliced over three frames, for product K-means of their parts.
    """

    name, dim = (MFCC_SPLICED, max(part.stop for part in MFCC_PARTS.values())) if in_parts else (MFCC, MFCC_DIM)
    return Extractor(_unchanged, name, (dim,), in_workers=partial(_mfcc_at_20_ms, in_parts=in_parts))


def _mfcc_at_20_ms(waveform: Tensor, in_parts: bool) -> Tensor:
    rows = mfcc(waveform)
    # K-means sees the 10 ms frames that the encoder has too: every other one, as the reference takes labels
    return (spliced(rows) if in_parts else rows)[::2]


def _unchanged(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
    return waveform  # what the workers have computed of it


def layer_extractor(
    path: Path | str, layer: int, device: torch.device, precision: Precision = nullcontext
) -> Extractor:
    """Create an extractor of one layer of an encoder, whose features do not depend on the batch.

    Args:
        path: Model in any format.
        layer: Layer, counted from 1.
        device: Device that computes.
        precision: Context in which the encoder computes.

    Raises:
        UserError: The model cannot be read, or has no such layer.
    """
    encoder = load_encoder(path).to(device)
    encoder.check_layer(layer)

    def features(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        if statistics is None and len(waveform) == 1 and num_frames(waveform.shape[1]) > WINDOW_FRAMES:
            statistics = statistics_of([waveform[0]])  # then the audio is convolved in pieces
        if statistics is not None:
            exact = torch.float32 if device.type == "mps" else torch.float64  # for differences of large numbers
            statistics = WaveformStatistics(*(value.to(device, exact) for value in statistics))
        padded = length_if_padded(length, device)
        with precision():
            return encoder.features(
                waveform.to(device), padded, layer=layer, ignore_padding=True, statistics=statistics
            )

    name = f"layer {layer} of encoder {encoder_fingerprint(encoder)}"
    return Extractor(features, name, (encoder.config.dim,), device, uses_statistics=True, encoder=encoder)


def all_layers_extractor(
    encoder: HubertEncoder, precision: Precision = nullcontext, with_input: bool = False
) -> Extractor:
    """Create an extractor of every layer of an encoder: (batch, frames, layers, dim).

    Args:
        encoder: Encoder, on the device that computes.
        precision: Context in which the encoder computes.
        with_input: Whether the input of the first layer, "layer 0", comes before the layers.
    """
    device = encoder.mask_embedding.device

    def features(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        padded = length_if_padded(length, device)
        with precision():
            layers = encoder.all_layers(waveform.to(device), padded, ignore_padding=True, with_input=with_input)
            return torch.stack(layers, dim=2)

    shape = (len(encoder.layers) + with_input, encoder.config.dim)
    return Extractor(features, "all layers of an encoder", shape, device)


def length_if_padded(length: Tensor, device: torch.device) -> Tensor | None:
    """Copy lengths to a device, without waiting for it, unless no row is padded, which is faster to compute.

    Args:
        length: (batch,), samples before padding, on the CPU; in page-locked memory if the device is a GPU.
        device: Device that computes.

    Returns:
        (batch,), or None if all lengths are the same.
    """
    return None if bool((length == length[0]).all()) else length.to(device, non_blocking=True)
