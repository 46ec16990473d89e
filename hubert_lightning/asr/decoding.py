"""From log-probabilities to words: each frame's best letter, or a beam search with lexicon and language models.

The search itself is flashlight's, as torchaudio builds it; here are its settings, what can be wrong with them, several
processes, and a second look at the best few hypotheses by a neural language model.
"""

import copy
import math
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from flashlight.lib.text.decoder import (
    Trie,
)
from torch import Tensor

from hubert_lightning.asr.causal_lm import CausalLM
from hubert_lightning.asr.decoder_settings import BOUNDARIES, DecoderSettings, Hypothesis, read_settings
from hubert_lightning.asr.flashlight import (
    _flashlight,
    _inherit,
    _reweighted,
    _search,
    _search_inherited,
    _spellings,
)
from hubert_lightning.asr.language_files import read_lexicon, unigrams
from hubert_lightning.asr.word_times import with_boundaries_in_pauses
from hubert_lightning.errors import UserError
from hubert_lightning.vocabulary import BLANK, BOUNDARY, Vocabulary


def greedy(log_probs: Tensor, num_frames: Tensor, vocabulary: Vocabulary) -> list[str]:
    """The words on the single best path: the best token of each frame, repeats collapsed, blanks dropped.

    log_probs:  (batch, frames, tokens); logits do as well
    num_frames: (batch,), frames before padding
    returns:    one text per utterance, with one space between words and none around them
    """
    texts = []
    for path, length in zip(log_probs.argmax(dim=-1).cpu(), num_frames.tolist(), strict=True):
        tokens = torch.unique_consecutive(path[:length])
        texts.append(vocabulary.text_of(tokens[tokens != BLANK].tolist()))
    return texts


