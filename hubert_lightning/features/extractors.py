"""Functions from audio to features: MFCC, or hidden layers of an encoder."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
BESIDE = " + "
"""Between the names of features that lie side by side."""
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
        columns: Columns of each of several features that lie side by side, such as those of two layers.
    """

    features: Features
    name: str
    shape: tuple[int, ...]
    device: torch.device = torch.device("cpu")
    uses_statistics: bool = False
    in_workers: Callable[[Tensor], Tensor] | None = None
    encoder: HubertEncoder | None = None
    columns: tuple[slice, ...] = (slice(None),)

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
    path: Path | str, layer: int | Sequence[int], device: torch.device, precision: Precision = nullcontext
) -> Extractor:
    """Create an extractor of one layer of an encoder, whose features do not depend on the batch.

    Args:
        path: Model in any format.
        layer: Layer, counted from 1; several layers, computed in one pass, lie side by side.
        device: Device that computes.
        precision: Context in which the encoder computes.

    Raises:
        UserError: The model cannot be read, or has no such layer.
    """
    encoder = load_encoder(path).to(device)
    layers = [layer] if isinstance(layer, int) else list(layer)
    for number in layers:
        encoder.check_layer(number)

    def features(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        if statistics is None and len(waveform) == 1 and num_frames(waveform.shape[1]) > WINDOW_FRAMES:
            statistics = statistics_of([waveform[0]])  # then the audio is convolved in pieces
        if statistics is not None:
            exact = torch.float32 if device.type == "mps" else torch.float64  # for differences of large numbers
            statistics = WaveformStatistics(*(value.to(device, exact) for value in statistics))
        padded = length_if_padded(length, device)
        options: dict[str, Any] = {"ignore_padding": True, "statistics": statistics}
        with precision():
            if len(layers) == 1:
                return encoder.features(waveform.to(device), padded, layer=layers[0], **options)
            return torch.cat(encoder.features_of_layers(waveform.to(device), padded, layers=layers, **options), dim=-1)

    fingerprint, dim = encoder_fingerprint(encoder), encoder.config.dim
    name = BESIDE.join(f"layer {number} of encoder {fingerprint}" for number in layers)
    shape = (dim * len(layers),)
    columns = side_by_side([dim] * len(layers))
    return Extractor(features, name, shape, device, uses_statistics=True, encoder=encoder, columns=columns)


def side_by_side(widths: Sequence[int]) -> tuple[slice, ...]:
    """Return the columns of features that lie side by side.

    Args:
        widths: Number of columns of each.
    """
    if len(widths) == 1:
        return (slice(None),)
    return tuple(slice(sum(widths[:number]), sum(widths[: number + 1])) for number in range(len(widths)))


def combined_extractor(
    sources: Sequence[tuple[str, int | None]], device: torch.device, precision: Precision = nullcontext
) -> Extractor:
    """Create an extractor of several features, side by side in this order.

    The audio is read once. Each model is loaded once and computes all of its layers in one pass.

    Args:
        sources: Model in any format and its layer, counted from 1; or "mfcc" and None.
        device: Device that computes.
        precision: Context in which encoders compute.

    Raises:
        UserError: A model cannot be read, or lacks a layer.
    """
    layers: dict[str, list[int | None]] = {}
    for name, layer in sources:
        layers.setdefault(name, []).append(layer)
    extractors = {
        name: mfcc_extractor()
        if name == MFCC
        else layer_extractor(name, [layer for layer in of_model if layer is not None], device, precision)
        for name, of_model in layers.items()
    }
    if len(extractors) == 1 and [layer for _, layer in sources] == layers[sources[0][0]]:
        return extractors[sources[0][0]]
    places = [(extractors[name], layers[name].index(layer)) for name, layer in sources]

    def features(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        computed = {
            name: extractor(waveform.cpu() if name == MFCC else waveform, length, statistics).to(device)
            for name, extractor in extractors.items()
        }
        parts = [
            computed[name][..., extractor.columns[place]]
            for (name, _), (extractor, place) in zip(sources, places, strict=True)
        ]
        return torch.cat(parts, dim=-1)

    widths = [len(range(extractor.shape[-1])[extractor.columns[place]]) for extractor, place in places]
    name = BESIDE.join(extractor.name.split(BESIDE)[place] for extractor, place in places)
    uses_statistics = any(extractor.uses_statistics for extractor in extractors.values())
    columns = side_by_side(widths)
    return Extractor(features, name, (sum(widths),), device, uses_statistics, columns=columns)


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
