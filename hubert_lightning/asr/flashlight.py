"""flashlight's CTC beam search and KenLM: every part of flashlight that this package uses is in this file.

torchaudio's `CTCDecoder` wraps the same classes. It is not used here for two reasons. It hides the lexicon's trie, so
it would build the trie again after each change of a weight. Without a lexicon, its numbers for the letters of a
language model differ from those of the tokens. flashlight does not document its Python names:
tests/asr/test_flashlight.py lists those used here. flashlight-text has wheels for Python 3.11 and 3.12; where it is
not installed, python_search.py has the same classes.
"""

import copy
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

try:
    from flashlight.lib.text.decoder import (
        LM,
        CriterionType,
        LexiconDecoder,
        LexiconDecoderOptions,
        LexiconFreeDecoder,
        LexiconFreeDecoderOptions,
        LMState,
        SmearingMode,
        Trie,
        ZeroLM,
    )
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    IN_PYTHON = False
except ImportError:
    from hubert_lightning.asr.python_search import (
        LM,
        CriterionType,
        Dictionary,
        KenLM,
        LexiconDecoder,
        LexiconDecoderOptions,
        LexiconFreeDecoder,
        LexiconFreeDecoderOptions,
        LMState,
        SmearingMode,
        Trie,
        ZeroLM,
    )

    IN_PYTHON = True

from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.hot_words import HotWord, PhraseMatcher, PhraseNode
from hubert_lightning.asr.language_files import (
    BOUNDARY_NAMES,
    SENTENCE_MARKS,
    UNKNOWN,
    Lexicon,
    for_kenlm,
    unigrams,
    unreadable_model,
)
from hubert_lightning.errors import UserError
from hubert_lightning.vocabulary import BLANK, Vocabulary

log = logging.getLogger(__name__)

SLOW = (
    "hubert: beam search in Python, which is slow: flashlight-text is not installed for Python %d.%d; it has wheels "
    "for Python 3.11 and 3.12"
)


class Hypothesis(NamedTuple):
    """A text that a beam search found.

    Attributes:
        text: Text as the model prints it.
        score: Natural logarithm of the CTC probability, plus the weighted scores of language model and words.
        tokens: Decoded tokens, repeats collapsed and blanks dropped.
        words: Words of the lexicon, if there is one.
    """

    text: str
    score: float
    tokens: tuple[int, ...] = ()
    words: tuple[str, ...] = ()


