"""Words of live audio, each as soon as it is stable."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hubert_lightning.asr.ctc_model import CTCModel
from hubert_lightning.asr.pauses import PAUSE_FRAMES, insert_pause_boundaries
from hubert_lightning.asr.word_times import TimedToken, Word, best_tokens, words_of
from hubert_lightning.features.extractors import Precision
from hubert_lightning.features.stream import FrameStream
from hubert_lightning.frames import HOP, SAMPLE_RATE, in_frames
from hubert_lightning.model.convolutions import WaveformStatistics
from hubert_lightning.model.windows import WindowLayout
from hubert_lightning.vocabulary import Vocabulary

LONGEST_WAIT = 30 * SAMPLE_RATE // HOP
"""Frames of 20 ms of the longest word; a longer one is given in parts, so that memory is bounded."""


class LiveWords:
    """Words of audio that arrives in chunks of any size, by greedy decoding.

    A word is stable once the model has predicted its end, or half a second of silence after it; it is never changed
    afterwards. Without a token between words, each token is given as soon as it is over. A word whose end is not
    predicted for half a minute is given in parts.

    Args:
        model: Fine-tuned model, on the device that computes.
        precision: Context in which the encoder computes.
        step: Seconds from one output of words to the next.
        lookahead: Seconds after a frame that the encoder sees before its letters are decided.
        history: Seconds before a step that the encoder sees.

    Raises:
        UserError: A duration is out of range.
    """

    def __init__(
        self, model: CTCModel, precision: Precision, step: float = 1.0, lookahead: float = 1.0, history: float = 5.0
    ) -> None:
        self._model, self._precision = model, precision
        self.vocabulary = model.vocabulary
        nothing, layout = torch.zeros(0, len(model.vocabulary)), WindowLayout.of(model.encoder.config)
        self.stream = FrameStream(self._log_probs, nothing, step, lookahead, history, model.clock, layout)
        self._rows = torch.zeros(0, len(model.vocabulary))  # of words that are not stable yet
        self._first = 0  # frame of the first of these rows

    @property
    def latency(self) -> float:
        """Largest number of seconds from the end of a word, as the model predicts it, to the word, without computing
        time.
        """
        return self.stream.latency

    def push(self, samples: Tensor | np.ndarray) -> list[Word]:
        """Add samples, and return the words that have become stable.

        Args:
            samples: (samples,), floats, 16 kHz, any number.

        Raises:
            UserError: The stream is finished, or the samples are not audio.
        """
        return self._stable(self.stream.push(samples), is_end=False)

    def finish(self) -> list[Word]:
        """End the stream, and return the words that were not stable yet."""
        return self._stable(self.stream.finish(), is_end=True)

    @torch.no_grad()
    def _log_probs(self, samples: Tensor, whole: WaveformStatistics | None = None) -> Tensor:
        """Log-probabilities of a part of the audio: (frames, tokens) float32, on the CPU."""
        device = self._model.head.weight.device
        if whole is not None:
            exact = torch.float32 if device.type == "mps" else torch.float64  # for differences of large numbers
            whole = WaveformStatistics(*(value.to(device, exact) for value in whole))
        with self._precision():
            local = self._model.encoder.local_features(samples[None].to(device), statistics=whole)
            logits: Tensor = self._model.head(self._model.encoder.contextual(local))
        return logits.float().log_softmax(dim=-1)[0].cpu()

    def _stable(self, rows: Tensor, is_end: bool) -> list[Word]:
        self._rows = torch.cat([self._rows, rows])
        tokens = best_tokens(self._rows)
        clock = self.stream.clock
        pause = in_frames(PAUSE_FRAMES, clock)
        end = len(self._rows) if is_end else _stable_until(tokens, len(self._rows), self.vocabulary, pause)
        if len(self._rows) - end > in_frames(LONGEST_WAIT, clock):
            end = tokens[-1].start if tokens[-1].start > end else len(self._rows)
        stable = [
            token._replace(start=token.start + self._first, end=token.end + self._first)
            for token in tokens
            if token.end <= end
        ]
        self._rows = self._rows[end:].clone()
        self._first += end
        return words_of(insert_pause_boundaries(stable, self.vocabulary, clock), self.vocabulary, clock)


def _stable_until(tokens: Sequence[TimedToken], num_frames: int, vocabulary: Vocabulary, pause: int) -> int:
    """Frame up to which no later audio changes the words.

    Args:
        tokens: Tokens of the frames.
        num_frames: Number of frames.
        vocabulary: Vocabulary of the tokens.
        pause: Frames of a pause between words, at least.
    """
    if not tokens:
        return num_frames
    if vocabulary.boundary is None or vocabulary.spaced:
        last = tokens[-1]
        return last.end if last.end < num_frames else last.start  # it may last longer
    ends = [0, *(token.end for token in tokens if token.token == vocabulary.boundary)]
    letters = [token for token in tokens if token.token != vocabulary.boundary]
    ends += [after.start for before, after in pairwise(letters) if after.start - before.end >= pause]
    if not letters or num_frames - letters[-1].end >= pause:
        ends.append(num_frames)
    return max(ends)
