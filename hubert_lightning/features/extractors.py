"""Functions from audio to features: MFCC, or hidden layers of an encoder."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hubert_lightning.errors import UserError
from hubert_lightning.features.mfcc import MFCC_DIM, MFCC_PARTS, SPLICED_FRAMES, mfcc, spliced
from hubert_lightning.features.windows import WINDOW_FRAMES
from hubert_lightning.frames import CLOCK, MFCC_CLOCK, Clock, frames_inside, num_frames
from hubert_lightning.model.convolutions import WaveformStatistics
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.statistics import statistics_of
from hubert_lightning.model.windows import STANDARD, WindowLayout
from hubert_lightning.pretrained.load import encoder_fingerprint, encoder_size, load_encoder
from hubert_lightning.pretrained.speech_encoder import SpeechEncoder, device_of
from hubert_lightning.pretrained.teacher_config import QUADRATIC_WINDOW
from hubert_lightning.pretrained.transformers_encoder import TransformersEncoder

MFCC = "mfcc"
BESIDE = " + "
"""Between the names of features that lie side by side."""
MFCC_SPLICED = f"mfcc spliced over {SPLICED_FRAMES} frames"

Precision = Callable[[], AbstractContextManager[object]]
"""Context in which an encoder computes, such as torch.autocast."""


class Features(Protocol):
    """A function from a padded batch of audio to one row of features per frame."""

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
        clock: Clock of the features.
        layout: Windows of the encoder's first convolution, of which norms over time need statistics.
        window_frames: Frames that are encoded at once at most, 20 ms each.
    """

    features: Features
    name: str
    shape: tuple[int, ...]
    device: torch.device = torch.device("cpu")
    uses_statistics: bool = False
    in_workers: Callable[[Tensor], Tensor] | None = None
    encoder: SpeechEncoder | None = None
    columns: tuple[slice, ...] = (slice(None),)
    clock: Clock = CLOCK
    layout: WindowLayout = STANDARD
    window_frames: int = WINDOW_FRAMES

    def __call__(self, waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        """Compute features of a batch in this process, as `Features`."""
        if self.in_workers is not None:
            rows = [self.in_workers(row[:samples]) for row, samples in zip(waveform, length.tolist(), strict=True)]
            waveform = pad_sequence(rows, batch_first=True)
        return self.features(waveform, length, statistics if self.uses_statistics else None)


def mfcc_extractor(in_parts: bool = False, clock: Clock = CLOCK) -> Extractor:
    """Create an extractor of MFCCs at an encoder's clock.

    Args:
        in_parts: Whether they are spliced over three frames, for product K-means of their parts.
        clock: Clock of the encoder that learns their clusters.
    """

    name, dim = (MFCC_SPLICED, max(part.stop for part in MFCC_PARTS.values())) if in_parts else (MFCC, MFCC_DIM)
    return Extractor(_unchanged, name, (dim,), in_workers=partial(_mfcc_at, clock, in_parts=in_parts), clock=clock)


def _mfcc_at(clock: Clock, waveform: Tensor, in_parts: bool) -> Tensor:
    rows = mfcc(waveform)
    # K-means sees one of the 10 ms frames inside each of the encoder's: the one in its centre. At 20 ms, this is every
    # other one, as the reference takes labels; at 40 ms, every fourth
    ratio, count = frames_inside(MFCC_CLOCK, clock)
    return (spliced(rows) if in_parts else rows)[(count - 1) // 2 :: ratio][: num_frames(len(waveform), clock)]


def _unchanged(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
    return waveform  # what the workers have computed of it


def layer_extractor(
    path: Path | str,
    layer: int | Sequence[int],
    device: torch.device,
    precision: Precision = nullcontext,
    clock: Clock | None = None,
) -> Extractor:
    """Create an extractor of one layer of an encoder, whose features do not depend on the batch.

    At the clock of an encoder with fewer frames, each row is the mean of the features inside its frame (`at_clock`).

    Args:
        path: Model in any format.
        layer: Layer, counted from 1; several layers, computed in one pass, lie side by side.
        device: Device that computes.
        precision: Context in which the encoder computes.
        clock: Clock of the encoder that learns the clusters; the encoder's own if not given.

    Raises:
        UserError: The model cannot be read, has no such layer, or has no frames inside those of the clock.
    """
    encoder = load_encoder(path).to(device)
    layers = [layer] if isinstance(layer, int) else list(layer)
    for number in layers:
        encoder.check_layer(number)
    own, layout = encoder.config.clock, layout_of(encoder)
    clock = own if clock is None else clock
    check_clock(path, own, clock)

    def features(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        if statistics is None and len(waveform) == 1 and num_frames(waveform.shape[1]) > WINDOW_FRAMES:
            statistics = statistics_of([waveform[0]], layout)  # then the audio is convolved in pieces
        if statistics is not None:
            exact = torch.float32 if device.type == "mps" else torch.float64  # for differences of large numbers
            statistics = WaveformStatistics(*(value.to(device, exact) for value in statistics))
        padded = length_if_padded(length, device)
        options: dict[str, Any] = {"ignore_padding": True, "statistics": statistics}
        with precision():
            if len(layers) == 1:
                rows = encoder.features(waveform.to(device), padded, layer=layers[0], **options)
            else:
                of_layers = encoder.features_of_layers(waveform.to(device), padded, layers=layers, **options)
                rows = torch.cat(of_layers, dim=-1)
        return at_clock(rows, own, clock)

    model, dim = encoder_fingerprint(encoder) + clock_suffix(own, clock), encoder.config.dim
    name = BESIDE.join(f"layer {number} of encoder {model}" for number in layers)
    return Extractor(
        features,
        name,
        (dim * len(layers),),
        device,
        uses_statistics=not isinstance(encoder, TransformersEncoder) or encoder.uses_statistics,
        encoder=encoder,
        columns=side_by_side([dim] * len(layers)),
        clock=clock,
        layout=layout,
        window_frames=window_frames_of(encoder),
    )


def side_by_side(widths: Sequence[int]) -> tuple[slice, ...]:
    """Return the columns of features that lie side by side.

    Args:
        widths: Number of columns of each.
    """
    if len(widths) == 1:
        return (slice(None),)
    return tuple(slice(sum(widths[:number]), sum(widths[: number + 1])) for number in range(len(widths)))


def combined_extractor(
    sources: Sequence[tuple[str, int | None]],
    device: torch.device,
    precision: Precision = nullcontext,
    clock: Clock | None = None,
) -> Extractor:
    """Create an extractor of several features, side by side in this order.

    The audio is read once. Each model is loaded once and computes all of its layers in one pass.

    Args:
        sources: Model in any format and its layer, counted from 1; or "mfcc" and None.
        device: Device that computes.
        precision: Context in which encoders compute.
        clock: Clock of the encoder that learns the clusters; that of the model with the longest frames if not given.

    Raises:
        UserError: A model cannot be read, lacks a layer, or has longer frames than the clock; or the first convolutions
            of two models differ.
    """
    layers: dict[str, list[int | None]] = {}
    for name, layer in sources:
        layers.setdefault(name, []).append(layer)
    if clock is None and len(layers) > 1:
        clock = max((encoder_size(name).clock for name in layers if name != MFCC), default=CLOCK)
    extractors = {
        name: mfcc_extractor(clock=clock or CLOCK)
        if name == MFCC
        else layer_extractor(name, [layer for layer in of_model if layer is not None], device, precision, clock)
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
    return Extractor(
        features,
        name,
        (sum(widths),),
        device,
        uses_statistics,
        columns=side_by_side(widths),
        clock=next(iter(extractors.values())).clock,
        layout=_common_layout(extractors),
        window_frames=min(extractor.window_frames for extractor in extractors.values()),
    )


def _common_layout(extractors: Mapping[str, Extractor]) -> WindowLayout:
    """Layout of the convolutions whose statistics several models share; raises `UserError` if they differ."""
    layouts = {extractor.layout[:2]: extractor.layout for extractor in extractors.values() if extractor.uses_statistics}
    if len(layouts) > 1:
        raise UserError(
            f"{' and '.join(extractors)}: their first convolutions differ, so that a long recording has no statistics "
            "for both; take one of them"
        )
    return next(iter(layouts.values()), STANDARD)


def check_clock(path: Path | str, own: Clock, clock: Clock) -> None:
    """Check that features of a model can be brought to the clock of another one.

    Args:
        path: Model that errors name.
        own: Clock of its features.
        clock: Clock of the other one.

    Raises:
        UserError: They cannot.
    """
    if not frames_inside(own, clock)[1]:
        raise UserError(
            f"{path} has {own.described}, and the model that learns its clusters {clock.described}: no frame of the "
            "one lies in each of the other; take features of a model with shorter frames, or the same"
        )


def at_clock(rows: Tensor, own: Clock, clock: Clock) -> Tensor:
    """Bring features to a clock with fewer frames: the mean of all whose windows lie inside the frame.

    The mean is centred on the frame. A single one of them would not be: of a 50 Hz model, two lie inside a frame of
    25 Hz, a quarter of a hop before and after its centre.

    Args:
        rows: (batch, frames, …).
        own: Clock of the features.
        clock: Clock that they are brought to.

    Returns:
        (batch, fewer frames, …); the same rows if the clocks are equal.
    """
    ratio, count = frames_inside(own, clock)
    if (ratio, count) == (1, 1):
        return rows
    if rows.shape[1] < count:
        return rows[:, :0]
    means: Tensor = rows.unfold(1, count, ratio).mean(dim=-1)
    return means


def clock_suffix(own: Clock, clock: Clock) -> str:
    """End of the name of features that are brought to another clock; empty if they are not."""
    return "" if frames_inside(own, clock) == (1, 1) else f", mean over {clock.window} samples every {clock.hop}"


def all_layers_extractor(
    encoder: SpeechEncoder,
    precision: Precision = nullcontext,
    with_input: bool = False,
    clock: Clock | None = None,
) -> Extractor:
    """Create an extractor of every layer of an encoder: (batch, frames, layers, dim).

    Args:
        encoder: Encoder, on the device that computes.
        precision: Context in which the encoder computes.
        with_input: Whether the input of the first layer, "layer 0", comes before the layers.
        clock: Clock of the encoder that learns the clusters, as of `layer_extractor`.
    """
    device, own, layout = device_of(encoder), encoder.config.clock, layout_of(encoder)
    clock = own if clock is None else clock
    check_clock("the encoder", own, clock)

    def features(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        padded = length_if_padded(length, device)
        with precision():
            layers = encoder.all_layers(waveform.to(device), padded, ignore_padding=True, with_input=with_input)
        return at_clock(torch.stack(layers, dim=2), own, clock)

    return Extractor(
        features,
        "all layers of an encoder",
        (encoder.config.num_layers + with_input, encoder.config.dim),
        device,
        clock=clock,
        layout=layout,
        window_frames=window_frames_of(encoder),
    )


def layout_of(encoder: SpeechEncoder) -> WindowLayout:
    """Return the windows of an encoder's first convolution, of which norms over time need statistics."""
    return WindowLayout.of(encoder.config) if isinstance(encoder, HubertEncoder) else STANDARD


def window_frames_of(encoder: SpeechEncoder) -> int:
    """Return the number of frames that an encoder should compute at once at most."""
    if isinstance(encoder, TransformersEncoder):
        return encoder.config.window_frames or WINDOW_FRAMES
    has_biases = isinstance(encoder, HubertEncoder) and encoder.config.position_buckets > 0
    return QUADRATIC_WINDOW if has_biases else WINDOW_FRAMES


def length_if_padded(length: Tensor, device: torch.device) -> Tensor | None:
    """Copy lengths to a device, without waiting for it, unless no row is padded, which is faster to compute.

    Args:
        length: (batch,), samples before padding, on the CPU; in page-locked memory if the device is a GPU.
        device: Device that computes.

    Returns:
        (batch,), or None if all lengths are the same.
    """
    return None if bool((length == length[0]).all()) else length.to(device, non_blocking=True)
