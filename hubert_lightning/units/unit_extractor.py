"""Units of any audio: for every 20 ms, the nearest centroid of K-means. In a notebook:

units = Units.from_pretrained("checkpoints/base/iteration1/last.ckpt", "checkpoints/base/iteration2/kmeans.safetensors")
units(waveform, sample_rate)  # (frames,)
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.audio import resampled, unusable
from hubert_lightning.errors import UserError
from hubert_lightning.features.extract import extract_cuts
from hubert_lightning.features.extractors import Extractor, layer_extractor, mfcc_extractor
from hubert_lightning.features.recordings import autocast
from hubert_lightning.features.windows import Window, windows
from hubert_lightning.frames import HOP, SAMPLE_RATE, WINDOW, num_frames, num_samples, seconds_to_samples
from hubert_lightning.model.convolutions import WaveformStatistics
from hubert_lightning.model.statistics import RunningStatistics, statistics_of
from hubert_lightning.pretrained.load import KMEANS_FILE
from hubert_lightning.units.kmeans import assign
from hubert_lightning.units.kmeans_file import kmeans_fingerprint, load_kmeans

OVERLAP = 250  # frames, 5 s, of neighbouring windows of a long recording: more agree hardly better (docs/benchmarks.md)


WINDOW_DURATION = 300.0  # seconds that are encoded at once: Base takes 1.8 GiB for them, and half as long again
LONGEST_STREAM = 600  # seconds


class Runs(NamedTuple):
    """Units without repetitions, and for how many frames of 20 ms each lasts: (runs,) int64."""

    units: Tensor
    durations: Tensor


def deduplicated(units: Tensor) -> Runs:
    """Each run of equal units as one.

    units: (frames,)
    """
    return Runs(*torch.unique_consecutive(units, return_counts=True))


class Units:
    """A function from audio to units.

    extractor: what the units are clusters of
    centroids: (clusters, dim)
    window:    seconds of a recording that are encoded at once, at least 10; a longer one is encoded in windows, which
        are normalised as the whole is, and whose attention ends where they end
    """

    def __init__(self, extractor: Extractor, centroids: Tensor, window: float = WINDOW_DURATION) -> None:
        if window < 10:
            raise UserError(f"window {window} s: take 10 s or more, of which 5 s are those of the next")
        self._longest = seconds_to_samples(window) // HOP
        if extractor.shape != centroids.shape[1:]:
            raise UserError(
                f"K-means is of {centroids.shape[1]} dimensions, but {extractor.name} has {extractor.shape[0]}; give "
                "the K-means of this model and layer"
            )
        centroids = centroids.to(extractor.device)

        def units(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
            features = extractor(waveform, length, statistics)  # (batch, frames, dim)
            return assign(features.flatten(0, 1), centroids).view(features.shape[:2])

        self.source = {"features": extractor.name, "kmeans": kmeans_fingerprint([centroids]), "window": window}
        """What units depend on besides their recordings."""
        over_time = extractor.features_of_parts is not None
        self._extractor = Extractor(units, extractor.name, (), extractor.device, units if over_time else None)

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
        """Units that a K-means makes of a layer of a model.

        model:     `.ckpt` of pre-training or fine-tuning, a directory saved by transformers, or "mfcc"
        kmeans:    its file; `kmeans.safetensors` in the model's directory if not given
        layer:     counted from 1; needed if K-means does not say which it was fitted on
        device:    a GPU if there is one, if not given
        precision: that the encoder computes in
        window:    seconds of a recording that are encoded at once

        Raises:
            UserError: They do not belong together, or cannot be opened.
        """
        kmeans = _beside(Path(model)) if kmeans is None else Path(kmeans)
        if not kmeans.is_file():
            raise UserError(f"{kmeans}: no such file of a K-means; correct the path")
        streams, source = load_kmeans(kmeans)
        if len(streams) > 1:
            raise UserError(f"{kmeans} holds {len(streams)} K-means, and units are of one; give a file with one")
        features = source.get("features", "")
        if str(model) == "mfcc":
            if features.startswith("mfcc spliced"):
                raise UserError(
                    f"{kmeans} was fitted on a part of MFCCs ({source.get('parts')}), and units are clusters of all of "
                    "them; give the K-means of whole MFCCs"
                )
            if layer is not None or features not in ("", "mfcc"):
                raise UserError(
                    f"MFCCs with {f'layer {layer}' if layer else f'{kmeans}, fitted on {features}'}: "
                    "MFCCs have no layers; give a model, or the K-means of MFCCs"
                )
            return cls(mfcc_extractor(), streams[0], window)
        layer = _layer(kmeans, features, layer)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        extractor = layer_extractor(model, layer, device, autocast(device, precision))
        if features and features != extractor.name:
            raise UserError(
                f"{kmeans} was fitted on {features}, but {model} gives {extractor.name}; give the model that it was "
                "fitted on, or the K-means of this one"
            )
        return cls(extractor, streams[0], window)

    def __call__(self, waveform: Tensor | np.ndarray, sample_rate: int) -> Tensor:
        """The unit of every frame of a recording of any length; a long one is encoded in windows.

        waveform: (samples,) or (channels, samples), floats, at any rate
        returns:  (frames,) int64, one for each 20 ms, on the CPU

        Raises:
            UserError: It is no audio, or shorter than a frame.
        """
        samples = _samples(waveform, sample_rate)
        if len(samples) < WINDOW:
            raise UserError(f"{len(samples)} samples at 16 kHz are too short: one frame takes {WINDOW}; leave it out")
        cut_up = self._windows(len(samples))
        if len(cut_up) == 1:
            return self.of_part(samples)
        whole = statistics_of(samples.split(60 * SAMPLE_RATE))
        parts = []
        for first, last, start, end in cut_up:
            part = samples[first * HOP : first * HOP + num_samples(last - first)]
            parts.append(self.of_part(part, whole)[start - first : end - first])
        return torch.cat(parts)

    @torch.no_grad()
    def of_part(self, samples: Tensor, whole: WaveformStatistics | None = None) -> Tensor:
        """Of what is encoded at once, normalised as the recording is of which it is a part.

        samples: (samples,), 16 kHz
        whole:   the statistics of that recording; of the samples if not given
        """
        return self._extractor(samples[None], torch.tensor([len(samples)]), whole)[0].cpu()

    def of_cuts(
        self, groups: Sequence[Sequence[Cut]], batch_duration: float | None = None, num_workers: int = 0
    ) -> Iterator[list[Tensor]]:
        """Units of recordings on disk, group after group, in the order of its cuts; arguments as in `extract_cuts`."""
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
        return windows(num_frames(samples), self._longest, OVERLAP)

    def stream(self, step: float = 1.0, lookahead: float = 1.0, history: float = 5.0) -> "UnitStream":
        """Units of audio while it is heard; all in seconds, and rounded to frames.

        step:      between units that are given and the next
        lookahead: that is heard after a frame before its unit is given
        history:   that is heard before
        """
        return UnitStream(self, step, lookahead, history)


class UnitStream:
    """Units of audio that comes in chunks, whatever their sizes: each as soon as what follows it has been heard.

    A step's units are those of the last seconds, encoded at once, normalised by what was heard so far.
    """

    def __init__(self, units: Units, step: float, lookahead: float, history: float) -> None:
        self.units = units
        self.step, self.lookahead, self.history = (
            seconds_to_samples(seconds) // HOP for seconds in (step, lookahead, history)
        )
        if self.step < 1 or self.lookahead < 0 or self.history < 0:
            raise UserError(
                f"step {step}, lookahead {lookahead}, history {history}: a step is at least one frame, 0.02 s, and the "
                "others are not negative"
            )
        if step + lookahead + history > LONGEST_STREAM:
            raise UserError(
                f"step {step}, lookahead {lookahead}, history {history}: together, what is encoded at once, they are "
                f"at most {LONGEST_STREAM} s"
            )
        self.given = 0  # frames whose units were given
        self._statistics = RunningStatistics()
        self._heard = torch.zeros(0)  # samples from those of frame `_first` on
        self._first = 0
        self._finished = False

    @property
    def latency(self) -> float:
        """Seconds at most from when a frame was said to when its unit could be given, if computing took no time."""
        return (self.step + self.lookahead) * HOP / SAMPLE_RATE

    @property
    def longest(self) -> int:
        """Samples that are encoded at once, for a step's units."""
        return num_samples(self.history + self.step + self.lookahead)

    def push(self, samples: Tensor | np.ndarray) -> Tensor:
        """Units that are known once these were heard.

        samples: (samples,), floats, 16 kHz, any number of them
        returns: (frames,) int64; often none, or of several steps
        """
        if self._finished:
            raise UserError("this stream is finished; make another for what follows")
        self._heard = torch.cat([self._heard, _samples(samples, SAMPLE_RATE)])
        known = [torch.zeros(0, dtype=torch.long)]
        while self._num_frames >= (last := self.given + self.step + self.lookahead):
            known.append(self._give(self.given + self.step, num_samples(last)))
        return torch.cat(known)

    def finish(self) -> Tensor:
        """Units of the frames that were waiting for what follows them: (frames,)"""
        self._finished = True
        if self._num_frames == self.given:
            return torch.zeros(0, dtype=torch.long)
        return self._give(self._num_frames, self._first * HOP + len(self._heard))

    @property
    def _num_frames(self) -> int:
        return self._first + num_frames(len(self._heard))

    def _give(self, end: int, heard: int) -> Tensor:
        """Units up to frame `end`, for which `heard` samples of all are enough."""
        first = max(self.given - self.history, 0)
        self._heard = self._heard[(first - self._first) * HOP :]
        self._first = first
        samples = self._heard[: heard - first * HOP]
        self._statistics.add(samples[self._statistics.num_samples - first * HOP :])
        # At the beginning, all that was heard is encoded
        units = self.units.of_part(samples, self._statistics.statistics() if first else None)
        units = units[self.given - first : end - first]
        self.given = end
        return units


