"""Audio files as ffmpeg, telephones, browsers and old archives write them: read whole, with ffmpeg's samples."""

import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from helpers import run_verb, save_ctc

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.coded_audio import CodedAudio
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.data.prepare import prepare_folder
from hubert_lightning.data.prepare_csv import prepare_csv
from hubert_lightning.data.probe import Sound, probe
from hubert_lightning.data.sound_files import coded_audio, open_audio
from hubert_lightning.features.recordings import listed
from hubert_lightning.frames import SAMPLE_RATE

SECONDS = 37

needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="ffmpeg, which tells what is right, is not installed: apt install ffmpeg"
)

# name → how ffmpeg makes it of a source: 44.1 kHz stereo, 16 kHz or 8 kHz
ENCODED = {
    "cbr.mp3": "44 -b:a 128k",
    "cbr-without-header.mp3": "44 -b:a 48k -write_xing 0",
    "vbr.mp3": "44 -q:a 6",
    "vbr-without-header.mp3": "44 -q:a 6 -write_xing 0",
    "tagged.mp3": "16 -b:a 64k -write_xing 0 -metadata title=Info -id3v2_version 3",
    "speech.mp3": "16 -b:a 24k",
    "vorbis.ogg": "44 -c:a libvorbis",
    "opus.opus": "44 -c:a libopus",
    "voice.ogg": "16 -c:a libopus -b:a 12k -application voip",
    "speex.spx": "16 -c:a libspeex",
    "flac.flac": "44",
    "u8.wav": "16 -c:a pcm_u8",
    "s16.wav": "16",
    "s24.wav": "16 -c:a pcm_s24le",
    "s32.wav": "16 -c:a pcm_s32le",
    "f32.wav": "16 -c:a pcm_f32le",
    "alaw.wav": "8 -c:a pcm_alaw",
    "mulaw.wav": "8 -c:a pcm_mulaw",
    "ima.wav": "16 -c:a adpcm_ima_wav",
    "ms.wav": "16 -c:a adpcm_ms",
    "rf64.wav": "16 -rf64 always",
    "mp3.wav": "16 -c:a libmp3lame",
    "g722.wav": "16 -c:a g722",
    "g726.wav": "8 -c:a g726 -b:a 32k",
    "g7231.wav": "8 -c:a g723_1 -b:a 6.3k",
    "g722.g722": "16 -c:a g722",
    "phone.m4a": "44",
    "alac.m4a": "44 -c:a alac",
    "call.mp4": "16 -c:a aac",
    "aac.aac": "44",
    "browser.webm": "44",
    "vorbis.webm": "44 -c:a libvorbis",
    "mp3.mka": "44 -c:a libmp3lame",
    "windows.wma": "44",
    "wavpack.wv": "44",
    "tta.tta": "44",
    "ac3.ac3": "44",
    "aiff.aiff": "16",
    "au.au": "16",
    "caf.caf": "16",
    "w64.w64": "16",
    "creative.voc": "44",
    "layer2.mp2": "44",
    "eight.m4a": "44 -ac 8 -b:a 256k",
    "float.w64": "16 -c:a pcm_f32le",
    "s64.wav": "16 -c:a pcm_s64le",
    "narrow.webm": "16 -c:a libopus",
    "mono.flac": "16",
    "film.avi": "44",
    "surround.m4a": "44 -ac 6",
}
# what is joined end to end → the single files
JOINED = {
    "twice.mp3": ["cbr.mp3", "cbr.mp3"],
    "twice-without-header.mp3": ["vbr-without-header.mp3"] * 2,
    "twice.ogg": ["vorbis.ogg", "vorbis.ogg"],
    "twice.opus": ["opus.opus", "opus.opus"],
    "mixed.ogg": ["vorbis.ogg", "voice.ogg"],
    "twice.flac": ["flac.flac", "flac.flac"],
    "mixed.flac": ["mono.flac", "flac.flac"],
    "mixed.mp3": ["speech.mp3", "cbr.mp3"],
    "twice.aac": ["aac.aac", "aac.aac"],
    "twice.webm": ["browser.webm", "browser.webm"],
}
# what is wrong with the header of s16.wav → where it is counted from, its format, its value
HEADERS = {
    "riff-0": (b"RIFF", 4, "<I", 0),
    "riff-100": (b"RIFF", 4, "<I", 100),
    "byte-rate": (b"fmt ", 16, "<I", 12345),
    "data-ffffffff": (b"data", 4, "<I", 0xFFFFFFFF),
    "data-7fffffff": (b"data", 4, "<I", 0x7FFFFFFF),
    "data-7ffff000": (b"data", 4, "<I", 0x7FFFF000),
    "data-2e9": (b"data", 4, "<I", 2_000_000_000),
    "data-0": (b"data", 4, "<I", 0),
    "data-36-more": (b"data", 4, "<I", 2 * 16_000 * SECONDS + 36),
    "data-odd": (b"data", 4, "<I", 2 * 16_000 * SECONDS + 1),
}
PARTS = ["piped.flac", "part-0.flac", "part-1.flac", "part-2.flac", "piped.wav"]
EVERY = [*ENCODED, *JOINED, *(f"{name}.wav" for name in HEADERS), *PARTS]


