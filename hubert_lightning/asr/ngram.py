"""An n-gram language model of a text, and the lexicon of its words.

kaldingram (of the Next-gen Kaldi team; Kneser-Ney smoothing as in SRILM) estimates the n-grams: it is the one
maintained estimator that installs everywhere as a Python package. KenLM's lmplz is better and faster, but has to be
compiled; KenLM's Python package can only read models. A model of lmplz can be used in the same way.
"""

import contextlib
import io
import re
from collections import Counter
from pathlib import Path

from kaldingram.train import NgramCounts

from hubert_lightning.asr.language_files import SENTENCE_MARKS, UNKNOWN
from hubert_lightning.asr.lexicon import format_counts, lexicon_of, model_vocabulary
from hubert_lightning.errors import UserError, counted
from hubert_lightning.files import replacing_all
from hubert_lightning.untrusted.text_file import lines_of
from hubert_lightning.vocabulary import BOUNDARY, Vocabulary


def ngram(
    text: Path,
    out: Path,
    order: int = 4,
    vocabulary: Path | None = None,
    letters: bool = False,
    min_counts: list[int] | None = None,
) -> None:
    """Make an n-gram language model of a text (OUT, in ARPA format) and its lexicon (OUT with the suffix .lexicon).

    Args:
        text: Text with a sentence per line, which may be compressed; it is normalised as transcripts are.
        out: Language model to write, a .arpa file.
        order: Length of the longest n-grams, 2 to 5.
        vocabulary: Vocabulary of the model: a file of `hubert vocabulary`, or a fine-tuned checkpoint. LibriSpeech's
            if not given.
        letters: Whether the n-grams consist of letters instead of words, for a search without lexicon.
        min_counts: Least number of occurrences of an n-gram in the model, for each order, as in [0, 0, 2]; none if not
            given.

    Raises:
        UserError: OUT is no .arpa file, its lexicon exists, or the arguments or the text cannot be used.
    """
    model_tokens = model_vocabulary(vocabulary)
    if Path(out).suffix != ".arpa":
        raise UserError(f"{out}: not a name of an ARPA file; choose one that ends in .arpa")
    if Path(out).absolute() == Path(text).absolute():
        raise UserError(f"{out}: the name of the text; choose another OUT, such as lm.arpa")
    lexicon = Path(out).with_suffix(".lexicon")
    if not letters and lexicon.exists():  # OUT alone was named, and is replaced
        raise UserError(f"{lexicon}: exists already; remove it or choose another OUT")
    if not 2 <= order <= 5:
        raise UserError(f"order {order}: choose 2 to 5")
    if min_counts is not None and len(min_counts) != order:
        raise UserError(f"min_counts {min_counts} for n-grams of order {order}; give one number for each order")
    counts, words, unknown, num_sentences = NgramCounts(order), Counter[str](), Counter[str](), 0
    for line in lines_of(Path(text)):
        sentence = _words_of(line, model_tokens, unknown)
        if sentence:
            num_sentences += 1
            words.update(sentence)
            counts.add_raw_counts_from_line(" ".join(_letters_of(sentence, model_tokens) if letters else sentence))
    if not set(words) - SENTENCE_MARKS:
        raise UserError(f"{text}: no sentences in the letters of the vocabulary; give a text in the model's language")
    outputs, summary = {Path(out): _estimate(counts, min_counts)}, ""
    if not letters:
        content, summary = lexicon_of(words, lexicon, model_tokens, str(text))
        outputs[lexicon] = content  # named last: what a killed call leaves does not block the next
    with replacing_all(*outputs) as files:
        for file, content in zip(files, outputs.values(), strict=True):
            file.write(content.encode())
    print(f"{out}: {'letters' if letters else 'words'}, order {order}, of {counted(num_sentences, 'sentence')}")
    if unknown:
        print(
            f"{words[UNKNOWN]} of {words.total()} words are unknown to the model, since the vocabulary lacks "
            f"{format_counts(unknown, 20)}"
        )
    if summary:
        print(summary)


def _words_of(line: str, vocabulary: Vocabulary, unknown: Counter[str]) -> list[str]:
    """Normalise a line, with <unk> for words with characters that are no token, which `unknown` counts."""
    words: list[str] = []
    for part in re.split("(<unk>|<UNK>)|</?s>", line):  # marks that the text has already
        if part in SENTENCE_MARKS:
            words.append(UNKNOWN)
            continue
        sentence = vocabulary.normalise(part or "")
        missing = vocabulary.unknown_characters(sentence)
        unknown.update(character for character in sentence if character in missing)
        words += [UNKNOWN if vocabulary.unknown_characters(word) else word for word in sentence.split()]
    return words


def _letters_of(words: list[str], vocabulary: Vocabulary) -> list[str]:
    """Tokens of a sentence, with the word boundary after each word."""
    end = [] if vocabulary.boundary is None or vocabulary.spaced else [BOUNDARY]
    return [token for word in words for token in (*([word] if word == UNKNOWN else vocabulary.spell(word)), *end)]


def _estimate(counts: NgramCounts, min_counts: list[int] | None) -> str:
    """Estimate probabilities and back-offs; returns the ARPA file."""
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each of many short steps
        if min_counts:
            counts.apply_count_cutoffs(min_counts)
        counts.cal_discounting_constants()
        # Without any n-gram that occurs twice, the discount would remove all that occur once; lmplz falls back to 0.5
        counts.d = [discount if discount < 1 else 0.5 for discount in counts.d]
        counts.cal_f()
        counts.cal_bow()
        arpa = io.StringIO()
        counts.print_as_arpa(arpa)
    return arpa.getvalue()
