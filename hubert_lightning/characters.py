"""Characters of transcripts in any script: case, punctuation, invisible characters, symbols that stand for words."""

import unicodedata
from collections.abc import Container, Sequence

APOSTROPHES = "'’ʼ＇"
"""Four forms of one letter."""
JOINERS = "\u200c\u200d\u180b\u180c\u180d\u180f"
"""Characters without width that change how the letters of some scripts are written."""
JOINING_SCRIPTS = (
    *((0x0600, 0x0DFF), (0x0F00, 0x109F), (0x1780, 0x18AF), (0x1900, 0x1AAF), (0x1B00, 0x1C4F), (0xA800, 0xA8FF)),
    *((0xA980, 0xABFF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC), (0x10A00, 0x11FFF), (0x1E900, 0x1E95F)),
)
"""First and last code points of the scripts in which joiners matter, Arabic and those of India among them."""
IGNORABLE = (
    *((0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x2065, 0x2065), (0x3164, 0x3164), (0xFE00, 0xFE0F)),
    *((0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF)),
)
"""Unicode's Default_Ignorable_Code_Point, without control and format characters and without joiners."""
SCRIPTS_WITHOUT_SPACES = (
    *((0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF)),
    *((0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x20000, 0x3FFFF)),
)
"""First and last code points of Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese, which write no spaces."""
SPOKEN_SYMBOLS = "%‰&@#§°№℃℉"
"""Symbols that are read as words, besides those of currencies and mathematics."""
DOT_ABOVE = "\u0307"
"""Mark that İ has, and that Python's lower case of İ keeps."""


def visible(text: str) -> str:
    """Convert a text to canonical composition (NFC), without invisible characters.

    White space stays, and so do joiners after a letter of a script in which they change the writing.
    """
    if text.isascii() and text.isprintable():
        return text
    characters: list[str] = []
    for character in unicodedata.normalize("NFC", text):
        if character in JOINERS:
            if characters and _may_be_joined(characters[-1]):
                characters.append(character)
        elif not _is_invisible(character):
            characters.append(character)
    return unicodedata.normalize("NFC", "".join(characters))


def lower_case(text: str, turkic: bool, keep_dots: bool) -> str:
    """Convert a text to lower case.

    Args:
        text: A text.
        turkic: Whether the lower case of I is ı and that of İ is i, as in Turkish.
        keep_dots: Whether the lower case of İ is i and a dot above, as in Python, rather than i, as in Unicode's simple
            mapping; Turkish has no such dot.
    """
    if turkic or not keep_dots:
        text = text.replace("İ", "i")
    return (text.replace("I", "ı") if turkic else text).lower()


def upper_case(text: str, turkic: bool, letters: Container[str]) -> str:
    """Convert a text to upper case.

    Args:
        text: A text.
        turkic: Whether the upper case of i is İ, as in Turkish.
        letters: Letters that stay, or are chosen, where Python's upper case has several characters (ß, ẞ).
    """
    text = text.replace("i", "İ") if turkic else text
    text = text.replace("ß", "ẞ") if "ẞ" in letters else text
    if text.isascii():
        return text.upper()
    return "".join(char if len(char.upper()) > 1 and char in letters else char.upper() for char in text)


def comparable(text: str) -> str:
    """Remove differences that are not errors: of Unicode's normal forms, of apostrophes and of spaces."""
    return " ".join(visible(text).translate(dict.fromkeys(map(ord, APOSTROPHES), "'")).split())


def has_words(text: str) -> bool:
    """Check whether a text has anything besides punctuation, symbols and invisible characters."""
    return any(unicodedata.category(character)[0] in "LN" for character in text)


def parts_words(text: str) -> bool:
    """Check whether most letters of a text are of scripts that write spaces between words."""
    letters = [character for character in text if unicodedata.category(character)[0] in "LM"]
    return 2 * sum(_is_in(SCRIPTS_WITHOUT_SPACES, character) for character in letters) <= len(letters)


def is_spoken_symbol(character: str) -> bool:
    """Check whether a symbol stands for a word, so that it must not vanish: currencies, mathematics, % and §."""
    mathematical = unicodedata.category(character) in ("Sc", "Sm") and character != "|"  # a delimiter of words
    return character in SPOKEN_SYMBOLS or mathematical


def is_punctuation(character: str) -> bool:
    """Check whether a character is punctuation, a symbol, or a mark that encloses, such as the one of keycaps."""
    category = unicodedata.category(character)
    return category[0] in "PS" or category == "Me"


def is_silent(character: str) -> bool:
    """Check whether a character is punctuation or a symbol that is not read as a word."""
    return is_punctuation(character) and not is_spoken_symbol(character)


def _is_invisible(character: str) -> bool:
    """Whether a character is ignorable, a control or a format character; white space is left to `split`."""
    if unicodedata.category(character) in ("Cc", "Cf"):
        return not character.isspace()
    return _is_in(IGNORABLE, character)


def _may_be_joined(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM" and _is_in(JOINING_SCRIPTS, character)


def _is_in(ranges: Sequence[tuple[int, int]], character: str) -> bool:
    code = ord(character)
    return code > 0x7F and any(first <= code <= last for first, last in ranges)
