"""Parts of words with their times: between spaces, or single characters, in any script."""

import unicodedata
from collections.abc import Sequence
from itertools import groupby

from hubert_lightning.asr.word_times import Word

LEADING_VOWELS = "เแโใไເແໂໃໄ"
"""Vowels of Thai and Lao that are written before the consonant after which they are spoken."""
ZERO_WIDTH_JOINERS = "\u200c\u200d"
"""Characters that belong to the character before and to the one after."""


def parts_between_spaces(word: Word) -> list[Word]:
    """Split an entry of a lexicon that consists of several words; each gets its share of the time."""
    if len(word.text.split()) == 1:
        return [word]
    groups = groupby(characters_of(word), lambda character: character.text.isspace())
    return [_joined(list(group)) for is_space, group in groups if not is_space]


def characters_of(word: Word) -> list[Word]:
    """Split a word into its characters; combining marks and closing punctuation stay with the letter before.

    The characters of a token share its time equally; so do the characters of a word whose tokens are not known.
    """
    characters: list[Word] = []
    for part in word.tokens or (word,):
        texts = _letters_with_marks(part.text)
        share = (part.end - part.start) / max(len(texts), 1)
        for index, text in enumerate(texts):
            end = part.start + (index + 1) * share
            if characters and _stays_with(characters[-1].text[-1], text[0]):
                before = characters.pop()
                characters.append(before._replace(text=before.text + text, end=end))
            else:
                characters.append(Word(text, part.start + index * share, end, part.confidence, (), word.speaker))
    return characters


def _letters_with_marks(text: str) -> list[str]:
    letters: list[str] = []
    for character in text:
        if letters and _stays_with(letters[-1][-1], character):
            letters[-1] += character
        else:
            letters.append(character)
    return letters


def _stays_with(before: str, character: str) -> bool:
    """Whether a line must not begin with a character, after another one."""
    category = unicodedata.category(character)
    if category[0] == "M" or character in ZERO_WIDTH_JOINERS or before in ZERO_WIDTH_JOINERS:
        return True
    if before in LEADING_VOWELS or unicodedata.category(before) in ("Ps", "Pi"):  # such as an opening bracket
        return True
    return category in ("Pe", "Pf", "Po") and unicodedata.category(before)[0] != "P"


def _joined(words: Sequence[Word]) -> Word:
    return words[0]._replace(text="".join(word.text for word in words), end=words[-1].end)
