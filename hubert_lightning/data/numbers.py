"""Numbers in transcripts, spelled out as words: those alone whose reading is certain.

The words of a number are num2words'. What may be read in several ways (telephone numbers, times, dates, ranges,
`3D`, German `3.` before a noun) stays as it is, and is told.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from hubert_lightning.data.text import is_said

POINT = {"en", "he", "ja", "ko", "th", "bn", "te", "kn"}
"""Languages that write 1,234.5; the others write 1.234,5."""
INDIAN = {"en_IN", "bn", "te", "kn"}
"""Languages that write 12,34,567."""
SPACED = {"fr", "fi", "no", "sv", "cs", "sk", "pl", "hu", "ru", "uk", "be", "lt", "lv", "sl", "fr_BE", "fr_CH", "fr_DZ"}
"""Languages that write 1 234 567 with spaces."""
UNSPACED = {"ja", "th"}
"""Languages without spaces between a number and the words around it."""
YEARS = {"en", "de", "nl"}
"""Languages in which years are read otherwise than numbers."""
DECIMALS = {"en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "no", "fi", "id", "he", "ja", "ko", "th", "ca"}
"""Languages that read the digits after the decimal sign one by one."""
ENDINGS_THAT_AGREE = {"de": "1", "fr": "1", "es": "1", "it": "1"} | dict.fromkeys(
    ("pt", "ca", "ro", "ru", "uk", "be", "pl", "cs", "sk", "sl", "sr", "lt", "lv"), "12"
)
"""Last digits of numbers whose word depends on the noun after them: ein Tag, eine Woche."""
DOTTED = {"de", "da", "no", "fi", "is", "cs", "sk", "sl", "hu", "pl", "sr", "lv", "et", "tr"}
"""Languages in which a full stop makes a number an ordinal."""
ORDINALS = {
    "en": r"st|nd|rd|th",
    "fr": r"er|e|ème|eme",
    "es": "º",
    "it": "º",
    "pt": "º",
    "nl": r"e|de|ste",
}
PERCENT = {
    "en": "percent",
    "de": "Prozent",
    "fr": "pour cent",
    "es": "por ciento",
    "it": "per cento",
    "pt": "por cento",
    "nl": "procent",
    "sv": "procent",
    "da": "procent",
    "no": "prosent",
    "pl": "procent",
    "id": "persen",
    "vi": "phần trăm",
    "ca": "per cent",
    "ja": "パーセント",
    "ko": " 퍼센트",
    "th": "เปอร์เซ็นต์",
}
AND = {
    "en": "and",
    "de": "und",
    "fr": "et",
    "es": "y",
    "it": "e",
    "pt": "e",
    "nl": "en",
    "sv": "och",
    "da": "og",
    "no": "og",
}
CURRENCIES = {"€": "EUR", "$": "USD", "£": "GBP"}
BETWEEN = {
    "en": " and ",
    "de": " und ",
    "fr": " et ",
    "es": " con ",
    "it": " e ",
    "pt": " e ",
    "nl": " en ",
    "ca": " amb ",
}
"""Between a currency's units and its cents; languages whose currencies num2words spells as they are said."""
OPENING, CLOSING = "([{\"'«„“‚‘¿¡", ".,;:!?…)]}\"'»”“’"
LONGEST = 6
"""Digits of a number without separators; longer ones are rather read digit by digit."""


class Spelled(NamedTuple):
    """A text with numbers spelled out; which ones, as they were written; and what of the kind is left in it."""

    text: str
    numbers: tuple[str, ...]
    left: tuple[str, ...]


def check_language(language: str) -> None:
    """Raise `ValueError` unless numbers can be spelled out in this language."""
    from num2words import CONVERTER_CLASSES

    if language not in CONVERTER_CLASSES:
        raise ValueError(
            f"spell_numbers {language}: no language that num2words knows; choose one of "
            f"{', '.join(CONVERTER_CLASSES)}, or spell numbers out in the transcripts"
        )


def said_otherwise(text: str) -> tuple[str, ...]:
    """The words of a text that have digits, or symbols that are said, such as € and %."""
    return tuple(word.strip(OPENING + CLOSING) for word in text.split() if any(map(_is_number_or_said, word)))


