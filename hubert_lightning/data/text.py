"""From transcripts to tokens and back, in any script that writes words with characters."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import Literal

from hubert_lightning.files import write_whole

BLANK = 0  # the token of CTC that stands for no character
BOUNDARY = "|"  # between words
APOSTROPHES = str.maketrans({"’": "'", "ʼ": "'", "＇": "'"})  # typographic ones are one letter with the plain one
JOINERS = "\u200c\u200d"  # they have no width, and yet change what is written in Persian or Hindi

SAID = "%‰&@#§°№℃℉"  # besides the symbols of currencies and mathematics

LETTERS = ("-", BOUNDARY, *ascii_uppercase, "'")
"""The 29 tokens of LibriSpeech transcripts; the blank is written "-"."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a model spells with, and what is done to a text before it is spelled. Defaults: LibriSpeech's.

    Args:
        tokens: The blank first, then characters, among them "|", which stands for the space between words.
        case: Into which letters are turned: "upper", "lower", or "as_written".
        punctuation: "refuse" punctuation and symbols that are no token, or put a "space" in their place; symbols that
            are said as words, such as € and %, are refused in either case.
    """

    tokens: tuple[str, ...] = LETTERS
    case: Literal["upper", "lower", "as_written"] = "upper"
    punctuation: Literal["refuse", "space"] = "refuse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))  # a checkpoint holds a list
        if len(set(self.tokens)) < len(self.tokens):
            twice = sorted({token for token in self.tokens if self.tokens.count(token) > 1})
            raise ValueError(f"the tokens {twice} are there more than once; give each token once")
        if BOUNDARY not in self.tokens[1:]:
            raise ValueError(f"no token {BOUNDARY!r} after the blank, the first; words need it between them")
        if self.case not in ("upper", "lower", "as_written") or self.punctuation not in ("refuse", "space"):
            raise ValueError(
                f"case {self.case!r} and punctuation {self.punctuation!r}; choose upper, lower or as_written, and "
                "refuse or space"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def normalise(self, text: str) -> str:
        """The text as this vocabulary spells it.

        In this order: no invisible characters, canonical composition (NFC), the case, one kind of apostrophe, spaces
        for punctuation and symbols that are no token (if so set), one space between words and none around them.
        """
        text = unicodedata.normalize("NFC", "".join(character for character in text if not _is_invisible(character)))
        if self.case != "as_written":
            # composed again: the upper case of a few characters is several
            text = unicodedata.normalize("NFC", text.upper() if self.case == "upper" else text.lower())
        text = text.translate(APOSTROPHES)
        if self.punctuation == "space":
            text = "".join(
                character if character in self._ids or not _is_silent(character) else " " for character in text
            )
        return " ".join(text.split())

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

    def known(self, text: str) -> str:
        """A normalised text without the characters that are no token."""
        return " ".join("".join(character for character in text if character in self._ids).split())

    @property
    def boundary(self) -> int:
        """The token between words."""
        return self.tokens.index(BOUNDARY)

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

    def write(self, path: Path) -> None:
        """Write it as JSON, which `read_vocabulary` reads."""
        write_whole(path, (json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n").encode())


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary in a JSON file of `hubert vocabulary`.

    Raises:
        ValueError: It is not there, or no vocabulary.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        others = sorted(content.keys() - {"tokens", "case", "punctuation"}) if isinstance(content, dict) else ["a list"]
        if others:
            raise ValueError(
                f"no vocabulary, which has tokens, case and punctuation, not {others[0]!r}; make one with "
                "`hubert vocabulary`"
            )
        return Vocabulary(**content)
    except OSError as error:
        raise ValueError(f"{path}: no such vocabulary; make it with `hubert vocabulary`") from error
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: no vocabulary ({error}); make one with `hubert vocabulary`") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def vocabulary_of(
    texts: Iterable[str], case: Literal["upper", "lower", "as_written"] = "lower", kept: str = "'"
) -> tuple[Vocabulary, Counter[str], Counter[str]]:
    """The vocabulary that spells these texts: every letter, mark and digit in them is a token.

    kept:    punctuation and symbols that are tokens too where they occur
    returns: the vocabulary, how often each of its characters occurs, and how often each that is no token
    """
    everything = Vocabulary(case=case)
    written = Counter(character for text in texts for character in everything.normalise(text) if character != " ")
    spelled = {
        character: count
        for character, count in sorted(written.items())
        if character != BOUNDARY and (character in kept or not _is_punctuation(character))
    }
    vocabulary = Vocabulary(("<blank>", BOUNDARY, *spelled), case, "space")
    return vocabulary, Counter(spelled), Counter({c: count for c, count in written.items() if c not in spelled})


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"


def is_said(character: str) -> bool:
    """Whether a symbol stands for a word, so that it may not vanish: those of currencies and mathematics, % and §."""
    return character in SAID or (unicodedata.category(character) in ("Sc", "Sm") and character != BOUNDARY)


def has_words(text: str) -> bool:
    """Whether a text has anything but punctuation, symbols and what nobody sees."""
    return any(unicodedata.category(character)[0] in "LN" for character in text)


def _is_silent(character: str) -> bool:
    return _is_punctuation(character) and not is_said(character)


def _is_invisible(character: str) -> bool:
    """Control and format characters, but for white space, which is left to `split`."""
    return unicodedata.category(character) in ("Cc", "Cf") and not character.isspace() and character not in JOINERS