def ffmpeg(*args: object, **kwargs: object) -> bytes:
    command = ["ffmpeg", "-v", "error", "-y", *map(str, args)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, **kwargs).stdout  # type: ignore[call-overload]


def sounds() -> np.ndarray:
    """Noise, a voice, a tone, silence, a constant, and noise that comes and goes."""
    draw, rate = np.random.default_rng(5), 44_100
    time = np.arange(SECONDS * rate) / rate
    noise = 0.1 * draw.standard_normal(len(time)).clip(-3, 3)
    pitch = np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.7 * time)) / rate
    voice = 0.3 * np.sin(2 * np.pi * pitch) + 0.2 * np.sin(6 * np.pi * pitch) + 0.1 * np.sin(24 * np.pi * pitch)
    tone, constant = 0.4 * np.sin(2 * np.pi * 440 * time), np.full(len(time), 0.05)
    gated = noise * (np.sin(2 * np.pi * time) > 0)
    kinds = [noise, voice, tone, 0 * time, constant, gated, voice + 0.1 * noise]
    return np.choose((time / SECONDS * len(kinds)).astype(int), kinds)


@pytest.fixture(scope="module")
def battery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all these files, of 37 seconds of sounds that decoders remember in different ways."""
    folder = tmp_path_factory.mktemp("battery")
    source = folder.with_name("source.wav")
    soundfile.write(source, np.stack([sounds(), np.roll(sounds(), 20_000)], axis=1), 44_100)
    sources = {"44": source}
    for rate in ("16", "8"):
        sources[rate] = folder.with_name(f"source{rate}.wav")
        ffmpeg("-i", source, "-ac", 1, "-ar", f"{rate}000", sources[rate])
    for name, how in ENCODED.items():
        rate, *options = how.split()
        ffmpeg("-i", sources[rate], *options, folder / name)
    for name, parts in JOINED.items():
        (folder / name).write_bytes(b"".join((folder / part).read_bytes() for part in parts))
    for name, (chunk, offset, layout, value) in HEADERS.items():
        content = bytearray((folder / "s16.wav").read_bytes())
        struct.pack_into(layout, content, content.index(chunk) + offset, value)
        (folder / f"{name}.wav").write_bytes(content)
    for name in ("piped.flac", "piped.wav"):
        (folder / name).write_bytes(ffmpeg("-i", sources["16"], "-f", Path(name).suffix[1:], "-"))
    ffmpeg("-i", sources["16"], "-f", "segment", "-segment_time", 15, "-c:a", "flac", folder / "part-%d.flac")
    return folder


def by_ffmpeg(path: Path, num_channels: int) -> np.ndarray:
    """(samples, channels) float32"""
    raw = ffmpeg("-i", path, "-map", "0:a:0", "-f", "f32le", "-c:a", "pcm_f32le", "-")
    return np.frombuffer(raw, "<f4").reshape(-1, num_channels)


@needs_ffmpeg
@pytest.mark.parametrize("name", [name for name in EVERY if name not in JOINED])
def test_a_file_is_as_long_as_ffmpeg_decodes_it_with_the_same_samples(battery: Path, name: str) -> None:
    sound = probe(battery / name)
    assert isinstance(sound, Sound)
    expected = by_ffmpeg(battery / name, sound.num_channels)
    assert abs(sound.num_samples - len(expected)) <= 0.020 * sound.sampling_rate
    with open_audio(str(battery / name), lambda num_samples, rate: num_samples == sound.num_samples) as audio:
        samples = audio.read(0, sound.num_samples)
    both = min(len(samples), len(expected))
    # Versions sum in another order, and round IMA ADPCM otherwise; AC-3 adds noise of its own
    allowed = {"ac3.ac3": 0.05, "ima.wav": 0.005}.get(name, 1e-4)
    np.testing.assert_allclose(samples[:both], expected[:both], atol=allowed, rtol=0)


@needs_ffmpeg
@pytest.mark.parametrize("name", JOINED)
def test_files_joined_end_to_end_are_as_long_as_they_are_one_by_one(battery: Path, name: str) -> None:
    sound = probe(battery / name)
    assert isinstance(sound, Sound)
    singles = [probe(battery / part) for part in JOINED[name]]
    seconds = sum(single.num_samples / single.sampling_rate for single in singles if isinstance(single, Sound))
    # a decoder's delay is removed at the first of joined MP3 and AAC files alone, as ffmpeg does
    allowed = 0.100 if name.endswith(("mp3", "aac", "webm")) else 0.020
    assert abs(sound.num_samples / sound.sampling_rate - seconds) <= allowed


@pytest.mark.slow
@needs_ffmpeg
def test_a_folder_of_all_of_them_is_prepared_whole_and_every_segment_is_the_slice_of_the_whole(
    battery: Path, tmp_path: Path
) -> None:
    prepare_folder(battery, tmp_path, max_duration=100.0, heldout=0)
    cuts = {cut.id: cut for cut in read_manifest(tmp_path / f"{battery.name}.jsonl.gz")}
    assert sorted(cuts) == sorted(EVERY)
    assert not (tmp_path / f"{battery.name}.refused.tsv").exists()
    draw = random.Random(0)
    for cut in cuts.values():
        whole = read_waveform(cut)
        assert whole.shape == (cut.num_samples,)
        for first in [0, cut.num_samples - 5000, *(draw.randrange(cut.num_samples - 5000) for _ in range(2))]:
            segment = read_waveform(cut, first, 5000)
            # at another rate, values come from the same filter in another order of summation
            torch.testing.assert_close(segment, whole[first : first + 5000], atol=1e-6, rtol=0, msg=cut.id)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("name", [name for name in [*ENCODED, *JOINED] if name != "g722.g722"])  # known by its name
def test_segments_are_bit_equal_whether_decoding_continues_jumps_or_restarts(battery: Path, name: str) -> None:
    audio = coded_audio(str(battery / name))
    whole = np.concatenate(list(audio.blocks()))
    draw = random.Random(1)
    firsts = [draw.randrange(len(whole)) for _ in range(10)]
    for first in [*firsts, *sorted(firsts)]:
        assert np.array_equal(audio.read(first, 20_000), whole[first : first + 20_000])
    assert np.array_equal(coded_audio((battery / name).read_bytes()).read(firsts[0], 99), whole[firsts[0] :][:99])


def test_recordings_of_telephones_in_amr_are_read(tmp_path: Path) -> None:
    """Made by PyAV, since Debian's ffmpeg lacks the encoder."""
    path = tmp_path / "calls" / "call.amr"
    path.parent.mkdir()
    time = np.arange(8_000 * 10) / 8_000
    tone = (8_000 * np.sin(2 * np.pi * 300 * time)).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libopencore_amrnb", rate=8_000, layout="mono", bit_rate=12_200)
        for start in range(0, len(tone), 160):
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + 160], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 8_000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    prepare_folder(path.parent, tmp_path, heldout=0)
    [cut] = read_manifest(tmp_path / "calls.jsonl.gz")
    whole = read_waveform(cut)
    assert abs(len(whole) - 160_000) <= 640
    assert whole.abs().max() > 0.15
    torch.testing.assert_close(read_waveform(cut, 70_000, 5_000), whole[70_000:75_000], atol=1e-6, rtol=0)


