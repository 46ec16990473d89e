"""Audio files, decoded to their end: whether they are usable, and remarks for the user."""

import math
import mmap
import os
import re
import struct
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile

from hubert_lightning.data.audio import unusable
from hubert_lightning.data.chained_audio import ChainedAudio, joined_files
from hubert_lightning.data.coded_audio import CodedAudio
from hubert_lightning.data.sound_files import Audio, PlainAudio, decoder_of, reason_of
from hubert_lightning.frames import SAMPLE_RATE

PLACEHOLDER = 1_900_000_000
"""Bytes from which on a length in a header, if the file has fewer, was written before the length was known."""

CHUNK_LAYOUTS = {b"RIFF": (12, 4, "<I", 0, 2), b"RIFX": (12, 4, ">I", 0, 2), b"FORM": (12, 4, ">I", 0, 2)}
CHUNK_LAYOUTS |= {b"riff": (40, 16, "<Q", 24, 8), b"caff": (8, 4, ">Q", 0, 1)}
"""Layouts of chunks in WAV, AIFF, W64 and CAF: offset of the first chunk, bytes of a chunk's name, format of its size,
bytes of the header that the size includes, and the multiple of bytes to which it is padded."""

LENGTH_TOLERANCE = 0.1
"""Seconds that may be missing of the stated length; some encoders count the samples of their filters."""

FRAME_TOLERANCE = 3
"""Frames by which the header of an MP3 may miscount; some headers count themselves."""

MANY_BYTES = 100_000
"""Bytes outside of the audio stream that deserve a remark; fewer may be tables and headers of packets."""

CLIPPED = 0.98
"""Level from which on a sample counts as clipped; the loudest samples of µ-law and of 8 bits are above it."""

SLOW = 300.0
"""Seconds from which on a file that is decoded from its start for every segment deserves a remark."""


class Sound(NamedTuple):
    """A decoded audio file.

    Attributes:
        sampling_rate: Sampling rate in Hz.
        num_channels: Number of channels.
        num_samples: Number of samples in each channel, at this rate.
        remarks: Unusual properties, each as a kind, a colon, and a sentence.
        silent: Whether all samples are equal.
    """

    sampling_rate: int
    num_channels: int
    num_samples: int
    remarks: tuple[str, ...] = ()
    silent: bool = False


TOO_LONG = "too long"
"""Beginning of the reason against a recording that lasts longer than its caller allows."""


class _TooLong(Exception):
    """A recording lasts longer than its caller allows."""


class _Levels:
    """Levels of all samples of an audio file.

    Args:
        audio: Audio file.
        max_duration: Seconds after which decoding ends.

    Raises:
        _TooLong: The file is longer.
    """

    def __init__(self, audio: Audio, max_duration: float) -> None:
        self.num_samples = self.clipped = 0
        self.lowest, self.highest = np.inf, -np.inf
        self.finite = True
        self.energy = self.energy_of_mean = 0.0
        for block in audio.blocks():
            self._add(block)
            if self.num_samples > max_duration * audio.rate:
                raise _TooLong

    def _add(self, block: np.ndarray) -> None:
        self.num_samples += len(block)
        lowest, highest = float(block.min()), float(block.max())  # NaN if a sample is
        if not np.isfinite(lowest + highest):
            self.finite = False
            return
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        if max(-lowest, highest) >= CLIPPED:
            self.clipped += int(np.count_nonzero(np.abs(block) >= CLIPPED))
        if block.shape[1] > 1:
            flat = block.ravel()
            mean = block.mean(axis=1)
            self.energy += float(flat @ flat) / block.shape[1]
            self.energy_of_mean += float(mean @ mean)

    @property
    def silent(self) -> bool:
        return self.lowest == self.highest

    @property
    def peak(self) -> float:
        return max(-self.lowest, self.highest)

    def mistake(self) -> str | None:
        """Reason to refuse these samples, or None."""
        if not self.finite:
            return "corrupt: it has samples that are not numbers"
        if self.peak > 10:
            return (
                f"out of range: its samples reach {self.peak:.6g}, where full scale is 1; divide them by full scale if "
                "they are integers stored as floating-point numbers; otherwise the file is corrupt: copy it again"
            )
        if self.peak < 2**-15 and not self.silent:
            return (
                f"inaudible: its samples reach {self.peak:.1g}, where full scale is 1, as if integers had been written "
                "into the low bits of a wider type; multiply them"
            )
        if self.energy and self.energy_of_mean < 1e-6 * self.energy:
            return "cancelled: the mean of its channels is silent, since one is the other's negative; keep one of them"
        return None

    def remarks(self, num_channels: int) -> list[str]:
        """Remarks on the samples."""
        if self.silent:
            return [f"silent: every sample is {self.highest:.3g}"]
        remarks = []
        if self.peak < 2**-8:
            remarks.append(f"very quiet: its loudest sample is {self.peak:.2g} of full scale")
        if self.clipped > 0.01 * self.num_samples * num_channels:
            share = self.clipped / (self.num_samples * num_channels)
            remarks.append(f"clipped: {100 * share:.0f} % of its samples are at full scale")
        if self.energy and self.energy_of_mean < 1e-2 * self.energy:
            remarks.append("cancelling: the mean of its channels is nearly silent; keep one of them")
        return remarks


