"""Recordings in a page: MP3 and spectrograms as data URIs, which need no file beside the page."""

import base64
import logging
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile
import torch
from PIL import Image

from hubert_lightning.data.audio import resampled, unusable
from hubert_lightning.data.sound_files import open_audio
from hubert_lightning.errors import UserError
from hubert_lightning.features.spectrogram import log_mel
from hubert_lightning.frames import SAMPLE_RATE

log = logging.getLogger(__name__)

BIT_RATE = 32_000
"""Bits in a second of MP3, which all browsers play: speech of 16 kHz is clear in it."""
MAX_CLIP = 120.0
"""Seconds of a clip; longer utterances are cut."""
BUDGET = 18_000_000
"""Characters of all clips of a page."""
DYNAMIC_RANGE, NOISE = 70.0, 40
"""Decibels between the loudest and the faintest visible part of a spectrogram; and the percentage of its points, those
of the background noise, that are left white."""


class Place(NamedTuple):
    """Part of an audio file.

    Args:
        source: Path of the file.
        channel: Channel of the file; None for the mean of all channels.
        start: First second.
        duration: Length in seconds.
    """

    source: str
    channel: int | None
    start: float
    duration: float


@dataclass
class Clips:
    """Clips of a page, each of them once.

    Args:
        audio: Whether recordings go into the page. Without them, spectrograms are left out too.
        budget: Characters of all clips. Further ones are left out, and counted.
        uris: Data URI of each clip by its key.
        missing: Files that cannot be read.
        left_out: Number of clips beyond the budget.
    """

    audio: bool = True
    budget: int = BUDGET
    uris: dict[str, str] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    left_out: int = 0
    _keys: dict[Place, str] = field(default_factory=dict)

    def add(self, place: Place | None) -> str | None:
        """Add a clip.

        Args:
            place: Part of an audio file; None where it is unknown.

        Returns:
            Key of the clip; None if the page has no such clip.
        """
        if place is None or not self.audio:
            return None
        if place in self._keys:
            return self._keys[place]
        samples = self.samples(place)
        if samples is None:
            return None
        uri = data_uri("audio/mpeg", mp3(samples))
        if len(uri) > self.budget:
            self.left_out += 1
            return None
        self.budget -= len(uri)
        key = self._keys[place] = f"c{len(self._keys)}"
        self.uris[key] = uri
        return key

    def samples(self, place: Place) -> np.ndarray | None:
        """Read a part of an audio file: (samples,) float32 at 16 kHz; None if it cannot be read."""
        if not self.audio or place.source in self.missing:
            return None
        try:
            return read_samples(place)
        except (OSError, ValueError, soundfile.SoundFileError, av.FFmpegError) as error:
            log.debug("%s: %s", place.source, error)
            self.missing.add(place.source)
            return None


@lru_cache(maxsize=8)
def read_samples(place: Place) -> np.ndarray:
    """Read a part of an audio file.

    Args:
        place: Part of the file, of which at most two minutes are read.

    Returns:
        (samples,) float32 at 16 kHz.

    Raises:
        OSError, ValueError: The file cannot be read, or has no such part.
    """
    path = Path(place.source)
    if not path.is_file():
        raise UserError(f"{path}: no such audio file")
    with open_audio(str(path.absolute())) as file:
        if reason := unusable(file.rate):
            raise UserError(f"{path}: {reason}")
        length = min(place.duration, MAX_CLIP)
        segment = file.read(round(max(place.start, 0) * file.rate), round(length * file.rate))
        rate = file.rate
    if not len(segment):
        raise UserError(f"{path}: ends before {place.start:.2f} s")
    if place.channel is not None and place.channel < segment.shape[1]:
        segment = segment[:, place.channel : place.channel + 1]
    samples: np.ndarray = resampled(torch.from_numpy(segment.mean(axis=1)), rate).numpy()
    return samples


def mp3(samples: np.ndarray) -> bytes:
    """Encode audio.

    Args:
        samples: (samples,) float32 in [-1, 1] at 16 kHz.
    """
    file = BytesIO()
    # metadata of the encoder would make the bytes differ between versions of a library
    with av.open(file, "w", format="mp3", options={"id3v2_version": "0"}) as container:
        stream = container.add_stream("libmp3lame", rate=SAMPLE_RATE, layout="mono")
        stream.bit_rate = BIT_RATE
        whole = np.ascontiguousarray(np.clip(samples, -1, 1)[None], dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(whole, format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


def spectrogram(samples: np.ndarray) -> bytes:
    """Draw a log-mel spectrogram as a WebP image: time to the right, one column for 10 ms; low bands at the bottom.

    Args:
        samples: (samples,) float32 at 16 kHz.
    """
    decibels = log_mel(torch.from_numpy(samples)).numpy()  # (bands, columns)
    floor = max(float(decibels.max()) - DYNAMIC_RANGE, float(np.percentile(decibels, NOISE)))
    shade = 1 - np.clip((decibels - floor) / max(float(decibels.max()) - floor, 1e-3), 0, 1)  # dark where it is loud
    file = BytesIO()
    Image.fromarray((255 * shade[::-1]).astype(np.uint8)).save(file, "WEBP", quality=70, method=4)
    return file.getvalue()


def data_uri(kind: str, content: bytes) -> str:
    """Write content as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
