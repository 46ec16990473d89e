"""Units of any audio: for every frame, the nearest centroid of K-means. In a notebook:

units = Units.from_pretrained("checkpoints/base/iteration1/last.ckpt", "checkpoints/base/iteration2/kmeans.safetensors")
units(waveform, sample_rate)  # (frames,)
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.audio import mono_samples
from hubert_lightning.errors import UserError
from hubert_lightning.features.extract import extract_cuts
from hubert_lightning.features.extractors import MFCC, MFCC_SPLICED, Extractor, layer_extractor, mfcc_extractor
from hubert_lightning.features.recordings import autocast
from hubert_lightning.features.stream import FrameStream
from hubert_lightning.features.windows import Window, windows
from hubert_lightning.frames import CLOCK, SAMPLE_RATE, Clock, in_frames, num_frames, num_samples, seconds_to_samples
from hubert_lightning.hub import HubModel, ModelParts, no_encoder
from hubert_lightning.model.convolutions import WaveformStatistics
from hubert_lightning.model.devices import choose_device
from hubert_lightning.model.statistics import statistics_of
from hubert_lightning.pretrained.load import KMEANS_FILE, is_hub_name, located
from hubert_lightning.pretrained.transformers_encoder import TransformersEncoder
from hubert_lightning.units.kmeans_file import kmeans_fingerprint, load_kmeans
from hubert_lightning.units.label_recipe import RESIDUAL, LabelRecipe, is_mfcc
from hubert_lightning.units.label_shards import LAYER_OF_ENCODER
from hubert_lightning.units.residual import joint_clusters

OVERLAP_FRAMES = 250
"""Frames, 5 s, that neighbouring windows of a long recording share: more agree hardly better (docs/benchmarks.md)."""
WINDOW_DURATION = 300.0
"""Seconds that are encoded at once: Base needs 1.8 GiB for them."""
BLOCK_SAMPLES = 60 * SAMPLE_RATE
"""Samples, a minute, whose statistics are computed at once."""


class Runs(NamedTuple):
    """Units without repetitions.

    Args:
        units: (runs,) int64.
        durations: (runs,) int64, frames that each lasts.
    """

    units: Tensor
    durations: Tensor


def deduplicated(units: Tensor) -> Runs:
    """Merge each run of equal units.

    Args:
        units: (frames,).
    """
    return Runs(*torch.unique_consecutive(units, return_counts=True))


class Units(HubModel):
    """A function from audio to units.

    Args:
        extractor: Function that computes the features.
        centroids: (clusters, dim); of residual K-means those of each stage. A unit then names a cluster of each stage:
            cluster of stage 1 · clusters of stage 2 + cluster of stage 2.
        window: Seconds of a recording that are encoded at once, at least 10. A longer recording is encoded in windows,
            which are normalised as the whole recording; attention does not reach beyond them.
        kmeans_source: Facts about the K-means for `save_pretrained`, by name.

    Raises:
        UserError: The window is too short, or features and centroids have different dimensions.
    """

    def __init__(
        self,
        extractor: Extractor,
        centroids: Tensor | Sequence[Tensor],
        window: float = WINDOW_DURATION,
        kmeans_source: Mapping[str, str] | None = None,
    ) -> None:
        if window < 10:
            raise UserError(f"window {window} s: give 10 s or more, because windows overlap by 5 s")
        self.clock = extractor.clock
        self._longest = min(
            seconds_to_samples(window) // self.clock.hop, in_frames(extractor.window_frames, self.clock)
        )
        stages = [centroids] if isinstance(centroids, Tensor) else list(centroids)
        for means in stages:
            if extractor.shape != means.shape[1:]:
                raise UserError(
                    f"K-means has {means.shape[1]} dimensions, but {extractor.name} has {extractor.shape[0]}; give "
                    "the K-means of this model and layer"
                )
        stages = [means.to(extractor.device) for means in stages]

        def units(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
            features = extractor.features(waveform, length, statistics)  # (batch, frames, dim)
            return joint_clusters(features.flatten(0, 1), stages).view(features.shape[:2])

        self.source = {"features": extractor.name, "kmeans": kmeans_fingerprint(stages), "window": window}
        """Everything that units depend on besides their recordings."""
        self._extractor = extractor._replace(features=units, shape=())
        self._centroids, self._kmeans_source = stages, {**(kmeans_source or {}), "features": extractor.name}

    @classmethod
    def from_pretrained(
        cls,
        model: Path | str,
        kmeans: Path | str | None = None,
        layer: int | None = None,
        device: torch.device | str | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        window: float = WINDOW_DURATION,
    ) -> "Units":
        """Load a model and its K-means.

        Args:
            model: Model in any format, or "mfcc".
            kmeans: File of the K-means; `kmeans.safetensors` in the model's directory if not given.
            layer: Transformer layer, counted from 1; needed if the K-means does not state the layer it was fitted on.
            device: Device that computes; a GPU if there is one, if not given.
            precision: Numeric precision of the encoder.
            window: Seconds of a recording that are encoded at once.

        Raises:
            UserError: A file cannot be opened, or model, layer and K-means do not belong together.
        """
        kmeans = _beside(Path(model)) if kmeans is None else Path(kmeans)
        if not kmeans.is_file():
            raise UserError(f"{kmeans}: no such file; correct the path")
        streams, source = load_kmeans(kmeans)
        if len(streams) > 1 and source.get(RESIDUAL) != str(len(streams)):
            raise UserError(
                f"{kmeans} holds {len(streams)} K-means, but units need one, or the stages of a residual one; give a "
                "file with one"
            )
        features = source.get("features", "")
        if is_mfcc(model):
            if features == MFCC_SPLICED:
                raise UserError(
                    f"{kmeans} was fitted on a part of MFCCs ({source.get('parts')}), but units are clusters of whole "
                    "MFCCs; give the K-means of whole MFCCs"
                )
            LabelRecipe(MFCC, layer)  # refuses a layer
            extractor = mfcc_extractor(clock=_clock(kmeans, source) or CLOCK)
        else:
            layer = _layer(kmeans, features, layer)
            device = choose_device(device)
            extractor = layer_extractor(model, layer, device, autocast(device, precision), _clock(kmeans, source))
        if features and features != extractor.name:
            wanted = "a K-means of MFCCs" if is_mfcc(model) else "the K-means of this one"
            gives = "MFCCs are asked for" if is_mfcc(model) else f"{model} gives {extractor.name}"
            raise UserError(
                f"{kmeans} was fitted on {features}, but {gives}; give the model that it was fitted on, or {wanted}"
            )
        return cls(extractor, streams, window, source)

    @property
    def num_clusters(self) -> int:
        """Number of different units: the product of the clusters of all stages."""
        return math.prod(map(len, self._centroids))

    def model_parts(self) -> ModelParts:
        """Return what the folder of the model holds.

        Raises:
            UserError: The units are those of MFCCs, or of an encoder that is no HuBERT.
        """
        if self._extractor.encoder is None:
            raise no_encoder("units of MFCCs")
        if isinstance(self._extractor.encoder, TransformersEncoder):
            raise UserError(
                f"{self._extractor.name}: this package writes HuBERT alone; copy the directory of the model, and put "
                f"its K-means into it as {KMEANS_FILE}"
            )
        return ModelParts(self._extractor.encoder, centroids=self._centroids, kmeans_source=self._kmeans_source)

    def __call__(self, waveform: Tensor | np.ndarray, sample_rate: int) -> Tensor:
        """Compute the unit of every frame of a recording; a long one is encoded in windows.

        Args:
            waveform: (samples,) or (channels, samples), floats.
            sample_rate: Samples per second, any number.

        Returns:
            (frames,) int64, one per frame of `clock`, on the CPU.

        Raises:
            UserError: The waveform is not audio, or shorter than a frame.
        """
        samples = mono_samples(waveform, sample_rate)
        window, hop = self.clock.window, self.clock.hop
        if len(samples) < window:
            raise UserError(f"{len(samples)} samples at 16 kHz are too short: one frame takes {window}; leave it out")
        split = self._windows(len(samples))
        if len(split) == 1:
            return self.of_part(samples)
        whole = statistics_of(torch.split(samples, BLOCK_SAMPLES), self._extractor.layout)
        parts = []
        for first, last, start, end in split:
            part = samples[first * hop : first * hop + num_samples(last - first, self.clock)]
            parts.append(self.of_part(part, whole)[start - first : end - first])
        return torch.cat(parts)

    @torch.no_grad()
    def of_part(self, samples: Tensor, whole: WaveformStatistics | None = None) -> Tensor:
        """Compute the units of a part of a recording at once.

        Args:
            samples: (samples,), 16 kHz.
            whole: Statistics of the recording, which normalise the part; of the samples if not given.

        Returns:
            (frames,) int64, on the CPU.
        """
        return self._extractor(samples[None], torch.tensor([len(samples)]), whole)[0].cpu()

    def of_cuts(
        self, groups: Sequence[Sequence[Cut]], batch_duration: float | None = None, num_workers: int = 0
    ) -> Iterator[list[Tensor]]:
        """Compute the units of recordings on disk.

        Args:
            groups: Groups of recordings.
            batch_duration: Seconds that are encoded at once, as of `extract_cuts`.
            num_workers: Number of processes that read audio.

        Returns:
            (frames,) int64 of each recording of a group, group after group.
        """
        return extract_cuts(
            self._extractor,
            groups,
            "units",
            batch_duration=batch_duration,
            num_workers=num_workers,
            windows_of=lambda cut: self._windows(cut.num_samples),
            as_whole=True,
        )

    def _windows(self, samples: int) -> list[Window]:
        return windows(num_frames(samples, self.clock), self._longest, in_frames(OVERLAP_FRAMES, self.clock))

    def stream(self, step: float = 1.0, lookahead: float = 1.0, history: float = 5.0) -> FrameStream:
        """Start a stream of units for live audio: (frames,) int64.

        Args:
            step: Seconds from one output of units to the next; each argument is rounded to frames.
            lookahead: Seconds after a frame that the encoder sees before its unit is given.
            history: Seconds before a step that the encoder sees.
        """
        nothing, layout = torch.zeros(0, dtype=torch.long), self._extractor.layout
        return FrameStream(self.of_part, nothing, step, lookahead, history, self.clock, layout)


def _beside(model: Path) -> Path:
    if not is_mfcc(model) and is_hub_name(model):
        model = located(model)
    if model.is_dir() and (model / KMEANS_FILE).is_file():
        return model / KMEANS_FILE
    if is_mfcc(model):
        raise UserError(
            "mfcc: has no K-means of its own; name one of MFCCs with --kmeans, that of a run's first iteration or one "
            "of `hubert kmeans fit mfcc`"
        )
    raise UserError(
        f"{model}: no {KMEANS_FILE} comes with this model; name a K-means of one of its layers with --kmeans, that of "
        "the run's next iteration or one of `hubert kmeans fit`"
    )


def _layer(kmeans: Path, features: str, layer: int | None) -> int:
    """Layer that a K-means was fitted on, which must be the one asked for."""
    if not features:
        if layer is None:
            raise UserError(f"{kmeans} does not state the layer it was fitted on; name it with --layer")
        return layer
    match = LAYER_OF_ENCODER.fullmatch(features)
    if match is None:
        raise UserError(f"{kmeans} was fitted on {features}; give 'mfcc' for the model, or the K-means of a layer")
    if layer not in (None, int(match["layer"])):
        raise UserError(f"{kmeans} was fitted on {features}, not on layer {layer}; leave --layer out")
    return int(match["layer"])


def _clock(kmeans: Path, source: Mapping[str, str]) -> Clock | None:
    """Clock of the features that a K-means was fitted on; None if it states none."""
    try:
        hop, window = json.loads(source["clock"])
        return Clock(int(hop), int(window))
    except KeyError:
        return None
    except (TypeError, ValueError) as error:
        raise UserError(f"{kmeans}: its clock is {source['clock']!r:.40}, so it is corrupt; fit it again") from error
