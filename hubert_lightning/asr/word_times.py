"""When each word was said: the most likely path of CTC that spells a text, and where long recordings can be parted."""

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import forced_align, merge_tokens

from hubert_lightning.errors import UserError
from hubert_lightning.frames import HOP, SAMPLE_RATE
from hubert_lightning.spelling import TokenMatch
from hubert_lightning.vocabulary import BLANK, Vocabulary

LARGEST = 2**29
"""Frames times letters that are aligned at once: the aligner keeps two bytes of each."""


class Letter(NamedTuple):
    """A token on a path: the frames from which to which it lasts, and the mean probability of these frames."""

    token: int
    start: int
    end: int
    confidence: float


class Word(NamedTuple):
    """A word, the seconds from which to which it was said, and the mean probability of its letters' frames.

    Attributes:
        letters: The same of each of its tokens, where the word is made of nothing else.
    """

    text: str
    start: float
    end: float
    confidence: float
    letters: tuple["Word", ...] = ()


PAUSE = 25
"""Frames, half a second, without a letter after which a word begins, even where the model says no boundary."""


def best_letters(log_probs: Tensor) -> list[Letter]:
    """The tokens on the path of each frame's best token, repeats collapsed and blanks dropped.

    Args:
        log_probs: (frames, tokens), float32.

    Returns:
        Each token with its frames and the mean of its probability over them.
    """
    if not len(log_probs):
        return []
    best = log_probs.detach().cpu().max(dim=-1)
    tokens, lengths = torch.unique_consecutive(best.indices, return_counts=True)
    ends = lengths.cumsum(0)
    sums = np.add.reduceat(best.values.double().exp().numpy(), (ends - lengths).numpy())
    runs = zip(tokens.tolist(), (ends - lengths).tolist(), ends.tolist(), sums.tolist(), strict=True)
    return [Letter(token, start, end, total / (end - start)) for token, start, end, total in runs if token != BLANK]


def parted_in_pauses(letters: Sequence[Letter], vocabulary: Vocabulary) -> list[Letter]:
    """Letters with a delimiter in every pause, where the vocabulary has one."""
    if vocabulary.boundary is None:
        return list(letters)
    parted: list[Letter] = []
    said = 0  # frame at which the last letter ended
    for letter in letters:
        if letter.token != vocabulary.boundary:
            if parted and letter.start - said >= PAUSE and parted[-1].token != vocabulary.boundary:
                parted.append(Letter(vocabulary.boundary, said, letter.start, 0.0))
            said = letter.end
        parted.append(letter)
    return parted


def aligned(log_probs: Tensor, tokens: Sequence[int], vocabulary: Vocabulary, first_frame: int = 0) -> list[Letter]:
    """When each of the tokens was said, on the most likely path that spells them.

    Args:
        log_probs: (frames, tokens), float32.
        tokens: Tokens without blanks.
        vocabulary: Vocabulary of the tokens.
        first_frame: Frame of the recording that the first row is.

    Raises:
        UserError: There are more tokens than frames.
    """
    if not tokens:
        return []
    needed = len(tokens) + sum(a == b for a, b in pairwise(tokens))  # a blank parts equal ones
    if needed > len(log_probs):
        raise UserError(
            f"{vocabulary.text_of(tokens)[:40]!r} has {len(tokens)} letters, and the audio {len(log_probs)} frames of "
            "20 ms, too few for them; give the text of this recording"
        )
    if len(log_probs) * len(tokens) > LARGEST:
        raise UserError(
            f"{vocabulary.text_of(tokens)[:40]!r} has {len(tokens)} letters in "
            f"{len(log_probs) * HOP / SAMPLE_RATE:.0f} s, too much to be aligned at once; cut the recording and its "
            "text into parts of ten minutes or so"
        )
    path, scores = forced_align(log_probs[None].contiguous(), torch.tensor([tokens], dtype=torch.int32), blank=BLANK)
    return [
        Letter(span.token, first_frame + span.start, first_frame + span.end, span.score)
        for span in merge_tokens(path[0], scores[0].exp(), blank=BLANK)
    ]


