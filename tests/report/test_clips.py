"""Recordings and spectrograms in a page."""

import base64
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from PIL import Image
from run_folders import recording

from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.report.clips import Clips, Place, mp3, read_samples, spectrogram


def decoded(content: bytes) -> np.ndarray:
    with av.open(BytesIO(content)) as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def test_an_mp3_has_the_length_and_the_sound_of_its_samples(tmp_path: Path) -> None:
    samples = read_samples(Place(str(recording(tmp_path / "a.wav", 3.0, pitch=440)), 0, 0.0, 3.0))
    heard = decoded(mp3(samples))
    assert abs(len(heard) - len(samples)) < 0.05 * SAMPLE_RATE
    length = min(len(heard), len(samples))
    assert np.corrcoef(heard[:length], samples[:length])[0, 1] > 0.98
    assert len(mp3(samples)) < 3 * 4_600


def test_a_clip_is_the_part_that_its_place_names(tmp_path: Path) -> None:
    path = recording(tmp_path / "a.wav", 3.0)
    whole = read_samples(Place(str(path), 0, 0.0, 3.0))
    part = read_samples(Place(str(path), None, 1.25, 0.5))
    np.testing.assert_array_equal(part, whole[20_000:28_000])


def test_a_clip_is_in_the_page_once(tmp_path: Path) -> None:
    place = Place(str(recording(tmp_path / "a.wav", 1.0)), 0, 0.0, 1.0)
    clips = Clips()
    assert clips.add(place) == clips.add(place) == "c0"
    assert list(clips.uris) == ["c0"]
    kind, _, content = clips.uris["c0"].partition(",")
    assert kind == "data:audio/mpeg;base64"
    assert len(decoded(base64.b64decode(content))) > 0.9 * SAMPLE_RATE


def test_clips_beyond_the_budget_are_counted(tmp_path: Path) -> None:
    path = str(recording(tmp_path / "a.wav", 2.0))
    clips = Clips(budget=7_000)
    assert [clips.add(Place(path, 0, start, 0.9)) for start in (0.0, 1.0)] == ["c0", None]
    assert clips.left_out == 1


def test_no_recording_is_read_without_audio(tmp_path: Path) -> None:
    clips = Clips(audio=False)
    place = Place(str(recording(tmp_path / "a.wav", 1.0)), 0, 0.0, 1.0)
    assert clips.add(place) is None
    assert clips.samples(place) is None
    assert not clips.uris
    assert not clips.missing


def test_a_missing_recording_is_named(tmp_path: Path) -> None:
    clips = Clips()
    (tmp_path / "text.wav").write_text("no audio")
    for name in ("nowhere.wav", "text.wav", "."):
        assert clips.add(Place(str(tmp_path / name), 0, 0.0, 1.0)) is None
    assert {Path(path).name for path in clips.missing} == {"nowhere.wav", "text.wav", tmp_path.name}


def test_a_spectrogram_is_dark_where_the_tone_is(tmp_path: Path) -> None:
    samples = read_samples(Place(str(recording(tmp_path / "a.wav", 1.0, pitch=1000)), 0, 0.0, 1.0))
    image = np.asarray(Image.open(BytesIO(spectrogram(samples))).convert("L")).astype(float)
    assert abs(image.shape[1] - 100) <= 2  # a column for 10 ms
    darkest = image.mean(axis=1).argmin()
    assert 0.5 < darkest / len(image) < 0.75  # 1 kHz on the mel scale, from the top