@needs_ffmpeg
@pytest.mark.parametrize("name", ["voice.ogg", "speech.mp3", "phone.m4a", "g722.wav", "g726.wav", "vorbis.webm"])
def test_a_segment_does_not_depend_on_what_was_read_before(battery: Path, name: str) -> None:
    alone = CodedAudio(str(battery / name)).read(200_000, 8_000)
    for others in ([290_000, 0], [0, 150_000], [199_000]):
        audio = CodedAudio(str(battery / name))
        for first in others:
            audio.read(first, 5_000)
        assert np.array_equal(audio.read(200_000, 8_000), alone)


@needs_ffmpeg
def test_a_long_file_is_entered_near_the_segment_once_its_packets_are_counted(battery: Path, tmp_path: Path) -> None:
    ffmpeg("-stream_loop", 9, "-i", battery / "speech.mp3", "-c:a", "copy", tmp_path / "long.mp3")
    audio = CodedAudio(str(tmp_path / "long.mp3"))
    end = audio.read(350 * SAMPLE_RATE, SAMPLE_RATE)
    audio.read(0, SAMPLE_RATE)
    before = audio.num_packets
    assert np.array_equal(audio.read(350 * SAMPLE_RATE, SAMPLE_RATE), end)
    packets = SAMPLE_RATE / 576
    assert audio.num_packets - before < 15 * packets  # of 350 s


