"""From log-probabilities to words: greedy decoding, or beam search with lexicon and language models.

flashlight.py holds the search itself. This module prepares its input, distributes utterances over processes, and
rescores the best hypotheses with a neural language model.
"""

import copy
import math
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubert_lightning.asr.causal_lm import CausalLM
from hubert_lightning.asr.decoder_settings import DecoderSettings, read_settings
from hubert_lightning.asr.flashlight import FlashlightDecoder, Hypothesis
from hubert_lightning.asr.hot_words import HotWord, with_hot_words
from hubert_lightning.asr.language_files import BOUNDARY_NAMES, Lexicon, read_lexicon, unigrams
from hubert_lightning.asr.pauses import allow_pause_boundaries
from hubert_lightning.data.resources import usable_cores
from hubert_lightning.errors import UserError
from hubert_lightning.frames import CLOCK, Clock
from hubert_lightning.interrupts import ignore_interrupts
from hubert_lightning.vocabulary import BLANK, BOUNDARY, Vocabulary


def greedy(log_probs: Tensor, num_frames: Tensor, vocabulary: Vocabulary) -> list[str]:
    """Decode the best token of each frame: repeats collapsed, blanks dropped.

    Args:
        log_probs: (batch, frames, tokens); logits give the same texts.
        num_frames: (batch,), frames before padding.
        vocabulary: Vocabulary of the tokens.

    Returns:
        One text per utterance, with one space between words and none around them.
    """
    texts = []
    for path, length in zip(log_probs.argmax(dim=-1).cpu(), num_frames.tolist(), strict=True):
        tokens = torch.unique_consecutive(path[:length])
        texts.append(vocabulary.text_of(tokens[tokens != BLANK].tolist()))
    return texts


class BeamSearch:
    """Beam search for the most likely words, with the lexicon, n-gram model and rescorer that the settings name.

    Args:
        settings: Weights, files and beam of the search.
        vocabulary: Tokens of the log-probabilities.
        ranks: Number of processes on this machine that search, each with its share of the cores.
        device: Device of the rescorer; the CPU if not given.
        hot_words: Words and phrases that are preferred, and added to the lexicon if there is one.
        clock: Clock of the frames.

    Raises:
        UserError: A file is missing, has other content than its setting requires, or does not fit the vocabulary.
    """

    def __init__(
        self,
        settings: DecoderSettings,
        vocabulary: Vocabulary,
        ranks: int = 1,
        device: torch.device | None = None,
        hot_words: Sequence[HotWord] = (),
        clock: Clock = CLOCK,
    ) -> None:
        self.settings, self.vocabulary, self.hot_words, self.clock = settings, vocabulary, tuple(hot_words), clock
        tokens = vocabulary.search_names
        for file in (settings.lm, settings.lexicon):
            if file and not Path(file).is_file():
                raise UserError(f"{file}: no such file; correct the path, or make it with `hubert ngram`")
        lexicon = read_lexicon(Path(settings.lexicon), tokens[1:]) if settings.lexicon else None
        self._delimiter = _delimiter(settings, vocabulary, lexicon)
        if lexicon is not None:
            lexicon = with_hot_words(lexicon, hot_words, vocabulary)
        self._lexicon = None if lexicon is None else _with_word_ends(lexicon, tokens[self._delimiter or BLANK])
        self._decoder = FlashlightDecoder(settings, vocabulary, self._lexicon, self._delimiter, self.hot_words)
        self.rescorer = CausalLM(settings.rescorer, device=device) if settings.rescorer else None
        # Elsewhere, forking a process that has threads is not safe
        cores = usable_cores() // ranks if sys.platform == "linux" else 0
        self._num_workers = cores if settings.num_workers is None else min(settings.num_workers, max(cores, 2))
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, log_probs: Tensor, num_frames: Tensor, vocabulary: Vocabulary | None = None) -> list[str]:
        """Decode a batch; arguments and result are those of `greedy`."""
        rows = log_probs.float().cpu()
        hypotheses = self.nbest([row[:frames] for row, frames in zip(rows, num_frames.tolist(), strict=True)])
        return [best[0].text if best else "" for best in hypotheses]

    def nbest(self, utterances: Sequence[Tensor]) -> list[list[Hypothesis]]:
        """Find and rescore the best hypotheses of utterances.

        Args:
            utterances: (frames, tokens) float32 each, on the CPU.

        Returns:
            Up to `nbest` hypotheses of each utterance, best first.
        """
        hypotheses = list(self.search(utterances))
        if self.rescorer is None:
            return hypotheses
        scores = iter(self.rescorer([self.rescorer_text(best.text) for nbest in hypotheses for best in nbest]))
        weight = self.settings.rescorer_weight
        rescored = [[best._replace(score=best.score + weight * next(scores)) for best in nbest] for nbest in hypotheses]
        return [sorted(nbest, key=lambda best: -best.score) for nbest in rescored]

    def search(self, utterances: Sequence[Tensor]) -> Iterator[list[Hypothesis]]:
        """Search without rescoring; takes and returns what `nbest` does."""
        utterances = [self._searchable(utterance) for utterance in utterances]
        if self._num_workers < 2:
            return map(self._decoder, utterances)
        if self._pool is None:  # forked, so that the language model is in memory once
            self._pool = ProcessPoolExecutor(
                self._num_workers, get_context("fork"), initializer=_start_worker, initargs=(self._decoder,)
            )
        return self._pool.map(_search_in_worker, [utterance.numpy() for utterance in utterances])

    def _searchable(self, log_probs: Tensor) -> Tensor:
        """Allow words of a lexicon to end where the model predicts no delimiter.

        Args:
            log_probs: (frames, tokens)

        Returns:
            (frames, tokens), with one more frame if there is a lexicon.
        """
        boundary = self.vocabulary.boundary
        if boundary is None or not len(log_probs):
            return log_probs
        if self._delimiter is None:  # the search uses the blank as the delimiter
            log_probs = log_probs.clone()
            log_probs[:, BLANK] = torch.maximum(log_probs[:, BLANK], log_probs[:, boundary])
            log_probs[:, boundary] = -math.inf
        elif self._lexicon is not None:
            # transformers trains without a delimiter after the last word
            end = torch.full_like(log_probs[:1], -math.inf)
            end[:, BLANK], end[:, boundary] = 0.0, -self.settings.silence_score
            log_probs = torch.cat([allow_pause_boundaries(log_probs, self.vocabulary, self.clock), end])
        return log_probs

    def with_settings(self, **changes: Any) -> "BeamSearch":
        """Copy the search with other weights, beam, n-best or processes; no file is read again.

        Args:
            **changes: Values of `DecoderSettings` by their names.
        """
        other = copy.copy(self)
        other.settings = replace(self.settings, **changes)
        other._decoder = self._decoder.with_settings(other.settings)
        if other.settings.num_workers is not None:
            other._num_workers = other.settings.num_workers
        other._pool = None
        return other

    def word_tokens(self, hypothesis: Hypothesis) -> list[tuple[str, range]]:
        """Find the tokens of each word in a hypothesis of a search with a lexicon.

        Args:
            hypothesis: Hypothesis of this search.

        Returns:
            Each word, and the indices of its tokens in `hypothesis.tokens`.
        """
        assert self._lexicon is not None
        names = self.vocabulary.search_names
        word_ends = {BOUNDARY, names[BLANK]}
        words, index = [], 0
        for word in hypothesis.words:
            while index < len(hypothesis.tokens) and hypothesis.tokens[index] == self.vocabulary.boundary:
                index += 1
            rest = [name for name in (names[token] for token in hypothesis.tokens[index:]) if name != BOUNDARY]
            spellings = [[name for name in spelling if name not in word_ends] for spelling in self._lexicon[word]]
            lengths = [len(spelling) for spelling in spellings if rest[: len(spelling)] == spelling]
            length = max(lengths, default=0)
            words.append((unicodedata.normalize("NFC", word), range(index, index + length)))
            index += length
        return words

    def close(self) -> None:
        """End the search processes."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def rescorer_text(self, text: str) -> str:
        """Convert a hypothesis to the case of the rescorer's input."""
        case = self.settings.rescorer_case
        return text if case == "as_written" else text.lower() if case == "lower" else text.upper()


