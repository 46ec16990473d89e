"""The beam search of flashlight in Python, for versions of Python that flashlight has no wheels for.

Names, arguments and results are those of flashlight (tests/asr/test_python_search.py). The search takes the most likely
path of each text, not the sum over its paths, in a beam of states.
"""

import ctypes
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from hubert_lightning.asr.arpa_model import END, START, ArpaModel, Words

FINISHED = -1
"""Child of a state of a language model after the end of a sentence."""


class CriterionType(Enum):
    """Criterion that a model was trained with."""

    CTC = 0


class SmearingMode(Enum):
    """Score of a sequence that several words begin with."""

    MAX = 0


class Dictionary:
    """Names and their indices.

    Args:
        names: Names, each once.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._indices = {name: index for index, name in enumerate(self._names)}

    def get_index(self, name: str) -> int:
        """Return the index of a name."""
        return self._indices[name]

    def get_entry(self, index: int) -> str:
        """Return the name with an index."""
        return self._names[index]

    def index_size(self) -> int:
        """Return the number of names."""
        return len(self._names)


class LMState:
    """A history of words or tokens; each has one object in a search."""

    __slots__ = ("children", "scores", "words")

    def __init__(self, words: Words = ()) -> None:
        self.words = words
        """The last words, which a language model scores the next one with."""
        self.children: dict[int, LMState] = {}
        self.scores: dict[int, float] = {}

    def child(self, index: int) -> "LMState":
        """Return the history that a word or token is added to."""
        child = self.children.get(index)
        if child is None:
            child = self.children[index] = LMState()
        return child


class LM(Protocol):
    """Scores of sequences."""

    def start(self, start_with_nothing: bool) -> LMState:
        """Return the first history: after the start of a sentence, or after nothing."""

    def score(self, state: LMState, index: int) -> tuple[LMState, float]:
        """Return the history after a word, and the log10 probability of the word."""

    def finish(self, state: LMState) -> tuple[LMState, float]:
        """Return the history after the end of a sentence, and the log10 probability of the end."""


class ZeroLM:
    """No language model."""

    def start(self, start_with_nothing: bool) -> LMState:
        """See `LM`."""
        return LMState()

    def score(self, state: LMState, index: int) -> tuple[LMState, float]:
        """See `LM`."""
        return state.child(index), 0.0

    def finish(self, state: LMState) -> tuple[LMState, float]:
        """See `LM`."""
        return state.child(FINISHED), 0.0


class KenLM:
    """An n-gram language model for the entries of a dictionary.

    Args:
        path: ARPA file.
        words: The dictionary.

    Raises:
        UserError: The file cannot be read, is no ARPA file, or has KenLM's binary form.
    """

    def __init__(self, path: str, words: Dictionary) -> None:
        self._model, self._words = ArpaModel(Path(path)), words

    def start(self, start_with_nothing: bool) -> LMState:
        """See `LM`."""
        return LMState(() if start_with_nothing else (START,))

    def score(self, state: LMState, index: int) -> tuple[LMState, float]:
        """See `LM`."""
        score = state.scores.get(index)
        if score is None:
            name = END if index == FINISHED else self._words.get_entry(index)
            words, score = self._model.score(state.words, name)
            state.children[index], state.scores[index] = LMState(words), score
        return state.children[index], score

    def finish(self, state: LMState) -> tuple[LMState, float]:
        """See `LM`."""
        return self.score(state, FINISHED)


class TrieNode:
    """A sequence of tokens that spellings begin with."""

    __slots__ = ("children", "score", "words")

    def __init__(self) -> None:
        self.children: dict[int, TrieNode] = {}
        self.words: list[tuple[int, float]] = []
        self.score = -math.inf
        """Highest score of the words below it."""


class Trie:
    """The prefix tree of a lexicon.

    Args:
        num_tokens: Number of tokens of the vocabulary.
        silence: Token between words.
    """

    def __init__(self, num_tokens: int, silence: int) -> None:
        self.root = TrieNode()

    def insert(self, tokens: Sequence[int], word: int, score: float) -> None:
        """Add a spelling of a word with the word's score."""
        node = self.root
        for token in tokens:
            node = node.children.setdefault(token, TrieNode())
        node.words.append((word, score))

    def smear(self, mode: SmearingMode) -> None:
        """Give each sequence the score of the best word that it begins; homophones add up."""
        nodes, index = [self.root], 0
        while index < len(nodes):
            nodes += nodes[index].children.values()
            index += 1
        for node in reversed(nodes):
            own = float(np.logaddexp.reduce([score for _, score in node.words])) if node.words else -math.inf
            node.score = max([own, *(child.score for child in node.children.values())])


