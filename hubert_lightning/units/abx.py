"""ABX: how often a phone is nearer to another phone than to one of its own kind (fastabx).

A and X are tokens of one phone and B is a token of another; an error is an X that is nearer to B than to A, by dynamic
time warping of the angles between frames. Within speakers, all three are of one speaker; across speakers, X is of
another. Contexts are not compared ("any" context of the ZeroSpeech challenges), since small corpora hold few triphones.
"""

import sys
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubert_lightning.data.alignments import SILENCE
from hubert_lightning.errors import UserError
from hubert_lightning.units.stretches import SpeechSample

MAX_SIZE_GROUP, MAX_X_ACROSS = 10, 5
"""Tokens of a phone in a comparison, and of speakers of X, at most: those of ZeroSpeech 2021."""
LEAST_FRAMES = 2
"""Frames, 40 ms, of the shortest token that is compared."""


class Tokens(NamedTuple):
    """Phones of a sample that are compared.

    Args:
        phone: (tokens,), symbols.
        speaker: (tokens,), number of the speaker.
        start: (tokens,), first frame in the sample.
        end: (tokens,), frame after the last.
    """

    phone: np.ndarray
    speaker: np.ndarray
    start: np.ndarray
    end: np.ndarray


class Errors(NamedTuple):
    """ABX error rates, from 0 to 0.5 for a guess; NaN where no two tokens can be compared.

    Args:
        within: A, B and X of one speaker.
        across: X of another speaker than A and B.
    """

    within: float
    across: float


def check_abx(sample: SpeechSample) -> Tokens:
    """Check that ABX can be computed, before any audio is read.

    Args:
        sample: Speech to judge on.

    Returns:
        Tokens to compare.

    Raises:
        UserError: fastabx is not installed, or the sample has no phones or no two speakers.
    """
    if find_spec("fastabx") is None:
        version = "" if sys.version_info >= (3, 12) else f" in Python 3.12 or later (this is {sys.version.split()[0]})"
        raise UserError(f"ABX needs fastabx{version}; install hubert-lightning[abx], or leave out --abx")
    if sample.num_speakers < 2:
        raise UserError("ABX compares speakers, but the manifest does not name two; leave out --abx")
    tokens = tokens_of(sample)
    if not len(tokens.phone):
        raise UserError(
            "ABX compares phones, but no utterance has any; add them with `hubert prepare alignments`, or leave out "
            "--abx"
        )
    return tokens


def tokens_of(sample: SpeechSample) -> Tokens:
    """Find the phones of a sample that lie whole in its stretches; silence is left out."""
    changes = (sample.phone[1:] != sample.phone[:-1]) | (sample.stretch[1:] != sample.stretch[:-1])
    bounds = np.flatnonzero(np.r_[True, changes, True])
    start, end = bounds[:-1], bounds[1:]
    last = len(sample.phone) - 1
    is_cut = (start == 0) | (end > last)  # by an edge of its stretch
    is_cut |= sample.stretch[np.maximum(start - 1, 0)] != sample.stretch[start]
    is_cut |= sample.stretch[np.minimum(end, last)] != sample.stretch[start]
    phone = sample.phone[start]
    kept = ~is_cut & (phone != "") & (phone != SILENCE) & (end - start >= LEAST_FRAMES)
    return Tokens(phone[kept], sample.speaker[start[kept]], start[kept], end[kept])


def abx(features: Tensor, tokens: Tokens, seed: int = 0) -> Errors:
    """Compute the ABX error rates of features.

    Args:
        features: (frames of the sample, dim).
        tokens: Phones to compare.
        seed: Seed of the choice of tokens.

    Returns:
        Error rates, means over pairs of phones.
    """
    import polars
    from fastabx import Dataset, EmptyTaskError, InMemoryAccessor, Score, Subsampler, Task

    labels = polars.DataFrame({"phone": tokens.phone.tolist(), "speaker": tokens.speaker.tolist()})
    places = dict(enumerate(zip(tokens.start.tolist(), tokens.end.tolist(), strict=True)))
    data = features.float()
    dataset = Dataset(labels, InMemoryAccessor(places, data, data.device))
    rates = []
    for by, across in ((["speaker"], None), (None, ["speaker"])):
        subsampler = Subsampler(MAX_SIZE_GROUP, MAX_X_ACROSS if across else None, seed)
        try:
            task = Task(dataset, on="phone", by=by, across=across, subsampler=subsampler)
        except EmptyTaskError:
            rates.append(float("nan"))
            continue
        with torch.no_grad():
            rates.append(Score(task, "angular", progress=False).collapse(levels=["speaker"]))
    return Errors(*rates)
