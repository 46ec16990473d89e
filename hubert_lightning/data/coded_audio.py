"""Audio of any codec, decoded by FFmpeg's libraries through PyAV. A segment is always the slice of the whole."""

import logging
import mmap
import os
import re
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from typing import IO, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition

log = logging.getLogger(__name__)

File = str | bytes
"""An absolute path, or the content of a file."""

RUN_UP = 5.0
"""Seconds that a decoder is given before a segment; see `CONVERGING`."""

CONVERGING = {"mp3float", "vorbis", "flac", "alac", "wavpack", "tta", "g722", "adpcm_ms", "adpcm_ima_wav"}
"""Codecs that are decoded to the same bits from any packet on, after a second at most; the test of segments checks it
on noise, voice, tones, silence and a constant. All others are decoded from the start of the file: AAC and AC-3 draw
noise, MPEG layer 2 dithers, Opus, GSM and G.726 predict from all that came before."""

GRAIN = 64
"""Packets between two entries of the table of where packets begin."""

RECENT = 1.0
"""Seconds that are kept, for a reader of one block after another whose blocks overlap by a filter's length."""

TABLES_KEPT = 1024
"""Files, for each thread, whose table of packets is kept; one takes 20 kB an hour of MP3."""

STATING = {"mov,mp4,m4a,3gp,3g2,mj2", "flac", "wv", "tta", "ape", "matroska,webm"}
"""Containers that state how long they are; others have FFmpeg estimate it, from the bit rate or the size."""

NOTHING = np.zeros((0, 1), np.float32)

