"""Recordings that the tests of `hubert prepare` list in other systems' files."""

from pathlib import Path

import numpy as np
import soundfile

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.frames import SAMPLE_RATE


def noise(seconds: float, seed: int, channels: int = 1, rate: int = SAMPLE_RATE) -> np.ndarray:
    """(samples, channels) float32."""
    samples = np.random.default_rng(seed).uniform(-0.3, 0.3, (round(seconds * rate), channels))
    return samples.astype(np.float32)


def write_noise(path: Path, seconds: float, seed: int, channels: int = 1, rate: int = SAMPLE_RATE) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = noise(seconds, seed, channels, rate)
    soundfile.write(path, samples, rate, "PCM_16")
    return soundfile.read(path, dtype="float32", always_2d=True)[0]


def rows(manifest: Path) -> dict[str, tuple[float, float, str | None, str | None]]:
    """Start, duration, text and speaker of each utterance."""
    table = {}
    for cut in read_manifest(manifest):
        segment = next(iter(cut.supervisions), None)
        table[cut.id] = (cut.start, cut.duration, segment and segment.text, segment and segment.speaker)
    return table


def samples_of(manifest: Path, utterance: str) -> np.ndarray:
    [cut] = [cut for cut in read_manifest(manifest) if cut.id == utterance]
    return read_waveform(cut).numpy()
