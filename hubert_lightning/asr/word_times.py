"""Times of words: the most likely CTC path through the tokens of a text."""

from collections.abc import Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubert_lightning.asr.forced_alignment import forced_path
from hubert_lightning.errors import UserError
from hubert_lightning.frames import CLOCK, Clock
from hubert_lightning.spelling import TokenMatch
from hubert_lightning.vocabulary import BLANK, Vocabulary

MAX_ALIGNMENT_SIZE = 2**29
"""Frames times tokens that are aligned at once: the aligner stores two bytes for each."""


class TimedToken(NamedTuple):
    """A token on a CTC path.

    Attributes:
        token: Token.
        start: Its first frame.
        end: The frame after its last one.
        confidence: Mean probability of the token over its frames.
    """

    token: int
    start: int
    end: int
    confidence: float


class Word(NamedTuple):
    """A word, or a token of a word, with its times.

    Attributes:
        text: The word.
        start: Start in seconds.
        end: End in seconds.
        confidence: Mean probability of the word's tokens over their frames.
        tokens: The tokens with their times, each as a `Word`, if the word is exactly these tokens.
        speaker: Speaker; None if not known.
    """

    text: str
    start: float
    end: float
    confidence: float
    tokens: tuple["Word", ...] = ()
    speaker: str | None = None


def best_tokens(log_probs: Tensor) -> list[TimedToken]:
    """Collapse the path of each frame's best token: repeats are merged, blanks are dropped.

    Args:
        log_probs: (frames, tokens), float32.

    Returns:
        The tokens that remain, with their frames.
    """
    if not len(log_probs):
        return []
    best = log_probs.detach().cpu().max(dim=-1)
    return _runs(best.indices, best.values)


def _runs(path: Tensor, log_probs: Tensor) -> list[TimedToken]:
    """The tokens of a path but for blanks; `path` and `log_probs` are (frames,)."""
    tokens, lengths = torch.unique_consecutive(path, return_counts=True)
    ends = lengths.cumsum(0)
    sums = np.add.reduceat(log_probs.double().exp().numpy(), (ends - lengths).numpy())
    runs = zip(tokens.tolist(), (ends - lengths).tolist(), ends.tolist(), sums.tolist(), strict=True)
    return [TimedToken(token, start, end, total / (end - start)) for token, start, end, total in runs if token != BLANK]


def align_tokens(
    log_probs: Tensor, tokens: Sequence[int], vocabulary: Vocabulary, first_frame: int = 0, clock: Clock = CLOCK
) -> list[TimedToken]:
    """Find the frames of each token on the most likely path.

    Args:
        log_probs: (frames, tokens), float32.
        tokens: Tokens without blanks.
        vocabulary: Vocabulary of the tokens.
        first_frame: Frame of the recording that the first row belongs to.
        clock: Clock of the frames.

    Raises:
        UserError: There are more tokens than frames, or too many of both.
    """
    if not tokens:
        return []
    num_needed = len(tokens) + sum(a == b for a, b in pairwise(tokens))  # a blank separates equal tokens
    if num_needed > len(log_probs):
        raise UserError(
            f"{vocabulary.text_of(tokens)[:40]!r} has {len(tokens)} letters, and the audio {len(log_probs)} frames of "
            f"{1000 * clock.seconds:g} ms, too few for them; give the text of this recording"
        )
    if len(log_probs) * len(tokens) > MAX_ALIGNMENT_SIZE:
        raise UserError(
            f"{vocabulary.text_of(tokens)[:40]!r} has {len(tokens)} letters in "
            f"{clock.duration(len(log_probs)):.0f} s, too much to be aligned at once; cut the recording and its "
            "text into parts of ten minutes or so"
        )
    path = torch.from_numpy(forced_path(log_probs, tokens))
    log_probs = log_probs.detach().cpu()
    return [
        token._replace(start=first_frame + token.start, end=first_frame + token.end)
        for token in _runs(path, log_probs.gather(1, path[:, None])[:, 0])
    ]


def words_of(tokens: Sequence[TimedToken], vocabulary: Vocabulary, clock: Clock = CLOCK) -> list[Word]:
    """Join tokens to words with times.

    A word lasts from the first frame of its first token to the last frame of its last one. CTC may predict a token
    several frames after its sound begins.

    Args:
        tokens: Tokens of a recording, with word boundaries if the vocabulary has one.
        vocabulary: Vocabulary of the tokens.
        clock: Clock of the frames.
    """
    return [
        word_of(word.text, tokens[word.first : word.last], vocabulary, clock)
        for word in vocabulary.words_of([token.token for token in tokens])
    ]


def word_of(text: str, tokens: Sequence[TimedToken], vocabulary: Vocabulary, clock: Clock = CLOCK) -> Word:
    """Join tokens to one word.

    Args:
        text: The word, which may be written otherwise than its tokens.
        tokens: Its tokens.
        vocabulary: Vocabulary of the tokens.
        clock: Clock of the frames.
    """
    num_frames = sum(token.end - token.start for token in tokens)
    confidence = sum(token.confidence * (token.end - token.start) for token in tokens) / num_frames
    parts = [_timed(vocabulary.decode([token.token]), [token], token.confidence, clock) for token in tokens]
    is_whole = all(part.text for part in parts) and "".join(part.text for part in parts) == text
    return _timed(text, tokens, confidence, clock)._replace(tokens=tuple(parts) if is_whole else ())