FULL_SCALE = {"u8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "flt": 1.0, "dbl": 1.0}
"""Largest value of FFmpeg's sample formats, by their names; the same formats in planes have a p behind them."""


class Form(NamedTuple):
    """Form of decoded audio: sampling rate in Hz, FFmpeg's name of the layout of the channels, number of channels."""

    rate: int
    layout: str
    channels: int


class CodedAudio:
    """Audio of any codec, decoded by FFmpeg's libraries.

    FFmpeg's own seeking goes by time stamps, which many files lack or round. Here a segment is found by counting: the
    file is read from its start without being decoded up to a run-up before the segment, and a table says at which
    sample every 64th packet begins. The table grows with what is decoded; a segment beyond it is reached by decoding.
    Audio is converted to the form that is given, or that the first frame has.

    Attributes:
        form: Sampling rate, layout and number of channels of what is read.
        empty: Whether no sample can be decoded.
        stated: Length in seconds that the file states, None if it states none.
        frames: Number of packets that the header of an MP3 file counts, None without one.
        num_packets: Number of packets that were read by `blocks`.
        num_bytes: Bytes of these packets together.
        failed: Numbers of the packets that could not be decoded.
        span: Seconds from the first packet's time stamp to the end of the last's.
        container: FFmpeg's name of the container.
        codec: FFmpeg's name of the decoder.
        alone: Whether the file holds no video or picture.

    Raises:
        OSError, av.FFmpegError: The file is missing, or holds no audio that FFmpeg knows.
    """

    def __init__(self, file: File, form: Form | None = None) -> None:
        self._file = file
        self._starts = array("q", [0])  # the sample with which every GRAIN-th packet begins
        self._converges = True
        self._form = form
        self._recent = deque[tuple[int, np.ndarray]]()  # the last blocks, and the sample that each begins with
        self._recent_from: int | None = None
        self.stated: float | None = None
        self.frames: int | None = None
        self.num_packets = self.num_bytes = 0
        self.failed: set[int] = set()
        self.span = 0.0
        self.container, self.codec, self.alone = "", "", True
        self._restart()
        while not self._end and self._advance():
            pass
        self.empty = not self._end
        self.rate, _, self.num_channels = self.form = self._form or Form(0, "", 0)

    def read(self, first: int, num_samples: int) -> np.ndarray:
        begin, aligned = self._place(first)
        # Continue decoding, unless the segment lies before what was decoded or a jump reaches it sooner
        if self._recent_from is None or first < self._recent_from or begin * GRAIN > self._next:
            self._restart(begin, aligned)
        while self._end < first + num_samples and self._advance():
            if len(self._recent) > 2 * GRAIN:
                self._forget(first)
            if self._jumped and not self._converges:  # this decoder does not count as it was expected to
                self._restart()
        parts = [block[max(first - start, 0) : max(first + num_samples - start, 0)] for start, block in self._recent]
        self._forget(self._end - round(RECENT * self.rate))
        return np.concatenate([np.zeros((0, self.num_channels), np.float32), *(part for part in parts if len(part))])

    def blocks(self) -> Iterator[np.ndarray]:
        self.num_packets = self.num_bytes = 0
        waiting: list[np.ndarray] = []
        num_samples = 0
        for _, block in self._decoded(0):
            waiting += [block] if len(block) else []
            num_samples += len(block)
            if num_samples > 30 * max(self.rate, 1):
                yield np.concatenate(waiting)
                waiting, num_samples = [], 0
        if waiting:
            yield np.concatenate(waiting)

    def close(self) -> None:
        """Close the file, but keep the table: the next segment opens it again."""
        self._packets.close()
        self._recent.clear()
        self._recent_from = None

    @property
    def jumps(self) -> bool:
        """Whether a segment is reached without decoding all that lies before it."""
        return self._converges

    def _place(self, first: int) -> tuple[int, int]:
        """Entries of the table: where decoding starts for a segment, and where what is decoded counts."""
        if not self._converges:
            return 0, 0
        aligned = bisect_right(self._starts, first) - 1
        begin = bisect_right(self._starts, self._starts[aligned] - round(RUN_UP * self.rate)) - 1
        return (begin, aligned) if begin > 0 else (0, 0)

    def _restart(self, begin: int = 0, aligned: int = 0) -> None:
        """Decode from an entry of the table on; what is decoded counts from another entry on."""
        self._packets = self._decoded(begin * GRAIN)
        self._jumped = begin > 0
        self._next = begin * GRAIN
        while self._next < aligned * GRAIN and next(self._packets, None) is not None:
            self._next += 1
        self._end = self._starts[aligned]
        self._recent.clear()
        self._recent_from = self._end

    def _advance(self) -> bool:
        """Decode one more packet; False at the end of the file."""
        decoded = next(self._packets, None)
        if decoded is None:
            return False
        number, block = decoded
        place, inside = divmod(number, GRAIN)
        if not inside and place == len(self._starts):
            self._starts.append(self._end)
        elif not inside and self._starts[place] != self._end:
            self._converges = False
        self._recent.append((self._end, block))
        self._end += len(block)
        self._next = number + 1
        return True

    def _forget(self, first: int) -> None:
        """Drop blocks that end before a sample, but for the last."""
        while len(self._recent) > 1 and self._recent[1][0] <= first:
            self._recent.popleft()
            self._recent_from = self._recent[0][0]

    def _decoded(self, begin: int) -> Generator[tuple[int, np.ndarray], None, None]:
        """Each packet from number `begin` on, and its samples, (samples, channels) float32."""
        convert = _Converter()
        with _opened(self._file) as container:
            stream = container.streams.best("audio")
            if not isinstance(stream, av.AudioStream) or stream.codec_context is None:  # an unknown codec
                raise OSError("there is no audio in it that FFmpeg decodes")
            stream.codec_context.thread_count = 1  # as many packets out as in; recordings are decoded in parallel
            self.codec = stream.codec_context.name
            self._converges &= self.codec in CONVERGING
            late = 0
            for number, packet in enumerate(_packets(container, stream)):
                if number == 0:
                    self._describe(container, stream, packet)
                    late = _priming_left(container, stream, packet)
                if number < begin:
                    continue
                frames = self._frames(stream, number, packet)
                if packet.has_sidedata("new_extradata") and number > 0:
                    self._converges = False  # another stream begins, which needs its own codebooks
                if frames and self._form is None:
                    self._form = Form(frames[0].sample_rate, frames[0].layout.name, frames[0].layout.nb_channels)
                blocks = [block for frame in frames for block in convert(frame, self._form)]
                if not packet.size:  # the end
                    blocks += convert.rest()
                self._converges &= not convert.used
                block = np.concatenate(blocks) if len(blocks) > 1 else blocks[0] if blocks else NOTHING
                yield number, block[late:]
                late = max(late - len(block), 0)

    def _frames(self, stream: av.AudioStream, number: int, packet: av.Packet) -> list[av.AudioFrame]:
        self.num_packets, self.num_bytes = self.num_packets + 1, self.num_bytes + packet.size
        if packet.pts is not None and packet.duration is not None and packet.time_base:
            self.span = max(self.span, float((packet.pts + packet.duration) * packet.time_base) - self._begins)
        try:
            return stream.decode(packet)
        except av.FFmpegError as error:
            log.debug("packet %d at byte %s cannot be decoded: %s", number, packet.pos, error)
            self.failed.add(number)
            return []

    def _describe(self, container: InputContainer, stream: av.AudioStream, first: av.Packet) -> None:
        """Find out what the file says about itself."""
        name = self.container = container.format.name
        self._begins = float((first.pts or 0) * (first.time_base or 0))
        film = [video for video in container.streams.video if not video.disposition & Disposition.attached_pic]
        if name == "matroska,webm" and container.duration and not film:
            self.stated = container.duration / av.time_base
        elif name in STATING and stream.duration and stream.time_base:
            self.stated = float(stream.duration * stream.time_base)
        if name == "mp3":
            self.frames = _frames_of_mp3(self._file, first.pos)
        self.alone = not container.streams.video


class ChainedAudio:
    """Ogg or FLAC files joined end to end, as streams of radio are: each has its own rate and channels.

    The file is held in memory, and its parts are decoded to count them before a segment is read: convert such files to
    FLAC if they are read often.

    Attributes:
        parts: The files that have samples, all converted to the form of the first.
    """

    def __init__(self, contents: list[bytes]) -> None:
        self.parts: list[CodedAudio] = []
        for content in contents:
            try:
                part = CodedAudio(content, self.parts[0].form if self.parts else None)
            except av.EOFError:  # headers alone
                continue
            self.parts += [] if part.empty else [part]
        self.rate, _, self.num_channels = self.parts[0].form if self.parts else Form(0, "", 0)
        self._starts = [0]

    def read(self, first: int, num_samples: int) -> np.ndarray:
        audio = [np.zeros((0, self.num_channels), np.float32)]
        for number, part in enumerate(self.parts):
            if number + 1 == len(self._starts):
                self._starts.append(self._starts[-1] + sum(map(len, part.blocks())))
            start, end = self._starts[number : number + 2]
            if start < first + num_samples and end > first:
                begin = max(first - start, 0)
                audio.append(part.read(begin, first + num_samples - start - begin))
            if end >= first + num_samples:
                break
        return np.concatenate(audio)

    def blocks(self) -> Iterator[np.ndarray]:
        for part in self.parts:
            yield from part.blocks()

    def close(self) -> None:
        """Close the parts."""
        for part in self.parts:
            part.close()


class _Converter:
    """Frames of any form → blocks of one form, (samples, channels) float32.

    Attributes:
        used: Whether a frame had another form.
    """

    def __init__(self) -> None:
        self._before: tuple[int, int] | None = None
        self._resampler: av.AudioResampler | None = None
        self.used = False

    def __call__(self, frame: av.AudioFrame, form: Form | None) -> list[np.ndarray]:
        own = frame.sample_rate, frame.layout.nb_channels
        changed = self.rest() if own != self._before else []
        self._before = own
        if form is None or own == (form.rate, form.channels):
            return [*changed, _samples(frame)]
        self.used = True
        if self._resampler is None:
            self._resampler = av.AudioResampler("fltp", form.layout, form.rate)
        return [*changed, *map(_samples, self._resampler.resample(frame))]

    def rest(self) -> list[np.ndarray]:
        """What the filter still holds."""
        if self._resampler is None:
            return []
        last = [_samples(frame) for frame in self._resampler.resample(None)]
        self._resampler = None
        return last


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """(samples, channels) float32 in [-1, 1]"""
    name = frame.format.name
    # PyAV 18 knows no s64, and crashes where it counts planes beyond FFmpeg's eight
    if name.removesuffix("p") not in FULL_SCALE or (name.endswith("p") and frame.layout.nb_channels > 7):
        [frame] = av.AudioResampler("flt", frame.layout, frame.sample_rate).resample(frame)
        name = frame.format.name
    values, scale = frame.to_ndarray(), FULL_SCALE[name.removesuffix("p")]
    values = values.T if name.endswith("p") else values.reshape(-1, frame.layout.nb_channels)
    if values.dtype == np.uint8:
        values = values - np.float32(128)
    return values if values.dtype == np.float32 and scale == 1 else (values / scale).astype(np.float32)


@contextmanager
def _opened(file: File) -> Iterator[InputContainer]:
    # FFmpeg is given the content, not the name, and no protocol, so that a file which is a playlist opens no others
    with (
        BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as content,
        av.open(_Seekable(content), "r", options={"protocol_whitelist": "none"}, metadata_errors="ignore") as container,
    ):
        yield container


class _Seekable:
    """A file in which seeking to nowhere is an error to FFmpeg, not a traceback that PyAV prints."""

    def __init__(self, content: IO[bytes]) -> None:
        self.read, self.tell = content.read, content.tell
        self.name = str(getattr(content, "name", ""))  # by which FFmpeg knows files without a head
        self._content = content

    def seek(self, offset: int, whence: int = 0) -> int:
        """As that of a file, or -1."""
        try:
            return self._content.seek(offset, whence)
        except (OSError, ValueError):
            return -1


def _packets(container: InputContainer, stream: av.AudioStream) -> Iterator[av.Packet]:
    """The packets of a stream.

    Raises:
        OSError: PyAV cannot read on, in whatever way: it raises exceptions of many types on odd files.
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
            raise OSError(f"FFmpeg cannot read on: {type(error).__name__}: {error}") from error
        yield packet


def _priming_left(container: InputContainer, stream: av.AudioStream, first: av.Packet) -> int:
    """Samples of Opus's priming that FFmpeg leaves in, since older versions wrote it at another rate into Matroska."""
    head = stream.codec_context.extradata or b""
    if container.format.name != "matroska,webm" or not head.startswith(b"OpusHead") or len(head) < 12:
        return 0
    skipped = bytes(first.get_sidedata("skip_samples") or b"") if first.has_sidedata("skip_samples") else b""
    removed = int.from_bytes(skipped[:4], "little")
    return max(int.from_bytes(head[10:12], "little") - removed, 0)  # RFC 7845, 5.1: pre-skip at 48 kHz


def _frames_of_mp3(file: File, first_packet: int | None) -> int | None:
    """How many frames an MP3 file has, if the one before its first packet is a Xing header, which counts them."""
    if not first_packet:
        return None
    longest = 2048  # bytes of a frame
    with BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as content:
        content.seek(max(first_packet - longest, 0))
        before = content.read(min(first_packet, longest))
    # It stands behind the frame's header of 4 bytes and its side information, whose length depends on the channels
    for mark in (b"Xing", b"Info"):
        at = before.rfind(mark)
        headers = [before[at - side - 4 : at - side - 2] for side in (32, 17, 9) if at >= side + 4]
        counted = before[at + 7 : at + 12]  # the last of four bytes of flags, and the number
        if any(header[0] == 0xFF and header[1] & 0xE0 == 0xE0 for header in headers) and counted[:1] and counted[0] & 1:
            return int.from_bytes(counted[1:], "big")
    return None


def head_of(file: File) -> bytes:
    """The first 16 bytes of a file."""
    if isinstance(file, bytes):
        return file[:16]
    with open(file, "rb") as content:
        return content.read(16)


_kept = threading.local()


def coded_audio(file: File) -> CodedAudio | ChainedAudio:
    """A decoder for a file; that of a path is kept for this thread, open until another file is asked for."""
    if isinstance(file, bytes):
        return decoder_of(file)
    status = os.stat(file)
    key = (file, status.st_size, status.st_mtime_ns)
    if getattr(_kept, "process", None) != os.getpid():  # a forked process shares the position in open files
        _kept.process, _kept.audio = os.getpid(), OrderedDict[tuple[str, int, int], CodedAudio | ChainedAudio]()
    if _kept.audio and next(reversed(_kept.audio)) != key:
        last, audio = _kept.audio.popitem()
        audio.close()
        if isinstance(audio, CodedAudio):  # a chain holds the content of its file
            _kept.audio[last] = audio
    _kept.audio[key] = _kept.audio.pop(key, None) or decoder_of(file)
    if len(_kept.audio) > TABLES_KEPT:
        _kept.audio.popitem(last=False)
    chosen: CodedAudio | ChainedAudio = _kept.audio[key]
    return chosen


def decoder_of(file: File) -> CodedAudio | ChainedAudio:
    """A new decoder for a file."""
    contents = chain(file)
    return ChainedAudio(contents) if contents else CodedAudio(file)


def chain(file: File) -> list[bytes]:
    """The Ogg or FLAC files that are joined in one; none if there is only one, or another format.

    An Ogg file begins with pages that begin streams, a FLAC file with its mark and a block of 34 bytes.
    """
    head = head_of(file)[:4]
    if head not in (b"OggS", b"fLaC"):
        return []
    if isinstance(file, bytes):
        return _links(file, head)
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _links(content, head)


def _links(content: bytes | mmap.mmap, head: bytes) -> list[bytes]:
    if head == b"fLaC":
        starts = [mark.start() for mark in re.finditer(rb"fLaC[\x00\x80]\x00\x00\x22", content)]
    else:
        starts, after_data = [], True
        for page in re.finditer(rb"OggS\x00(.)", content, re.DOTALL):
            begins = bool(page[1][0] & 2)
            if begins and after_data:
                starts.append(page.start())
            after_data = not begins
    return [content[start:end] for start, end in pairwise([*starts, len(content)])] if len(starts) > 1 else []
