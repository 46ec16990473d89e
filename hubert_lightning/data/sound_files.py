"""Samples of one audio file, whatever its format.

soundfile reads PCM and FLAC, and FFmpeg's libraries (`coded_audio`) every other format. A few old telephony codecs that
only libsndfile decodes are read by soundfile from the start. `open_audio` chooses the reader for every verb.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Protocol

import numpy as np
import soundfile

from hubert_lightning.data.chained_audio import ChainedAudio, joined_files
from hubert_lightning.data.coded_audio import CodedAudio
from hubert_lightning.data.ffmpeg import File, head_of

MAX_DECODERS = 1024
"""Files, for each thread, whose decoder is kept with its table of packets; a table takes 20 kB an hour of MP3."""
PCM = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"}
ALAC = {"ALAC_16", "ALAC_20", "ALAC_24", "ALAC_32"}
"""Codecs in CAF, whose last packet FFmpeg loses."""
ONLY_LIBSNDFILE = {"G721_32", "G723_24", "G723_40", "NMS_ADPCM_16", "NMS_ADPCM_24", "NMS_ADPCM_32", "VOX_ADPCM"}
ONLY_LIBSNDFILE |= {"DPCM_8", "DPCM_16"}
"""Codecs that FFmpeg mistakes or does not know; libsndfile decodes them, but cannot seek in them."""
HEADERS = tuple(b"RIFF RIFX RF64 FORM fLaC .snd dns. caff NIST PVF1 2BIT Exte".split())
"""First bytes of the files that soundfile reads. It accepts others, but counts and seeks wrongly in MP3 and in corrupt
Ogg Vorbis, and reads floating-point numbers in W64 as integers."""


class Audio(Protocol):
    """An open audio file.

    Attributes:
        rate: Sampling rate in Hz.
        num_channels: Number of channels.
    """

    rate: int
    num_channels: int

    def read(self, first: int, num_samples: int) -> np.ndarray:
        """Return the segment from sample `first` on, (samples, channels) float32, shorter where the file ends."""
        ...

    def blocks(self) -> Iterator[np.ndarray]:
        """Decode the file from its start to its end, in blocks (samples, channels) float32 of seconds to a minute."""
        ...


@contextmanager
def open_audio(file: File, is_whole: Callable[[int, int], bool] | None = None) -> Iterator[Audio]:
    """Open an audio file of any format.

    Args:
        file: Absolute path or content.
        is_whole: Function of a number of samples and a sampling rate that checks whether they are the whole file. If
            libsndfile expects fewer, as in joined FLAC files or after a wrong header, FFmpeg reads the file.

    Raises:
        OSError, soundfile.SoundFileError, av.FFmpegError: The file is missing, or has no audio that can be decoded.
    """
    plain = PlainAudio.opened(file)
    if plain is not None:
        with plain:
            if is_whole is None or plain.sequential or is_whole(plain.num_samples, plain.rate):
                yield plain
                return
    coded = coded_audio(file)
    try:
        if not coded.rate:
            raise OSError("there are no samples in it that can be decoded")
        yield coded
    finally:
        if isinstance(file, bytes):  # the decoder of a path is kept
            coded.close()


class PlainAudio:
    """PCM or FLAC, read by soundfile, or a codec that only libsndfile decodes.

    Attributes:
        rate: Sampling rate in Hz.
        num_channels: Number of channels.
        num_samples: Length in samples that libsndfile expects.
        sequential: Whether libsndfile cannot seek in the file, so every segment is decoded from its start.
    """

    def __init__(self, sound: soundfile.SoundFile) -> None:
        self._sound = sound
        self.rate, self.num_channels, self.num_samples = sound.samplerate, sound.channels, sound.frames
        self.sequential = sound.subtype in ONLY_LIBSNDFILE

    @classmethod
    def opened(cls, file: File) -> "PlainAudio | None":
        """Open a file, or return None if FFmpeg has to read it."""
        headless = isinstance(file, str) and file.lower().endswith(".vox")
        if not headless and not head_of(file).startswith(HEADERS):
            return None
        try:
            sound = soundfile.SoundFile(BytesIO(file) if isinstance(file, bytes) else file)
        except soundfile.SoundFileError:
            return None
        plain = sound.subtype in PCM | ALAC | ONLY_LIBSNDFILE or sound.format == "FLAC"
        if plain and 0 < sound.frames < 2**62:  # FLAC that was written to a pipe states no length
            return cls(sound)
        sound.close()
        return None

    def __enter__(self) -> "PlainAudio":
        return self

    def __exit__(self, *_: object) -> None:
        self._sound.close()

    def read(self, first: int, num_samples: int) -> np.ndarray:
        """Return the segment from sample `first` on, (samples, channels) float32, shorter where the file ends."""
        if self.sequential:
            self._skip(first)
        else:
            self._sound.seek(min(first, self.num_samples))
        segment: np.ndarray = self._sound.read(num_samples, dtype="float32", always_2d=True)
        return segment

    def blocks(self) -> Iterator[np.ndarray]:
        """Decode the file from its start to its end, in blocks (samples, channels) float32 of a minute."""
        # `SoundFile.blocks` continues after the end of a truncated file, with arbitrary memory
        size = 60 * self.rate
        while len(block := self._sound.read(size, dtype="float32", always_2d=True)):
            yield block
            if len(block) < size:
                return

    def _skip(self, num_samples: int) -> None:
        while num_samples and len(skipped := self._sound.read(min(num_samples, 60 * self.rate), dtype="float32")):
            num_samples -= len(skipped)


_decoders = threading.local()


def coded_audio(file: File) -> CodedAudio | ChainedAudio:
    """Open a decoder; that of a path is kept for this thread, open until another file is read."""
    if isinstance(file, bytes):
        return decoder_of(file)
    status = os.stat(file)
    key = (file, status.st_size, status.st_mtime_ns)
    if getattr(_decoders, "process", None) != os.getpid():  # a forked process shares the position in open files
        _decoders.process, _decoders.audio = os.getpid(), OrderedDict[tuple[str, int, int], CodedAudio | ChainedAudio]()
    if _decoders.audio and next(reversed(_decoders.audio)) != key:
        last, audio = _decoders.audio.popitem()
        audio.close()
        if isinstance(audio, CodedAudio):  # a chain holds the content of its file
            _decoders.audio[last] = audio
    _decoders.audio[key] = _decoders.audio.pop(key, None) or decoder_of(file)
    if len(_decoders.audio) > MAX_DECODERS:
        _decoders.audio.popitem(last=False)
    chosen: CodedAudio | ChainedAudio = _decoders.audio[key]
    return chosen


def close_decoders() -> None:
    """Close the decoders that are kept for this thread, so that files which are removed do not stay open."""
    if getattr(_decoders, "process", None) != os.getpid():
        return
    while _decoders.audio:
        _, audio = _decoders.audio.popitem()
        audio.close()


def decoder_of(file: File) -> CodedAudio | ChainedAudio:
    """Open a new decoder."""
    contents = joined_files(file)
    return ChainedAudio(contents) if contents else CodedAudio(file)


def reason_of(error: Exception) -> str:
    """The message of a reader's exception, without its number and the path."""
    reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return str(reason).strip() or type(error).__name__
