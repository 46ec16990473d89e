"""Phones of English words in ARPAbet without stress: pocketsphinx's dictionary, else espeak-ng's rules."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import as_file, files
from string import ascii_lowercase
from types import TracebackType
from typing import NamedTuple, Self

from hubert_lightning.data.espeak_library import EspeakLibrary
from hubert_lightning.data.numbers import spell_numbers
from hubert_lightning.errors import UserError, counted
from hubert_lightning.untrusted.json_file import shown
from hubert_lightning.untrusted.text_file import lines_of
from hubert_lightning.vocabulary import BOUNDARY, Vocabulary

VOICE = "en-us"
ARPABET_OF_ESPEAK = {
    "a": "AE", "aa": "AE", "a#": "AH", "A:": "AA", "A@": "AA R", "A~": "AA N", "0": "AA", "O": "AO", "O:": "AO",
    "O2": "AO", "O@": "AO R", "o@": "AO R", "O~": "AO N", "o": "OW", "oU": "OW", "V": "AH", "@": "AH", "@-": "AH",
    "@2": "AH", "@5": "UH", "@L": "AH L", "E": "EH", "e@": "EH R", "I": "IH", "I2": "IH", "I#": "IH", "i": "IY",
    "i:": "IY", "i::": "IY", "i@": "IY AH", "i@3": "IH R", "U": "UH", "U@": "UH R", "u": "UW", "u:": "UW", "3": "ER",
    "3:": "ER", "eI": "EY", "aI": "AY", "aI@": "AY AH", "aI3": "AY ER", "aU": "AW", "OI": "OY", "b": "B", "tS": "CH",
    "d": "D", "D": "DH", "f": "F", "g": "G", "h": "HH", "dZ": "JH", "k": "K", "l": "L", "l#": "L", "m": "M", "n": "N",
    "n-": "AH N", "N": "NG", "p": "P", "r": "R", "r-": "R", "s": "S", "S": "SH", "t": "T", "t#": "T", "t2": "T",
    "?": "T", "T": "TH", "v": "V", "w": "W", "j": "Y", "z": "Z", "Z": "ZH", "x": "K",
}  # fmt: skip
"""ARPAbet by the mnemonic of espeak-ng's voice en-us: those that the dictionary's 126 000 words need, and two more."""
STRESS_MARKS = "',%=;|"

ENGLISH = Vocabulary(tokens=("-", BOUNDARY, *ascii_lowercase, "'"), case="lower", punctuation="space")
"""Letters of English words; others are left to espeak-ng if they are Latin."""
ENGLISH_NAMES = ("en", "eng", "english")
"""Names of the language in manifests, without a country."""
LEAST_WORDS = 20
"""Number of words from which a corpus can be told not to be English."""
LEAST_KNOWN = 0.75
"""Least share of English words that are in the dictionary; sentences of German, French or Spanish have fewer."""


class Word(NamedTuple):
    """A word of a transcript.

    Attributes:
        text: The word in lower case.
        entry: The word as it is in the dictionary, or as it is added to it.
        phones: Phones with spaces between them for a word that is not in the dictionary; None for one that is.
    """

    text: str
    entry: str
    phones: str | None


class Pronunciations:
    """The words of English transcripts, with phones for all of them.

    Args:
        known: Words of the dictionary.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self.known = frozenset(known)
        self._espeak = EspeakLibrary()
        self._spelled: dict[str, str] = {}
        if not self._espeak.has_voice(VOICE):
            raise UserError(f"espeak-ng has no voice {VOICE}; install the espeakng-loader that the project asks for")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._espeak.__exit__(error, value, traceback)

    def words(self, text: str) -> list[Word]:
        """Split a transcript into words and find their phones.

        Numbers are written as words, and punctuation is left out.

        Args:
            text: English transcript.

        Raises:
            UserError: It has no words, characters of another script, or a number or sign that can be read in several
                ways.
        """
        spelled = spell_numbers(text.replace("—", " — "), "en")
        if spelled.left:
            raise UserError(f"{shown(spelled.left[0])} can be read in several ways; write it in letters")
        if others := characters_of_other_scripts(spelled.text):
            raise UserError(f"its transcript has {', '.join(others[:5])}, which is no letter of English")
        words = [self._word(word) for word in ENGLISH.normalise(spelled.text).split() if word.strip("'")]
        if not words:
            raise UserError("its transcript has no words")
        return words

    def entry_of(self, word: str) -> str | None:
        """Find a normalised word in the dictionary, also without accents and outer apostrophes; None without it."""
        plain = without_accents(word)
        candidates = (word, plain, plain.strip("'"))
        return next((candidate for candidate in candidates if candidate in self.known), None)

    def _word(self, word: str) -> Word:
        entry = self.entry_of(word)
        if entry is not None:
            return Word(word, entry, None)
        if word not in self._spelled:
            self._spelled[word] = " ".join(self.spelled(word))
        return Word(word, word, self._spelled[word])

    def spelled(self, word: str) -> list[str]:
        """Find the phones of a word by espeak-ng's rules.

        Args:
            word: English word in lower case.

        Returns:
            ARPAbet without stress.

        Raises:
            UserError: espeak-ng gives no phones, or some that English lacks.
        """
        phones: list[str] = []
        for mnemonic in self._espeak.phones(word):
            name = re.sub(r"\([a-z-]+\)", "", mnemonic).strip(STRESS_MARKS)  # the name of another language
            if name not in ARPABET_OF_ESPEAK and name:
                raise UserError(f"{shown(word)} has a sound that English lacks ({name}); spell it as an English word")
            symbols = ARPABET_OF_ESPEAK[name].split() if name else []
            # espeak-ng writes the r after vowels that have one, as in "aberration"
            phones += [] if symbols == ["R"] and phones[-1:] in (["ER"], ["R"]) else symbols
        if not phones:
            raise UserError(f"{shown(word)} has no phones; spell it as an English word")
        return phones


