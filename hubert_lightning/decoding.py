"""From log-probabilities to words: each frame's best letter, or a beam search with lexicon and language models.

The search itself is flashlight's, as torchaudio builds it; here are its settings, what can be wrong with them, several
processes, and a second look at the best few hypotheses by a neural language model.
"""

import copy
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
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
)
from flashlight.lib.text.dictionary import load_words
from torch import Tensor
from torchaudio.models.decoder import CTCDecoder, ctc_decoder

from hubert_lightning.data.text import BLANK, BOUNDARY, Vocabulary
from hubert_lightning.files import write_whole
from hubert_lightning.rescoring import CausalLM


def greedy(log_probs: Tensor, num_frames: Tensor, vocabulary: Vocabulary) -> list[str]:
    """The words on the single best path: the best token of each frame, repeats collapsed, blanks dropped.

    log_probs:  (batch, frames, tokens); logits do as well
    num_frames: (batch,), frames before padding
    returns:    one text per utterance, with one space between words and none around them
    """
    texts = []
    for path, length in zip(log_probs.argmax(dim=-1).cpu(), num_frames.tolist(), strict=True):
        tokens = torch.unique_consecutive(path[:length])
        texts.append(" ".join(vocabulary.decode(tokens[tokens != BLANK].tolist()).split()))
    return texts


NUMBERS = ("lm_weight", "word_score", "silence_score", "beam_threshold", "rescorer_weight")


@dataclass(frozen=True)
class DecoderSettings:
    """What a beam search looks for. Defaults: fairseq's with a 4-gram (HuBERT infer_kenlm.yaml).

    Args:
        lm: n-gram language model, ARPA or KenLM's binary form: of words with a lexicon, of letters without.
        lexicon: The words that can be said, each on a line with its letters; anything can be spelled if not given.
        lm_weight: Of the language model's log-probability.
        word_score: Added for each word (of a lexicon).
        silence_score: Added for each word boundary.
        beam_size: Hypotheses that are kept at each frame.
        beam_threshold: Hypotheses whose score is further below the best one are dropped.
        nbest: Hypotheses that are returned, or that the rescorer chooses from.
        rescorer: Directory of a causal language model of transformers.
        rescorer_weight: Of its log-probability, which is added to the search's score.
        rescorer_case: Into which letters it reads are turned: "lower", "upper", or "as_written".
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
        numbers = {name: getattr(self, name) for name in NUMBERS}
        counts = {"beam_size": self.beam_size, "nbest": self.nbest, "num_workers": self.num_workers or 0}
        wrong = [name for name, value in numbers.items() if not isinstance(value, (int, float))]
        wrong += [name for name, value in counts.items() if not isinstance(value, int)]
        if wrong:
            raise ValueError(f"{wrong[0]} is {getattr(self, wrong[0])!r}; it is a number")
        if self.rescorer_case not in ("lower", "upper", "as_written"):
            raise ValueError(f"rescorer_case is {self.rescorer_case!r}; choose lower, upper or as_written")
        if self.beam_size < 1 or self.nbest < 1 or self.beam_threshold <= 0:
            raise ValueError(
                f"beam_size {self.beam_size}, nbest {self.nbest}, beam_threshold {self.beam_threshold}; each is above 0"
            )


def write_settings(settings: DecoderSettings, path: Path) -> None:
    """Write them as JSON; files beside it or below are named as seen from there, so that the folder can be moved."""
    content = asdict(settings)
    for key in ("lm", "lexicon", "rescorer"):
        if content[key]:
            file = Path(content[key]).resolve()
            inside = file.is_relative_to(path.parent.resolve())
            content[key] = str(file.relative_to(path.parent.resolve()) if inside else file)
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def read_settings(path: Path) -> DecoderSettings:
    """The settings in a JSON file of `hubert tune-decoder`.

    Raises:
        ValueError: It is not there, or holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        for key in ("lm", "lexicon", "rescorer"):
            if content.get(key):
                content[key] = str(path.parent / content[key])
        return DecoderSettings(**content)
    except OSError as error:
        raise ValueError(f"{path}: no such decoder; make it with `hubert tune-decoder`") from error
    except (TypeError, AttributeError, ValueError) as error:  # no JSON, or other settings
        raise ValueError(f"{path}: no settings of a decoder ({error}); make it with `hubert tune-decoder`") from error


class Hypothesis(NamedTuple):
    """A text that may have been said, and its score: natural logarithms of the model, weighted ones of the rest."""

    text: str
    score: float


