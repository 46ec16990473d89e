"""The private parts of flashlight's beam search decoder."""

import copy
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from flashlight.lib.text.decoder import (
    LexiconDecoder,
    LexiconDecoderOptions,
    LexiconFreeDecoder,
    LexiconFreeDecoderOptions,
    SmearingMode,
    Trie,
    ZeroLM,
)
from flashlight.lib.text.decoder.kenlm import KenLM
from flashlight.lib.text.dictionary import Dictionary
from torch import Tensor
from torchaudio.models.decoder import CTCDecoder

from hubert_lightning.asr.decoder_settings import BOUNDARIES, DecoderSettings, Hypothesis, search_options
from hubert_lightning.asr.language_files import MARKS, UNKNOWN, for_kenlm, no_model, unigrams
from hubert_lightning.errors import UserError
from hubert_lightning.interrupts import ignore_interrupts
from hubert_lightning.vocabulary import BLANK, BOUNDARY, Vocabulary

_inherited: tuple[CTCDecoder, Vocabulary]


def _inherit(decoder: CTCDecoder, vocabulary: Vocabulary) -> None:
    global _inherited
    _inherited = decoder, vocabulary
    ignore_interrupts()
    torch.set_num_threads(1)


def _search_inherited(log_probs: Any) -> list[Hypothesis]:
    return _search(*_inherited, torch.from_numpy(log_probs))


def _search(decoder: CTCDecoder, vocabulary: Vocabulary, log_probs: Tensor) -> list[Hypothesis]:
    if not len(log_probs):
        return [Hypothesis("", 0.0)]
    [found] = decoder(log_probs[None].contiguous())
    few = []
    for one in found:
        tokens = one.tokens.tolist()
        while tokens and tokens[-1] == vocabulary.boundary:  # the search begins and ends with one
            tokens.pop()
        while tokens and tokens[0] == vocabulary.boundary:
            tokens.pop(0)
        if isinstance(decoder.decoder, LexiconDecoder):  # a narrow beam may end in the middle of a word
            text = vocabulary.printed(" ".join(" ".join(one.words).split()))
        else:
            text = vocabulary.text_of(tokens)
        few.append(Hypothesis(text, float(one.score), tuple(tokens), tuple(one.words)))
    return few


def _flashlight(
    settings: DecoderSettings,
    vocabulary: Vocabulary,
    lexicon: dict[str, list[list[str]]] | None,
    delimiter: int | None,
) -> CTCDecoder:
    """The search that `torchaudio.models.decoder.ctc_decoder` builds, with words and tokens numbered by us."""
    options: LexiconFreeDecoderOptions | LexiconDecoderOptions
    if lexicon is None:
        options = LexiconFreeDecoderOptions(**search_options(settings, len(vocabulary)))
        known, lm = _letter_model(settings.lm, vocabulary, delimiter)
    else:
        shared = search_options(settings, len(vocabulary))
        options = LexiconDecoderOptions(word_score=settings.word_score, unk_score=-math.inf, **shared)
        known = Dictionary([*lexicon, UNKNOWN])
        lm = _word_model(settings, known, list(lexicon))
    return CTCDecoder(
        nbest=settings.nbest,
        lexicon=lexicon,
        word_dict=known,
        tokens_dict=Dictionary(vocabulary.search_names),
        lm=lm,
        decoder_options=options,
        blank_token=vocabulary.search_names[BLANK],
        sil_token=vocabulary.search_names[delimiter or BLANK],
        unk_word=UNKNOWN,
    )


def _spellings(decoder: CTCDecoder, lexicon: dict[str, list[list[str]]], silence: int) -> Trie:
    """What the letters of a lexicon can become, as torchaudio builds it, too."""
    trie, start = Trie(decoder.tokens_dict.index_size(), silence), decoder.lm.start(False)
    for word, spellings in lexicon.items():
        index = decoder.word_dict.get_index(word)
        _, score = decoder.lm.score(start, index)
        for spelling in spellings:
            trie.insert([decoder.tokens_dict.get_index(token) for token in spelling], index, score)
    trie.smear(SmearingMode.MAX)
    return trie