def words_of(letters: Sequence[Letter], vocabulary: Vocabulary) -> list[Word]:
    """The words that letters spell, with their times.

    A word lasts from the first frame of its first letter to the last of its last one; CTC spells a letter when it is
    sure of it, which may be some frames after it began.
    """
    return [
        one_word(word.text, letters[word.first : word.last], vocabulary)
        for word in vocabulary.words_of([letter.token for letter in letters])
    ]


def one_word(text: str, letters: Sequence[Letter], vocabulary: Vocabulary) -> Word:
    """A word that is made of letters."""
    frames = sum(letter.end - letter.start for letter in letters)
    confidence = sum(letter.confidence * (letter.end - letter.start) for letter in letters) / frames
    parts = [_said(vocabulary.decode([letter.token]), [letter], letter.confidence) for letter in letters]
    whole = all(part.text for part in parts) and "".join(part.text for part in parts) == text
    return _said(text, letters, confidence)._replace(letters=tuple(parts) if whole else ())


def _said(text: str, letters: Sequence[Letter], confidence: float) -> Word:
    return Word(text, letters[0].start * HOP / SAMPLE_RATE, letters[-1].end * HOP / SAMPLE_RATE, confidence)


def word_times(log_probs: Tensor, text: str, vocabulary: Vocabulary, first_frame: int = 0) -> list[Word]:
    """The words of a text on the most likely path that spells it, in whichever of the tokens that can.

    Args:
        log_probs: (frames, tokens), float32.
        text: Normalised text.
        vocabulary: Vocabulary of the tokens.
        first_frame: Frame of the recording that the first row is.

    Raises:
        UserError: It has characters that are no token, or more letters than frames.
    """
    words = text.split()
    # The words of a lexicon may be written otherwise than the model spells them
    written = [vocabulary.normalise(word).replace(" ", "") or word for word in words]
    spelled = _spelled(log_probs, written, vocabulary)
    delimiter = [] if vocabulary.boundary is None or vocabulary.spaced else [vocabulary.boundary]
    tokens = [token for number, word in enumerate(spelled) for token in (*(delimiter if number else ()), *word)]
    letters = iter(aligned(log_probs, tokens, vocabulary, first_frame))
    times = []
    for number, (word, of_word) in enumerate(zip(words, spelled, strict=True)):
        if number and delimiter:
            next(letters)
        times.append(one_word(word, list(islice(letters, len(of_word))), vocabulary))
    return times


def _spelled(log_probs: Tensor, words: Sequence[str], vocabulary: Vocabulary) -> list[list[int]]:
    """Spell each word with the tokens of the most likely path.

    Args:
        log_probs: (frames, tokens)
        words: Normalised words.
        vocabulary: What the tokens are.

    Returns:
        Tokens of each word; the longest ones if no path spells the words, or if there are too many paths to compare.

    Raises:
        UserError: A word has characters that are no token.
    """
    longest = [vocabulary.encode(word) for word in words]
    pieces = [vocabulary.token_matches(word) for word in words]
    if [len(of_word) for of_word in pieces] == [len(of_word) for of_word in longest]:
        return longest
    edges, word_of = list[TokenMatch](), list[int]()  # between the places of the text, in which a delimiter is one, too
    end = 0
    for number, of_word in enumerate(pieces):
        if number and vocabulary.boundary is not None and not vocabulary.spaced:
            edges.append(TokenMatch(end, end + 1, vocabulary.boundary))
            word_of.append(-1)
            end += 1
        edges += [TokenMatch(end + piece.first, end + piece.last, piece.token) for piece in of_word]
        word_of += [number] * len(of_word)
        end = edges[-1].last
    if len(log_probs) * (len(edges) + end + 1) > LARGEST:
        return longest
    path = _likeliest(log_probs, edges, end)
    if not path:
        return longest
    return [[edges[edge].token for edge in path if word_of[edge] == number] for number in range(len(words))]