def spell_numbers(text: str, language: str) -> Spelled:
    """Spell out the numbers of a text, with their signs of currency and percent, where their reading is certain.

    Args:
        text: A transcript.
        language: As num2words calls it, "de" or "pt_BR".
    """
    base = language.split("_")[0]
    number, sign = r"\d(?:[\d.,'’٬٫]*\d)?", "".join(CURRENCIES)
    spaces = "[\u00a0\u202f\u2009 ]" if language in SPACED else "[\u00a0\u202f\u2009]"
    grouped = rf"(?<![\d.,])\d{{1,3}}(?:{spaces}\d{{3}})+(?!\d)"
    text = re.sub(grouped, lambda found: re.sub(spaces, "'", found[0]), text)
    text = re.sub(rf"(\d)\s+([%{sign}])(?!\w)", r"\1\2", text)
    text = re.sub(rf"(?<!\S)([{sign}])\s+(?=\d)", r"\1", text)
    text = re.sub(r"(?<=\d)[٪％]", "%", text)
    done: list[str] = []

    def replaced(word: str, spell: Callable[[str], str | None]) -> str:
        said = spell(word)
        if said is None:
            return word
        done.append(word)
        return said

    if language in UNSPACED:
        alone = rf"(?<![A-Za-z\d.,:/+−-]){number}%?(?![A-Za-z\d:/−-])"
        text = re.sub(alone, lambda found: replaced(found[0], partial(_spelled, language=language)), text)
    else:
        words = text.split()
        telephone = _telephone(words)
        for place, word in enumerate(words):
            inner = word.strip(OPENING + CLOSING)
            if word == "&" and base in AND and 0 < place < len(words) - 1:
                words[place] = replaced(word, lambda _: AND[base])
            elif any(map(str.isdecimal, inner)):
                opening, closing = word.split(inner, 1)
                following = words[place + 1] if place + 1 < len(words) else ""
                if (
                    (closing.startswith(".") and base in DOTTED and following)  # the end of a sentence, or an ordinal
                    or (closing[:1] in set("'’\"”") and not opening)  # feet, inches, minutes
                    or (following[:1].isalpha() and not closing and _agrees(inner, base))
                    or place in telephone
                ):
                    continue
                words[place] = opening + replaced(inner, partial(_spelled, language=language)) + closing
        text = " ".join(words)
    return Spelled(text, tuple(done), said_otherwise(text))


def _spelled(word: str, language: str) -> str | None:
    """The words of a number, or none if it may be read in several ways."""
    base, sign = language.split("_")[0], "".join(CURRENCIES)
    parts = re.fullmatch(rf"([-−]?)([{sign}]?)(\d(?:[\d.,'’٬٫]*\d)?)([^\W\d]*|[%{sign}]|[ºª])", word)
    if not parts:
        return None
    minus, before, written, after = parts.groups()
    value = _value(written, language)
    if value is None or (before and after) or (minus and (before or after)):
        return None
    whole, fraction = value
    try:
        if before or after in CURRENCIES:
            said = _money(whole, fraction, CURRENCIES[before or after], language)
        elif after and after != "%":
            said = _ordinal(word, whole, fraction, after, language)
        else:
            said = _cardinal(whole, fraction, language, may_be_year=not after and written.isdecimal())
            if minus and said is not None:
                said = _negative(said, language)
            if after and base == "de" and (whole, fraction) == (1, ""):
                said = "ein"
            if after and said is not None:
                said = f"{said}{'' if base in (*UNSPACED, 'ko') else ' '}{PERCENT[base]}" if base in PERCENT else None
    except (NotImplementedError, ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError):
        return None  # num2words fails in many ways where it does not know a language well
    if said is None:
        return None
    said = said.replace(",", "")
    return said.replace("-", " ") if base == "en" else said


def _telephone(words: Sequence[str]) -> set[int]:
    """Places of digits that follow one another as those of telephone numbers do: three groups, or after 0 or +."""
    digits = [re.fullmatch(r"[(]?[+]?[\d/()-]+[.,;:!?)]?", word) is not None for word in words]
    places: set[int] = set()
    for alike, run in groupby(range(len(words)), digits.__getitem__):
        group = list(run)
        first = words[group[0]].lstrip("(")
        if alike and (len(group) > 2 or (len(group) > 1 and first[0] in "0+")):
            places.update(group)
    return places


def _agrees(written: str, base: str) -> bool:
    """Whether the word of a number depends on the noun after it."""
    return (
        written.isdecimal()
        and written[-1] in ENDINGS_THAT_AGREE.get(base, "")
        and written[-2:] not in ("11", "12")
        and (base not in ("de", "it") or len(written) == 1)
    )