class FlashlightDecoder:
    """A beam search over the log-probabilities of one utterance.

    Args:
        settings: Language model, weights and beam.
        vocabulary: Tokens of the log-probabilities.
        lexicon: Spellings of each word, by the names of their tokens; None to search without a lexicon.
        delimiter: Token between words; None if the search uses the blank instead.
        hot_words: Words and phrases that are preferred; those of a search with a lexicon are in it.

    Raises:
        UserError: The language model cannot be read, or does not fit the vocabulary or the lexicon.
    """

    def __init__(
        self,
        settings: DecoderSettings,
        vocabulary: Vocabulary,
        lexicon: Lexicon | None,
        delimiter: int | None,
        hot_words: Sequence[HotWord] = (),
    ) -> None:
        if IN_PYTHON:
            log.warning(SLOW, *sys.version_info[:2])
        self.vocabulary = vocabulary
        self._silence = delimiter or BLANK
        self._tokens = Dictionary(vocabulary.search_names)
        self._trie: Trie | None = None
        self._unknown: dict[int, float] = {}  # hot words that the language model does not know, with their scores
        if lexicon is None:
            self._words, self._plain_lm = _token_model(settings.lm, vocabulary, delimiter)
            phrases = [(word.tokens, word.weight) for word in hot_words]
            self._matcher = PhraseMatcher(phrases, delimiter) if hot_words else None
        else:
            self._words = Dictionary([*lexicon, UNKNOWN])
            self._plain_lm = _word_model(settings, self._words, list(lexicon))
            self._matcher = PhraseMatcher([self._phrase(word) for word in hot_words], None) if hot_words else None
            if hot_words and settings.lm is not None:
                self._unknown = self._floors_of_unknown(lexicon, hot_words)
        self._set_model(settings)
        if lexicon is not None:
            self._trie = self._trie_of(lexicon)
        self._set(settings)

    def _phrase(self, hot_word: HotWord) -> tuple[list[int], float]:
        words = [hot_word.text] if hot_word.spelled else hot_word.text.split()
        return [self._words.get_index(word) for word in words], hot_word.weight

    def _floors_of_unknown(self, lexicon: Lexicon, hot_words: Sequence[HotWord]) -> dict[int, float]:
        """Least score of each hot word that the language model does not know: that of its rarest known word.

        A model without an entry for unknown words gives them a probability of 1e-100, which no weight makes up for.
        """
        start = self._plain_lm.start(False)
        _, of_unknown = self._plain_lm.score(start, self._words.get_index(UNKNOWN))
        scores = {index: self._plain_lm.score(start, index)[1] for index in map(self._words.get_index, lexicon)}
        rarest = min((score for score in scores.values() if score != of_unknown), default=of_unknown)
        units = {unit for word in hot_words for unit in self._phrase(word)[0]}
        return {unit: rarest for unit in units if scores[unit] == of_unknown}

    def _set_model(self, settings: DecoderSettings) -> None:
        """Choose the language model and its weight; with hot words, they add their weights to its score."""
        self._lm, self._lm_weight = self._plain_lm, settings.lm_weight
        if self._matcher is None:
            return
        if settings.lm is None:
            self._lm_weight = 1.0
        elif settings.lm_weight <= 0:
            raise UserError(f"hot words with lm_weight {settings.lm_weight}; give settings with a weight above 0")
        self._lm = _HotWordModel(self._plain_lm, self._matcher, self._lm_weight, self._unknown)

    def with_settings(self, settings: DecoderSettings) -> "FlashlightDecoder":
        """Copy the decoder with other weights, beam or n-best; the copies share language model and lexicon."""
        other = copy.copy(self)
        other._set_model(settings)
        other._set(settings)
        return other

    def __call__(self, log_probs: Tensor) -> list[Hypothesis]:
        """Find the most likely texts.

        Args:
            log_probs: (frames, tokens), float32, on the CPU.

        Returns:
            Up to `nbest` hypotheses, best first.
        """
        if not len(log_probs):
            return [Hypothesis("", 0.0)]
        log_probs = log_probs.contiguous()
        results = self._search.decode(log_probs.data_ptr(), *log_probs.shape)
        return [self._hypothesis(result) for result in results[: self._nbest]]

    def _set(self, settings: DecoderSettings) -> None:
        self._nbest = settings.nbest
        options: dict[str, Any] = {
            "beam_size": settings.beam_size,
            "beam_size_token": self._tokens.index_size(),
            "beam_threshold": settings.beam_threshold,
            "lm_weight": self._lm_weight,
            "sil_score": settings.silence_score,
            "log_add": False,
            "criterion_type": CriterionType.CTC,
        }
        if self._trie is None:
            free = LexiconFreeDecoderOptions(**options)
            self._search = LexiconFreeDecoder(free, self._lm, self._silence, BLANK, [])
        else:
            bound = LexiconDecoderOptions(word_score=settings.word_score, unk_score=-math.inf, **options)
            unknown = self._words.get_index(UNKNOWN)
            self._search = LexiconDecoder(bound, self._trie, self._lm, self._silence, BLANK, unknown, [], False)

    def _trie_of(self, lexicon: Lexicon) -> Trie:
        """Build the prefix tree of all spellings, each with the language model's score of its word."""
        trie, start = Trie(self._tokens.index_size(), self._silence), self._lm.start(False)
        for word, spellings in lexicon.items():
            index = self._words.get_index(word)
            _, score = self._lm.score(start, index)
            for spelling in spellings:
                trie.insert([self._tokens.get_index(token) for token in spelling], index, score)
        trie.smear(SmearingMode.MAX)
        return trie

    def _hypothesis(self, result: Any) -> Hypothesis:  # Any: flashlight is not typed
        """Convert one of flashlight's results, which has a token for each frame."""
        tokens = [token for token, _ in groupby(result.tokens) if token != BLANK]
        while tokens and tokens[-1] == self.vocabulary.boundary:  # flashlight adds one at each end
            tokens.pop()
        while tokens and tokens[0] == self.vocabulary.boundary:
            tokens.pop(0)
        words = tuple(self._words.get_entry(word) for word in result.words if word >= 0)
        if self._trie is None:
            text = self.vocabulary.text_of(tokens)
        else:  # from words: the tokens of a narrow beam may end in the middle of one
            text = self.vocabulary.printed(" ".join(" ".join(words).split()))
        return Hypothesis(text, float(result.score), tuple(tokens), words)


