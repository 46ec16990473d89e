"""Functions from audio to features: MFCC, or hidden layers of an encoder."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hubert_lightning.features.mfcc import MFCC_PARTS, SPLICED, mfcc, spliced
from hubert_lightning.features.windows import LONGEST
from hubert_lightning.frames import num_frames
from hubert_lightning.model.convolutions import WaveformStatistics
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.statistics import statistics_of
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder

Features = Callable[[Tensor, Tensor], Tensor]
"""waveform (batch, samples), length (batch,) → (batch, frames, …, dim), one row per 20 ms"""


class Extractor(NamedTuple):
    """A function from audio to features, what labels made of them are said to come from, the shape of one frame's,
    the device that computes them, and, if norms over time are in them, the features of parts of recordings."""

    features: Features
    name: str
    shape: tuple[int, ...]
    device: torch.device = torch.device("cpu")
    features_of_parts: Callable[[Tensor, Tensor, WaveformStatistics], Tensor] | None = None

    def __call__(self, waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        """Features of a batch; with the statistics of the recordings of which its rows are parts, as they have them."""
        if statistics is None or self.features_of_parts is None:
            return self.features(waveform, length)
        return self.features_of_parts(waveform, length, statistics)


def mfcc_extractor(in_parts: bool = False) -> Extractor:
    """MFCC at the encoder's clock.

    Args:
        in_parts: Spliced over three frames, for product K-means of their parts.
    """

    def features(waveform: Tensor, length: Tensor) -> Tensor:
        rows = (mfcc(row[:samples]) for row, samples in zip(waveform, length.tolist(), strict=True))
        # K-means sees the 10 ms frames that the encoder has too: every other one, as the reference takes labels
        return pad_sequence([(spliced(row) if in_parts else row)[::2] for row in rows], batch_first=True)

    if in_parts:
        return Extractor(
            features, f"mfcc spliced over {SPLICED} frames", (max(part.stop for part in MFCC_PARTS.values()),)
        )
    return Extractor(features, "mfcc", (39,))


def layer_extractor(
    path: Path | str,
    layer: int,
    device: torch.device,
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> Extractor:
    """One layer, counted from 1, of the encoder in a checkpoint, each utterance as if it were alone."""
    encoder = load_encoder(path).to(device)
    encoder.check_layer(layer)

    def features(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        if statistics is None and len(waveform) == 1 and num_frames(waveform.shape[1]) > LONGEST:
            statistics = statistics_of([waveform[0]])  # with which it is convolved in pieces
        if statistics is not None:
            exact = torch.float32 if device.type == "mps" else torch.float64  # variances are differences
            statistics = WaveformStatistics(*(value.to(device, exact) for value in statistics))
        padded = length_if_padded(length, device)
        with precision():
            waveform = waveform.to(device)
            return encoder.features(waveform, padded, layer=layer, ignore_padding=True, statistics=statistics)

    name = f"layer {layer} of encoder {encoder_fingerprint(encoder)}"
    return Extractor(features, name, (encoder.config.dim,), device, features_of_parts=features)


def all_layers_extractor(
    encoder: HubertEncoder, precision: Callable[[], AbstractContextManager] = nullcontext
) -> Extractor:
    """Every layer of an encoder: (batch, frames, layers, dim)."""
    device = encoder.mask_embedding.device

    def features(waveform: Tensor, length: Tensor) -> Tensor:
        padded = length_if_padded(length, device)
        with precision():
            return torch.stack(encoder.all_layers(waveform.to(device), padded, ignore_padding=True), dim=2)

    shape = (len(encoder.layers), encoder.config.dim)
    return Extractor(features, "all layers of an encoder", shape, device)


def length_if_padded(length: Tensor, device: torch.device) -> Tensor | None:
    """Lengths (batch,) on a device, or none where no row is padded, which is faster."""
    return None if bool((length == length[0]).all()) else length.to(device)