@dataclass(frozen=True, kw_only=True)
class LexiconFreeDecoderOptions:
    """Weights and beam of a search.

    Args:
        beam_size: Number of states that are kept at each frame.
        beam_size_token: Number of tokens; all are tried.
        beam_threshold: Distance below the best score at which states are dropped.
        lm_weight: Weight of the language model.
        sil_score: Score added for each silence.
        log_add: Must be false: scores of paths with the same text are not added.
        criterion_type: Criterion of the model's training.
    """

    beam_size: int
    beam_size_token: int
    beam_threshold: float
    lm_weight: float
    sil_score: float
    log_add: bool
    criterion_type: CriterionType


@dataclass(frozen=True, kw_only=True)
class LexiconDecoderOptions(LexiconFreeDecoderOptions):
    """Weights and beam of a search with a lexicon.

    Args:
        word_score: Score added for each word.
        unk_score: Score of a word that is not in the lexicon; none is found.
    """

    word_score: float
    unk_score: float


class DecodeResult(NamedTuple):
    """A path of a search.

    Attributes:
        score: Its score.
        words: A word or -1 for each frame, with one more at each end.
        tokens: A token for each frame, with the silence at each end.
    """

    score: float
    words: list[int]
    tokens: list[int]


class State(NamedTuple):
    """A path to a frame. Paths with the same history, node, token and `after_blank` are one: the better is kept."""

    score: float
    history: LMState
    node: TrieNode
    token: int
    after_blank: bool
    word: int
    parent: "State | None"


Key = tuple[int, int, int]


class _Beam:
    """The states of one frame, of which the best are kept.

    Args:
        size: Number of states that are kept.
        threshold: Distance below the best score at which states are dropped.
    """

    def __init__(self, size: int, threshold: float) -> None:
        self._size, self._threshold = size, threshold
        self.states: dict[Key, State] = {}
        self.best = -math.inf
        self.bound = -math.inf
        """Score that a state needs; a lower one is dropped for certain."""

    def add(self, state: State) -> None:
        """Add a state, or replace a worse one in the same place."""
        if state.score > self.best:
            self.best = state.score
            self.bound = max(self.bound, self.best - self._threshold)
        key = id(state.history), id(state.node), 2 * state.token + state.after_blank
        other = self.states.get(key)
        if other is None or state.score > other.score:
            self.states[key] = state

    def raise_bound(self) -> None:
        """Set the bound to the score of the last state that would be kept if no more were added."""
        if len(self.states) >= self._size:
            scores = np.fromiter((state.score for state in self.states.values()), np.float64, len(self.states))
            self.bound = max(self.bound, float(np.partition(scores, -self._size)[-self._size]))

    def kept(self) -> list[State]:
        """Return the best states, best first."""
        lowest = self.best - self._threshold
        states = [state for state in self.states.values() if state.score >= lowest]
        return heapq.nlargest(self._size, states, key=lambda state: state.score)


class _Search:
    """Steps of two kinds: those that stay in a sequence of tokens, and those that begin a token or a word.

    Args:
        options: Weights and beam.
        lm: Language model.
        silence: Token between words.
        blank: Token of no letter.
        root: Node of the first state.
    """

    def __init__(self, options: LexiconFreeDecoderOptions, lm: LM, silence: int, blank: int, root: TrieNode) -> None:
        self._lm, self._silence, self._blank, self._root = lm, silence, blank, root
        self._size, self._threshold = options.beam_size, options.beam_threshold
        self._lm_lowers = isinstance(lm, (KenLM, ZeroLM)) and options.lm_weight >= 0
        self._lm_weight, self._silence_score = options.lm_weight, options.sil_score

    def decode(self, address: int, num_frames: int, num_tokens: int) -> list[DecodeResult]:
        """Search one utterance.

        Args:
            address: Address of the log-probabilities: (frames, tokens), float32.
            num_frames: Number of frames.
            num_tokens: Number of tokens.

        Returns:
            Results, best first.
        """
        array = (ctypes.c_float * (num_frames * num_tokens)).from_address(address)
        log_probs = np.ctypeslib.as_array(array).reshape(num_frames, num_tokens).astype(np.float64)
        emissions = np.column_stack([log_probs, log_probs[:, self._blank]])  # the last column has no silence_score
        emissions[:, self._silence] += self._silence_score
        states = [State(0.0, self._lm.start(False), self._root, self._silence, False, -1, None)]
        for row in emissions.tolist():
            beam = _Beam(self._size, self._threshold)
            for state in states:
                self._stay(beam, state, row)
            beam.raise_bound()
            for state in states:
                self._begin(beam, state, row)
            states = beam.kept()
        return [_result(state) for state in self._ended(states)]

    def _ended(self, states: list[State]) -> list[State]:
        beam = _Beam(self._size, self._threshold)
        for state in states:
            history, log_prob = self._lm.finish(state.history)
            score = state.score + self._lm_weight * log_prob
            beam.add(State(score, history, state.node, self._silence, False, -1, state))
        return beam.kept()

    def _stay(self, beam: _Beam, state: State, row: list[float]) -> None:
        raise NotImplementedError

    def _begin(self, beam: _Beam, state: State, row: list[float]) -> None:
        raise NotImplementedError