class _HotWordModel(LM):  # type: ignore[misc]  # flashlight is not typed
    """A language model that adds the weights of hot words to the scores of another one.

    Args:
        model: The other model.
        matcher: Hot words.
        weight: Weight of the language model in the search, by which those of hot words are divided.
        floors: Least score of words that the other model does not know.
    """

    def __init__(self, model: Any, matcher: PhraseMatcher, weight: float, floors: Mapping[int, float]) -> None:
        LM.__init__(self)
        self._model, self._matcher, self._weight, self._floors = model, matcher, weight, floors
        # flashlight compares states by their identity, so each history has one
        self._states: dict[LMState, tuple[Any, tuple[PhraseNode, ...]]] = {}
        self._steps: dict[tuple[LMState, int], tuple[LMState, float]] = {}

    def start(self, start_with_nothing: bool) -> LMState:
        """Begin an utterance, and forget the one before."""
        self._states.clear()
        self._steps.clear()
        state = LMState()
        self._states[state] = self._model.start(start_with_nothing), self._matcher.start
        return state

    def score(self, state: LMState, unit: int) -> tuple[LMState, float]:
        """Score a word or token after a history."""
        known = self._steps.get((state, unit))
        if known is not None:
            return known
        inner, places = self._states[state]
        inner, score = self._model.score(inner, unit)
        score = max(score, self._floors.get(unit, -math.inf))
        places, bonus = self._matcher.step(places, unit)
        following = state.child(unit)
        self._states[following] = inner, places
        self._steps[state, unit] = following, score + bonus / self._weight
        return self._steps[state, unit]

    def finish(self, state: LMState) -> tuple[LMState, float]:
        """Score the end after a history."""
        inner, places = self._states[state]
        _, score = self._model.finish(inner)
        return state, score + self._matcher.end(places) / self._weight


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Discard what C++ writes to the standard error, where KenLM draws a progress bar."""
    stderr = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _kenlm(path: str, words: Dictionary) -> KenLM:
    with _silenced_stderr(), for_kenlm(Path(path)) as file:
        try:
            return KenLM(str(file), words)
        except UnicodeDecodeError as error:  # KenLM quotes bytes of the file in its message
            raise unreadable_model(path, "it is cut short or corrupt") from error
        except UserError as error:  # the search in Python names the copy that it reads
            raise UserError(str(error).replace(str(file), path, 1)) from error
        except RuntimeError as error:
            raise unreadable_model(path, str(error)) from error


def _word_model(settings: DecoderSettings, dictionary: Dictionary, words: list[str]) -> KenLM | ZeroLM:
    """Read the language model for a search with a lexicon; refuse one that knows at most a tenth of its words."""
    if settings.lm is None:
        return ZeroLM()
    lm, entries = _kenlm(settings.lm, dictionary), unigrams(Path(settings.lm))
    num_known = len(_known_words(lm, dictionary, words) if entries is None else entries.intersection(words))
    if num_known <= 0.1 * len(words):
        raise UserError(
            f"{settings.lm}: knows {num_known} of {len(words)} words of {settings.lexicon}; make both of the same text "
            "with `hubert ngram`, in the same case"
        )
    return lm


def _token_model(path: str | None, vocabulary: Vocabulary, delimiter: int | None) -> tuple[Dictionary, KenLM | ZeroLM]:
    """Read the language model for a search without a lexicon.

    Tokens that no language model has as letters, such as the blank or a token <s> or <unk>, are unknown to it.

    Returns:
        The name of each token in the language model, and the language model.
    """
    names = [
        f"token {index}" if index == BLANK or token in SENTENCE_MARKS else token
        for index, token in enumerate(vocabulary.search_names)
    ]
    if path is None:
        return Dictionary([*names, UNKNOWN]), ZeroLM()
    entries = unigrams(Path(path))
    if entries is None:
        dictionary = Dictionary([*names, *(name for name in BOUNDARY_NAMES if name not in names), UNKNOWN])
        entries = _known_words(_kenlm(path, dictionary), dictionary, [*names, *BOUNDARY_NAMES])
        num_known = len(entries.intersection(names))
        is_of_letters = num_known > 0.1 * len(names)
        fact = f"{num_known} of the model's {len(names)} tokens"
    else:
        other_words = sorted(entries - {*names, *BOUNDARY_NAMES})
        is_of_letters = len(other_words) <= len(entries) / 2  # "a" is a word and a letter
        fact = f"words such as {other_words[0]!r}, not letters" if other_words else "letters"
    if not is_of_letters:
        raise UserError(
            f"{path}: knows {fact}; give the lexicon of its words (`hubert lexicon`), or make a model of letters, "
            "in the case of the vocabulary, with `hubert ngram --letters true`"
        )
    if delimiter is not None:
        other_tokens = {*names[:delimiter], *names[delimiter + 1 :]}
        boundary = next((name for name in BOUNDARY_NAMES if name in entries - other_tokens), None)
        if boundary is None:
            raise UserError(
                f"{path}: a language model of letters without the word boundary, one of {', '.join(BOUNDARY_NAMES)}; "
                "make one with `hubert ngram --letters true`"
            )
        names[delimiter] = boundary
    dictionary = Dictionary([*names, UNKNOWN])
    return dictionary, _kenlm(path, dictionary)


def _known_words(lm: KenLM, dictionary: Dictionary, words: Sequence[str]) -> set[str]:
    """Select words with another score than the unknown word: a binary model may not store the words themselves."""
    start = lm.start(False)
    _, unknown_score = lm.score(start, dictionary.get_index(UNKNOWN))
    return {word for word in words if lm.score(start, dictionary.get_index(word))[1] != unknown_score}