@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [("wav", "GSM610"), ("wav", "G721_32"), ("au", "G723_24"), ("au", "G723_40"), ("wav", "NMS_ADPCM_24")]
    + [("aiff", "IMA_ADPCM"), ("caf", "ALAC_16"), ("w64", "GSM610"), ("vox", "VOX_ADPCM")],
)
def test_codecs_of_telephony_are_prepared_and_read_in_segments(tmp_path: Path, suffix: str, subtype: str) -> None:
    time = np.arange(8_000 * 20) / 8_000
    tone = 0.3 * np.sin(2 * np.pi * (200 + 5 * time) * time)
    path = tmp_path / "phone" / f"call.{suffix}"
    path.parent.mkdir()
    soundfile.write(path, tone, 8_000, subtype=subtype, format="RAW" if suffix == "vox" else None)
    prepare_folder(path.parent, tmp_path, max_duration=60.0, heldout=0)
    [cut] = read_manifest(tmp_path / "phone.jsonl.gz")
    whole = read_waveform(cut)
    assert abs(len(whole) - 16_000 * 20) < 0.020 * 16_000
    wanted = torch.from_numpy(np.interp(np.arange(len(whole)) / 16_000, time, tone)).float()
    assert (whole - wanted)[1000:-1000].square().mean() < 0.02 * wanted.square().mean()
    for first in (0, 12_345, 200_001, len(whole) - 4000):
        torch.testing.assert_close(read_waveform(cut, first, 4000), whole[first : first + 4000], atol=1e-6, rtol=0)


def cut_short(path: Path, share: float = 0.6) -> Path:
    short = path.with_name(f"short-{path.name}")
    short.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return short


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("s16.wav", "truncated: its header promises 37.00 s, and 22.20 s are there"),
        ("aiff.aiff", "truncated: its header promises 37.00 s"),
        ("au.au", "truncated: its header promises 37.00 s"),
        ("caf.caf", "truncated: its header promises"),
        ("w64.w64", "truncated: its header promises 37.00 s"),
        ("ima.wav", "truncated: its header promises"),
        ("ms.wav", "truncated: its header promises"),
        ("g722.wav", "truncated: its header promises"),
        ("flac.flac", "truncated: it states 37.00 s, and 2"),
        ("cbr.mp3", "truncated: its header counts 1418 frames, and 8"),
        ("browser.webm", "truncated: it states 37.0"),
        ("sphere.sph", "truncated: its header promises 37.00 s"),
        ("wavpack.wv", "unreadable"),
        ("phone.m4a", "unreadable"),
    ],
)
def test_a_file_that_is_shorter_than_its_header_states_is_refused(
    battery: Path, tmp_path: Path, name: str, reason: str
) -> None:
    if name == "sphere.sph":
        samples, rate = soundfile.read(battery / "s16.wav")
        soundfile.write(tmp_path / name, samples, rate, format="NIST")
        path = tmp_path / name
    else:
        path = shutil.copy(battery / name, tmp_path)
    assert str(probe(cut_short(Path(path)))).startswith(reason)


