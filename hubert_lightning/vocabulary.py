"""From transcripts to tokens and back, in any script that writes words with characters."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import permutations
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

from hubert_lightning.errors import UserError
from hubert_lightning.files import write_whole
from hubert_lightning.untrusted.json_file import is_text, read_json, shown

BOUNDARY = "|"  # between words
BLANK = 0  # the token of CTC that stands for no character
APOSTROPHES = "'’ʼ＇"  # one letter that is written in four ways
OTHER_APOSTROPHES = "ʻ‘`´′"  # what a table may have in its place
JOINERS = "\u200c\u200d\u180b\u180c\u180d\u180f"  # they have no width, and yet change what is written in some scripts
JOINING_SCRIPTS = (  # first and last code point: scripts in which they do, Arabic and those of India among them
    *((0x0600, 0x0DFF), (0x0F00, 0x109F), (0x1780, 0x18AF), (0x1900, 0x1AAF), (0x1B00, 0x1C4F), (0xA800, 0xA8FF)),
    *((0xA980, 0xABFF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC), (0x10A00, 0x11FFF), (0x1E900, 0x1E95F)),
)
IGNORABLE = (  # Unicode's Default_Ignorable_Code_Point, but for control and format characters and for JOINERS
    *((0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x2065, 0x2065), (0x3164, 0x3164), (0xFE00, 0xFE0F)),
    *((0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF)),
)
DOT_ABOVE = "\u0307"  # which İ has, and which Python's lower case of İ keeps

SAID = "%‰&@#§°№℃℉"  # besides the symbols of currencies and mathematics
MOST_TOKENS = 100_000
LONGEST_TOKEN = 1_000

LETTERS = ("-", BOUNDARY, *ascii_uppercase, "'")
"""The 29 tokens of LibriSpeech transcripts; the blank is written "-"."""


class SpelledWord(NamedTuple):
    """A word, and the indices of its first token and of the one after its last in a sequence of tokens."""

    text: str
    first: int
    last: int


class Piece(NamedTuple):
    """A token that spells a part of a word: the place of its first character in the word (NFD), and after its last."""

    first: int
    last: int
    token: int


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a model spells with, and what is done to a text before it is spelled. Defaults: LibriSpeech's.

    Args:
        tokens: The blank first, then characters, or sequences of them.
        case: Into which letters are turned: "upper", "lower", or "as_written".
        punctuation: "refuse" punctuation and symbols that are no token, or put a "space" in their place; symbols that
            are said as words, such as € and %, are refused in either case.
        delimiter: Token between words; null if words are not parted by a token.
        separator: What is printed for the delimiter.
        lower_case: Print in lower case what tokens in upper case spell.
        spaced: Print a space between tokens, as between phonemes; each counts as a word.
        clean_up: Print punctuation and English contractions without the space before them, as transformers does.
        turkic: Whether I and i are the capital of ı and the small letter of İ; inferred from the tokens if not given.
        unknown: Token of what has no token.
        start: Token of a sentence's start, which CTC does not use.
        end: Token of a sentence's end, which CTC does not use.
        blank_id: Place of the blank among the tokens of the system that the model comes from.
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
            twice = sorted(token for token, count in Counter(self.tokens).items() if count > 1)
            raise UserError(f"the tokens {shown(twice)} are there more than once; give each token once")
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
        if strangers := sorted(set((self.same or {}).values()) - set(self.tokens[1:])):
            raise UserError(
                f"same names {shown(strangers[0])}, which is no token; name one of the tokens after the blank"
            )
        if not 0 <= self.blank_id < len(self.tokens):
            raise UserError(f"blank_id {self.blank_id} of {len(self.tokens)} tokens; they count from 0")

    def _check_types(self) -> None:
        """Refuse what a file may hold in place of texts and switches."""
        if not isinstance(self.tokens, (list, tuple)) or not 0 < len(self.tokens) <= MOST_TOKENS:
            raise UserError(
                f"the tokens are {shown(self.tokens)}; give a list of them, {MOST_TOKENS} at most, such as "
                '["<blank>", "|", "a"]'
            )
        if others := [token for token in self.tokens if not isinstance(token, str)]:
            raise UserError(f"the token {shown(others[0])} is no text; put it in quotes")
        if others := [token for token in self.tokens if not _is_token(token)]:
            raise UserError(f"the token {shown(others[0])}; give each from 1 to {LONGEST_TOKEN} characters")
        for name in ("delimiter", "separator", "unknown", "start", "end"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "separator"):
                raise UserError(f"{name} is {shown(value)}, which is no text; put it in quotes")
            if value and (len(value) > LONGEST_TOKEN or not is_text(value)):
                raise UserError(f"{name} is {shown(value)}; give a text of up to {LONGEST_TOKEN} characters")
        for name in ("lower_case", "spaced", "clean_up", "turkic"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name != "turkic"):
                raise UserError(f"{name} is {shown(value)}; choose true or false")
        if not isinstance(self.blank_id, int) or isinstance(self.blank_id, bool):
            raise UserError(f"blank_id is {shown(self.blank_id)}; give a number")
        if self.same is not None and not isinstance(self.same, Mapping):
            raise UserError(f"same is {shown(self.same)}; give an object of spellings and their tokens")
        if others := [text for pair in (self.same or {}).items() for text in pair if not _is_token(text)]:
            raise UserError(f"same has {shown(others[0])}, which is no text of 1 to {LONGEST_TOKEN} characters")

    def __len__(self) -> int:
        return len(self.tokens)

    def settings(self) -> dict[str, Any]:
        """The arguments that make this vocabulary, without those that have their default."""
        always = {"tokens": list(self.tokens), "case": self.case, "punctuation": self.punctuation}
        others = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in always}
        return always | {name: value for name, value in others.items() if value != getattr(Vocabulary, name)}

    def normalise(self, text: str) -> str:
        """The text with the characters that the tokens spell, and with spaces between words.

        In this order: no invisible characters, canonical composition (NFC), the case, the apostrophe that is a token,
        spaces for punctuation and symbols that are no token (if so set), one space between words and none around them.
        Tokens such as [UNK] stay as they are.
        """
        text = visible(text)
        if not self.spaced:
            pieces = self._marks.split(text) if self._marks else [text]
            text = "".join(piece if index % 2 else self._plain(piece) for index, piece in enumerate(pieces))
        return " ".join(text.split())

    def _plain(self, text: str) -> str:
        text = unicodedata.normalize("NFC", self._cased(text)).translate(self._variants)
        if self.punctuation == "space":
            text = "".join(
                character if character in self._characters or not _is_silent(character) else " " for character in text
            )
        return text

    def _cased(self, text: str) -> str:
        if self._is_turkic:
            text = text.replace("i" + DOT_ABOVE, "i")  # what Python makes of İ
        if self.case == "lower":
            if self._is_turkic or DOT_ABOVE not in self._characters:
                text = text.replace("İ", "i")  # Unicode's simple mapping; Python's is i and a dot above
            return (text.replace("I", "ı") if self._is_turkic else text).lower()
        if self.case == "upper":
            text = text.replace("i", "İ") if self._is_turkic else text
            text = text.replace("ß", "ẞ") if "ẞ" in self._characters else text
            if text.isascii():
                return text.upper()
            # The upper case of a few characters is several
            return "".join(one if len(one.upper()) > 1 and one in self._characters else one.upper() for one in text)
        return text

    def encode(self, text: str) -> list[int]:
        """The tokens of a normalised text, the longest ones that spell it.

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
            tokens += self._spelled(word) or []
        return tokens

    def spell(self, word: str) -> list[str]:
        """The tokens of a normalised word, by their names."""
        return [self.tokens[token] for token in self.encode(word)]

    def pieces(self, word: str) -> list[Piece]:
        """Find every token in some spelling of a normalised word.

        Args:
            word: Characters that are tokens, without spaces.

        Returns:
            Tokens by their first place, long ones first; as many as `encode` gives if there is one spelling.

        Raises:
            UserError: The word has characters that are no token.
        """
        text, longest = unicodedata.normalize("NFD", word), self.encode(word)
        places = range(len(text))
        if self.spaced and text in self._alike:
            return [Piece(0, len(text), token) for token in self._alike[text]]
        found = [
            Piece(first, last, token)
            for first in places
            for last in range(min(first + self._longest, len(text)), first, -1)
            for token in self._alike.get(text[first:last], [])
        ]
        begun = {0}
        for piece in found:
            begun |= {piece.last} if piece.first in begun else set()
        ended = {len(text)}
        for piece in reversed(found):
            ended |= {piece.first} if piece.last in ended else set()
        if 0 not in ended:  # marks in an order of their own
            return [Piece(place, place + 1, token) for place, token in enumerate(longest)]
        return [piece for piece in found if piece.first in begun and piece.last in ended]

    def targets(self, text: str) -> list[int]:
        """What CTC learns of a normalised text: its tokens, and the delimiter after the last word.

        Words at the end of a text end as those inside do (fairseq libri_labels), so that a model parts words at any
        pause of a long recording.
        """
        tokens = self.encode(self.known(text))
        return tokens if self.boundary is None or self.spaced else [*tokens, self.boundary]

    def known(self, text: str) -> str:
        """A normalised text without the characters that are no token."""
        words = text.split()
        for index, word in enumerate(words):
            if unknown := self.unknown_characters(word):
                words[index] = "" if self.spaced else "".join(one for one in word if one not in unknown)
        return " ".join(filter(None, words))

    @cached_property
    def boundary(self) -> int | None:
        """The token between words, if there is one."""
        return None if self.delimiter is None else self.tokens.index(self.delimiter)

    @property
    def search_names(self) -> list[str]:
        """What lexicons, and language models of letters, call the tokens: the delimiter is "|" there."""
        return with_boundary(self.tokens, self.delimiter)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text that tokens spell: nothing is collapsed, and a blank shows as it is written."""
        named = [self._shown[token] for token in tokens]
        if self.spaced:
            named = [name for name in named if name != self.delimiter]
            return unicodedata.normalize("NFC", " ".join(named))
        return self._composed("".join(self.separator if name == self.delimiter else name for name in named))

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text that collapsed tokens spell, with one space between words and none around them."""
        text = self.decode(tokens)
        return " ".join((_cleaned_up(text.strip()) if self.clean_up else text).split())

    def printed(self, text: str) -> str:
        """A normalised text as the model prints it, to be compared with what it prints.

        Without a token between words, it prints no spaces, as in Chinese; with one, the separator; and contractions and
        punctuation as transformers does if `clean_up`.
        """
        if not self.spaced:
            can_part = self.delimiter is not None or any(any(map(str.isspace, token)) for token in self.tokens[1:])
            text = self._composed(text.replace(" ", self.separator if can_part else ""))
        return " ".join((_cleaned_up(text) if self.clean_up else text).split())

    def words_of(self, tokens: Sequence[int]) -> list[SpelledWord]:
        """The words that collapsed tokens spell, and which tokens each is made of."""
        words: list[SpelledWord] = []
        letters, first, last = "", 0, 0
        names = [" " if token == self.boundary else self._shown[token] + " " * self.spaced for token in tokens]
        for index, name in enumerate([*names, " "]):
            for character in name:  # a token of several may hold a space
                if not character.isspace():
                    first, last = first if letters else index, index + 1
                    letters += character
                elif letters:
                    words.append(SpelledWord(self._composed(letters), first, last))
                    letters = ""
        return _merged(words, self.text_of(tokens)) if self.clean_up and words else words

    def _composed(self, text: str) -> str:
        return unicodedata.normalize("NFC", text.lower() if self.lower_case else text)

    def unknown_characters(self, text: str) -> set[str]:
        if self._plainly and self._plainly.keys() >= set(text) - {" "}:
            return set()
        unknown = set[str]()
        for word in set(text.split(" ")):
            if self._spelled(word) is None:
                odd = {character for character in word if self._spelled(character) is None}
                # Marks that are only tokens together with their letters
                alone = odd - {one for form in self._forms for one in form if len(form) > 1}
                rest = "".join(character for character in word if character not in alone)
                unknown |= alone if alone and self._spelled(rest) is not None else odd or set(word)
        return unknown

    def _spelled(self, word: str) -> list[int] | None:
        """The longest tokens that spell a word, or none if none do."""
        if self._plainly and self._plainly.keys() >= set(word):
            return [self._plainly[character] for character in word]
        if word not in self._spellings:
            self._spellings[word] = self._segmented(unicodedata.normalize("NFD", word))
        return self._spellings[word]

    @cached_property
    def _spellings(self) -> dict[str, list[int] | None]:
        """Words that were spelled before."""
        return {}

    def _segmented(self, text: str) -> list[int] | None:
        if self.spaced and text in self._forms:
            return [self._forms[text]]
        if (spelled := self._longest_tokens(text)) is not None:
            return spelled
        # Marks on a letter may have another order in the table than in Unicode, as in ê with a dot below
        clusters = [self._in_any_order(cluster) for cluster in _clusters(text)]
        return None if None in clusters else [token for cluster in clusters for token in cluster or []]

    def _longest_tokens(self, text: str) -> list[int] | None:
        longest = self._longest
        ways: list[tuple[int, int] | None] = [None] * len(text) + [(0, 0)]
        for start in reversed(range(len(text))):
            for end in range(min(start + longest, len(text)), start, -1):
                token = self._forms.get(text[start:end])
                if token is not None and ways[end] is not None:
                    ways[start] = (end, token)
                    break
        tokens, index = [], 0
        while index < len(text):
            way = ways[index]
            if way is None:
                return None
            index, token = way
            tokens.append(token)
        return tokens

    def _in_any_order(self, cluster: str) -> list[int] | None:
        letter, marks = cluster[0], cluster[1:5]
        for order in permutations(marks):
            written = letter + "".join(order)
            if (
                unicodedata.normalize("NFD", written) == cluster
                and (tokens := self._longest_tokens(written)) is not None
            ):
                return tokens
        return None

    @cached_property
    def _shown(self) -> list[str]:
        """Each token as it is printed; for rows of a head without a token of their own, that is the unknown one."""
        return [
            self.unknown if self.unknown is not None and re.fullmatch(r"<\d+>", token) else token
            for token in self.tokens
        ]

    @cached_property
    def _forms(self) -> dict[str, int]:
        """What each token spells, decomposed (NFD), but for blank and delimiter; of several alike, the first."""
        return {form: tokens[0] for form, tokens in self._alike.items()}

    @cached_property
    def _alike(self) -> dict[str, list[int]]:
        """All tokens that spell the same."""
        forms: dict[str, list[int]] = {}
        indices = list(range(1, len(self)))
        if self.lower_case:  # of A and a, which print as one, A is spelled with, as in transformers
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
        return forms

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._forms), default=0)

    @cached_property
    def _plainly(self) -> dict[str, int]:
        """The token of each character, where every token spells one; empty where some spell several."""
        composed = {unicodedata.normalize("NFC", form): token for form, token in self._forms.items()}
        several = any(len(form) > 1 and not is_mark(form) for form in composed)
        return {} if several or self.spaced else {form: token for form, token in composed.items() if len(form) == 1}

    @cached_property
    def _characters(self) -> set[str]:
        """Characters that tokens spell, alone or with others."""
        forms = [unicodedata.normalize("NFC", form) for form in self._forms if not is_mark(form)]
        return {character for form in forms for character in form}

    @cached_property
    def _marks(self) -> re.Pattern[str] | None:
        """Tokens of several characters with punctuation among them, such as [UNK], as they are printed."""
        forms = [unicodedata.normalize("NFC", form) for form in self._forms if len(form) > 1]
        marks = [form for form in forms if any(map(_is_punctuation, form))]
        return re.compile(f"({'|'.join(map(re.escape, sorted(marks, key=len, reverse=True)))})") if marks else None

    @cached_property
    def _variants(self) -> dict[int, str]:
        """What takes the place of characters that are another form of a token's."""
        held = next((one for one in APOSTROPHES + OTHER_APOSTROPHES if one in self._characters), "'")
        variants = {ord(one): held for one in APOSTROPHES if one not in self._characters}
        if "σ" in self.tokens and "ς" not in self.tokens and not self.lower_case:
            variants[ord("ς")] = "σ"
        return variants

    @cached_property
    def _is_turkic(self) -> bool:
        if self.turkic is not None:
            return self.turkic
        if self.case == "lower":  # a table with a dot above was made with Python's lower case, which knows no Turkish
            return "ı" in self._characters and DOT_ABOVE not in self._characters
        # Decomposed, İ and the other letters of Turkish are these; no other language has the three marks
        decomposed = {"I", "\u0306", DOT_ABOVE, "\u0327"}
        return self.case == "upper" and ("İ" in self.tokens or decomposed <= set(self.tokens))

    def write(self, path: Path) -> None:
        """Write it as JSON, which `read_vocabulary` reads."""
        write_whole(path, (json.dumps(self.settings(), ensure_ascii=False, indent=1) + "\n").encode())


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary in a JSON file of `hubert vocabulary`.

    Raises:
        UserError: It is not there, or no vocabulary.
    """
    path, way_out = Path(path), "make one with `hubert vocabulary`"
    if not path.is_file():
        raise UserError(f"{path}: no such vocabulary; make it with `hubert vocabulary`")
    content = read_json(path, way_out, fact=": no vocabulary")
    known = {field.name for field in fields(Vocabulary)}
    if others := sorted(content.keys() - known) if isinstance(content, dict) else ["a list"]:
        raise UserError(
            f"{path}: no vocabulary, which has tokens, case and punctuation, not {shown(others[0])}; {way_out}"
        )
    return vocabulary_from(content, path, "")


def vocabulary_from(
    settings: Mapping[str, Any], path: Path | str, whose: str = "its vocabulary cannot be used: "
) -> Vocabulary:
    """The vocabulary that a model's file tells of; `whose` goes before what is wrong with it.

    Raises:
        UserError: It is none.
    """
    try:
        return Vocabulary(**settings)
    except TypeError as error:
        raise UserError(f"{path}: {whose}{error}; make one with `hubert vocabulary`") from error
    except ValueError as error:
        raise UserError(f"{path}: {whose}{error}") from error


def vocabulary_of(
    texts: Iterable[str], case: Literal["upper", "lower", "as_written"] = "lower", kept: str = "'"
) -> tuple[Vocabulary, Counter[str], Counter[str]]:
    """The vocabulary that spells these texts: every letter, mark and digit in them is a token.

    Args:
        texts: Transcripts.
        case: Case of the tokens: "upper", "lower" or "as_written".
        kept: Punctuation and symbols that are tokens too where they occur.

    Returns:
        The vocabulary, the count of each of its characters, and the count of each character that is no token.
    """
    texts = [visible(text) for text in texts]
    # Only languages with both write either
    turkic = True if case != "as_written" and any("ı" in text or "İ" in text for text in texts) else None
    apostrophe = next((character for character in kept if character in APOSTROPHES), "'")
    everything = Vocabulary(("<blank>", BOUNDARY, apostrophe), case, turkic=turkic)
    written = Counter(character for text in texts for character in everything.normalise(text) if character != " ")
    spelled = {
        character: count
        for character, count in sorted(written.items())
        if character != BOUNDARY and (character in kept or not _is_punctuation(character))
    }
    vocabulary = Vocabulary(("<blank>", BOUNDARY, *spelled), case, "space", turkic=turkic)
    return vocabulary, Counter(spelled), Counter({c: count for c, count in written.items() if c not in spelled})


def visible(text: str) -> str:
    """The text in canonical composition (NFC), without characters that nobody sees.

    White space stays, and so do joiners that follow a letter of a script in which they change what is written.
    """
    if text.isascii() and text.isprintable():
        return text
    shown: list[str] = []
    for character in unicodedata.normalize("NFC", text):
        if character in JOINERS:
            if shown and _may_be_joined(shown[-1]):
                shown.append(character)
        elif not _is_invisible(character):
            shown.append(character)
    return unicodedata.normalize("NFC", "".join(shown))


def comparable(text: str) -> str:
    """The text without differences that are no errors: forms of Unicode, of apostrophes and of spaces."""
    return " ".join(visible(text).translate(dict.fromkeys(map(ord, APOSTROPHES), "'")).split())


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_TOKEN and is_text(value)


def _is_punctuation(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "PS" or category == "Me"  # a mark that encloses, as the one of keycaps


def is_said(character: str) -> bool:
    """Whether a symbol stands for a word, so that it may not vanish: those of currencies and mathematics, % and §."""
    return character in SAID or (unicodedata.category(character) in ("Sc", "Sm") and character != BOUNDARY)


def has_words(text: str) -> bool:
    """Whether a text has anything but punctuation, symbols and what nobody sees."""
    return any(unicodedata.category(character)[0] in "LN" for character in text)


def _is_silent(character: str) -> bool:
    return _is_punctuation(character) and not is_said(character)


def _is_invisible(character: str) -> bool:
    """Control and format characters and other ignorable ones, but for white space, which is left to `split`."""
    if unicodedata.category(character) in ("Cc", "Cf"):
        return not character.isspace()
    return _is_in(IGNORABLE, character)


def _may_be_joined(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM" and _is_in(JOINING_SCRIPTS, character)


def _is_in(ranges: Sequence[tuple[int, int]], character: str) -> bool:
    code = ord(character)
    return code > 0x7F and any(first <= code <= last for first, last in ranges)


def _clusters(text: str) -> list[str]:
    """A decomposed text, parted before every character that is no mark."""
    clusters: list[str] = []
    for character in text:
        if clusters and unicodedata.combining(character):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def _cleaned_up(text: str) -> str:
    """What transformers does with clean_up_tokenization_spaces."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text


def _merged(words: Sequence[SpelledWord], cleaned_up: str) -> list[SpelledWord]:
    """Words as `_cleaned_up` prints them: some are parts of one."""
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


def is_mark(token: str) -> bool:
    """Whether a token is written as those that stand for no text, such as <s> and [UNK]."""
    return len(token) > 2 and (token[0], token[-1]) in (("<", ">"), ("[", "]"))


def with_boundary(tokens: Sequence[str], delimiter: str | None) -> list[str]:
    """The tokens as systems call them whose delimiter is always "|".

    Args:
        tokens: Tokens by their own names.
        delimiter: Token between words; none if no token parts words.

    Returns:
        The same tokens, in the same order; unchanged where "|" is one of them already.
    """
    if delimiter is None or BOUNDARY in tokens:
        return list(tokens)
    return [BOUNDARY if token == delimiter else token for token in tokens]