class BeamSearch:
    """Looks for the most likely words.

    Args:
        settings: Weights, files and beam of the search.
        vocabulary: Tokens of the log-probabilities.
        ranks: Number of processes on this machine that search, each with its share of the cores.
        device: Device of the rescorer; the CPU if not given.

    Raises:
        UserError: A file is missing, or is not what its name says, or does not fit the vocabulary.
    """

    def __init__(
        self, settings: DecoderSettings, vocabulary: Vocabulary, ranks: int = 1, device: torch.device | None = None
    ) -> None:
        self.settings, self.vocabulary = settings, vocabulary
        tokens = vocabulary.search_names
        for file in (settings.lm, settings.lexicon):
            if file and not Path(file).is_file():
                raise UserError(f"{file}: no such file; correct the path, or make it with `hubert ngram`")
        lexicon = read_lexicon(Path(settings.lexicon), tokens[1:]) if settings.lexicon else None
        self._delimiter = _delimiter(settings, vocabulary, lexicon)
        self._lexicon = None if lexicon is None else _ended(lexicon, tokens[self._delimiter or BLANK])
        self._decoder = _flashlight(settings, vocabulary, self._lexicon, self._delimiter)
        self._trie: Trie | None = None
        self.rescorer = CausalLM(settings.rescorer, device=device) if settings.rescorer else None
        # Elsewhere, forking a process that has threads is not safe
        cores = len(os.sched_getaffinity(0)) // ranks if sys.platform == "linux" else 0
        self._num_workers = cores if settings.num_workers is None else min(settings.num_workers, max(cores, 2))
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, log_probs: Tensor, num_frames: Tensor, vocabulary: Vocabulary | None = None) -> list[str]:
        """The best text of each utterance; takes and returns what `greedy` does."""
        return [best[0].text if best else "" for best in self.nbest(log_probs, num_frames)]

    def nbest(self, log_probs: Tensor, num_frames: Tensor) -> list[list[Hypothesis]]:
        """The best few of each utterance, best first.

        log_probs:  (batch, frames, tokens)
        num_frames: (batch,), frames before padding
        """
        rows = log_probs.float().cpu()
        return self.nbest_of([row[:frames] for row, frames in zip(rows, num_frames.tolist(), strict=True)])

    def nbest_of(self, utterances: Sequence[Tensor]) -> list[list[Hypothesis]]:
        """The same for utterances of any length: (frames, tokens) float32 each, on the CPU."""
        hypotheses = list(self.searched(utterances))
        if self.rescorer is None:
            return hypotheses
        scores = iter(self.rescorer([self.as_read(one.text) for few in hypotheses for one in few]))
        weight = self.settings.rescorer_weight
        rescored = [[one._replace(score=one.score + weight * next(scores)) for one in few] for few in hypotheses]
        return [sorted(few, key=lambda one: -one.score) for few in rescored]

    def searched(self, utterances: Sequence[Tensor]) -> Iterator[list[Hypothesis]]:
        """What the search finds, before it is rescored."""
        utterances = [self._searchable(utterance) for utterance in utterances]
        if self._num_workers < 2:
            return (_search(self._decoder, self.vocabulary, utterance) for utterance in utterances)
        if self._pool is None:  # forked, so that the language model is in memory once
            self._pool = ProcessPoolExecutor(
                self._num_workers, get_context("fork"), initializer=_inherit, initargs=(self._decoder, self.vocabulary)
            )
        return self._pool.map(_search_inherited, [utterance.numpy() for utterance in utterances])

    def _searchable(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities in which words of a lexicon may end where the model says no delimiter.

        Args:
            log_probs: (frames, tokens)

        Returns:
            (frames, tokens), with one more frame if there is a lexicon.
        """
        boundary = self.vocabulary.boundary
        if boundary is None or not len(log_probs):
            return log_probs
        if self._delimiter is None:  # which the search takes for a blank
            log_probs = log_probs.clone()
            log_probs[:, BLANK] = torch.maximum(log_probs[:, BLANK], log_probs[:, boundary])
            log_probs[:, boundary] = -math.inf
        elif self._lexicon is not None:
            # transformers trains without a delimiter after the last word
            end = torch.full_like(log_probs[:1], -math.inf)
            end[:, BLANK], end[:, boundary] = 0.0, -self.settings.silence_score
            log_probs = torch.cat([with_boundaries_in_pauses(log_probs, self.vocabulary), end])
        return log_probs

    def with_weights(self, **changed: Any) -> "BeamSearch":
        """The same search with other weights, beam or n-best; nothing is read again."""
        if self._lexicon and self._trie is None:
            self._trie = _spellings(self._decoder, self._lexicon, self._delimiter or BLANK)
        other = copy.copy(self)
        other.settings = replace(self.settings, **changed)
        other._decoder = _reweighted(self._decoder, self._trie, other.settings, self._delimiter or BLANK)
        if other.settings.num_workers is not None:
            other._num_workers = other.settings.num_workers
        other._pool = None
        return other

    def word_tokens(self, hypothesis: Hypothesis) -> list[tuple[str, range]]:
        """The words of a lexicon in a hypothesis, and the indices of each one's tokens."""
        assert self._lexicon is not None
        names = self.vocabulary.search_names
        ends = {BOUNDARY, names[BLANK]}
        words, index = [], 0
        for word in hypothesis.words:
            while index < len(hypothesis.tokens) and hypothesis.tokens[index] == self.vocabulary.boundary:
                index += 1
            spelled = [name for name in (names[token] for token in hypothesis.tokens[index:]) if name != BOUNDARY]
            ways = [[name for name in way if name not in ends] for way in self._lexicon[word]]
            length = max((len(way) for way in ways if spelled[: len(way)] == way), default=0)
            words.append((unicodedata.normalize("NFC", word), range(index, index + length)))
            index += length
        return words

    def close(self) -> None:
        """End its processes."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def as_read(self, text: str) -> str:
        """A text in the case that the rescorer reads."""
        case = self.settings.rescorer_case
        return text if case == "as_written" else text.lower() if case == "lower" else text.upper()


def _delimiter(
    settings: DecoderSettings, vocabulary: Vocabulary, lexicon: dict[str, list[list[str]]] | None
) -> int | None:
    """The token between words of a search; between phonemes, only if its lexicon or its language model has one."""
    if vocabulary.boundary is None or not vocabulary.spaced:
        return vocabulary.boundary
    if lexicon is not None:
        parted = any(BOUNDARY in spelled for ways in lexicon.values() for spelled in ways)
    else:
        parted = settings.lm is not None and not (unigrams(Path(settings.lm)) or set()).isdisjoint(BOUNDARIES)
    return vocabulary.boundary if parted else None


def _ended(lexicon: dict[str, list[list[str]]], end: str) -> dict[str, list[list[str]]]:
    """A lexicon in which every word may end with a token of its own.

    flashlight leaves a word at the first frame of its last token, so that a last letter could last no longer.
    """
    return {
        word: [*ways, *(way for way in ([*spelled, end] for spelled in ways if spelled[-1] != end) if way not in ways)]
        for word, ways in lexicon.items()
    }


def search_with(
    settings: DecoderSettings | Path | str, vocabulary: Vocabulary, ranks: int = 1, device: torch.device | None = None
) -> BeamSearch:
    """The search that settings, or a file of them, describe."""
    if not isinstance(settings, DecoderSettings):
        settings = read_settings(Path(settings))
    return BeamSearch(settings, vocabulary, ranks, device)
