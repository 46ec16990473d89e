"""n-gram language models in Python, with the scores of KenLM."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from hubert_lightning.asr.language_files import KENLM_START, UNKNOWN, required_arpa_lines, unreadable_model
from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.text_file import decompressed

START, END = "<s>", "</s>"
MISSING_UNKNOWN = -100.0
"""log10 probability of an unknown word in a model without an entry for it, as in KenLM."""

Words = tuple[str, ...]


class ArpaModel:
    """A back-off model of n-grams (Katz, as ARPA files define it).

    Args:
        path: ARPA file, which may be compressed.

    Raises:
        UserError: The file cannot be read, or is no ARPA file.
    """

    def __init__(self, path: Path) -> None:
        with decompressed(path) as file:
            if file.read(len(KENLM_START)) == KENLM_START:
                raise UserError(
                    f"{path}: KenLM's binary form, which only flashlight-text reads; give the ARPA file that it was "
                    "made from, or use Python 3.11 or 3.12, which flashlight-text has wheels for"
                )
        self.entries: dict[Words, tuple[float, float]] = {}
        self.order = 0
        for words, log_prob, back_off in _entries(path):
            self.entries[words] = log_prob, back_off
            self.order = max(self.order, len(words))
        for mark in (START, END):
            if (mark,) not in self.entries:
                raise unreadable_model(path, f"it has no {mark}")
        if (UNKNOWN,) not in self.entries:
            self.entries[UNKNOWN,] = self.entries.get(("<UNK>",), (MISSING_UNKNOWN, 0.0))

    def score(self, context: Words, word: str) -> tuple[Words, float]:
        """Probability of a word after others.

        Args:
            context: Words before it, the start of the sentence among them; longer contexts than the model's are cut.
            word: The word.

        Returns:
            The context of the next word, and the log10 probability.
        """
        if (word,) not in self.entries:
            word = UNKNOWN
        context = context[max(len(context) - self.order + 1, 0) :]
        back_offs = 0.0
        while (entry := self.entries.get((*context, word))) is None:
            back_offs += self.entries.get(context, (0.0, 0.0))[1]
            context = context[1:]
        return (*context, word), entry[0] + back_offs


def _entries(path: Path) -> Iterator[tuple[Words, float, float]]:
    """Words, log10 probability and log10 back-off of each n-gram."""
    order, announced, num_entries = 0, 0, 0
    for line in required_arpa_lines(path):
        line = line.strip()
        if line.startswith("ngram "):
            announced += int(line.rpartition("=")[2]) if line.rpartition("=")[2].strip().isdigit() else 0
        elif line == "\\end\\":
            if num_entries != announced:
                raise unreadable_model(path, f"it has {num_entries} n-grams, and announces {announced}")
            return
        elif line.startswith("\\") and line.endswith("-grams:"):
            stated = line[1 : -len("-grams:")]
            if not (stated.isascii() and stated.isdigit()):
                raise unreadable_model(path, f"{line[:40]!r} states no order of n-grams")
            order = int(stated)
        elif line and order:
            yield _entry(path, line, order)
            num_entries += 1
    raise unreadable_model(path, "it is cut short or corrupt")


def _entry(path: Path, line: str, order: int) -> tuple[Words, float, float]:
    parts: Sequence[str] = line.split()
    try:
        log_prob, back_off = float(parts[0]), float(parts[order + 1]) if len(parts) > order + 1 else 0.0
    except ValueError:
        log_prob, back_off = math.nan, 0.0
    if len(parts) not in (order + 1, order + 2) or not log_prob <= 0 or math.isnan(back_off):
        raise unreadable_model(path, f"the line {line[:40]!r} is no n-gram of {order} words")
    return tuple(parts[1 : order + 1]), log_prob, back_off