class LexiconFreeDecoder(_Search):
    """A search for any sequence of tokens.

    Args:
        options: Weights and beam.
        lm: Language model of tokens.
        silence: Token between words.
        blank: Token of no letter.
        transitions: Empty.
    """

    def __init__(
        self, options: LexiconFreeDecoderOptions, lm: LM, silence: int, blank: int, transitions: list[float]
    ) -> None:
        super().__init__(options, lm, silence, blank, TrieNode())

    def _stay(self, beam: _Beam, state: State, row: list[float]) -> None:
        score, history, node, last, after_blank, _, _ = state
        beam.add(State(score + row[self._blank], history, node, self._blank, True, -1, state))
        if last != self._blank and not after_blank:
            beam.add(State(score + row[last], history, node, last, False, -1, state))

    def _begin(self, beam: _Beam, state: State, row: list[float]) -> None:
        score, history, node, last, _, _, _ = state
        # probabilities only lower the score; those of a model with hot words, whose weights are added, are always asked
        lowest = beam.bound if self._lm_lowers else -math.inf
        for token in range(len(row) - 1):
            acoustic = score + row[token]
            if token in (last, self._blank) or acoustic < lowest:
                continue
            following, log_prob = self._lm.score(history, token)
            if (total := acoustic + self._lm_weight * log_prob) >= beam.bound:
                beam.add(State(total, following, node, token, False, -1, state))


class LexiconDecoder(_Search):
    """A search for words of a lexicon.

    Args:
        options: Weights and beam.
        trie: The lexicon.
        lm: Language model of words.
        silence: Token between words.
        blank: Token of no letter.
        unknown: The unknown word, which is never found.
        transitions: Empty.
        is_token_model: Must be false: the language model is one of words.
    """

    def __init__(
        self,
        options: LexiconDecoderOptions,
        trie: Trie,
        lm: LM,
        silence: int,
        blank: int,
        unknown: int,
        transitions: list[float],
        is_token_model: bool,
    ) -> None:
        super().__init__(options, lm, silence, blank, trie.root)
        self._word_score = options.word_score

    def _stay(self, beam: _Beam, state: State, row: list[float]) -> None:
        score, history, node, last, after_blank, _, _ = state
        beam.add(State(score + row[-1], history, node, self._blank, True, -1, state))
        if node is self._root:
            beam.add(State(score + row[self._silence], history, node, self._silence, False, -1, state))
        elif not after_blank:
            beam.add(State(score + row[last], history, node, last, False, -1, state))

    def _begin(self, beam: _Beam, state: State, row: list[float]) -> None:
        score, history, node, last, after_blank, _, _ = state
        expected = 0.0 if node is self._root else node.score
        for token, child in node.children.items():
            acoustic = score + row[token]
            total = acoustic + self._lm_weight * (child.score - expected)
            if child.children and (after_blank or token != last) and total >= beam.bound:
                beam.add(State(total, history, child, token, False, -1, state))
            if node is self._root and token == last:  # a word of one token, which is repeated
                continue
            for word, _ in child.words:
                following, log_prob = self._lm.score(history, word)
                total = acoustic + self._lm_weight * (log_prob - expected) + self._word_score
                if total >= beam.bound:
                    beam.add(State(total, following, self._root, token, False, word, state))

    def _ended(self, states: list[State]) -> list[State]:
        """Only states between words end, if there are any."""
        return super()._ended([state for state in states if state.node is self._root] or states)


def _result(state: State) -> DecodeResult:
    words, tokens = [], []
    ancestor: State | None = state
    while ancestor is not None:
        words.append(ancestor.word)
        tokens.append(ancestor.token)
        ancestor = ancestor.parent
    return DecodeResult(state.score, words[::-1], tokens[::-1])
