"""Reading audio: any file comes out as 16 kHz mono, any segment as the slice of the whole."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import Recording
from lhotse.audio import AudioSource
from lhotse.cut import Cut
from torch.testing import assert_close

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.frames import HOP, SAMPLE_RATE

RECORDINGS = Path(__file__).parents[3] / "shared" / "data" / "librispeech"
FORMATS = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}


def sweep(rate: int, num_channels: int, seconds: float = 1.3) -> np.ndarray:
    """Tones below 2 kHz, another in every channel: (samples, channels)."""
    time = np.arange(round(seconds * rate)) / rate
    pitches = 200 + 300 * np.arange(num_channels)
    return 0.3 * np.sin(2 * np.pi * (pitches * time[:, None] + 400 * time[:, None] ** 2))


def cut_of(path: Path) -> Cut:
    return Recording.from_file(path).resample(SAMPLE_RATE).to_cut()


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Cut]:
    """One FLAC file for each of several sampling rates."""
    folder = tmp_path_factory.mktemp("audio")
    cuts = {}
    for rate in (8_000, 11_025, 16_000, 22_050, 44_100, 48_000):
        soundfile.write(folder / f"{rate}.flac", sweep(rate, 1), rate, subtype="PCM_16")
        cuts[rate] = cut_of(folder / f"{rate}.flac")
    return cuts


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_every_format_rate_and_channel_count_gives_the_mean_of_the_channels_at_16_khz(
    tmp_path: Path, suffix: str, rate: int, num_channels: int
) -> None:
    path = tmp_path / f"audio.{suffix}"
    soundfile.write(path, sweep(rate, num_channels), rate, subtype=FORMATS[suffix])
    waveform = read_waveform(cut_of(path))
    wanted = torch.from_numpy(sweep(SAMPLE_RATE, num_channels).mean(axis=1)).float()
    assert waveform.dtype == torch.float32
    inside = slice(500, len(wanted) - 500)  # the ends of a resampled sweep ring
    tolerance = 2e-3 if suffix in ("wav", "flac") else 0.05  # lossy
    assert_close(waveform[: len(wanted)][inside], wanted[inside], atol=tolerance, rtol=0)
    assert abs(len(waveform) - len(wanted)) <= 1


@given(data=st.data(), rate=st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000]))
@settings(max_examples=60, deadline=None)
def test_a_segment_is_the_slice_of_the_whole_at_any_rate(audio: dict[int, Cut], data: st.DataObject, rate: int) -> None:
    cut = audio[rate]
    first = data.draw(st.integers(0, cut.num_samples))
    count = data.draw(st.integers(0, cut.num_samples - first))
    segment, whole = read_waveform(cut, first, count), read_waveform(cut)
    assert len(whole) == cut.num_samples
    assert segment.shape == (count,)
    # resampled values come from the same filter at the same phase, but in another order of summation
    assert_close(segment, whole[first : first + count], atol=0 if rate == SAMPLE_RATE else 1e-6, rtol=0)


@given(data=st.data(), rate=st.sampled_from([16_000, 44_100]))
@settings(max_examples=30, deadline=None)
def test_a_piece_of_a_recording_equals_its_slice(audio: dict[int, Cut], data: st.DataObject, rate: int) -> None:
    whole = audio[rate]
    begin = data.draw(st.integers(0, whole.num_samples - 1))
    size = data.draw(st.integers(1, whole.num_samples - begin))
    piece = replace(whole, id="piece", start=begin / SAMPLE_RATE, duration=size / SAMPLE_RATE)
    assert piece.num_samples == size
    assert_close(read_waveform(piece), read_waveform(whole)[begin : begin + size], atol=1e-6, rtol=0)


@pytest.mark.skipif(not RECORDINGS.is_dir(), reason="the real recordings are not beside this checkout (../shared/data)")
def test_crops_of_librispeech_on_the_frame_grid_equal_the_slice_bit_by_bit() -> None:
    for path in sorted(RECORDINGS.rglob("*.flac"))[:8]:
        cut = cut_of(path)
        whole = read_waveform(cut)
        assert_close(whole, torch.from_numpy(soundfile.read(path, dtype="float32")[0]), atol=0, rtol=0)
        for first in range(0, cut.num_samples - 8000, 37 * HOP):
            assert torch.equal(read_waveform(cut, first, 8000), whole[first : first + 8000])


def test_only_the_channels_of_the_cut_are_read(tmp_path: Path) -> None:
    path = tmp_path / "call.wav"
    soundfile.write(path, sweep(SAMPLE_RATE, 2), SAMPLE_RATE, subtype="FLOAT")
    call = cut_of(path)
    assert_close(read_waveform(call), torch.from_numpy(sweep(SAMPLE_RATE, 2).mean(axis=1)).float())
    for channel in (0, 1):
        side = call.recording.to_cut().to_mono()[channel]
        assert_close(read_waveform(side), torch.from_numpy(sweep(SAMPLE_RATE, 2)[:, channel]).float())


def test_audio_in_memory_equals_the_file(audio: dict[int, Cut]) -> None:
    cut = audio[44_100]
    encoded = Path(cut.recording.sources[0].source).read_bytes()
    recording = replace(cut.recording, sources=[AudioSource("memory", [0], encoded)])
    assert torch.equal(read_waveform(replace(cut, recording=recording), 123, 456), read_waveform(cut, 123, 456))


def damaged(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("this is no audio")
    elif damage == "truncated":
        path.write_bytes(content[: len(content) * 6 // 10])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(400) + content[middle + 400 :])


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "corrupt"])
@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_an_error_names_an_unreadable_file_its_cut_and_the_way_out(tmp_path: Path, damage: str, suffix: str) -> None:
    if (suffix, damage) == ("wav", "corrupt"):
        pytest.skip("PCM has no checksum: any bytes are samples")
    path = tmp_path / f"audio.{suffix}"
    soundfile.write(path, sweep(SAMPLE_RATE, 1), SAMPLE_RATE, subtype=FORMATS[suffix])
    cut = cut_of(path)
    damaged(path, damage)
    with pytest.raises(ValueError, match="hubert prepare") as error:
        read_waveform(cut)
    assert str(error.value).startswith(f"{cut.id}: {path}")
    assert "\n" not in str(error.value)


def test_a_file_that_lost_a_tenth_of_a_second_is_refused_instead_of_padded(tmp_path: Path) -> None:
    path = tmp_path / "audio.wav"
    soundfile.write(path, sweep(SAMPLE_RATE, 1), SAMPLE_RATE)
    cut = cut_of(path)
    soundfile.write(path, sweep(SAMPLE_RATE, 1)[:-1600], SAMPLE_RATE)
    with pytest.raises(ValueError, match=r"ends at 1\.200 s, before the 1\.300 s"):
        read_waveform(cut)


def test_a_segment_outside_the_cut_or_a_manifest_at_another_rate_is_refused(audio: dict[int, Cut]) -> None:
    cut = audio[16_000]
    for first, count in [(-1, 5), (0, cut.num_samples + 1), (cut.num_samples + 1, 0), (5, -2)]:
        with pytest.raises(ValueError, match="ask for a segment inside it"):
            read_waveform(cut, first, count)
    other = Recording.from_file(audio[8_000].recording.sources[0].source).to_cut()
    with pytest.raises(ValueError, match="8000 Hz"):
        read_waveform(other)
    with pytest.raises(ValueError, match="Speed is not applied"):
        read_waveform(cut.perturb_speed(1.1))
    with pytest.raises(ValueError, match="MixedCut"):
        read_waveform(cut.append(cut))