def _beside(model: Path) -> Path:
    if model.is_dir() and (model / KMEANS_FILE).is_file():
        return model / KMEANS_FILE
    raise UserError(
        f"{model}: no {KMEANS_FILE} in it; name one with --kmeans: units of a checkpoint are clustered by the "
        "iteration that follows it"
    )


def _layer(kmeans: Path, features: str, layer: int | None) -> int:
    """The layer that a K-means says it is of, which must be the one asked for."""
    if not features:
        if layer is None:
            raise UserError(f"{kmeans} does not say which layer it was fitted on; name it with --layer")
        return layer
    said = re.fullmatch(r"layer (\d+) of encoder \w+", features)
    if said is None:
        raise UserError(f"{kmeans} was fitted on {features}; give 'mfcc' for the model, or the K-means of a layer")
    if layer not in (None, int(said[1])):
        raise UserError(f"{kmeans} was fitted on {features}, not on layer {layer}; leave --layer out")
    return int(said[1])


def _samples(waveform: Tensor | np.ndarray, rate: int) -> Tensor:
    """(samples,) or (channels, samples) at any rate → (samples,) float32 at 16 kHz, channels averaged"""
    samples = torch.as_tensor(waveform).detach().cpu()
    if not samples.is_floating_point():
        found = str(samples.dtype).removeprefix("torch.")
        raise UserError(f"samples are {found}; give floats from -1 to 1, such as int16 divided by 32768")
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and len(samples) > samples.shape[1]):
        raise UserError(
            f"a waveform of shape {tuple(samples.shape)}; it is (samples,) or (channels, samples): transpose it"
        )
    if not samples.isfinite().all():
        raise UserError("samples that are NaN or infinite; look for what made them")
    if reason := unusable(rate):
        raise UserError(f"audio {reason}")
    samples = resampled(samples.float(), rate)
    return samples if samples.ndim == 1 else samples.mean(dim=0)