_worker_decoder: FlashlightDecoder


def _start_worker(decoder: FlashlightDecoder) -> None:
    global _worker_decoder
    _worker_decoder = decoder
    ignore_interrupts()
    torch.set_num_threads(1)


def _search_in_worker(log_probs: np.ndarray) -> list[Hypothesis]:
    return _worker_decoder(torch.from_numpy(log_probs))


def _delimiter(settings: DecoderSettings, vocabulary: Vocabulary, lexicon: Lexicon | None) -> int | None:
    """Choose the token between words of a search.

    Returns:
        The vocabulary's delimiter; between phonemes, only if the lexicon or the language model contains one.
    """
    if vocabulary.boundary is None or not vocabulary.spaced:
        return vocabulary.boundary
    if lexicon is not None:
        has_boundaries = any(BOUNDARY in spelling for spellings in lexicon.values() for spelling in spellings)
    else:
        entries = unigrams(Path(settings.lm)) if settings.lm is not None else None
        has_boundaries = not (entries or set()).isdisjoint(BOUNDARY_NAMES)
    return vocabulary.boundary if has_boundaries else None


def _with_word_ends(lexicon: Lexicon, end: str) -> Lexicon:
    """Add to each word its spellings with an end token.

    flashlight leaves a word at the first frame of its last token; without an end token, the last letter of a word could
    not last longer.
    """
    extended = {}
    for word, spellings in lexicon.items():
        ended = [[*spelling, end] for spelling in spellings if spelling[-1] != end]
        extended[word] = [*spellings, *(spelling for spelling in ended if spelling not in spellings)]
    return extended


def search_with(
    settings: DecoderSettings | Path | str,
    vocabulary: Vocabulary,
    ranks: int = 1,
    device: torch.device | None = None,
    hot_words: Sequence[HotWord] = (),
    clock: Clock = CLOCK,
) -> BeamSearch:
    """Build a beam search.

    Args:
        settings: Settings, or the path of their JSON file.
        vocabulary: Tokens of the log-probabilities.
        ranks: Number of processes on this machine that search.
        device: Device of the rescorer; the CPU if not given.
        hot_words: Words and phrases that are preferred.
        clock: Clock of the log-probabilities.

    Raises:
        UserError: As `read_settings` and `BeamSearch` raise.
    """
    if not isinstance(settings, DecoderSettings):
        settings = read_settings(Path(settings))
    return BeamSearch(settings, vocabulary, ranks, device, hot_words, clock)