def _timed(text: str, tokens: Sequence[TimedToken], confidence: float, clock: Clock) -> Word:
    return Word(text, clock.duration(tokens[0].start), clock.duration(tokens[-1].end), confidence)


def word_times(
    log_probs: Tensor, text: str, vocabulary: Vocabulary, first_frame: int = 0, clock: Clock = CLOCK
) -> list[Word]:
    """Find the times of the words of a text on the most likely path.

    A word may be a sequence of tokens in several ways, such as "th e" or "t h e"; the path decides.

    Args:
        log_probs: (frames, tokens), float32.
        text: Normalised text.
        vocabulary: Vocabulary of the tokens.
        first_frame: Frame of the recording that the first row belongs to.
        clock: Clock of the frames.

    Raises:
        UserError: The text has characters that are no token, or more tokens than frames.
    """
    words = text.split()
    # a lexicon may spell words in another way than the vocabulary
    normalised = [vocabulary.normalise(word).replace(" ", "") or word for word in words]
    tokens_of_words = _best_spellings(log_probs, normalised, vocabulary)
    delimiter = [] if vocabulary.boundary is None or vocabulary.spaced else [vocabulary.boundary]
    tokens = [
        token for index, spelling in enumerate(tokens_of_words) for token in (*(delimiter if index else ()), *spelling)
    ]
    timed = iter(align_tokens(log_probs, tokens, vocabulary, first_frame, clock))
    times = []
    for index, (word, spelling) in enumerate(zip(words, tokens_of_words, strict=True)):
        if index and delimiter:
            next(timed)
        times.append(word_of(word, list(islice(timed, len(spelling))), vocabulary, clock))
    return times


def _best_spellings(log_probs: Tensor, words: Sequence[str], vocabulary: Vocabulary) -> list[list[int]]:
    """Choose the tokens of each word by the most likely path.

    The possible tokens are the edges of a graph, whose nodes are the positions between characters of the text.

    Args:
        log_probs: (frames, tokens)
        words: Normalised words.
        vocabulary: Vocabulary of the tokens.

    Returns:
        Tokens of each word; the longest ones if there are too few frames for any path, or too many paths to compare.

    Raises:
        UserError: A word has characters that are no token.
    """
    longest = [vocabulary.encode(word) for word in words]
    matches = [vocabulary.token_matches(word) for word in words]
    if [len(tokens) for tokens in matches] == [len(tokens) for tokens in longest]:
        return longest
    edges, word_of_edge = list[TokenMatch](), list[int]()
    end = 0
    for index, tokens in enumerate(matches):
        if index and vocabulary.boundary is not None and not vocabulary.spaced:
            edges.append(TokenMatch(end, end + 1, vocabulary.boundary))
            word_of_edge.append(-1)
            end += 1
        edges += [TokenMatch(end + match.first, end + match.last, match.token) for match in tokens]
        word_of_edge += [index] * len(tokens)
        end = edges[-1].last
    if len(log_probs) * (len(edges) + end + 1) > MAX_ALIGNMENT_SIZE:
        return longest
    path = _best_path(log_probs, edges, end)
    if not path:
        return longest
    return [[edges[edge].token for edge in path if word_of_edge[edge] == index] for index in range(len(words))]


def _best_path(log_probs: Tensor, edges: Sequence[TokenMatch], end: int) -> list[int]:
    """Find the edges on the most likely CTC path from node 0 to node `end` (Viterbi).

    A state of the path is an edge, which emits its token, or a node, which emits blanks.

    Args:
        log_probs: (frames, tokens)
        edges: Tokens between two nodes.
        end: Last node.

    Returns:
        Indices of the edges; empty if there are too few frames for any path.
    """
    edges_into: list[list[int]] = [[] for _ in range(end + 1)]
    for index, edge in enumerate(edges):
        edges_into[edge.last].append(index)
    num_states = len(edges) + end + 1
    predecessors = [
        [index, len(edges) + edge.first, *(one for one in edges_into[edge.first] if edges[one].token != edge.token)]
        for index, edge in enumerate(edges)
    ] + [[len(edges) + node, *edges_into[node]] for node in range(end + 1)]
    most = max(map(len, predecessors))
    sources = np.array([states + [num_states] * (most - len(states)) for states in predecessors])
    tokens = np.array([*(edge.token for edge in edges), *[BLANK] * (end + 1)])
    scores = np.full(num_states + 1, -np.inf)  # the last one stands for no state
    scores[len(edges)] = 0.0  # as if a blank came first
    chosen = np.zeros((len(log_probs), num_states), dtype=np.uint16)
    all_states = np.arange(num_states)
    for frame, row in enumerate(log_probs.double().numpy()):
        candidates = scores[sources]
        chosen[frame] = candidates.argmax(axis=1)
        scores[:-1] = candidates[all_states, chosen[frame]] + row[tokens]
    state = max([len(edges) + end, *edges_into[end]], key=lambda last: scores[last])
    if scores[state] == -np.inf:
        return []
    path: list[int] = []
    for row in chosen[::-1]:
        source = sources[state, row[state]]
        if state < len(edges) and source != state:
            path.append(state)
        state = source
    return path[::-1]