def _reweighted(decoder: CTCDecoder, trie: Trie | None, settings: DecoderSettings, silence: int) -> CTCDecoder:
    """A decoder that shares all but its options with another."""
    other = copy.copy(decoder)
    other.nbest = settings.nbest
    options = search_options(settings, decoder.tokens_dict.index_size())
    if trie is None:
        free = LexiconFreeDecoderOptions(**options)
        other.decoder = LexiconFreeDecoder(free, decoder.lm, silence, decoder.blank, [])
    else:
        words = LexiconDecoderOptions(word_score=settings.word_score, unk_score=-math.inf, **options)
        unknown = decoder.word_dict.get_index(UNKNOWN)
        other.decoder = LexiconDecoder(words, trie, decoder.lm, silence, decoder.blank, unknown, [], False)
    return other


@contextmanager
def _quiet() -> Iterator[None]:
    """What C++ writes to the standard error goes nowhere: KenLM draws a bar of its own there."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _kenlm(path: str, known: Dictionary) -> KenLM:
    with _quiet(), for_kenlm(Path(path)) as file:
        try:
            return KenLM(str(file), known)
        except UnicodeDecodeError as error:  # in a message of its own
            raise no_model(path, "it is cut short or damaged") from error
        except RuntimeError as error:
            raise no_model(path, error) from error


def _word_model(settings: DecoderSettings, known: Dictionary, words: list[str]) -> KenLM | ZeroLM:
    """A language model of the words of a lexicon; refuses one that knows hardly any of them."""
    if settings.lm is None:
        return ZeroLM()
    lm, there = _kenlm(settings.lm, known), unigrams(Path(settings.lm))
    num_known = len(_known(lm, known, words)) if there is None else sum(word in there for word in words)
    if num_known <= 0.1 * len(words):
        raise UserError(
            f"{settings.lm}: knows {num_known} of {len(words)} words of {settings.lexicon}; make both of the same text "
            "with `hubert ngram`, in the same case"
        )
    return lm


def _letter_model(path: str | None, vocabulary: Vocabulary, delimiter: int | None) -> tuple[Dictionary, KenLM | ZeroLM]:
    """A language model of tokens, and what it calls each of them.

    Tokens that the language model cannot mean, such as a model's own <s> or <unk>, are unknown to it.
    """
    names = [
        f"token {index}" if index == BLANK or token in MARKS else token
        for index, token in enumerate(vocabulary.search_names)
    ]
    if path is None:
        return Dictionary([*names, UNKNOWN]), ZeroLM()
    there = unigrams(Path(path))
    if there is None:
        known = Dictionary([*names, *(name for name in BOUNDARIES if name not in names), UNKNOWN])
        there = _known(_kenlm(path, known), known, [*names, *BOUNDARIES])
        no_letters = len(there.intersection(names)) <= 0.1 * len(names)
        fact = f"{len(there.intersection(names))} of the model's {len(names)} tokens"
    else:
        unknown = sorted(there - {*names, *BOUNDARIES})
        no_letters = len(unknown) > len(there) / 2  # "a" is a word and a letter
        fact = f"words such as {unknown[0]!r}, not letters" if unknown else "letters"
    if no_letters:
        raise UserError(
            f"{path}: knows {fact}; give the lexicon that spells them (`hubert lexicon`), or make a model of letters, "
            "in the case of the vocabulary, with `hubert ngram --letters true`"
        )
    if delimiter is not None:
        others = {*names[:delimiter], *names[delimiter + 1 :]}
        boundary = next((name for name in BOUNDARIES if name in there - others), None)
        if boundary is None:
            raise UserError(
                f"{path}: a language model of letters without the space between words, {BOUNDARY}; make one with "
                "`hubert ngram --letters true`"
            )
        names[delimiter] = boundary
    known = Dictionary([*names, UNKNOWN])
    return known, _kenlm(path, known)


def _known(lm: KenLM, known: Dictionary, words: Sequence[str]) -> set[str]:
    """Those words whose score is not that of an unknown one: all that a binary model tells of what it knows."""
    start = lm.start(False)
    _, of_unknown = lm.score(start, known.get_index(UNKNOWN))
    return {word for word in words if lm.score(start, known.get_index(word))[1] != of_unknown}
