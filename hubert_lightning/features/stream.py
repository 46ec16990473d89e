"""Rows of live audio: one per frame of audio that arrives in chunks, such as units or log-probabilities of letters."""

import sys
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hubert_lightning.data.audio import mono_samples
from hubert_lightning.errors import UserError
from hubert_lightning.frames import CLOCK, SAMPLE_RATE, Clock, num_frames, num_samples, seconds_to_samples
from hubert_lightning.model.convolutions import WaveformStatistics
from hubert_lightning.model.statistics import RunningStatistics
from hubert_lightning.model.windows import STANDARD, WindowLayout

MAX_STREAM_WINDOW = 600
"""Seconds of a stream that are encoded at once at most."""
MAX_READ = 2 * SAMPLE_RATE // 10
"""Bytes, 100 ms of 16-bit samples, that are read from standard input at once."""


class RowsOfPart(Protocol):
    """A function from a part of a recording to one row per frame."""

    def __call__(self, samples: Tensor, whole: WaveformStatistics | None = None) -> Tensor:
        """Compute the rows.

        Args:
            samples: (samples,), 16 kHz.
            whole: Statistics of the recording, which normalise the part; of the samples if not given.

        Returns:
            (frames, …), on the CPU.
        """


class FrameStream:
    """Rows of audio that arrives in chunks of any size, each as soon as its lookahead has arrived.

    A step's rows come from the last seconds, encoded at once and normalised by all audio so far.

    Args:
        of_part: Function from a part of a recording to its rows.
        nothing: (0, …), rows of no frame.
        step: Seconds from one output of rows to the next.
        lookahead: Seconds after a frame that the encoder sees before its row is given.
        history: Seconds before a step that the encoder sees.
        clock: Clock of the rows.
        layout: Windows of the encoder's first convolution.

    Raises:
        UserError: A duration is out of range.
    """

    def __init__(
        self,
        of_part: RowsOfPart,
        nothing: Tensor,
        step: float,
        lookahead: float,
        history: float,
        clock: Clock = CLOCK,
        layout: WindowLayout = STANDARD,
    ) -> None:
        self.of_part, self._nothing, self.clock = of_part, nothing, clock
        self.step, self.lookahead, self.history = (
            seconds_to_samples(seconds) // clock.hop for seconds in (step, lookahead, history)
        )
        if self.step < 1 or self.lookahead < 0 or self.history < 0:
            raise UserError(
                f"step {step}, lookahead {lookahead}, history {history}: choose a step of at least one frame, "
                f"{clock.seconds:g} s, and others that are not negative"
            )
        if step + lookahead + history > MAX_STREAM_WINDOW:
            raise UserError(
                f"step {step}, lookahead {lookahead}, history {history}: their sum is encoded at once; keep it to "
                f"{MAX_STREAM_WINDOW} s"
            )
        self.given = 0  # frames whose rows were given
        self._statistics = RunningStatistics(layout)
        self._audio = torch.zeros(0)  # from frame `_first` on
        self._first = 0
        self._finished = False

    @property
    def latency(self) -> float:
        """Largest number of seconds from a frame to its row, without computing time."""
        return self.clock.duration(self.step + self.lookahead)

    @property
    def longest(self) -> int:
        """Number of samples that are encoded at once for a step."""
        return num_samples(self.history + self.step + self.lookahead, self.clock)

    def push(self, samples: Tensor | np.ndarray) -> Tensor:
        """Add samples, and return the rows that they complete.

        Args:
            samples: (samples,), floats, 16 kHz, any number.

        Returns:
            (frames, …); often none, or those of several steps.

        Raises:
            UserError: The stream is finished, or the samples are not audio.
        """
        if self._finished:
            raise UserError("this stream is finished; start another one for more audio")
        self._audio = torch.cat([self._audio, mono_samples(samples, SAMPLE_RATE)])
        known = [self._nothing]
        while self._num_frames >= (last := self.given + self.step + self.lookahead):
            known.append(self._give(self.given + self.step, num_samples(last, self.clock)))
        return torch.cat(known)

    def finish(self) -> Tensor:
        """End the stream, and return the rows of the frames whose lookahead is incomplete: (frames, …)."""
        self._finished = True
        if self._num_frames == self.given:
            return self._nothing
        return self._give(self._num_frames, self._first * self.clock.hop + len(self._audio))

    @property
    def _num_frames(self) -> int:
        return self._first + num_frames(len(self._audio), self.clock)

    def _give(self, end: int, num_heard: int) -> Tensor:
        """Compute the rows up to frame `end` from the first `num_heard` samples of the stream."""
        first = max(self.given - self.history, 0)
        hop = self.clock.hop
        self._audio = self._audio[(first - self._first) * hop :]
        self._first = first
        samples = self._audio[: num_heard - first * hop]
        self._statistics.add(samples[self._statistics.num_samples - first * hop :])
        # At the beginning, all audio so far is encoded
        rows = self.of_part(samples, self._statistics.statistics() if first else None)
        rows = rows[self.given - first : end - first]
        self.given = end
        return rows


def standard_input() -> Iterator[np.ndarray]:
    """Read raw 16 kHz mono samples of 16 bits, little-endian, as they arrive, until the end or Ctrl-C.

    Yields:
        (samples,) float32.
    """
    rest = b""
    try:
        while chunk := sys.stdin.buffer.read1(MAX_READ):  # type: ignore[union-attr]  # typed as BinaryIO
            rest += chunk
            whole = len(rest) // 2 * 2
            yield np.frombuffer(rest[:whole], dtype="<i2").astype(np.float32) / 2**15
            rest = rest[whole:]
    except KeyboardInterrupt:  # ends a recording from a microphone
        pass


def print_latency(what: str, stream: FrameStream, durations: Sequence[float]) -> None:
    """Print on standard error how late the results of a stream are, and whether this machine is fast enough.

    Args:
        what: Results and their verb, such as "units come".
        stream: Stream.
        durations: Seconds that steps took to be computed; nothing is printed without any.
    """
    if not durations:
        return
    middle, most, step = float(np.median(durations)), max(durations), seconds_of(stream.step, stream.clock)
    lookahead = seconds_of(stream.lookahead, stream.clock)
    line = (
        f"hubert: {what} {stream.latency + middle:.2f} s late: step {step:g} s, lookahead {lookahead:g} s, computation "
        f"{middle:.2f} s (at most {most:.2f} s), {step / middle:.1f} × real time"
    )
    if middle > step:
        line += ", too slow: make step longer, or history shorter"
    print(line, file=sys.stderr, flush=True)


def seconds_for_a_step(stream: FrameStream) -> float:
    """Measure how long the rows of a step take to be computed."""
    samples = torch.randn(stream.longest, generator=torch.Generator().manual_seed(0)) / 10
    began = perf_counter()
    stream.of_part(samples)
    return perf_counter() - began


def seconds_of(frames: int, clock: Clock = CLOCK) -> float:
    """Convert frames to seconds, rounded to 10 ms."""
    return round(clock.duration(frames), 2)