@needs_ffmpeg
def test_half_of_a_file_is_not_lost_without_a_remark(battery: Path, tmp_path: Path) -> None:
    for name in ("s16.wav", "tta.tta", "phone.m4a"):  # of which FFmpeg reads the first, too
        twice = tmp_path / name
        twice.write_bytes((battery / name).read_bytes() * 2)
        sound = probe(twice)
        assert isinstance(sound, Sound)
        assert [remark.partition(":")[0] for remark in sound.remarks] == ["not read whole"]
    two = tmp_path / "two.mka"
    ffmpeg("-i", battery / "s16.wav", "-i", battery / "s16.wav", "-map", 0, "-map", 1, "-c:a", "copy", two)
    sound = probe(two)
    assert isinstance(sound, Sound)
    assert "several streams" in sound.remarks[0]


@needs_ffmpeg
def test_data_besides_the_audio_of_a_file_change_nothing(battery: Path, tmp_path: Path) -> None:
    mp3 = (battery / "cbr.mp3").read_bytes()
    (tmp_path / "page.mp3").write_bytes(mp3 + b"<html>" * 30_000)
    (tmp_path / "junk.mp3").write_bytes(random.Random(0).randbytes(3000) + mp3)
    for suffix in ("m4a", "mka", "avi"):  # a title in Latin-1
        title = tmp_path / f"title.{suffix}"
        subprocess.run(["ffmpeg", "-v", "error", "-i", battery / "s16.wav", "-metadata", b"title=M\xfcller", title])
    for path in sorted(tmp_path.iterdir()):
        sound = probe(path)
        assert isinstance(sound, Sound)
        assert abs(sound.num_samples / sound.sampling_rate - SECONDS) < 0.08
        assert not sound.remarks or sound.remarks[0].startswith("partly corrupt")


@needs_ffmpeg
@pytest.mark.parametrize("name", ["flac.flac", "vorbis.ogg", "opus.opus", "cbr.mp3", "phone.m4a", "browser.webm"])
def test_a_part_that_was_copied_out_has_ffmpegs_samples_in_every_segment(
    battery: Path, tmp_path: Path, name: str
) -> None:
    part = tmp_path / "part" / name
    part.parent.mkdir()
    ffmpeg("-ss", 10.37, "-i", battery / name, "-t", 15, "-c", "copy", part)
    prepare_folder(part.parent, tmp_path, heldout=0)
    [cut] = read_manifest(tmp_path / "part.jsonl.gz")
    sound = probe(part)
    assert isinstance(sound, Sound)
    expected = by_ffmpeg(part, sound.num_channels)
    assert abs(sound.num_samples - len(expected)) <= 0.020 * sound.sampling_rate
    with open_audio(str(part), lambda num_samples, rate: num_samples == sound.num_samples) as audio:
        samples = audio.read(0, sound.num_samples)
    both = min(len(samples), len(expected))
    np.testing.assert_allclose(samples[:both], expected[:both], atol=1e-4, rtol=0)
    whole = read_waveform(cut)
    torch.testing.assert_close(read_waveform(cut, 100_001, 5_000), whole[100_001:105_001], atol=1e-6, rtol=0)


@needs_ffmpeg
def test_a_corrupt_packet_is_remarked_and_many_are_refused(battery: Path, tmp_path: Path) -> None:
    content = bytearray((battery / "vbr-without-header.mp3").read_bytes())
    some, many = tmp_path / "some.mp3", tmp_path / "many.mp3"
    content[50_000:50_600] = bytes(600)
    some.write_bytes(content)
    for start in range(10_000, len(content), 1_000):
        content[start : start + 300] = random.Random(start).randbytes(300)
    many.write_bytes(content)
    for path, kinds in ((some, ("partly corrupt", "out of range")), (many, ("corrupt", "out of range"))):
        found = probe(path)
        told = found.remarks[0] if isinstance(found, Sound) and found.remarks else str(found)
        assert told.startswith(kinds), (path.name, told)


