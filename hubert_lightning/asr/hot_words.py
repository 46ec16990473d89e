"""Hot words: names and terms that a beam search prefers, and adds to its lexicon."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hubert_lightning.asr.language_files import Lexicon
from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.text_file import lines_of
from hubert_lightning.vocabulary import BOUNDARY, Vocabulary

DEFAULT_WEIGHT = 10.0
MAX_WEIGHT = 1e6


class HotWord(NamedTuple):
    """A word, or a phrase of several words, that a search prefers.

    Attributes:
        text: Normalised text.
        weight: Score added to a hypothesis for each time that the word is in it, in natural logarithms.
        tokens: Indices of its tokens, with the delimiter between words.
        spelled: Whether the tokens were given, for a word of a lexicon that is spelled otherwise.
    """

    text: str
    weight: float
    tokens: tuple[int, ...]
    spelled: bool = False


def read_hot_words(
    source: Path | str | Sequence[str], vocabulary: Vocabulary, weight: float = DEFAULT_WEIGHT
) -> tuple[list[HotWord], list[str]]:
    """Read hot words.

    Args:
        source: File with a word or a phrase on each line, or words with commas between them, or a list of words. On a
            line of a file, a number after a tab is the weight of the word, and other text after a tab is its spelling,
            the names of the tokens with spaces between them.
        vocabulary: Vocabulary of the model.
        weight: Weight of words without their own.

    Returns:
        The words, each once; and a sentence for each that cannot be used, because it has characters that are no tokens.

    Raises:
        UserError: The file cannot be read, a weight is no number, or no word can be used.
    """
    _check_weight(weight, "hot words")
    words: dict[str, HotWord] = {}
    refused: list[str] = []
    for line, place in _lines(source):
        try:
            word = _hot_word(line, place, vocabulary, weight)
        except _UnusableWordError as error:
            refused.append(str(error))
        else:
            words[word.text] = word
    if not words:
        raise UserError(refused[0] if refused else "hot words: none are given; name some, or leave the option out")
    return list(words.values()), refused


def with_hot_words(lexicon: Lexicon, hot_words: Sequence[HotWord], vocabulary: Vocabulary) -> Lexicon:
    """Add hot words to a lexicon.

    Args:
        lexicon: Spellings of each word.
        hot_words: Words and phrases; each word of a phrase is added.
        vocabulary: Vocabulary of the model.
    """
    extended = dict(lexicon)
    names = vocabulary.search_names
    end = [] if vocabulary.boundary is None or vocabulary.spaced else [BOUNDARY]
    for hot_word in hot_words:
        if hot_word.spelled:
            entries = {hot_word.text: [names[token] for token in hot_word.tokens]}
        else:
            missing = [word for word in hot_word.text.split() if word not in lexicon]
            entries = {word: [names[token] for token in vocabulary.encode(word)] for word in missing}
        for word, spelling in entries.items():
            spellings = extended.get(word, [])
            if [*spelling, *end] not in spellings:
                extended[word] = [*spellings, [*spelling, *end]]
    return extended


class _UnusableWordError(Exception):
    """A word that is left out, with the reason."""


def _lines(source: Path | str | Sequence[str]) -> list[tuple[str, str]]:
    """Lines of hot words, and the place of each for messages."""
    if isinstance(source, str) and not os.path.isfile(source):
        looks_like_a_path = "/" in source or Path(source).suffix in (".txt", ".tsv", ".lexicon")
        if not looks_like_a_path:
            return [(word, "hot words") for word in source.split(",") if word.strip()]
    if isinstance(source, (str, Path)):
        if not os.path.isfile(source):
            raise UserError(
                f"{source}: no such file; name a file with a hot word on each line, or the words themselves"
            )
        lines = enumerate(lines_of(Path(source)), start=1)
        return [(line, f"{source}, line {number}") for number, line in lines if line.strip()]
    return [(word, "hot words") for word in source if word.strip()]


def _hot_word(line: str, place: str, vocabulary: Vocabulary, weight: float) -> HotWord:
    written, *columns = (column.strip() for column in line.split("\t"))
    spelling: list[str] = []
    for column in filter(None, columns):
        try:
            weight = float(column)
        except ValueError:
            spelling = column.split()
        else:
            _check_weight(weight, place)
    text = vocabulary.normalise(written)
    if spelling:
        names = vocabulary.search_names
        if spelling[-1] == BOUNDARY:
            spelling.pop()
        if unknown := sorted(set(spelling) - set(names[1:])):
            raise _UnusableWordError(
                f"{place}: {written[:40]!r} is spelled with {unknown}, which are not tokens of the model; left out"
            )
        return HotWord(written, weight, tuple(names.index(name) for name in spelling), spelled=True)
    if unknown := sorted(vocabulary.unknown_characters(text)):
        raise _UnusableWordError(
            f"{place}: {written[:40]!r} has {unknown}, which are not tokens of the model; left out: write it in the "
            "model's letters"
        )
    if not text:
        raise _UnusableWordError(f"{place}: {written[:40]!r} has no letters; left out")
    return HotWord(text, weight, tuple(vocabulary.encode(text)))


def _check_weight(weight: float, place: str) -> None:
    if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
        raise UserError(f"{place}: the weight is {weight}; give a number, such as {DEFAULT_WEIGHT:g}")


class PhraseNode:
    """A place in the tree of all hot words, which are sequences of words or of tokens.

    Attributes:
        value: Part of the weight that has been added on the way here.
        weight: Weight of the phrase that ends here; 0 if none does.
        children: Next places by word or token.
    """

    def __init__(self, value: float = 0.0) -> None:
        self.value, self.weight = value, 0.0
        self.children: dict[int, PhraseNode] = {}


class PhraseMatcher:
    """Scores of sequences in which phrases occur.

    A phrase adds its weight little by little, so that a narrow beam keeps its beginning; what was added is taken back
    where the sequence goes on otherwise.

    Args:
        phrases: Units and weight of each phrase.
        delimiter: Unit between words, if units are tokens: phrases begin and end there. Without it, they may begin and
            end anywhere.
    """

    def __init__(self, phrases: Sequence[tuple[Sequence[int], float]], delimiter: int | None) -> None:
        self.root, self.delimiter = PhraseNode(), delimiter
        for units, weight in phrases:
            node = self.root
            for place, unit in enumerate(units, start=1):
                value = weight * place / len(units)
                child = node.children.setdefault(unit, PhraseNode(value))
                child.value = max(child.value, value)
                node = child
            node.weight = max(node.weight, weight)

    @property
    def start(self) -> tuple[PhraseNode, ...]:
        """The places before the first unit."""
        return (self.root,)

    def step(self, places: tuple[PhraseNode, ...], unit: int) -> tuple[tuple[PhraseNode, ...], float]:
        """Move on by a unit.

        Args:
            places: Places in phrases that may have begun.
            unit: Word or token.

        Returns:
            The places after it, and the score to add.
        """
        moved = tuple(place.children[unit] for place in places if unit in place.children)
        if self.delimiter is None:
            done = sum(place.weight for place in moved)
            moved = (self.root, *(place for place in moved if place.children))
        elif unit == self.delimiter:
            done = sum(place.weight for place in places)
            moved = (self.root, *moved)
        else:
            done = 0.0
        return moved, done + _most(moved) - _most(places)

    def end(self, places: tuple[PhraseNode, ...]) -> float:
        """Score to add at the end of a sequence."""
        done = 0.0 if self.delimiter is None else sum(place.weight for place in places)
        return done - _most(places)


def _most(places: Sequence[PhraseNode]) -> float:
    return max((place.value for place in places), key=abs, default=0.0)