def _value(written: str, language: str) -> tuple[int, str] | None:
    """Digits before and after the decimal sign, or none if separators are not the language's."""
    decimal, thousands = (".", ",") if language.split("_")[0] in POINT else (",", ".")
    plain = "".join(str(unicodedata.decimal(one)) if one.isdecimal() else one for one in written)
    plain = plain.replace("٫", decimal).replace("٬", thousands).replace("’", "'")
    grouped = rf"\d{{1,3}}(?:\{thousands}\d{{3}})+|\d{{1,3}}(?:'\d{{3}})+"
    if language in INDIAN:
        grouped += r"|\d{1,2}(?:,\d{2})*,\d{3}"
    parts = re.fullmatch(rf"({grouped}|\d+)(?:\{decimal}(\d+))?", plain)
    if not parts or (parts[1].isdecimal() and len(parts[1]) > LONGEST):
        return None
    whole = re.sub(r"\D", "", parts[1])
    return (int(whole), parts[2] or "") if whole == "0" or not whole.startswith("0") else None


def _words(number: float, lang: str, **how: Any) -> str:
    from num2words import num2words  # a tenth of a second, where no other verb needs it

    return num2words(number, lang=lang, **how)


def _cardinal(whole: int, fraction: str, language: str, may_be_year: bool) -> str | None:
    base = language.split("_")[0]
    if not fraction:
        year = may_be_year and base in YEARS and 1100 <= whole < 2100
        return _words(whole, lang=language, to="year" if year else "cardinal")
    if base not in DECIMALS:
        return None
    one = _words(1, lang=language)
    pattern = _words(whole + 0.1, lang=language)
    if not pattern.endswith(one):
        return None
    digits = ("" if base in UNSPACED else " ").join(_words(int(digit), lang=language) for digit in fraction)
    return pattern.removesuffix(one) + digits


def _negative(said: str, language: str) -> str | None:
    one, negative = _words(1, lang=language), _words(-1, lang=language)
    minus = negative.removesuffix(one)
    return minus + said if negative.endswith(one) and minus else None


def _money(whole: int, fraction: str, currency: str, language: str) -> str | None:
    base = language.split("_")[0]
    if base not in BETWEEN or len(fraction) not in (0, 2) or (currency == "GBP" and base in ("fr", "pt")):
        return None
    amount = float(f"{whole}.{fraction or '00'}")
    units, cents = _words(amount, lang=language, to="currency", currency=currency, separator="#").split("#")
    if base == "en":
        units = re.sub("euro$", "euros" if whole != 1 else "euro", units.replace(" sterling", ""))
    return units if not int(fraction or 0) else units + BETWEEN[base] + cents.strip()


def _ordinal(word: str, whole: int, fraction: str, ending: str, language: str) -> str | None:
    base = language.split("_")[0]
    if fraction or base not in ORDINALS or not re.fullmatch(ORDINALS[base], ending):
        return None
    if base == "en" and _words(whole, lang=language, to="ordinal_num") != word:
        return None  # 2th
    if base == "fr" and (ending == "er") != (whole == 1):
        return None
    return _words(whole, lang=language, to="ordinal")


def _is_number_or_said(character: str) -> bool:
    return unicodedata.category(character)[0] == "N" or is_said(character)


def account(before: Sequence[str], spelled: Sequence[Spelled] | None) -> str | None:
    """A sentence on what transcripts have of numbers and symbols; none if they have none."""
    found = [said_otherwise(text) for text in before]
    number, of_texts = sum(map(len, found)), sum(map(bool, found))
    if not number:
        return None
    start = f"{of_texts} of {len(before)} transcripts have numbers or symbols that are said as words ({number} in all"
    if spelled is None:
        return (
            f"{start}, {_some(found)}): `hubert fit` refuses those that its vocabulary has no tokens for; "
            "--spell_numbers LANGUAGE spells numbers out"
        )
    done, left = [one.numbers for one in spelled], [one.left for one in spelled]
    examples = f", {_some(done)}" if any(done) else ""
    rest = f", {_some(left)}" if any(left) else ""
    return (
        f"{start}): {sum(map(len, done))} spelled out in {sum(map(bool, done))} transcripts{examples}; "
        f"{sum(map(len, left))} left in {sum(map(bool, left))}{rest}"
    )


def _some(words: Sequence[Sequence[str]], most: int = 5) -> str:
    different = list(dict.fromkeys(word for of_text in words for word in of_text))
    return "such as " + ", ".join(different[:most])
