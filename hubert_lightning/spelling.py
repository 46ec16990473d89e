"""Words as sequences of tokens."""

import unicodedata
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import NamedTuple


class SpelledWord(NamedTuple):
    """A word in a sequence of tokens.

    Attributes:
        text: The word.
        first: Index of its first token in the sequence.
        last: Index of the token after its last.
    """

    text: str
    first: int
    last: int


class TokenMatch(NamedTuple):
    """A token that spells part of a word.

    Attributes:
        first: Index of its first character in the word (NFD).
        last: Index of the character after its last.
        token: Index of the token.
    """

    first: int
    last: int
    token: int


class Spelling:
    """The tokens of a vocabulary by their characters.

    Args:
        tokens_of_form: Tokens of each decomposed text (NFD) that a token spells; the first one is used to encode.
        spaced: Whether a token may be a whole word, as in phonemes parted by spaces.

    Attributes:
        token_of_form: Token that encodes each decomposed text.
        characters: Composed characters (NFC) that occur in tokens.
    """

    def __init__(self, tokens_of_form: Mapping[str, Sequence[int]], spaced: bool) -> None:
        self.tokens_of_form, self.spaced = tokens_of_form, spaced
        self.token_of_form = {form: tokens[0] for form, tokens in tokens_of_form.items()}
        self.characters = {
            character
            for form in self.token_of_form
            if not is_special(form)
            for character in unicodedata.normalize("NFC", form)
        }
        self._longest = max(map(len, self.token_of_form), default=0)
        self._token_of_character = self._by_character()
        self._encoded: dict[str, list[int] | None] = {}

    def _by_character(self) -> dict[str, int]:
        """The token of each character if every token spells one character, else nothing."""
        composed = {unicodedata.normalize("NFC", form): token for form, token in self.token_of_form.items()}
        several = any(len(form) > 1 and not is_special(form) for form in composed)
        return {} if several or self.spaced else {form: token for form, token in composed.items() if len(form) == 1}

    def encode(self, word: str) -> list[int] | None:
        """Find the longest tokens that spell a word.

        Returns:
            Token indices, or None if no sequence of tokens spells the word.
        """
        if self._token_of_character and self._token_of_character.keys() >= set(word):
            return [self._token_of_character[character] for character in word]
        if word not in self._encoded:
            self._encoded[word] = self._segment(unicodedata.normalize("NFD", word))
        return self._encoded[word]

    def matches(self, word: str, encoded: Sequence[int]) -> list[TokenMatch]:
        """Find every token that is part of some spelling of a word.

        Args:
            word: Characters that are tokens, without spaces.
            encoded: Tokens of the word by `encode`, taken where its marks have an order of their own.

        Returns:
            Tokens by their first character, long ones first.
        """
        text = unicodedata.normalize("NFD", word)
        if self.spaced and text in self.tokens_of_form:
            return [TokenMatch(0, len(text), token) for token in self.tokens_of_form[text]]
        matches = [
            TokenMatch(first, last, token)
            for first in range(len(text))
            for last in range(min(first + self._longest, len(text)), first, -1)
            for token in self.tokens_of_form.get(text[first:last], [])
        ]
        from_start = {0}
        for match in matches:
            from_start |= {match.last} if match.first in from_start else set()
        to_end = {len(text)}
        for match in reversed(matches):
            to_end |= {match.first} if match.last in to_end else set()
        if 0 not in to_end:
            return [TokenMatch(index, index + 1, token) for index, token in enumerate(encoded)]
        return [match for match in matches if match.first in from_start and match.last in to_end]

    def unknown_characters(self, text: str) -> set[str]:
        """Find the characters of a normalised text that no token spells."""
        if self._token_of_character and self._token_of_character.keys() >= set(text) - {" "}:
            return set()
        unknown = set[str]()
        for word in set(text.split(" ")):
            if self.encode(word) is None:
                odd = {character for character in word if self.encode(character) is None}
                # Marks that are tokens only together with their letters
                alone = odd - {character for form in self.token_of_form if len(form) > 1 for character in form}
                rest = "".join(character for character in word if character not in alone)
                unknown |= alone if alone and self.encode(rest) is not None else odd or set(word)
        return unknown

    def _segment(self, text: str) -> list[int] | None:
        if self.spaced and text in self.token_of_form:
            return [self.token_of_form[text]]
        if (tokens := self._longest_tokens(text)) is not None:
            return tokens
        # Marks on a letter may have another order in the vocabulary than in Unicode, as in ê with a dot below
        clusters = [self._in_any_order(cluster) for cluster in _letters_with_marks(text)]
        return None if None in clusters else [token for cluster in clusters for token in cluster or []]

    def _longest_tokens(self, text: str) -> list[int] | None:
        steps: list[tuple[int, int] | None] = [None] * len(text) + [(0, 0)]  # end and token, from each character
        for start in reversed(range(len(text))):
            for end in range(min(start + self._longest, len(text)), start, -1):
                token = self.token_of_form.get(text[start:end])
                if token is not None and steps[end] is not None:
                    steps[start] = (end, token)
                    break
        tokens, index = [], 0
        while index < len(text):
            step = steps[index]
            if step is None:
                return None
            index, token = step
            tokens.append(token)
        return tokens

    def _in_any_order(self, cluster: str) -> list[int] | None:
        letter, marks = cluster[0], cluster[1:5]
        for order in permutations(marks):
            written = letter + "".join(order)
            if unicodedata.normalize("NFD", written) == cluster:
                tokens = self._longest_tokens(written)
                if tokens is not None:
                    return tokens
        return None


def is_special(token: str) -> bool:
    """Check whether a token is written like those that stand for no text, such as <s> and [UNK]."""
    return len(token) > 2 and (token[0], token[-1]) in (("<", ">"), ("[", "]"))


def _letters_with_marks(text: str) -> list[str]:
    """A decomposed text, divided before every character that is not a combining mark."""
    clusters: list[str] = []
    for character in text:
        if clusters and unicodedata.combining(character):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def clean_up(text: str) -> str:
    """Remove spaces before punctuation and English contractions, as transformers' clean_up_tokenization_spaces does."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text


def merge_words(words: Sequence[SpelledWord], cleaned_up: str) -> list[SpelledWord]:
    """Join words that `clean_up` makes one.

    Args:
        words: Words before `clean_up`.
        cleaned_up: Text after it.
    """
    merged: list[SpelledWord] = []
    parts = iter(words)
    for text in cleaned_up.split():
        part = next(parts)
        whole = part
        while len(whole.text) < len(text):
            part = next(parts)
            whole = SpelledWord(whole.text + part.text, whole.first, part.last)
        merged.append(whole._replace(text=text))
    return merged
