"""From log-probabilities to words: each frame's best letter, or a beam search with lexicon and language models.

The search itself is flashlight's, as torchaudio builds it; here are its settings, what can be wrong with them, several
processes, and a second look at the best few hypotheses by a neural language model.
"""

import copy
import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from flashlight.lib.text.decoder import (
    CriterionType,
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

from hubert_lightning.asr.causal_lm import CausalLM
from hubert_lightning.asr.language_files import MARKS, UNKNOWN, for_kenlm, no_model, read_lexicon, unigrams
from hubert_lightning.asr.word_times import with_boundaries_in_pauses
from hubert_lightning.files import write_whole
from hubert_lightning.interrupts import ignore_interrupts
from hubert_lightning.untrusted.json_file import is_text, read_json, shown
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


BOUNDARIES = (BOUNDARY, "<space>", "▁", "<sp>")
"""What language models of letters call the space between words."""
NUMBERS = ("lm_weight", "word_score", "silence_score", "beam_threshold", "rescorer_weight")

LARGEST_WEIGHT = 1e6
COUNTS = {"beam_size": (1, 10_000), "nbest": (1, 10_000), "num_workers": (0, 1024)}
"""What a file may set: a search keeps a hypothesis of some 60 bytes for each frame and place in the beam."""


@dataclass(frozen=True)
class DecoderSettings:
    """What a beam search looks for. Defaults: fairseq's with a 4-gram (HuBERT infer_kenlm.yaml).

    Args:
        lm: n-gram language model, ARPA or KenLM's binary form: of words with a lexicon, of letters without. Either file
            may be compressed with gzip, bzip2 or xz.
        lexicon: The words that can be said, each on a line with its letters; anything can be spelled if not given.
        lm_weight: Weight of the language model's log-probability.
        word_score: Score added for each word (of a lexicon).
        silence_score: Score added for each word boundary.
        beam_size: Hypotheses that are kept at each frame.
        beam_threshold: Distance below the best score at which hypotheses are dropped.
        nbest: Hypotheses that are returned, or that the rescorer chooses from.
        rescorer: Directory of a causal language model of transformers.
        rescorer_weight: Weight of its log-probability, which is added to the search's score.
        rescorer_case: Case of the text that it reads: "lower", "upper", or "as_written".
        num_workers: Processes that search; one for each core if not given, 0 for none.
    """

    lm: str | None = None
    lexicon: str | None = None
    lm_weight: float = 2.0
    word_score: float = -1.0
    silence_score: float = 0.0
    beam_size: int = 500
    beam_threshold: float = 100.0
    nbest: int = 1
    rescorer: str | None = None
    rescorer_weight: float = 0.5
    rescorer_case: Literal["lower", "upper", "as_written"] = "lower"
    num_workers: int | None = None

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= LARGEST_WEIGHT:
                raise ValueError(f"{name} is {shown(value)}; it is a number, of {LARGEST_WEIGHT:.0f} at most")
        counts = self.beam_size, self.nbest, self.beam_threshold
        if all(isinstance(count, (int, float)) for count in counts) and min(counts) <= 0:
            raise ValueError(
                f"beam_size {self.beam_size}, nbest {self.nbest}, beam_threshold {self.beam_threshold}; each is above 0"
            )
        for name, (least, most) in COUNTS.items():
            value = getattr(self, name)
            if value is None and name == "num_workers":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name} is {shown(value)}; it is a number from {least} to {most}")
        for name in ("lm", "lexicon", "rescorer"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or "\0" in value or not is_text(value)):
                raise ValueError(f"{name} is {shown(value)}; it is a path")
        if self.rescorer_case not in ("lower", "upper", "as_written"):
            raise ValueError(f"rescorer_case is {shown(self.rescorer_case)}; choose lower, upper or as_written")


def settings_identity(settings: DecoderSettings) -> dict[str, Any]:
    """What a search finds depends on: the settings, and size and modification time of every file that they name."""
    files: dict[str, list[list[Any]]] = {}
    for name in (settings.lm, settings.lexicon, settings.rescorer):
        if name:
            path = Path(name)
            inside = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
            files[os.path.abspath(path)] = [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in inside]
    return {name: value for name, value in asdict(settings).items() if name != "num_workers"} | {"files": files}


def write_settings(settings: DecoderSettings, path: Path) -> None:
    """Write settings to a JSON file."""
    write_whole(path, settings_json(settings, path))


def settings_json(settings: DecoderSettings, path: Path) -> bytes:
    """Settings as JSON; files beside its path or below are named relative to it, so that the folder can be moved."""
    content = asdict(settings)
    for key in ("lm", "lexicon", "rescorer"):
        if content[key]:
            file = Path(content[key]).resolve()
            inside = file.is_relative_to(path.parent.resolve())
            content[key] = str(file.relative_to(path.parent.resolve()) if inside else file)
    return (json.dumps(content, indent=1) + "\n").encode()


