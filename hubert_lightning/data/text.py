"""From transcripts to tokens and back."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from string import ascii_uppercase

BLANK = 0  # the token of CTC that stands for no character
BOUNDARY = "|"  # between words

LETTERS = ("-", BOUNDARY, *ascii_uppercase, "'")
"""The 29 tokens of LibriSpeech transcripts; the blank is written "-"."""


def normalise(text: str) -> str:
    """Upper case, one space between words and none around them."""
    return " ".join(text.upper().split())


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a model spells with.

    Args:
        tokens: The blank first, then characters, among them "|", which stands for the space between words.
    """

    tokens: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))  # a checkpoint holds a list
        if len(set(self.tokens)) < len(self.tokens):
            twice = sorted({token for token in self.tokens if self.tokens.count(token) > 1})
            raise ValueError(f"the tokens {twice} are there more than once; give each token once")
        if BOUNDARY not in self.tokens[1:]:
            raise ValueError(f"no token {BOUNDARY!r} after the blank, the first; words need it between them")

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """The token of every character of a normalised text.

        Raises:
            ValueError: The text has characters that are no token.
        """
        if unknown := self.unknown_characters(text):
            raise ValueError(
                f"{text[:40]!r} has {sorted(unknown)}, which are not among the model's letters; "
                "normalise the text, and spell out or remove what is left"
            )
        return [self._ids[character] for character in text]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text that tokens spell, one character each: nothing is collapsed, and a blank shows as it is written."""
        return "".join(self.tokens[token] for token in tokens).replace(BOUNDARY, " ")

    def unknown_characters(self, text: str) -> set[str]:
        return set(text) - self._ids.keys()

    @cached_property
    def _ids(self) -> dict[str, int]:
        # Neither the blank nor the boundary is a character of any text, even where it is written with one
        ids = {token: place for place, token in enumerate(self.tokens) if place != BLANK}
        ids[" "] = ids.pop(BOUNDARY)
        return ids