def probe(path: Path, max_duration: float = math.inf) -> Sound | str:
    """Decode an audio file to its end.

    Args:
        path: Audio file.
        max_duration: Seconds of the longest usable recording; a longer one is not decoded further.

    Returns:
        The file's `Sound`, or the reason why it cannot be used: missing, not audio, cut short, too long, or with
        samples that are certainly wrong.
    """
    if not _is_utf8(path):
        return "its name is not UTF-8, and no manifest can hold it: rename it"
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        return "not there: correct its path"
    file = os.path.abspath(path)
    try:
        if not os.path.getsize(file):
            return "empty: it has no bytes; copy it again"
        sound: Sound | str | soundfile.SoundFileError | None = None
        plain = PlainAudio.opened(file)
        if plain is not None:
            with plain:
                sound = _probe_plain(file, plain, max_duration)
        if isinstance(sound, (Sound, str)):
            return sound
        with closing(decoder_of(file)) as coded:
            if isinstance(coded, CodedAudio):
                by_ffmpeg = _probe_coded(file, coded, max_duration)
            else:
                by_ffmpeg = _probe_chained(file, coded, max_duration)
        if plain and sound and isinstance(by_ffmpeg, Sound) and by_ffmpeg.num_samples == plain.num_samples:
            return f"corrupt: {reason_of(sound)}"  # such as a wrong checksum, which FFmpeg does not check
        return by_ffmpeg
    except _TooLong:
        return f"{TOO_LONG}: it lasts more than {max_duration:g} s; cut it into parts"
    except av.InvalidDataError:
        return "unreadable: it is no audio, or a part of it is lost; copy it again, or convert it to WAV or FLAC"
    except (OSError, ValueError, soundfile.SoundFileError, av.FFmpegError) as error:
        return f"unreadable: {reason_of(error)}"


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _probe_plain(file: str, plain: PlainAudio, max_duration: float) -> Sound | str | soundfile.SoundFileError | None:
    """Decode a file with soundfile; None if FFmpeg has to decode it since it may be longer."""
    if reason := unusable(plain.rate):
        return reason
    try:
        levels = _Levels(plain, max_duration)
    except soundfile.SoundFileError as error:
        if plain.sequential:
            raise
        return error
    if levels.num_samples != plain.num_samples or joined_files(file):
        return None
    return _sound_of(file, plain, levels, [])


def _probe_coded(file: str, coded: CodedAudio, max_duration: float) -> Sound | str:
    """Decode a file with FFmpeg's libraries."""
    if coded.rate and (reason := unusable(coded.rate)):
        return reason
    levels = _Levels(coded, max_duration)
    last = coded.num_packets - 1  # the end of the stream counts as a packet
    failed = len(coded.failed - {last - 1})
    if not levels.num_samples:
        return f"corrupt: none of its {last} packets can be decoded" if failed else "empty"
    seconds = levels.num_samples / coded.rate
    missing = (coded.stated or 0) - seconds
    remarks = []
    if coded.frames and last < coded.frames - FRAME_TOLERANCE:
        return f"truncated: its header counts {coded.frames} frames, and {last} are there; copy it again"
    if missing > LENGTH_TOLERANCE:
        if coded.failed or coded.container != "flac":  # a FLAC file may be a part with the header of the whole
            return f"truncated: it states {coded.stated:.2f} s, and {seconds:.2f} s can be decoded; copy it again"
        remarks.append(f"wrong header: it states {coded.stated:.2f} s, and the file holds {seconds:.2f} s")
    if coded.container == "flac" and coded.span - seconds > 1 / coded.rate:  # its frames are numbered
        return f"corrupt: {coded.span - seconds:.3f} s of it cannot be decoded; copy it again"
    if failed > max(2, 0.01 * last):
        return f"corrupt: {failed} of its {last} packets cannot be decoded; copy it again"
    if failed:
        remarks.append(f"partly corrupt: it has packets that cannot be decoded and are left out, {failed} of {last}")
    others = os.path.getsize(file) - coded.num_bytes
    if coded.alone and others > max(MANY_BYTES, coded.num_bytes):
        remarks.append(
            f"not read whole: {others} of its bytes are not of the stream that is read; it may hold several streams, "
            "or several files joined end to end"
        )
    return _sound_of(file, coded, levels, remarks)


