"""Pauses: word boundaries that the model does not predict, and where a long recording is split."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubert_lightning.asr.word_times import TimedToken
from hubert_lightning.frames import CLOCK, Clock, in_frames
from hubert_lightning.vocabulary import BLANK, Vocabulary

PAUSE_FRAMES = 25
"""Frames without a letter, half a second, after which a word begins, even where the model predicts no boundary."""
SEGMENT_FRAMES = 1_500
"""Frames that a beam search decodes at once, 30 s."""


class Segment(NamedTuple):
    """A part of a recording that is decoded at once.

    Attributes:
        start: First frame.
        end: Frame after the last one.
        new_word: Whether a word begins with the segment.
    """

    start: int
    end: int
    new_word: bool


def insert_pause_boundaries(
    tokens: Sequence[TimedToken], vocabulary: Vocabulary, clock: Clock = CLOCK
) -> list[TimedToken]:
    """Insert a word boundary into every pause without one, if the vocabulary has one.

    Args:
        tokens: Tokens of a recording in the order of time.
        vocabulary: Vocabulary of the tokens.
        clock: Clock of the frames.
    """
    if vocabulary.boundary is None:
        return list(tokens)
    complete: list[TimedToken] = []
    pause = in_frames(PAUSE_FRAMES, clock)
    last_end = 0  # of the last letter
    for token in tokens:
        if token.token != vocabulary.boundary:
            is_pause = token.start - last_end >= pause
            if complete and is_pause and complete[-1].token != vocabulary.boundary:
                complete.append(TimedToken(vocabulary.boundary, last_end, token.start, 0.0))
            last_end = token.end
        complete.append(token)
    return complete


def allow_skipped_boundaries(log_probs: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Raise the probability of blanks to that of boundaries, so that an alignment may skip boundaries.

    Args:
        log_probs: (frames, tokens)
        vocabulary: Vocabulary of the tokens.

    Returns:
        (frames, tokens) float64.
    """
    if vocabulary.boundary is None:
        return log_probs
    # A little less than the boundary itself, by another number in each frame: where two paths are equally likely,
    # torchaudio 2.11 takes neither
    less = torch.linspace(0.01, 0.02, len(log_probs), dtype=torch.float64)
    blank = torch.maximum(log_probs[:, BLANK].double(), log_probs[:, vocabulary.boundary].double() - less)
    return torch.cat([blank[:, None], log_probs[:, 1:]], dim=1)


def allow_pause_boundaries(log_probs: Tensor, vocabulary: Vocabulary, clock: Clock = CLOCK) -> Tensor:
    """Make a boundary as likely as the blank in the middle of every pause without one.

    Args:
        log_probs: (frames, tokens)
        vocabulary: Vocabulary of the tokens.
        clock: Clock of the frames.

    Returns:
        (frames, tokens)
    """
    runs, is_pause, has_boundary = _quiet_runs(log_probs, vocabulary, clock)
    middles = torch.from_numpy(runs[is_pause & ~has_boundary].sum(axis=1) // 2)
    if vocabulary.boundary is None or not len(middles):
        return log_probs
    log_probs = log_probs.clone()
    log_probs[middles, vocabulary.boundary] = log_probs[middles, BLANK]
    return log_probs


def split_in_pauses(
    log_probs: Tensor, vocabulary: Vocabulary, longest: int | None = None, clock: Clock = CLOCK
) -> list[Segment]:
    """Split a long recording without cutting a word.

    A segment ends between words, in the longest pause of its second half if there is one. Where no word ends for long,
    it ends between letters.

    Args:
        log_probs: (frames, tokens)
        vocabulary: Vocabulary of the tokens.
        longest: Most frames of a segment; half a minute if not given.
        clock: Clock of the frames.
    """
    longest = in_frames(SEGMENT_FRAMES, clock) if longest is None else longest
    runs, is_pause, has_boundary = _quiet_runs(log_probs, vocabulary, clock)
    return list(_segments(len(log_probs), longest, runs, is_pause | has_boundary))


def _quiet_runs(log_probs: Tensor, vocabulary: Vocabulary, clock: Clock) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find runs of frames without a letter.

    Args:
        log_probs: (frames, tokens)
        vocabulary: Vocabulary of the tokens.
        clock: Clock of the frames.

    Returns:
        (runs, 2), first frame of every run and the frame after its last one; (runs,), whether it is a pause; (runs,),
        whether it has a boundary, or a blank if the vocabulary has no boundary.
    """
    best = log_probs.argmax(dim=-1).numpy()
    boundary = BLANK if vocabulary.boundary is None else vocabulary.boundary
    is_quiet = (best == BLANK) | (best == boundary)
    runs = np.flatnonzero(np.diff(is_quiet, prepend=False, append=False)).reshape(-1, 2)
    is_pause = runs[:, 1] - runs[:, 0] >= in_frames(PAUSE_FRAMES, clock)
    has_boundary = np.array([(best[first:last] == boundary).any() for first, last in runs], dtype=bool)
    return runs, is_pause, has_boundary


def _segments(num_frames: int, longest: int, runs: np.ndarray, between_words: np.ndarray) -> Iterator[Segment]:
    start, new_word = 0, True
    while num_frames - start > longest:
        cut, is_between_words = start + longest, False  # if there are letters in every frame
        for earliest in (start + longest // 2, start + 1):
            first, last = np.maximum(runs[:, 0], earliest), np.minimum(runs[:, 1], start + longest)
            inside = np.flatnonzero(first < last)
            if len(inside):
                word_ends = inside[between_words[inside]]
                candidates = word_ends if len(word_ends) else inside
                run = candidates[np.argmax(runs[candidates, 1] - runs[candidates, 0])]
                cut = int(np.clip(runs[run].sum() // 2, first[run], last[run]))
                is_between_words = bool(between_words[run])
                break
        yield Segment(start, cut, new_word)
        start, new_word = cut, is_between_words
    yield Segment(start, num_frames, new_word)
