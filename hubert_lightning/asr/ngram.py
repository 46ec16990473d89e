"""An n-gram language model of somebody's own text, and the lexicon of its words.

The n-grams are estimated by kaldingram (of the Next-gen Kaldi team; Kneser-Ney as SRILM does it), since it is the one
maintained estimator that installs everywhere as a Python package: KenLM's lmplz is better and faster, but has to be
compiled, and KenLM's Python package reads models without making any. What lmplz writes can be used in the same way.
"""

import contextlib
import io
import re
from collections import Counter
from pathlib import Path

from kaldingram.train import NgramCounts

from hubert_lightning.asr.language_files import MARKS, UNKNOWN
from hubert_lightning.asr.lexicon import lexicon_of, model_vocabulary
from hubert_lightning.errors import UserError
from hubert_lightning.files import replacing_all
from hubert_lightning.untrusted.text_file import lines_of
from hubert_lightning.vocabulary import BOUNDARY


def ngram(
    text: Path,
    out: Path,
    order: int = 4,
    vocabulary: Path | None = None,
    letters: bool = False,
    min_counts: list[int] | None = None,
) -> None:
    """A text → an n-gram language model in ARPA format, and beside it the lexicon of its words, `<its name>.lexicon`.

    Args:
        text: a sentence on each line, which may be compressed; it is normalised as transcripts are
        out: where the language model goes, a .arpa file
        order: words (or letters) that are looked at together, 2 to 5
        vocabulary: of the model, a file of `hubert vocabulary` or a fine-tuned checkpoint; LibriSpeech's if not given
        letters: n-grams of letters, for a search without lexicon, in place of words
        min_counts: for each order, how often an n-gram must occur to be kept, as in [0, 0, 2]; all are if not given
    """
    spelled_with = model_vocabulary(vocabulary)
    if Path(out).suffix == ".lexicon" or Path(out).absolute() == Path(text).absolute():
        taken = "the lexicon" if Path(out).suffix == ".lexicon" else "the text"
        raise UserError(f"{out}: the name of {taken}; choose another OUT, such as lm.arpa")
    if not 2 <= order <= 5:
        raise UserError(f"order {order}: choose 2 to 5")
    if min_counts is not None and len(min_counts) != order:
        raise UserError(f"min_counts {min_counts} for n-grams of order {order}; give one number for each order")
    counts, words, unknown, lines = NgramCounts(order), Counter[str](), Counter[str](), 0
    for line in lines_of(Path(text)):
        said: list[str] = []
        for part in re.split("(<unk>|<UNK>)|</?s>", line):  # marks that the text has already
            if part in MARKS:
                said.append(UNKNOWN)
                continue
            sentence = spelled_with.normalise(part or "")
            strange = spelled_with.unknown_characters(sentence)
            unknown.update(character for character in sentence if character in strange)
            said += [word if not spelled_with.unknown_characters(word) else UNKNOWN for word in sentence.split()]
        if not said:
            continue
        lines += 1
        words.update(said)
        if letters:
            ends = [] if spelled_with.boundary is None or spelled_with.spaced else [BOUNDARY]
            said = [
                letter
                for word in said
                for letter in (*([word] if word == UNKNOWN else spelled_with.spell(word)), *ends)
            ]
        counts.add_raw_counts_from_line(" ".join(said))
    known = set(words) - MARKS
    if not known:
        raise UserError(f"{text}: no sentences that the vocabulary spells; give a text in the language of the model")
    outputs, said_of_lexicon = {Path(out): _estimate(counts, min_counts)}, ""
    if not letters:
        beside = Path(out).with_suffix(".lexicon")
        of_words, said_of_lexicon = lexicon_of(words, beside, spelled_with, str(text))
        outputs = {beside: of_words} | outputs
    with replacing_all(*outputs) as files:
        for file, content in zip(files, outputs.values(), strict=True):
            file.write(content.encode())
    print(f"{out}: {'letters' if letters else 'words'}, order {order}, of {lines} sentences")
    if unknown:
        print(
            f"{words['<unk>']} of {words.total()} words cannot be spelled and are unknown to the model, because of "
            + ", ".join(f"{character!r} ({count})" for character, count in unknown.most_common(20))
        )
    if said_of_lexicon:
        print(said_of_lexicon)


def _estimate(counts: NgramCounts, min_counts: list[int] | None) -> str:
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each of many short steps
        if min_counts:
            counts.apply_count_cutoffs(min_counts)
        counts.cal_discounting_constants()
        # Where no n-gram occurs twice, nothing would be left of those that occur once; what lmplz falls back to
        counts.d = [discount if discount < 1 else 0.5 for discount in counts.d]
        counts.cal_f()
        counts.cal_bow()
        arpa = io.StringIO()
        counts.print_as_arpa(arpa)
    return arpa.getvalue()