def dictionary_words() -> list[str]:
    """Read the words of the dictionary that pocketsphinx brings.

    Raises:
        UserError: pocketsphinx is not installed.
    """
    check_pocketsphinx()
    with as_file(files("pocketsphinx") / "model" / "en-us" / "cmudict-en-us.dict") as path:
        return [line.split(maxsplit=1)[0] for line in lines_of(path) if line.strip()]


def check_pocketsphinx() -> None:
    """Check that pocketsphinx is installed.

    Raises:
        UserError: It is not.
    """
    try:
        import pocketsphinx  # noqa: F401
    except ImportError as error:
        raise UserError(
            'phones need pocketsphinx, which is not installed; run `pip install "hubert-lightning[phones]"`'
        ) from error


def check_english(texts: Sequence[str], languages: Iterable[str | None], pronunciations: Pronunciations) -> None:
    """Refuse transcripts in another language before any audio is read.

    Args:
        texts: All transcripts.
        languages: Languages that the manifest states.
        pronunciations: English words.

    Raises:
        UserError: Most transcripts are in another script, most words are not English, or the manifest states another
            language.
    """
    way_out = (
        "pocketsphinx's model is English only; align other languages with the Montreal Forced Aligner, and give its "
        "TextGrids to `hubert prepare alignments`"
    )
    stated = Counter(language for language in languages if language and not is_english(language))
    if stated:
        language, count = stated.most_common(1)[0]
        raise UserError(f"{shown(language)} is the language of {counted(count, 'utterance')}; {way_out}")
    foreign = [text for text in texts if characters_of_other_scripts(text)]
    if len(foreign) > len(texts) / 2:
        characters = characters_of_other_scripts(" ".join(foreign[:100]))
        raise UserError(
            f"characters of another script in {len(foreign)} of {counted(len(texts), 'transcript')} "
            f"({', '.join(characters[:8])}); {way_out}"
        )
    words = [word for text in texts for word in ENGLISH.normalise(text).split() if word.isalpha()]
    known = sum(pronunciations.entry_of(word) is not None and word.isascii() for word in words)
    if len(words) >= LEAST_WORDS and known < LEAST_KNOWN * len(words):
        unknown = Counter(word for word in words if pronunciations.entry_of(word) is None or not word.isascii())
        first = ", ".join(word for word, _ in unknown.most_common(5))
        raise UserError(
            f"only {known / len(words):.0%} of the words are in the English dictionary, and {first} are not; {way_out}"
        )


def is_english(language: str) -> bool:
    """Check whether a name of a language, such as en, en-US or English, is that of English."""
    return re.split(r"[-_ ]", language.strip().lower())[0] in ENGLISH_NAMES


def characters_of_other_scripts(text: str) -> list[str]:
    """Find the letters of a text that are not Latin, each once in their order."""
    letters = dict.fromkeys(character for character in text if unicodedata.category(character)[0] == "L")
    return [letter for letter in letters if not unicodedata.name(letter, "").startswith(("LATIN", "MODIFIER LETTER"))]


def without_accents(word: str) -> str:
    """Remove the marks above and below letters."""
    return "".join(letter for letter in unicodedata.normalize("NFD", word) if not unicodedata.combining(letter))