@needs_ffmpeg
def test_a_flipped_bit_in_flac_is_refused_and_a_part_of_a_file_is_not(battery: Path, tmp_path: Path) -> None:
    content = (battery / "flac.flac").read_bytes()
    draw = random.Random(0)
    for number in range(8):
        flipped = bytearray(content)
        flipped[draw.randrange(10_000, len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / f"{number}.flac").write_bytes(flipped)
        assert str(probe(tmp_path / f"{number}.flac")).startswith(("corrupt", "truncated"))
    ffmpeg("-ss", 10, "-i", battery / "flac.flac", "-c", "copy", "-t", 15, tmp_path / "part.flac")
    sound = probe(tmp_path / "part.flac")
    assert isinstance(sound, Sound)
    assert abs(sound.num_samples / sound.sampling_rate - 15) < 0.2
    assert sound.remarks[0].startswith("wrong header: it states 37.00 s")


def written(write: Callable[[Path], None], path: Path) -> Sound | str:
    write(path)
    return probe(path)


SPEECH = 0.2 * np.random.default_rng(0).standard_normal(SAMPLE_RATE).clip(-3, 3)


def as_wav(samples: np.ndarray, subtype: str | None = None) -> Callable[[Path], None]:
    return lambda path: soundfile.write(path, samples, SAMPLE_RATE, subtype=subtype)


@pytest.mark.parametrize(
    ("samples", "subtype", "reason"),
    [
        (SPEECH * 20_000, "FLOAT", "out of range: its samples reach 12"),
        ((SPEECH * 6_000).astype(np.int32), "PCM_32", "inaudible: its samples reach"),
        (np.stack([SPEECH, -SPEECH], axis=1), "PCM_16", "cancelled: the mean of its channels is silent"),
        (np.where(np.arange(SAMPLE_RATE) == 777, np.nan, SPEECH), "FLOAT", "corrupt: it has samples that are not"),
        (np.where(np.arange(SAMPLE_RATE) == 777, np.inf, SPEECH), "DOUBLE", "corrupt: it has samples that are not"),
    ],
)
def test_samples_that_are_certainly_wrong_are_refused(
    tmp_path: Path, samples: np.ndarray, subtype: str, reason: str
) -> None:
    assert str(written(as_wav(samples, subtype), tmp_path / "a.wav")).startswith(reason)


@pytest.mark.parametrize(
    ("samples", "subtype", "kinds"),
    [
        (SPEECH, "PCM_16", []),
        (np.where(np.arange(SAMPLE_RATE) % 999 == 0, 1.3, SPEECH), "FLOAT", []),  # a little above full scale
        ((SPEECH * 2**23).astype(np.int32), "PCM_32", ["very quiet"]),
        ((20 * SPEECH).clip(-1, 1), "PCM_16", ["clipped"]),
        ((20 * SPEECH).clip(-1, 1), "ULAW", ["clipped"]),
        (np.stack([SPEECH, -0.9 * SPEECH], axis=1), "PCM_16", ["cancelling"]),
        (np.stack([SPEECH, 0 * SPEECH], axis=1), "PCM_16", []),
        (np.zeros(SAMPLE_RATE), "PCM_16", ["silent"]),
        (np.full(SAMPLE_RATE, 0.25), "PCM_16", ["silent"]),
    ],
)
def test_unusual_samples_are_remarked(tmp_path: Path, samples: np.ndarray, subtype: str, kinds: list[str]) -> None:
    sound = written(as_wav(samples, subtype), tmp_path / "a.wav")
    assert isinstance(sound, Sound)
    assert [remark.partition(":")[0] for remark in sound.remarks] == kinds


def test_remarks_are_counted_and_listed_and_silence_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "wild"
    root.mkdir()
    for name, samples in {"a": SPEECH, "b": (20 * SPEECH).clip(-1, 1), "c": (9 * SPEECH).clip(-1, 1)}.items():
        soundfile.write(root / f"{name}.wav", samples, SAMPLE_RATE)
    soundfile.write(root / "empty room.wav", 0 * SPEECH, SAMPLE_RATE)
    for name in ("notes.pdf", "more.pdf", "README"):
        (root / name).write_text("no audio")
    prepare_folder(root, tmp_path, heldout=0)
    assert set(read_manifest(tmp_path / "wild.jsonl.gz").ids) == {"a.wav", "b.wav", "c.wav"}
    told = capsys.readouterr().out
    assert "2 clipped, such as" in told
    assert "skipped, since their names have no suffix of audio: 2 .pdf, 1 without a suffix" in told
    remarks = (tmp_path / "wild.remarks.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in remarks] == [str(root / "b.wav"), str(root / "c.wav")]
    assert "silent: every sample is 0" in (tmp_path / "wild.refused.tsv").read_text()


def test_a_name_that_is_not_utf8_is_refused_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "names"
    root.mkdir()
    soundfile.write(root / "plain.wav", SPEECH, SAMPLE_RATE)
    for name in (b"caf\xe9.wav", b"tab\tand\nline.wav"):
        shutil.copy(root / "plain.wav", bytes(root) + b"/" + name)
    prepare_folder(root, tmp_path, heldout=0)
    assert set(read_manifest(tmp_path / "names.jsonl.gz").ids) == {"plain.wav", "tab\tand\nline.wav"}
    assert "caf\\xe9.wav: its name is not UTF-8" in capsys.readouterr().out
    assert len((tmp_path / "names.refused.tsv").read_text().splitlines()) == 1


def test_a_file_under_several_names_counts_once(tmp_path: Path) -> None:
    root = tmp_path / "links"
    root.mkdir()
    soundfile.write(root / "a.wav", SPEECH, SAMPLE_RATE)
    (root / "b.wav").symlink_to("a.wav")
    (root / "c.wav").hardlink_to(root / "a.wav")
    prepare_folder(root, tmp_path, heldout=0)
    assert list(read_manifest(tmp_path / "links.jsonl.gz").ids) == ["a.wav"]
    assert (tmp_path / "links.refused.tsv").read_text().count("the same file as") == 2
    assert listed([root / "a.wav", root / ".." / "links" / "a.wav", root]) == [root / "a.wav", root / "c.wav"]


def test_a_table_counts_a_file_once_however_its_path_is_written(tmp_path: Path) -> None:
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", SPEECH, SAMPLE_RATE)
    (tmp_path / "below").mkdir()
    paths = ["a.wav", str(tmp_path / "a.wav"), "below/../a.wav", "./a.wav", "b.wav"]
    rows = "".join(f"{path},said {number}\n" for number, path in enumerate(paths))
    (tmp_path / "table.csv").write_text("path,text\n" + rows)
    prepare_csv(tmp_path / "table.csv", tmp_path / "out", heldout=0.5)
    ids = [cut.id for name in ("train", "dev") for cut in read_manifest(tmp_path / "out" / f"{name}.jsonl.gz")]
    assert sorted(ids) == ["a.wav", "b.wav"]


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "secret.mp3", SPEECH, SAMPLE_RATE)
    for name, content in {
        "concat.wav": "ffconcat version 1.0\nfile secret.mp3\n",
        "hls.mp3": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{tmp_path}/secret.mp3\n#EXT-X-ENDLIST\n",
    }.items():
        (tmp_path / name).write_text(content)
        assert str(probe(tmp_path / name)).startswith("unreadable")


def test_files_without_audio_cause_no_message_of_a_decoder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for suffix in ("mp3", "wav", "m4a", "ogg", "flac"):
        path = tmp_path / f"text.{suffix}"
        path.write_text("this is no audio, " * 100)
        assert str(probe(path)).startswith("unreadable")
    assert capfd.readouterr().err == ""


def test_odd_paths_of_a_table_are_refused_alone(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", SPEECH, SAMPLE_RATE)
    rows = [["a.wav", "one"], ["b" * 300 + ".wav", "two"], ["c" * 5000, "three"], ["", "four"]]
    (tmp_path / "table.csv").write_text("path,text\n" + "".join(f"{path},{text}\n" for path, text in rows))
    prepare_csv(tmp_path / "table.csv", tmp_path / "out", heldout=0.0)
    assert list(read_manifest(tmp_path / "out" / "train.jsonl.gz").ids) == ["a.wav"]
    assert (tmp_path / "out" / "train.refused.tsv").read_text().count("not there") == 2


@needs_ffmpeg
def test_a_chain_may_have_links_without_samples(battery: Path, tmp_path: Path) -> None:
    whole = (battery / "vorbis.ogg").read_bytes()
    pages = [place.start() for place in re.finditer(b"OggS", whole)]
    headers = whole[: pages[2]]  # in two pages
    for name, content in {"first.ogg": headers + whole, "last.ogg": whole + headers}.items():
        (tmp_path / name).write_bytes(content)
        sound = probe(tmp_path / name)
        assert isinstance(sound, Sound)
        assert abs(sound.num_samples / sound.sampling_rate - SECONDS) < 0.02


@needs_ffmpeg
def test_corrupt_files_of_any_kind_end_in_a_sentence_and_are_closed(battery: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    names = [name for name in ENCODED if not name.startswith("surround")]
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(150):
        name = draw.choice(names)
        content = bytearray((battery / name).read_bytes()[:60_000])
        for _ in range(draw.randrange(1, 60)):
            content[draw.randrange(min(len(content), draw.choice([100, 4000, 60_000])))] = draw.randrange(256)
        path = tmp_path / f"{number}{Path(name).suffix}"
        path.write_bytes(content)
        found = probe(path)
        assert isinstance(found, Sound) or found == "empty" or ": " in found or found.startswith("sampled at")
        path.unlink()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_headers_that_lead_nowhere_end_in_a_sentence(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.w64", SPEECH, SAMPLE_RATE)
    soundfile.write(tmp_path / "a.wav", SPEECH, SAMPLE_RATE)
    for name, size_at, layout in (("a.w64", 40 + 16, "<Q"), ("a.wav", 12 + 4, "<I"), ("a.wav", 36 + 4, "<I")):
        for size in (0, 1, 2**31, 2**32 - 1):
            content = bytearray((tmp_path / name).read_bytes())
            struct.pack_into(layout, content, size_at, size)
            (tmp_path / "odd.wav").write_bytes(content)
            found = probe(tmp_path / "odd.wav")
            assert isinstance(found, Sound) or ": " in found or found == "empty"
    (tmp_path / "odd.wav").write_bytes(b"NIST_1A\n   1024\nsample_count -i x\n" + bytes(2000))
    assert str(probe(tmp_path / "odd.wav")).startswith("unreadable")


def mp4(path: Path, sound: bool = True) -> bytes:
    """A short film, or its sound alone."""
    with av.open(str(path), "w", format="mp4") as container:
        if sound:
            audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            noise = np.random.default_rng(0).normal(0, 3000, (1, SAMPLE_RATE)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            container.mux([*audio.encode(frame), *audio.encode(None)])
        else:
            video = container.add_stream("mpeg4", rate=10, width=16, height=16)
            picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
            container.mux([*video.encode(picture), *video.encode(None)])
    return path.read_bytes()


@pytest.mark.parametrize("kind", [b"drms", b"enca"])
def test_protected_audio_is_refused_in_a_sentence_whatever_it_decodes_to(kind: bytes, tmp_path: Path) -> None:
    content = mp4(tmp_path / "free.m4a")
    assert isinstance(probe(tmp_path / "free.m4a"), Sound)
    entry = content.index(b"mp4a", content.index(b"stsd"))
    (tmp_path / "bought.m4p").write_bytes(content[:entry] + kind + content[entry + 4 :])
    assert probe(tmp_path / "bought.m4p") == (
        "unreadable: it is protected against copying (DRM), and nothing can be decoded without its key"
    )


@needs_ffmpeg
def test_audio_in_common_encryption_is_refused_in_a_sentence(tmp_path: Path) -> None:
    mp4(tmp_path / "free.m4a")
    keys = ["-encryption_key", "76a6c65c" * 4, "-encryption_kid", "a7e61c37" * 4]
    encryption = ["-encryption_scheme", "cenc-aes-ctr", *keys]
    ffmpeg("-i", tmp_path / "free.m4a", "-c", "copy", *encryption, tmp_path / "lent.mp4")
    assert "protected against copying (DRM)" in str(probe(tmp_path / "lent.mp4"))


def test_a_video_without_sound_and_a_protected_file_do_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mp4(tmp_path / "film.mp4", sound=False)
    content = mp4(tmp_path / "talk.m4a")
    (tmp_path / "bought.m4p").write_bytes(content.replace(b"mp4a", b"drms"))
    save_ctc(tmp_path / "best.ckpt")
    assert run_verb("transcribe", tmp_path / "best.ckpt", tmp_path) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path / 'talk.m4a'}\t")
    assert f"{tmp_path / 'film.mp4'}: unreadable: it is a video without sound" in printed.err
    assert f"{tmp_path / 'bought.m4p'}: unreadable: it is protected against copying (DRM)" in printed.err
    assert "2 of 3 files failed" in printed.err
