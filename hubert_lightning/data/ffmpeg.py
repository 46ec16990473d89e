"""FFmpeg's libraries through PyAV: containers, packets, and frames as arrays of samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import IO, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition

File = str | bytes
"""An absolute path, or the content of a file."""

FULL_SCALE = {"u8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "flt": 1.0, "dbl": 1.0}
"""Largest value of FFmpeg's sample formats, by name; the names of the same formats in planes end in p."""

MAX_MP3_FRAME = 2048
"""Bytes of a frame of MP3."""

PROTECTED_CODECS = {"drms", "enca", "aavd"}
"""Names that MP4 files give to encrypted audio: of Apple's shop, of Common Encryption, and of Audible."""


class Form(NamedTuple):
    """Form of decoded audio.

    Attributes:
        rate: Sampling rate in Hz.
        layout: FFmpeg's name of the layout of the channels.
        channels: Number of channels.
    """

    rate: int
    layout: str
    channels: int


class Converter:
    """Converts frames of any form to blocks of one form, (samples, channels) float32.

    Attributes:
        used: Whether a frame had another form.
    """

    def __init__(self) -> None:
        self._last_form: tuple[int, int] | None = None
        self._resampler: av.AudioResampler | None = None
        self.used = False

    def __call__(self, frame: av.AudioFrame, form: Form | None) -> list[np.ndarray]:
        """Convert a frame to a form, or to its own if none is given."""
        frame_form = frame.sample_rate, frame.layout.nb_channels
        changed = self.rest() if frame_form != self._last_form else []
        self._last_form = frame_form
        if form is None or frame_form == (form.rate, form.channels):
            return [*changed, _samples(frame)]
        self.used = True
        if self._resampler is None:
            self._resampler = av.AudioResampler("fltp", form.layout, form.rate)
        return [*changed, *map(_samples, self._resampler.resample(frame))]

    def rest(self) -> list[np.ndarray]:
        """Return the samples that the resampling filter still holds."""
        if self._resampler is None:
            return []
        last = [_samples(frame) for frame in self._resampler.resample(None)]
        self._resampler = None
        return last


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """Samples of a frame: (samples, channels) float32 in [-1, 1]."""
    name = frame.format.name
    # PyAV 18 does not know s64, and crashes on more planes than FFmpeg's eight
    if name.removesuffix("p") not in FULL_SCALE or (name.endswith("p") and frame.layout.nb_channels > 7):
        [frame] = av.AudioResampler("flt", frame.layout, frame.sample_rate).resample(frame)
        name = frame.format.name
    values, scale = frame.to_ndarray(), FULL_SCALE[name.removesuffix("p")]
    values = values.T if name.endswith("p") else values.reshape(-1, frame.layout.nb_channels)
    if values.dtype == np.uint8:
        values = values - np.float32(128)
    return values if values.dtype == np.float32 and scale == 1 else (values / scale).astype(np.float32)


def audio_stream(container: InputContainer) -> av.AudioStream:
    """Return the stream of audio in a container.

    Raises:
        OSError: There is none, or none with a known codec.
    """
    stream = container.streams.best("audio")
    if stream is None and any(not video.disposition & Disposition.attached_pic for video in container.streams.video):
        raise OSError("it is a video without sound")
    if not isinstance(stream, av.AudioStream) or stream.codec_context is None:  # an unknown codec
        raise OSError("there is no audio in it that FFmpeg decodes")
    return stream


def check_unprotected(stream: av.AudioStream, first: "av.Packet[av.AudioStream]") -> None:
    """Refuse encrypted audio, which decodes to noise or to nothing.

    Args:
        stream: Stream of audio.
        first: Its first packet.

    Raises:
        OSError: The audio is encrypted.
    """
    try:
        codec = stream.codec_context.codec_tag
    except UnicodeDecodeError:  # a number of WAV formats, such as that of G.722
        codec = ""
    if codec in PROTECTED_CODECS or first.has_sidedata("encryption_info"):
        raise OSError("it is protected against copying (DRM), and nothing can be decoded without its key")


@contextmanager
def open_container(file: File) -> Iterator[InputContainer]:
    """Open a file so that it cannot make FFmpeg open others: FFmpeg gets its content, no name and no protocol."""
    with (
        BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as content,
        av.open(_Seekable(content), "r", options={"protocol_whitelist": "none"}, metadata_errors="ignore") as container,
    ):
        yield container


class _Seekable:
    """A file whose failed seeks are errors of FFmpeg, not tracebacks that PyAV prints."""

    def __init__(self, content: IO[bytes]) -> None:
        self.read, self.tell = content.read, content.tell
        self.name = str(getattr(content, "name", ""))  # by which FFmpeg recognises files without a header
        self._content = content

    def seek(self, offset: int, whence: int = 0) -> int:
        """Seek as in a file; -1 after an error."""
        try:
            return self._content.seek(offset, whence)
        except (OSError, ValueError):
            return -1


def packets_of(container: InputContainer, stream: av.AudioStream) -> Iterator["av.Packet[av.AudioStream]"]:
    """Read the packets of a stream.

    Raises:
        OSError: PyAV cannot continue; it raises exceptions of many types on odd files.
    """
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            raise
        except Exception as error:
            raise OSError(f"FFmpeg cannot continue: {type(error).__name__}: {error}") from error
        yield packet


def remaining_priming(container: InputContainer, stream: av.AudioStream, first: "av.Packet[av.AudioStream]") -> int:
    """Samples of Opus's priming that FFmpeg does not remove: older versions wrote it at another rate into Matroska."""
    head = stream.codec_context.extradata or b""
    if container.format.name != "matroska,webm" or not head.startswith(b"OpusHead") or len(head) < 12:
        return 0
    skipped = bytes(first.get_sidedata("skip_samples") or b"") if first.has_sidedata("skip_samples") else b""
    removed = int.from_bytes(skipped[:4], "little")
    return max(int.from_bytes(head[10:12], "little") - removed, 0)  # RFC 7845, 5.1: pre-skip at 48 kHz


def mp3_frame_count(file: File, first_packet: int | None) -> int | None:
    """Number of frames of an MP3 file, if the frame before its first packet is a Xing header, which counts them."""
    if not first_packet:
        return None
    with BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as content:
        content.seek(max(first_packet - MAX_MP3_FRAME, 0))
        before = content.read(min(first_packet, MAX_MP3_FRAME))
    # It follows the frame's header of 4 bytes and its side information, whose length depends on the channels
    for mark in (b"Xing", b"Info"):
        position = before.rfind(mark)
        headers = [before[position - side - 4 : position - side - 2] for side in (32, 17, 9) if position >= side + 4]
        flags_and_count = before[position + 7 : position + 12]  # the last of four bytes of flags, and the number
        if (
            any(header[0] == 0xFF and header[1] & 0xE0 == 0xE0 for header in headers)
            and flags_and_count[:1]
            and flags_and_count[0] & 1
        ):
            return int.from_bytes(flags_and_count[1:], "big")
    return None


def head_of(file: File) -> bytes:
    """The first 16 bytes of a file."""
    if isinstance(file, bytes):
        return file[:16]
    with open(file, "rb") as content:
        return content.read(16)
