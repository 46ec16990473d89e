"""Audio of any codec, decoded by FFmpeg's libraries. A segment always equals the slice of the whole file."""

import logging
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterator

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition

from hubert_lightning.data.ffmpeg import (
    Converter,
    File,
    Form,
    audio_stream,
    check_unprotected,
    mp3_frame_count,
    open_container,
    packets_of,
    remaining_priming,
)

log = logging.getLogger(__name__)

RUN_UP = 5.0
"""Seconds that a decoder decodes before a segment; see `CONVERGING_CODECS`."""

CONVERGING_CODECS = {"mp3float", "vorbis", "flac", "alac", "wavpack", "tta", "g722", "adpcm_ms", "adpcm_ima_wav"}
"""Codecs that decode to the same bits from any packet on, after a second at most; the test of segments checks it on
noise, voice, tones, silence and a constant. All others are decoded from the start of the file: AAC and AC-3 draw noise,
MPEG layer 2 dithers, and Opus, GSM and G.726 predict from all earlier samples."""

TABLE_STEP = 64
"""Packets between two entries of the table of packet starts."""

KEPT_SECONDS = 1.0
"""Seconds that are kept for the next segment, which may overlap with this one by the length of a filter."""

STATING_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "flac", "wv", "tta", "ape", "matroska,webm"}
"""Containers that state their length; for others FFmpeg estimates it from the bit rate or the size."""

NOTHING = np.zeros((0, 1), np.float32)


class CodedAudio:
    """Audio of any codec, decoded by FFmpeg's libraries.

    FFmpeg seeks by time stamps, which many files lack or round. Here segments are found by counting samples: packets
    are read from the start of the file, but decoding starts only shortly before the segment. A table holds the first
    sample of every 64th packet. The table grows while the file is decoded; a segment beyond it is reached by decoding.

    Args:
        file: Absolute path or content.
        form: Form that audio is converted to; default: the form of the first frame.

    Attributes:
        rate: Sampling rate in Hz.
        num_channels: Number of channels.
        form: Form of the samples.
        empty: Whether no sample can be decoded.
        stated: Length in seconds according to the file, or None.
        frames: Number of packets that the header of an MP3 file counts, or None.
        num_packets: Number of packets that `blocks` read.
        num_bytes: Total bytes of these packets.
        failed: Numbers of the packets that could not be decoded.
        span: Seconds from the first packet's time stamp to the end of the last's.
        container: FFmpeg's name of the container.
        codec: FFmpeg's name of the decoder.
        alone: Whether the file has no other streams, such as video or pictures.

    Raises:
        OSError, av.FFmpegError: The file is missing, or has no audio that FFmpeg knows.
    """

    def __init__(self, file: File, form: Form | None = None) -> None:
        self._file = file
        self._starts = array("q", [0])  # first sample of every TABLE_STEP-th packet
        self._converges = True
        self._form = form
        self._recent = deque[tuple[int, np.ndarray]]()  # the last blocks, each with its first sample
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
        """Return the segment from sample `first` on, (samples, channels) float32, shorter where the file ends."""
        begin, aligned = self._entries(first)
        # Continue decoding, unless the segment lies before what was decoded or a jump reaches it sooner
        if self._recent_from is None or first < self._recent_from or begin * TABLE_STEP > self._next:
            self._restart(begin, aligned)
        while self._end < first + num_samples and self._advance():
            if len(self._recent) > 2 * TABLE_STEP:
                self._forget(first)
            if self._jumped and not self._converges:  # the packets differ from the table
                self._restart()
        parts = [block[max(first - start, 0) : max(first + num_samples - start, 0)] for start, block in self._recent]
        self._forget(self._end - round(KEPT_SECONDS * self.rate))
        return np.concatenate([np.zeros((0, self.num_channels), np.float32), *(part for part in parts if len(part))])

    def blocks(self) -> Iterator[np.ndarray]:
        """Decode the file from its start to its end, in blocks (samples, channels) float32 of half a minute."""
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
        """Whether a segment is decoded without decoding everything before it."""
        return self._converges

    def _entries(self, first: int) -> tuple[int, int]:
        """Table entries of a segment: where decoding starts, and from where on its samples count."""
        if not self._converges:
            return 0, 0
        aligned = bisect_right(self._starts, first) - 1
        begin = bisect_right(self._starts, self._starts[aligned] - round(RUN_UP * self.rate)) - 1
        return (begin, aligned) if begin > 0 else (0, 0)

    def _restart(self, begin: int = 0, aligned: int = 0) -> None:
        """Start to decode at one entry of the table; the samples count from another entry on."""
        self._packets = self._decoded(begin * TABLE_STEP)
        self._jumped = begin > 0
        self._next = begin * TABLE_STEP
        while self._next < aligned * TABLE_STEP and next(self._packets, None) is not None:
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
        entry, inside = divmod(number, TABLE_STEP)
        if not inside and entry == len(self._starts):
            self._starts.append(self._end)
        elif not inside and self._starts[entry] != self._end:
            self._converges = False
        self._recent.append((self._end, block))
        self._end += len(block)
        self._next = number + 1
        return True

    def _forget(self, first: int) -> None:
        """Drop the blocks that end before a sample, except the last."""
        while len(self._recent) > 1 and self._recent[1][0] <= first:
            self._recent.popleft()
            self._recent_from = self._recent[0][0]

    def _decoded(self, begin: int) -> Generator[tuple[int, np.ndarray], None, None]:
        """Decode packets from number `begin` on: number and samples, (samples, channels) float32, of each."""
        convert = Converter()
        with open_container(self._file) as container:
            stream = audio_stream(container)
            stream.codec_context.thread_count = 1  # one result for each packet; recordings are decoded in parallel
            self.codec = stream.codec_context.name
            self._converges &= self.codec in CONVERGING_CODECS
            late = 0
            for number, packet in enumerate(packets_of(container, stream)):
                if number == 0:
                    check_unprotected(stream, packet)
                    self._describe(container, stream, packet)
                    late = remaining_priming(container, stream, packet)
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

    def _frames(self, stream: av.AudioStream, number: int, packet: "av.Packet[av.AudioStream]") -> list[av.AudioFrame]:
        self.num_packets, self.num_bytes = self.num_packets + 1, self.num_bytes + packet.size
        if packet.pts is not None and packet.duration is not None and packet.time_base:
            self.span = max(self.span, float((packet.pts + packet.duration) * packet.time_base) - self._begins)
        try:
            return stream.decode(packet)
        except av.FFmpegError as error:
            log.debug("packet %d at byte %s cannot be decoded: %s", number, packet.pos, error)
            self.failed.add(number)
            return []

    def _describe(self, container: InputContainer, stream: av.AudioStream, first: "av.Packet[av.AudioStream]") -> None:
        """Read what the file states about itself."""
        name = self.container = container.format.name
        self._begins = float((first.pts or 0) * (first.time_base or 0))
        film = [video for video in container.streams.video if not video.disposition & Disposition.attached_pic]
        if name == "matroska,webm" and container.duration and not film:
            self.stated = container.duration / av.time_base
        elif name in STATING_CONTAINERS and stream.duration and stream.time_base:
            self.stated = float(stream.duration * stream.time_base)
        if name == "mp3":
            self.frames = mp3_frame_count(self._file, first.pos)
        self.alone = not container.streams.video