class BeamSearch:
    """Looks for the most likely words.

    Args:
        settings: What for.
        vocabulary: What the tokens of the log-probabilities are.
        ranks: How many processes on this machine search, each with its share of the cores.
        device: Of the rescorer; the CPU if not given.

    Raises:
        ValueError: A file is missing, or is not what its name says, or does not fit the vocabulary.
    """

    def __init__(
        self, settings: DecoderSettings, vocabulary: Vocabulary, ranks: int = 1, device: torch.device | None = None
    ) -> None:
        self.settings, self.vocabulary = settings, vocabulary
        _check_files(settings, vocabulary)
        self._decoder = _flashlight(settings, vocabulary)
        if settings.lm and settings.lexicon:
            _check_words(self._decoder, settings)
        self._trie: Trie | None = None
        self.rescorer = CausalLM(settings.rescorer, device=device) if settings.rescorer else None
        # Elsewhere, forking a process that has threads is not safe
        cores = len(os.sched_getaffinity(0)) // ranks if sys.platform == "linux" else 0
        self._num_workers = cores if settings.num_workers is None else settings.num_workers
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
        found = list(self.searched(utterances))
        if self.rescorer is None:
            return found
        scores = iter(self.rescorer([self.as_read(one.text) for few in found for one in few]))
        weight = self.settings.rescorer_weight
        rescored = [[Hypothesis(one.text, one.score + weight * next(scores)) for one in few] for few in found]
        return [sorted(few, key=lambda one: -one.score) for few in rescored]

    def searched(self, utterances: Sequence[Tensor]) -> Iterator[list[Hypothesis]]:
        """What the search finds, before it is rescored."""
        if self._num_workers < 2:
            return (_search(self._decoder, utterance) for utterance in utterances)
        if self._pool is None:  # forked, so that the language model is in memory once
            self._pool = ProcessPoolExecutor(
                self._num_workers, get_context("fork"), initializer=_inherit, initargs=(self._decoder,)
            )
        return self._pool.map(_search_inherited, [utterance.numpy() for utterance in utterances])

    def with_weights(self, **changed: Any) -> "BeamSearch":
        """The same search with other weights, beam or n-best; nothing is read again."""
        if self.settings.lexicon and self._trie is None:
            self._trie = _spellings(self._decoder, self.settings.lexicon)
        other = copy.copy(self)
        other.settings = replace(self.settings, **changed)
        other._decoder = _reweighted(self._decoder, self._trie, other.settings)
        if other.settings.num_workers is not None:
            other._num_workers = other.settings.num_workers
        other._pool = None
        return other

    def close(self) -> None:
        """End its processes."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def as_read(self, text: str) -> str:
        """A text in the case that the rescorer reads."""
        case = self.settings.rescorer_case
        return text if case == "as_written" else text.lower() if case == "lower" else text.upper()


_inherited: CTCDecoder


def _inherit(decoder: CTCDecoder) -> None:
    global _inherited
    _inherited = decoder
    torch.set_num_threads(1)


def _search_inherited(log_probs: Any) -> list[Hypothesis]:
    return _search(_inherited, torch.from_numpy(log_probs))


def _search(decoder: CTCDecoder, log_probs: Tensor) -> list[Hypothesis]:
    if not len(log_probs):
        return [Hypothesis("", 0.0)]
    [found] = decoder(log_probs[None].contiguous())
    few = []
    for one in found:
        if isinstance(decoder.decoder, LexiconDecoder):  # a narrow beam may end in the middle of a word
            text = " ".join(one.words)
        else:
            text = "".join(decoder.idxs_to_tokens(one.tokens)).replace(BOUNDARY, " ")
        few.append(Hypothesis(" ".join(text.split()), float(one.score)))
    return few


def _flashlight(settings: DecoderSettings, vocabulary: Vocabulary) -> CTCDecoder:
    with _quiet(), TemporaryDirectory() as folder:
        order = None
        if settings.lm and not settings.lexicon:
            # Otherwise torchaudio 2.11 numbers the letters for the language model in the order of a hash table
            order = str(Path(folder) / "tokens.txt")
            Path(order).write_text("\n".join([*vocabulary.tokens, "<unk>"]), "utf-8")
        try:
            return ctc_decoder(
                lexicon=settings.lexicon,
                tokens=list(vocabulary.tokens),
                lm=settings.lm,
                lm_dict=order,
                nbest=settings.nbest,
                beam_size=settings.beam_size,
                beam_threshold=settings.beam_threshold,
                lm_weight=settings.lm_weight,
                word_score=settings.word_score,
                sil_score=settings.silence_score,
                blank_token=vocabulary.tokens[BLANK],
                sil_token=BOUNDARY,
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"{settings.lm}: no n-gram language model that KenLM reads ({reason}); make one with `hubert ngram`"
            ) from error


def _spellings(decoder: CTCDecoder, lexicon: str) -> Trie:
    """What the letters of a lexicon can become, as torchaudio builds it, too."""
    silence = decoder.tokens_dict.get_index(BOUNDARY)
    trie, start = Trie(decoder.tokens_dict.index_size(), silence), decoder.lm.start(False)
    for word, spellings in load_words(lexicon).items():
        place = decoder.word_dict.get_index(word)
        _, score = decoder.lm.score(start, place)
        for spelling in spellings:
            trie.insert([decoder.tokens_dict.get_index(token) for token in spelling], place, score)
    trie.smear(SmearingMode.MAX)
    return trie


def _reweighted(decoder: CTCDecoder, trie: Trie | None, settings: DecoderSettings) -> CTCDecoder:
    """A decoder that shares all but its options with another."""
    other = copy.copy(decoder)
    other.nbest = settings.nbest
    options = {
        "beam_size": settings.beam_size,
        "beam_size_token": decoder.tokens_dict.index_size(),
        "beam_threshold": settings.beam_threshold,
        "lm_weight": settings.lm_weight,
        "sil_score": settings.silence_score,
        "log_add": False,
        "criterion_type": CriterionType.CTC,
    }
    silence = decoder.tokens_dict.get_index(BOUNDARY)
    if trie is None:
        free = LexiconFreeDecoderOptions(**options)
        other.decoder = LexiconFreeDecoder(free, decoder.lm, silence, decoder.blank, [])
    else:
        words = LexiconDecoderOptions(word_score=settings.word_score, unk_score=-math.inf, **options)
        unknown = decoder.word_dict.get_index("<unk>")
        other.decoder = LexiconDecoder(words, trie, decoder.lm, silence, decoder.blank, unknown, [], False)
    return other


def _check_files(settings: DecoderSettings, vocabulary: Vocabulary) -> None:
    for file in (settings.lm, settings.lexicon):
        if file and not Path(file).is_file():
            raise ValueError(f"{file}: no such file; correct the path, or make it with `hubert ngram`")
    if settings.lexicon:
        _check_lexicon(Path(settings.lexicon), vocabulary)
    elif settings.lm and (words := _unigrams(Path(settings.lm))):
        unknown = sorted(words - set(vocabulary.tokens))
        if len(unknown) > len(words) / 2:  # "a" is a word and a letter
            raise ValueError(
                f"{settings.lm}: knows words such as {unknown[0]!r}, not letters; give the lexicon that spells them "
                "(`hubert lexicon`), or make a model of letters with `hubert ngram --letters true`"
            )


def _check_lexicon(path: Path, vocabulary: Vocabulary) -> None:
    known, empty = set(vocabulary.tokens[1:]), True
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                word, *tokens = line.split() or [""]
                empty = empty and not word
                if unknown := set(tokens) - known:
                    raise ValueError(
                        f"{path}, line {number}: {word!r} is spelled with {sorted(unknown)}, which are not among the "
                        "model's tokens; make the lexicon with `hubert lexicon` and the model's vocabulary"
                    )
                if word and not tokens:
                    raise ValueError(f"{path}, line {number}: {word!r} has no spelling; make it with `hubert lexicon`")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no lexicon, which is UTF-8 text; make it with `hubert lexicon`") from error
    if empty:
        raise ValueError(f"{path}: an empty lexicon; make it with `hubert lexicon`")


def _check_words(decoder: CTCDecoder, settings: DecoderSettings) -> None:
    """Refuse a language model that knows hardly any word of the lexicon."""
    start, most = decoder.lm.start(False), 10_000
    _, of_unknown = decoder.lm.score(start, decoder.word_dict.get_index("<unk>"))
    words = [word for word in list(load_words(str(settings.lexicon)))[:most] if word != "<unk>"]
    known = sum(decoder.lm.score(start, decoder.word_dict.get_index(word))[1] != of_unknown for word in words)
    if known <= 0.1 * len(words):
        raise ValueError(
            f"{settings.lm}: knows {known} of {len(words)} words of {settings.lexicon}; make both of the same text "
            "with `hubert ngram`, in the same case"
        )


def _unigrams(path: Path, most: int = 10_000) -> set[str]:
    """Some words of an ARPA file, without its marks; none of a binary one."""
    words: set[str] = set()
    with path.open(encoding="utf-8", errors="ignore") as file:
        if not re.match(r"\s*\\data\\", file.read(100)):
            return words
        file.seek(0)
        for line in file:
            parts = line.rstrip("\n").split("\t")
            if line.startswith("\\2-grams") or len(words) > most:
                break
            if len(parts) > 1:
                words.add(parts[1])
    return words - {"<s>", "</s>", "<unk>"}


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