def _likeliest(log_probs: Tensor, edges: Sequence[TokenMatch], end: int) -> list[int]:
    """The edges on the most likely path of CTC from place 0 to `end`; none if there are too few frames for any.

    A state is an edge, which emits its token, or a place, which emits blanks.
    """
    into: list[list[int]] = [[] for _ in range(end + 1)]
    for number, edge in enumerate(edges):
        into[edge.last].append(number)
    nothing = len(edges) + end + 1
    before = [
        [number, len(edges) + edge.first, *(other for other in into[edge.first] if edges[other].token != edge.token)]
        for number, edge in enumerate(edges)
    ] + [[len(edges) + place, *into[place]] for place in range(end + 1)]
    most = max(map(len, before))
    sources = np.array([states + [nothing] * (most - len(states)) for states in before])
    tokens = np.array([*(edge.token for edge in edges), *[BLANK] * (end + 1)])
    scores = np.full(nothing + 1, -np.inf)
    scores[len(edges)] = 0.0  # as if a blank came first
    chosen = np.zeros((len(log_probs), nothing), dtype=np.uint16)
    states = np.arange(nothing)
    for frame, row in enumerate(log_probs.double().numpy()):
        candidates = scores[sources]
        chosen[frame] = candidates.argmax(axis=1)
        scores[:-1] = candidates[states, chosen[frame]] + row[tokens]
    state = max([len(edges) + end, *into[end]], key=lambda last: scores[last])
    if scores[state] == -np.inf:
        return []
    path: list[int] = []
    for row in chosen[::-1]:
        source = sources[state, row[state]]
        if state < len(edges) and source != state:
            path.append(state)
        state = source
    return path[::-1]


def with_boundaries_as_blanks(log_probs: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Log-probabilities for an alignment that may pass over boundaries, as at the ends and twice between two words."""
    if vocabulary.boundary is None:
        return log_probs
    # A little less than the boundary itself, in each frame by another number: where two paths are exactly as likely,
    # torchaudio 2.11 takes neither
    less = torch.linspace(0.01, 0.02, len(log_probs), dtype=torch.float64)
    quiet = torch.maximum(log_probs[:, BLANK].double(), log_probs[:, vocabulary.boundary].double() - less)
    return torch.cat([quiet[:, None], log_probs[:, 1:]], dim=1)


def with_boundaries_in_pauses(log_probs: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Log-probabilities in which a boundary is as likely as the blank in the middle of every pause without one.

    Args:
        log_probs: (frames, tokens)
        vocabulary: What the tokens are.

    Returns:
        (frames, tokens)
    """
    runs, paused, bounded = _silences(log_probs, vocabulary)
    middles = torch.from_numpy(runs[paused & ~bounded].sum(axis=1) // 2)
    if vocabulary.boundary is None or not len(middles):
        return log_probs
    log_probs = log_probs.clone()
    log_probs[middles, vocabulary.boundary] = log_probs[middles, BLANK]
    return log_probs


class Part(NamedTuple):
    """Frames of a recording, `start` to `end`, that are decoded at once, and whether a word begins with them."""

    start: int
    end: int
    new_word: bool


def parts(log_probs: Tensor, vocabulary: Vocabulary, longest: int = 1_500) -> list[Part]:
    """Where a long recording can be parted without cutting a word: between words, in the longest pause if there are
    several; where there is none for long, between letters.

    Args:
        log_probs: (frames, tokens).
        vocabulary: Vocabulary of the tokens.
        longest: Most frames of a part; one ends in its second half if possible.
    """
    runs, paused, bounded = _silences(log_probs, vocabulary)
    return list(_parted(len(log_probs), longest, runs, bounded | paused))


def _silences(log_probs: Tensor, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of frames without a letter.

    Args:
        log_probs: (frames, tokens)
        vocabulary: What the tokens are.

    Returns:
        The first frame of every run, and the one after its last, (runs, 2); whether it is a pause; whether it has a
        boundary, or, of a vocabulary without one, a blank.
    """
    best = log_probs.argmax(dim=-1).numpy()
    boundary = BLANK if vocabulary.boundary is None else vocabulary.boundary
    quiet = (best == BLANK) | (best == boundary)
    runs = np.flatnonzero(np.diff(quiet, prepend=False, append=False)).reshape(-1, 2)
    paused = runs[:, 1] - runs[:, 0] >= PAUSE
    bounded = np.array([(best[first:last] == boundary).any() for first, last in runs], dtype=bool)
    return runs, paused, bounded


def _parted(end: int, longest: int, runs: np.ndarray, between_words: np.ndarray) -> Iterator[Part]:
    start, new_word = 0, True
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