def read_settings(path: Path) -> DecoderSettings:
    """The settings in a JSON file of `hubert tune-decoder`.

    Raises:
        ValueError: It is not there, or holds something else.
    """
    way_out = "make it with `hubert tune-decoder`"
    if not path.is_file():
        raise ValueError(f"{path}: no such decoder; {way_out}")
    content = read_json(path, way_out, fact=": no settings of a decoder")
    known = {field.name for field in fields(DecoderSettings)}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: no settings of a decoder ({shown(content)} is no object of JSON); {way_out}")
    if others := sorted(content.keys() - known):
        raise ValueError(f"{path}: no settings of a decoder (not {shown(others[0])}); {way_out}")
    for key in ("lm", "lexicon", "rescorer"):
        if content.get(key) and isinstance(content[key], str):
            content[key] = str(path.parent / content[key])
    try:
        return DecoderSettings(**content)
    except ValueError as error:
        raise ValueError(f"{path}: no settings of a decoder ({error}); {way_out}") from error


class Hypothesis(NamedTuple):
    """A text that may have been said.

    Attributes:
        text: Text as the model prints it.
        score: Natural logarithm of the model's probability, plus the weighted scores of the rest.
        tokens: Decoded tokens, repeats collapsed and blanks dropped.
        words: Words of the lexicon, if there is one.
    """

    text: str
    score: float
    tokens: tuple[int, ...] = ()
    words: tuple[str, ...] = ()


class BeamSearch:
    """Looks for the most likely words.

    Args:
        settings: Weights, files and beam of the search.
        vocabulary: Tokens of the log-probabilities.
        ranks: Number of processes on this machine that search, each with its share of the cores.
        device: Device of the rescorer; the CPU if not given.

    Raises:
        ValueError: A file is missing, or is not what its name says, or does not fit the vocabulary.
    """

    def __init__(
        self, settings: DecoderSettings, vocabulary: Vocabulary, ranks: int = 1, device: torch.device | None = None
    ) -> None:
        self.settings, self.vocabulary = settings, vocabulary
        tokens = vocabulary.search_names
        for file in (settings.lm, settings.lexicon):
            if file and not Path(file).is_file():
                raise ValueError(f"{file}: no such file; correct the path, or make it with `hubert ngram`")
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
        options = LexiconFreeDecoderOptions(**_options(settings, len(vocabulary)))
        known, lm = _letter_model(settings.lm, vocabulary, delimiter)
    else:
        shared = _options(settings, len(vocabulary))
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


def _options(settings: DecoderSettings, num_tokens: int) -> dict[str, Any]:
    """The options of a search, with a lexicon or without."""
    return {
        "beam_size": settings.beam_size,
        "beam_size_token": num_tokens,
        "beam_threshold": settings.beam_threshold,
        "lm_weight": settings.lm_weight,
        "sil_score": settings.silence_score,
        "log_add": False,
        "criterion_type": CriterionType.CTC,
    }


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
        raise ValueError(
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
        raise ValueError(
            f"{path}: knows {fact}; give the lexicon that spells them (`hubert lexicon`), or make a model of letters, "
            "in the case of the vocabulary, with `hubert ngram --letters true`"
        )
    if delimiter is not None:
        others = {*names[:delimiter], *names[delimiter + 1 :]}
        boundary = next((name for name in BOUNDARIES if name in there - others), None)
        if boundary is None:
            raise ValueError(
                f"{path}: a language model of letters without the space between words, {BOUNDARY}; make one with "
                "`hubert ngram --letters true`"
            )
        names[delimiter] = boundary
    known = Dictionary([*names, UNKNOWN])
    return known, _kenlm(path, known)


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


def _known(lm: KenLM, known: Dictionary, words: Sequence[str]) -> set[str]:
    """Those words whose score is not that of an unknown one: all that a binary model tells of what it knows."""
    start = lm.start(False)
    _, of_unknown = lm.score(start, known.get_index(UNKNOWN))
    return {word for word in words if lm.score(start, known.get_index(word))[1] != of_unknown}


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
    options = _options(settings, decoder.tokens_dict.index_size())
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


def search_with(
    settings: DecoderSettings | Path | str, vocabulary: Vocabulary, ranks: int = 1, device: torch.device | None = None
) -> BeamSearch:
    """The search that settings, or a file of them, describe."""
    if not isinstance(settings, DecoderSettings):
        settings = read_settings(Path(settings))
    return BeamSearch(settings, vocabulary, ranks, device)
