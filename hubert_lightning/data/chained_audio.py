"""Ogg or FLAC files that are joined end to end in one file."""

import mmap
import re
from collections.abc import Iterator
from itertools import pairwise

import av
import numpy as np

from hubert_lightning.data.coded_audio import CodedAudio
from hubert_lightning.data.ffmpeg import File, Form, head_of


class ChainedAudio:
    """Ogg or FLAC files joined end to end, as in recorded radio streams; each has its own rate and channels.

    The whole file is kept in memory, and all its parts are decoded to count their samples before a segment is read. So
    convert such files to FLAC if they are read often.

    Args:
        contents: Content of each part.

    Attributes:
        parts: Parts with samples, all converted to the form of the first.
        rate: Sampling rate in Hz.
        num_channels: Number of channels.
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
        """Return the segment from sample `first` on, (samples, channels) float32, shorter where the file ends."""
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
        """Decode the parts, in blocks (samples, channels) float32."""
        for part in self.parts:
            yield from part.blocks()

    def close(self) -> None:
        """Close the parts."""
        for part in self.parts:
            part.close()


def joined_files(file: File) -> list[bytes]:
    """Divide a file into the Ogg or FLAC files that are joined in it.

    An Ogg file begins with pages that begin streams, a FLAC file with its mark and a block of 34 bytes.

    Returns:
        Content of each joined file; empty if there is only one, or another format.
    """
    head = head_of(file)[:4]
    if head not in (b"OggS", b"fLaC"):
        return []
    if isinstance(file, bytes):
        return _divided(file, head)
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _divided(content, head)


def _divided(content: bytes | mmap.mmap, head: bytes) -> list[bytes]:
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
