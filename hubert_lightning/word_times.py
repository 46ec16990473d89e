"""When each word was said: the most likely path of CTC that spells a text, and where long recordings can be parted."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import forced_align, merge_tokens

from hubert_lightning.data.text import BLANK, Vocabulary
from hubert_lightning.frames import HOP, SAMPLE_RATE

LARGEST = 2**29
"""Frames times letters that are aligned at once: the aligner keeps two bytes of each."""


class Word(NamedTuple):
    """A word, the seconds from which to which it was said, and the mean probability of its letters' frames."""

    text: str
    start: float
    end: float
    confidence: float


def word_times(log_probs: Tensor, text: str, vocabulary: Vocabulary, first_frame: int = 0) -> list[Word]:
    """The words of a text on the most likely path that spells it.

    A word lasts from the first frame of its first letter to the last of its last one; CTC spells a letter when it is
    sure of it, which may be some frames after it began.

    log_probs:   (frames, tokens) float32
    first_frame: of the recording, which the first row is

    Raises:
        ValueError: It has characters that are no token, or more letters than frames.
    """
    words = text.split()
    if not words:
        return []
    # The words of a lexicon may be written otherwise than the model spells them
    spelled = [vocabulary.normalise(word).replace(" ", "") or word for word in words]
    tokens = torch.tensor([vocabulary.encode(" ".join(spelled))], dtype=torch.int32)
    needed = tokens.shape[1] + int((tokens[0, 1:] == tokens[0, :-1]).sum())  # a blank parts equal ones
    if needed > len(log_probs):
        raise ValueError(
            f"{text[:40]!r} has {tokens.shape[1]} letters, and the audio {len(log_probs)} frames of 20 ms, too few for "
            "them; give the text of this recording"
        )
    if len(log_probs) * tokens.shape[1] > LARGEST:
        raise ValueError(
            f"{text[:40]!r} has {tokens.shape[1]} letters in {len(log_probs) * HOP / SAMPLE_RATE:.0f} s, too much to "
            "be aligned at once; cut the recording and its text into parts of ten minutes or so"
        )
    path, scores = forced_align(log_probs[None].contiguous(), tokens, blank=BLANK)
    spans = merge_tokens(path[0], scores[0].exp(), blank=BLANK)
    times: list[Word] = []
    of_word: list = []
    for span in [*spans, None]:
        if span is not None and span.token != vocabulary.boundary:
            of_word.append(span)
        elif of_word:
            frames = sum(len(letter) for letter in of_word)
            times.append(
                Word(
                    words[len(times)],
                    (first_frame + of_word[0].start) * HOP / SAMPLE_RATE,
                    (first_frame + of_word[-1].end) * HOP / SAMPLE_RATE,
                    sum(letter.score * len(letter) for letter in of_word) / frames,
                )
            )
            of_word = []
    return times


PAUSE = 25
"""Frames, half a second, without a letter after which a word begins, even where the model says no boundary."""


class Part(NamedTuple):
    """Frames of a recording, `start` to `end`, that are decoded at once, and whether a word begins with them."""

    start: int
    end: int
    new_word: bool


def parts(log_probs: Tensor, vocabulary: Vocabulary, longest: int = 1_500, every_pause: bool = False) -> list[Part]:
    """Where a long recording can be parted without cutting a word: between words, in the longest pause if there are
    several; where there is none for long, between letters.

    log_probs:   (frames, tokens)
    longest:     frames of a part; one ends in its second half if possible
    every_pause: part it in every pause, too
    """
    best = log_probs.argmax(dim=-1).numpy()
    quiet = (best == BLANK) | (best == vocabulary.boundary)
    # First frame of every run of frames without a letter, and the one after its last
    runs = np.flatnonzero(np.diff(quiet, prepend=False, append=False)).reshape(-1, 2)
    paused = runs[:, 1] - runs[:, 0] >= PAUSE
    bounded = np.array([(best[first:last] == vocabulary.boundary).any() for first, last in runs], dtype=bool)
    between_words = bounded | paused
    pauses = runs[paused].sum(axis=1) // 2 if every_pause else []
    return [
        part
        for start, end in pairwise([0, *(int(frame) for frame in pauses if 0 < frame < len(best)), len(best)])
        for part in _parted(start, end, longest, runs, between_words)
    ]


def _parted(start: int, end: int, longest: int, runs: np.ndarray, between_words: np.ndarray) -> Iterator[Part]:
    new_word = True
    while end - start > longest:
        cut, following = start + longest, False  # if there are letters in every frame
        for earliest in (start + longest // 2, start + 1):
            first, last = np.maximum(runs[:, 0], earliest), np.minimum(runs[:, 1], start + longest)
            near = np.flatnonzero(first < last)
            if len(near):
                words = near[between_words[near]]
                choice = words if len(words) else near
                pause = choice[np.argmax(runs[choice, 1] - runs[choice, 0])]
                cut = int(np.clip(runs[pause].sum() // 2, first[pause], last[pause]))
                following = bool(between_words[pause])
                break
        yield Part(start, cut, new_word)
        start, new_word = cut, following
    yield Part(start, end, new_word)
