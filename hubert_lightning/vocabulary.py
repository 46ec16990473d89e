"""From transcripts to tokens and back, in any script that writes words with characters."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from hubert_lightning.characters import (
    APOSTROPHES,
    DOT_ABOVE,
    is_punctuation,
    is_silent,
    lower_case,
    upper_case,
    visible,
)
from hubert_lightning.errors import UserError
from hubert_lightning.files import write_whole
from hubert_lightning.spelling import SpelledWord, Spelling, TokenMatch, clean_up, merge_words
from hubert_lightning.untrusted.json_file import is_text, read_json, shown

BOUNDARY = "|"
"""Token between words."""
BLANK = 0
"""Index of CTC's blank."""
OTHER_APOSTROPHES = "ʻ‘`´′"
"""Characters that a vocabulary may have in place of an apostrophe."""
MAX_TOKENS = 100_000
MAX_TOKEN_LENGTH = 1_000

LETTERS = ("-", BOUNDARY, *ascii_uppercase, "'")
"""The 29 tokens of LibriSpeech transcripts; the blank is written "-"."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, and the normalisation of its transcripts. Defaults: LibriSpeech.

    Args:
        tokens: Tokens, the blank first; each is a character or a sequence of characters.
        case: Case of the letters: "upper", "lower", or "as_written".
        punctuation: "refuse" punctuation and symbols that are no token, or replace them by a "space"; symbols that are
            read as words, such as € and %, are refused in either case.
        delimiter: Token between words; null if no token parts words.
        separator: Text that is printed for the delimiter.
        lower_case: Whether upper-case tokens are printed in lower case.
        spaced: Whether a space is printed between tokens, as between phonemes; each token then counts as a word.
        clean_up: Whether punctuation and English contractions lose the space before them, as in transformers.
        turkic: Whether I and i are the capital of ı and the small letter of İ; inferred from the tokens if not given.
        unknown: Token for characters that have no token.
        start: Token of a sentence's start, which CTC does not use.
        end: Token of a sentence's end, which CTC does not use.
        blank_id: Index of the blank among the tokens of the system that the model comes from.
        same: Other spellings of tokens, such as letters that share a token, each with the token that is printed.
    """

    tokens: tuple[str, ...] = LETTERS
    case: Literal["upper", "lower", "as_written"] = "upper"
    punctuation: Literal["refuse", "space"] = "refuse"
    delimiter: str | None = BOUNDARY
    separator: str = " "
    lower_case: bool = False
    spaced: bool = False
    clean_up: bool = False
    turkic: bool | None = None
    unknown: str | None = None
    start: str | None = None
    end: str | None = None
    blank_id: int = 0
    same: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "tokens", tuple(self.tokens))  # a checkpoint holds a list
        if len(set(self.tokens)) < len(self.tokens):
            repeated = sorted(token for token, count in Counter(self.tokens).items() if count > 1)
            raise UserError(f"the tokens {shown(repeated)} are there more than once; give each token once")
        if self.delimiter is not None and self.delimiter not in self.tokens[1:]:
            raise UserError(
                f"no token {shown(self.delimiter)} after the blank, the first; words need it between them, or the "
                "delimiter null"
            )
        if self.case not in ("upper", "lower", "as_written") or self.punctuation not in ("refuse", "space"):
            raise UserError(
                f"case {shown(self.case)} and punctuation {shown(self.punctuation)}; choose upper, lower or "
                "as_written, and refuse or space"
            )
        if missing := sorted(set((self.same or {}).values()) - set(self.tokens[1:])):
            raise UserError(
                f"same names {shown(missing[0])}, which is not a token; name one of the tokens after the blank"
            )
        if not 0 <= self.blank_id < len(self.tokens):
            raise UserError(f"blank_id {self.blank_id} of {len(self.tokens)} tokens; they count from 0")

    def _check_types(self) -> None:
        """Check the types of values that a file may hold."""
        if not isinstance(self.tokens, (list, tuple)) or not 0 < len(self.tokens) <= MAX_TOKENS:
            raise UserError(
                f"the tokens are {shown(self.tokens)}; give a list of them, {MAX_TOKENS} at most, such as "
                '["<blank>", "|", "a"]'
            )
        if wrong := [token for token in self.tokens if not isinstance(token, str)]:
            raise UserError(f"the token {shown(wrong[0])} is not text; put it in quotes")
        if wrong := [token for token in self.tokens if not _is_token(token)]:
            raise UserError(f"the token {shown(wrong[0])}; give each from 1 to {MAX_TOKEN_LENGTH} characters")
        for name in ("delimiter", "separator", "unknown", "start", "end"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "separator"):
                raise UserError(f"{name} is {shown(value)}, which is not text; put it in quotes")
            if value and (len(value) > MAX_TOKEN_LENGTH or not is_text(value)):
                raise UserError(f"{name} is {shown(value)}; give a text of up to {MAX_TOKEN_LENGTH} characters")
        for name in ("lower_case", "spaced", "clean_up", "turkic"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name != "turkic"):
                raise UserError(f"{name} is {shown(value)}; choose true or false")
        if not isinstance(self.blank_id, int) or isinstance(self.blank_id, bool):
            raise UserError(f"blank_id is {shown(self.blank_id)}; give a number")
        if self.same is not None and not isinstance(self.same, Mapping):
            raise UserError(f"same is {shown(self.same)}; give an object of spellings and their tokens")
        if wrong := [text for pair in (self.same or {}).items() for text in pair if not _is_token(text)]:
            raise UserError(f"same has {shown(wrong[0])}, which is not a text of 1 to {MAX_TOKEN_LENGTH} characters")

    def __len__(self) -> int:
        return len(self.tokens)

    def settings(self) -> dict[str, Any]:  # JSON values
        """The arguments of this vocabulary, without those that have their default."""
        always = {"tokens": list(self.tokens), "case": self.case, "punctuation": self.punctuation}
        others = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in always}
        return always | {name: value for name, value in others.items() if value != getattr(Vocabulary, name)}

    def normalise(self, text: str) -> str:
        """Convert a text to the characters of the tokens, with one space between words.

        In this order: remove invisible characters, compose (NFC), convert the case, choose the apostrophe that is a
        token, replace punctuation and symbols that are no token by spaces (if so set), and remove superfluous spaces.
        Tokens such as [UNK] stay as they are.
        """
        text = visible(text)
        if not self.spaced:
            parts = self._marks.split(text) if self._marks else [text]
            text = "".join(part if index % 2 else self._normalise_letters(part) for index, part in enumerate(parts))
        return " ".join(text.split())

    def encode(self, text: str) -> list[int]:
        """Convert a normalised text to the longest tokens that spell it.

        Args:
            text: Words with single spaces between them.

        Returns:
            Token indices, with the delimiter between words.

        Raises:
            UserError: The text has characters that are no token.
        """
        if unknown := self.unknown_characters(text):
            raise UserError(
                f"{text[:40]!r} has {sorted(unknown)}, which are not among the model's letters; "
                "normalise the text, and spell out or remove what is left"
            )
        tokens: list[int] = []
        for number, word in enumerate(text.split(" ")):
            if number and self.boundary is not None and not self.spaced:
                tokens.append(self.boundary)
            tokens += self._spelling.encode(word) or []
        return tokens

    def spell(self, word: str) -> list[str]:
        """The tokens of a normalised word, by their names."""
        return [self.tokens[token] for token in self.encode(word)]

    def token_matches(self, word: str) -> list[TokenMatch]:
        """Find every token that is part of some spelling of a normalised word.

        Args:
            word: Characters that are tokens, without spaces.

        Returns:
            Tokens by their first character, long ones first; as many as `encode` gives if there is one spelling.

        Raises:
            UserError: The word has characters that are no token.
        """
        return self._spelling.matches(word, self.encode(word))

    def targets(self, text: str) -> list[int]:
        """The targets of CTC for a normalised text: its tokens, and the delimiter after the last word.

        The delimiter ends the last word as it ends the others (fairseq libri_labels), so that a model parts words at
        any pause of a long recording.
        """
        tokens = self.encode(self.known(text))
        return tokens if self.boundary is None or self.spaced else [*tokens, self.boundary]

    def known(self, text: str) -> str:
        """Remove the characters that are no token from a normalised text."""
        words = text.split()
        for index, word in enumerate(words):
            if unknown := self.unknown_characters(word):
                words[index] = "" if self.spaced else "".join(char for char in word if char not in unknown)
        return " ".join(filter(None, words))

    def unknown_characters(self, text: str) -> set[str]:
        """The characters of a normalised text that no token spells."""
        return self._spelling.unknown_characters(text)

    @cached_property
    def boundary(self) -> int | None:
        """Index of the token between words, or None."""
        return None if self.delimiter is None else self.tokens.index(self.delimiter)

    @property
    def search_names(self) -> list[str]:
        """Names of the tokens in lexicons and in language models of letters, where the delimiter is "|"."""
        return with_boundary(self.tokens, self.delimiter)

    def decode(self, tokens: Iterable[int]) -> str:
        """Convert tokens to text without collapsing any; a blank shows as it is written."""
        names = [self._printed_tokens[token] for token in tokens]
        if self.spaced:
            names = [name for name in names if name != self.delimiter]
            return unicodedata.normalize("NFC", " ".join(names))
        return self._composed("".join(self.separator if name == self.delimiter else name for name in names))

    def text_of(self, tokens: Sequence[int]) -> str:
        """Convert collapsed tokens to text, with one space between words and none around them."""
        text = self.decode(tokens)
        return " ".join((clean_up(text.strip()) if self.clean_up else text).split())

    def printed(self, text: str) -> str:
        """Convert a normalised text to the form that the model prints, to compare the two.

        Without a token between words, the model prints no spaces, as in Chinese; with one, it prints the separator; and
        contractions and punctuation as transformers does if `clean_up`.
        """
        if not self.spaced:
            can_part = self.delimiter is not None or any(any(map(str.isspace, token)) for token in self.tokens[1:])
            text = self._composed(text.replace(" ", self.separator if can_part else ""))
        return " ".join((clean_up(text) if self.clean_up else text).split())

    def words_of(self, tokens: Sequence[int]) -> list[SpelledWord]:
        """Divide collapsed tokens into words."""
        words: list[SpelledWord] = []
        letters, first, last = "", 0, 0
        names = [" " if token == self.boundary else self._printed_tokens[token] + " " * self.spaced for token in tokens]
        for index, name in enumerate([*names, " "]):
            for character in name:  # a token of several characters may hold a space
                if not character.isspace():
                    first, last = first if letters else index, index + 1
                    letters += character
                elif letters:
                    words.append(SpelledWord(self._composed(letters), first, last))
                    letters = ""
        return merge_words(words, self.text_of(tokens)) if self.clean_up and words else words

    def write(self, path: Path) -> None:
        """Write a JSON file that `read_vocabulary` reads.

        Raises:
            UserError: The disk is full or cannot be written to.
        """
        write_whole(path, (json.dumps(self.settings(), ensure_ascii=False, indent=1) + "\n").encode())

    def _normalise_letters(self, text: str) -> str:
        text = unicodedata.normalize("NFC", self._in_case(text)).translate(self._variants)
        if self.punctuation == "space":
            letters = self._spelling.characters
            text = "".join(
                " " if character not in letters and is_silent(character) else character for character in text
            )
        return text

    def _in_case(self, text: str) -> str:
        letters = self._spelling.characters
        if self._is_turkic:
            text = text.replace("i" + DOT_ABOVE, "i")  # Python's lower case of İ
        if self.case == "lower":
            return lower_case(text, self._is_turkic, keep_dots=DOT_ABOVE in letters)
        return upper_case(text, self._is_turkic, letters) if self.case == "upper" else text

    def _composed(self, text: str) -> str:
        return unicodedata.normalize("NFC", text.lower() if self.lower_case else text)

    @cached_property
    def _printed_tokens(self) -> list[str]:
        """Each token as it is printed; rows of a head without a token of their own print the unknown token."""
        return [
            self.unknown if self.unknown is not None and re.fullmatch(r"<\d+>", token) else token
            for token in self.tokens
        ]

    @cached_property
    def _spelling(self) -> Spelling:
        """The tokens by what they spell, without blank and delimiter."""
        forms: dict[str, list[int]] = {}
        indices = list(range(1, len(self)))
        if self.lower_case:  # A and a print alike; A is used to encode, as in transformers
            indices.sort(key=lambda index: self.tokens[index] == self.tokens[index].lower())
        for index in indices:
            token = self.tokens[index]
            if token and not any(map(str.isspace, token)) and (token != self.delimiter or self.spaced):
                form = unicodedata.normalize("NFD", token.lower() if self.lower_case else token)
                forms.setdefault(form, []).append(index)
        for other, token in (self.same or {}).items():
            if token != self.delimiter and other and not any(map(str.isspace, other)):
                forms.setdefault(unicodedata.normalize("NFD", other), [self.tokens.index(token)])
        if "σ" in forms:
            forms.setdefault("ς", forms["σ"])
        return Spelling(forms, self.spaced)

    @cached_property
    def _marks(self) -> re.Pattern[str] | None:
        """Tokens of several characters with punctuation among them, such as [UNK], as they are printed."""
        forms = [unicodedata.normalize("NFC", form) for form in self._spelling.token_of_form if len(form) > 1]
        marks = [form for form in forms if any(map(is_punctuation, form))]
        return re.compile(f"({'|'.join(map(re.escape, sorted(marks, key=len, reverse=True)))})") if marks else None

    @cached_property
    def _variants(self) -> dict[int, str]:
        """The token's form of characters that are written in several forms."""
        letters = self._spelling.characters
        apostrophe = next((char for char in APOSTROPHES + OTHER_APOSTROPHES if char in letters), "'")
        variants = {ord(char): apostrophe for char in APOSTROPHES if char not in letters}
        if "σ" in self.tokens and "ς" not in self.tokens and not self.lower_case:
            variants[ord("ς")] = "σ"
        return variants

    @cached_property
    def _is_turkic(self) -> bool:
        if self.turkic is not None:
            return self.turkic
        letters = self._spelling.characters
        if self.case == "lower":  # a vocabulary with a dot above was made by Python's lower case, which is not Turkish
            return "ı" in letters and DOT_ABOVE not in letters
        # Decomposed, İ and the other letters of Turkish are these; no other language has the three marks
        decomposed = {"I", "\u0306", DOT_ABOVE, "\u0327"}
        return self.case == "upper" and ("İ" in self.tokens or decomposed <= set(self.tokens))


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a vocabulary from a JSON file of `hubert vocabulary`.

    Raises:
        UserError: The file does not exist, or holds no vocabulary.
    """
    path, way_out = Path(path), "make one with `hubert vocabulary`"
    if not path.is_file():
        raise UserError(f"{path}: no such vocabulary; make it with `hubert vocabulary`")
    content = read_json(path, way_out, fact=": no vocabulary")
    names = {field.name for field in fields(Vocabulary)}
    if others := sorted(content.keys() - names) if isinstance(content, dict) else ["a list"]:
        raise UserError(
            f"{path}: no vocabulary, which has tokens, case and punctuation, not {shown(others[0])}; {way_out}"
        )
    return vocabulary_from(content, path, "")


def vocabulary_from(
    settings: Mapping[str, Any], path: Path | str, introduction: str = "its vocabulary cannot be used: "
) -> Vocabulary:
    """Make the vocabulary that a model's file describes.

    Args:
        settings: Arguments of `Vocabulary`, JSON values.
        path: File that errors name.
        introduction: Words of an error before the reason.

    Raises:
        UserError: The settings make no vocabulary.
    """
    try:
        return Vocabulary(**settings)
    except TypeError as error:
        raise UserError(f"{path}: {introduction}{error}; make one with `hubert vocabulary`") from error
    except UserError as error:
        raise UserError(f"{path}: {introduction}{error}") from error


def vocabulary_of(
    texts: Iterable[str], case: Literal["upper", "lower", "as_written"] = "lower", keep_punctuation: str = "'"
) -> tuple[Vocabulary, Counter[str], Counter[str]]:
    """Make a vocabulary whose tokens are all letters, marks and digits of some texts.

    Args:
        texts: Transcripts.
        case: Case of the tokens: "upper", "lower" or "as_written".
        keep_punctuation: Punctuation and symbols that become tokens too where they occur.

    Returns:
        The vocabulary, the count of each of its characters, and the count of each character that is no token.
    """
    texts = [visible(text) for text in texts]
    # Only languages with both write either
    turkic = True if case != "as_written" and any("ı" in text or "İ" in text for text in texts) else None
    apostrophe = next((character for character in keep_punctuation if character in APOSTROPHES), "'")
    everything = Vocabulary(("<blank>", BOUNDARY, apostrophe), case, turkic=turkic)
    counts = Counter(character for text in texts for character in everything.normalise(text) if character != " ")
    letters = {
        character: count
        for character, count in sorted(counts.items())
        if character != BOUNDARY and (character in keep_punctuation or not is_punctuation(character))
    }
    vocabulary = Vocabulary(("<blank>", BOUNDARY, *letters), case, "space", turkic=turkic)
    left_out = {character: count for character, count in counts.items() if character not in letters}
    return vocabulary, Counter(letters), Counter(left_out)


def with_boundary(tokens: Sequence[str], delimiter: str | None) -> list[str]:
    """Rename the delimiter of words to "|", as other systems call it.

    Args:
        tokens: Tokens by their own names.
        delimiter: Token between words; None if no token parts words.

    Returns:
        The same tokens, in the same order; unchanged where "|" is one of them already.
    """
    if delimiter is None or BOUNDARY in tokens:
        return list(tokens)
    return [BOUNDARY if token == delimiter else token for token in tokens]


def _is_token(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TOKEN_LENGTH and is_text(value)