def _probe_chained(file: str, chained: ChainedAudio, max_duration: float) -> Sound | str:
    if chained.rate and (reason := unusable(chained.rate)):
        return reason
    return _sound_of(file, chained, _Levels(chained, max_duration), [])


def _sound_of(file: str, audio: Audio, levels: _Levels, remarks: list[str]) -> Sound | str:
    if levels.num_samples == 0:
        return "empty"
    seconds, missing = levels.num_samples / audio.rate, _missing(file)
    if missing * seconds > LENGTH_TOLERANCE:
        promised = (1 + missing) * seconds
        return f"truncated: its header promises {promised:.2f} s, and {seconds:.2f} s are there; copy it again"
    if reason := levels.mistake():
        return reason
    if not remarks and _occurs_again(file, b"WAVEfmt "):
        remarks.append(
            "not read whole: several WAV files joined end to end, of which the first is read; join their samples"
        )
    remarks += levels.remarks(audio.num_channels)
    if audio.rate < SAMPLE_RATE:
        remarks.append(f"low rate: recorded at {audio.rate} Hz; a model of 16 kHz recordings makes more errors on it")
    if seconds > SLOW and isinstance(audio, CodedAudio) and not audio.jumps:
        remarks.append(
            f"slow: {audio.codec} is decoded from its start for every segment, here up to {seconds / 60:.0f} minutes; "
            "convert it to FLAC before training on it"
        )
    return Sound(audio.rate, audio.num_channels, levels.num_samples, tuple(remarks), levels.silent)


def _missing(file: str) -> float:
    """Share of PCM that a header promises beyond the content; 0 if it promises none."""
    with open(file, "rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        size, head = len(whole), whole[:1024]
        if sphere := re.match(rb"NIST_1A\n *(\d+)\n", head):
            fields = (b"sample_count", b"channel_count", b"sample_n_bytes")
            counts = [int(field[1]) for name in fields if (field := re.search(name + rb" -i (\d+)", head))]
            plain = len(counts) == len(fields) and b"embedded" not in head  # compressed, as LDC distributes it
            begin, promised = int(sphere[1]), int(np.prod(counts)) if plain else 0
        elif head.startswith(b".snd"):
            begin, promised = struct.unpack(">II", head[4:12])
        else:
            begin, promised = _sound_chunk(whole)
        present = size - begin
        return promised / present - 1 if 0 < present < promised < PLACEHOLDER else 0.0


def _sound_chunk(whole: mmap.mmap) -> tuple[int, int]:
    """Offset of the audio in a file of chunks, and the bytes that the chunk's header promises; 0 without one."""
    offset, name_size, size_format, counted, padded = CHUNK_LAYOUTS.get(whole[:4], (len(whole), 4, "<I", 0, 1))
    header = name_size + struct.calcsize(size_format)
    while offset + header <= len(whole):
        name = whole[offset : offset + name_size]
        [size] = struct.unpack(size_format, whole[offset + name_size : offset + header])
        if name[:4] in (b"data", b"SSND"):
            return offset + header, size - counted
        offset += header + -(-max(size - counted, 0) // padded) * padded
    return 0, 0


def _occurs_again(file: str, mark: bytes) -> bool:
    """Whether the mark at the start of a file is in the file again."""
    with open(file, "rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        first = whole.find(mark, 0, 4096)
        return first >= 0 and whole.find(mark, first + len(mark)) >= 0
