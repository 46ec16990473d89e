"""Numbers in transcripts, written as words where their reading is certain.

num2words gives the words. A number that can be read in several ways stays as it is and is counted: telephone numbers,
times, dates, ranges, `3D`, German `3.` before a noun, numbers that agree with a noun or are declined, `$5 million`, and
a number next to another one.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from hubert_lightning.characters import is_spoken_symbol
from hubert_lightning.data.number_rules import (
    AGREEING_DIGITS,
    AND_WORD,
    BEFORE_CENTS,
    BEFORE_YEARS,
    COUNTED_WORDS,
    CURRENCIES,
    DECIMAL_POINT,
    DECLINED_NUMBERS,
    DETERMINERS,
    DOTTED_ORDINALS,
    INDIAN_GROUPS,
    MAGNITUDES,
    MONTHS,
    NO_WORD_SPACES,
    ORDINAL_ENDINGS,
    PERCENT_WORD,
    READ_DIGITS,
    READ_YEARS,
    SPACED,
)
from hubert_lightning.errors import UserError, counted

OPENING, CLOSING = "([{\"'«„“‚‘¿¡", ".,;:!?…)]}\"'»”“’"
BETWEEN_NUMBERS = re.compile(r"[-‐-―−×xX*:/]")
"""Signs between numbers with several readings: a range, a score, a difference."""
NUMBER_SPACE = "\ue000"
"""Placeholder for a space within a number, or between a number and its sign."""
MAX_DIGITS = 6
"""Most digits of a number without separators; longer numbers tend to be read digit by digit."""


class Spelled(NamedTuple):
    """A text with numbers as words.

    Attributes:
        text: The text.
        numbers: Numbers that became words, as they were written.
        left: Words that still have digits or spoken symbols.
    """

    text: str
    numbers: tuple[str, ...]
    left: tuple[str, ...]


def check_language(language: str) -> None:
    """Check that num2words knows a language.

    Raises:
        UserError: It does not.
    """
    from num2words import CONVERTER_CLASSES

    if language not in CONVERTER_CLASSES:
        raise UserError(
            f"spell_numbers {language}: no language that num2words knows; choose one of "
            f"{', '.join(CONVERTER_CLASSES)}, or spell numbers out in the transcripts"
        )


def words_with_digits_or_symbols(text: str) -> tuple[str, ...]:
    """Find the words of a text that have digits, or symbols that are read as words, such as € and %."""
    return tuple(word.strip(OPENING + CLOSING) for word in text.split() if any(map(_is_number_or_spoken, word)))


def spell_numbers(text: str, language: str) -> Spelled:
    """Write the numbers of a text as words, with their signs of currency and percent, where the reading is certain.

    Args:
        text: A transcript.
        language: Name of the language in num2words, such as "de" or "pt_BR".

    Returns:
        The text, and the numbers in it.
    """
    base = language.split("_")[0]
    number, sign = r"\d(?:[\d.,'’٬٫]*\d)?", "".join(CURRENCIES)
    spaces = "[\u00a0\u202f\u2009 ]" if language in SPACED else "[\u00a0\u202f\u2009]"
    grouped = rf"(?<![\d.,])\d{{1,3}}(?:{spaces}\d{{3}})+(?!\d)"
    text = re.sub(grouped, lambda match: re.sub(spaces, NUMBER_SPACE, match[0]), text)
    text = re.sub(rf"(\d)\s+([%{sign}])(?!\w)", rf"\1{NUMBER_SPACE}\2", text)
    text = re.sub(rf"(?<!\S)([{sign}])\s+(?=\d)", rf"\1{NUMBER_SPACE}", text)
    text = re.sub(r"(?<=\d)[٪％]", "%", text)
    done: list[str] = []

    def replaced(word: str, spell: Callable[[str], str | None]) -> str:
        plain = re.sub(rf"(?<=\d){NUMBER_SPACE}(?=\d)", "'", word).replace(NUMBER_SPACE, "")
        spelled = spell(plain)
        if spelled is None:
            return word
        done.append(plain)
        return spelled

    if language in NO_WORD_SPACES:
        beside = r"[-‐-―−~〜～×:]"  # another number, of a range or a score
        alone = rf"(?<![A-Za-z\d.,:/+−~〜～-])(?<!\d\s)(?<!{beside}\s){number}%?(?![A-Za-z\d/])(?!\s*{beside}|\s\d)"
        text = re.sub(alone, lambda match: replaced(match[0], partial(_spelled, language=language)), text)
    else:
        words = text.split()
        is_number = [any(unicodedata.category(char)[0] == "N" for char in word) for word in words]
        telephone = _telephone(words)
        as_written = list(words)
        for index, word in enumerate(as_written):
            if word == "&" and base in AND_WORD and 0 < index < len(words) - 1:
                words[index] = replaced(word, lambda _: AND_WORD[base])
            elif any(map(str.isdecimal, word)) and index not in telephone:
                inner = word.strip(OPENING + CLOSING)
                opening, closing = word.split(inner, 1)
                if not _is_by_a_number(as_written, is_number, index) and not _is_doubtful(
                    as_written[:index], opening, inner, closing, as_written[index + 1 :], base
                ):
                    words[index] = opening + replaced(inner, partial(_spelled, language=language)) + closing
        text = " ".join(words)
    text = text.replace(NUMBER_SPACE, " ")
    return Spelled(text, tuple(done), words_with_digits_or_symbols(text))


def _spelled(word: str, language: str) -> str | None:
    """The words of a number, or None if it has several readings."""
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
            words = _money(whole, fraction, CURRENCIES[before or after], language)
        elif after and after != "%":
            words = _ordinal(word, whole, fraction, after, language)
        else:
            words = _cardinal(whole, fraction, language, may_be_year=not after and written.isdecimal())
            if minus and words is not None:
                words = _negative(words, language)
            if after and base == "de" and (whole, fraction) == (1, ""):
                words = "ein"
            if after and words is not None:
                gap = "" if base in (*NO_WORD_SPACES, "ko") else " "
                words = f"{words}{gap}{PERCENT_WORD[base]}" if base in PERCENT_WORD else None
    except (NotImplementedError, ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError):
        return None  # num2words raises errors of many types for languages that it knows badly
    if words is None or "ttt" in words:  # Swedish etttusen, which is spelled ettusen
        return None
    words = words.replace(",", "")
    return words.replace("-", " ") if base == "en" else words


def _telephone(words: Sequence[str]) -> set[int]:
    """Indices of words that form telephone numbers: three groups of digits in a row, or two after 0 or +."""
    digits = [re.fullmatch(r"[(]?[+]?[\d/()-]+[.,;:!?)]?", word) is not None for word in words]
    indices: set[int] = set()
    for alike, run in groupby(range(len(words)), digits.__getitem__):
        group = list(run)
        first = words[group[0]].lstrip("(")
        if alike and (len(group) > 2 or (len(group) > 1 and first[0] in "0+")):
            indices.update(group)
    return indices


def _is_by_a_number(words: Sequence[str], is_number: Sequence[bool], index: int) -> bool:
    """Whether a number is next to another one, or only a sign is between them: 555 1234, 2 1/2, 5 - 6."""

    def are_joined(first: int) -> bool:
        """Whether the word at an index and the next one are parts of one number."""
        if first < 0 or first + 1 >= len(words):
            return False
        second = first + 1
        if BETWEEN_NUMBERS.fullmatch(words[second]) and second + 1 < len(words):
            second += 1
        elif BETWEEN_NUMBERS.fullmatch(words[first]) and first:
            first -= 1
        apart = words[first][-1] in CLOSING or words[second][0] in OPENING
        return is_number[first] and is_number[second] and not apart

    return are_joined(index - 1) or are_joined(index)


def _is_doubtful(
    before: Sequence[str], opening: str, number: str, closing: str, after: Sequence[str], base: str
) -> bool:
    """Whether the words around a number give it another possible reading.

    Args:
        before: Words before the number in the text.
        opening: Punctuation before the number in its word.
        number: Number with its sign of currency or percent.
        closing: Punctuation after the number in its word.
        after: Words after the number in the text.
        base: Language without its country.
    """
    previous = before[-1] if before and before[-1][-1] not in ".!?:;,…" and not opening else ""
    following = after[0] if after and not closing else ""
    is_followed = following[:1].isalpha()
    determined = _begins(DETERMINERS.get(base), previous)
    digits = re.sub(rf"[.,'’٬٫{NUMBER_SPACE}]", "", number)
    if any(sign in number for sign in CURRENCIES):
        of_a_country = number[0] in CURRENCIES and re.fullmatch("[A-Z]{2,3}|[AC]", previous)  # US $5
        if _begins(MAGNITUDES, following) or (is_followed and determined) or of_a_country:
            return True
    return (
        # The end of a sentence, or an ordinal
        (closing.startswith(".") and base in DOTTED_ORDINALS and (bool(after) or determined))
        or (closing[:1] in set("'’\"”") and not opening)  # feet, inches, minutes
        or (bool(before) and before[-1] in ("-", "−"))  # a dash, or minus
        or (is_followed and digits.isdecimal() and _agrees(digits, base))
        or (base in ("sv", "no") and re.fullmatch(rf"1{NUMBER_SPACE}?%", number) is not None)  # en, and not ett
        or (digits != number and _begins(r"[ap]\.?m\b|h\b", following))  # 3.30 pm
        or (base in DECLINED_NUMBERS and bool(before) and before[-1][-1] not in ".!?…")
        or (number.isdecimal() and _is_date(int(number), before, previous, following, base))
    )


def _is_date(whole: int, before: Sequence[str], previous: str, following: str, base: str) -> bool:
    """Whether a number may be a day or a year and then has another reading, or only seems to be a year."""
    months = MONTHS.get(base)
    by_month = _begins(months, before[-1] if before else ""), _begins(months, following)
    if whole <= 31 and (any(by_month) or (base in DECLINED_NUMBERS and months is None and following[:1].isalpha())):
        return True
    if base in READ_YEARS and (1100 <= whole < 2000 or (base == "en" and 2010 <= whole < 2100)):
        is_year = by_month[0] or _begins(BEFORE_YEARS[base], previous)
        return not is_year or re.match(COUNTED_WORDS[base], following) is not None
    return (base in ("sv", "no", "da") and 1100 <= whole < 2000) or (
        base in DECLINED_NUMBERS and 1100 <= whole < 2100 and following[:1].isalpha()
    )


def _agrees(digits: str, base: str) -> bool:
    """Whether the words of a number depend on the noun after it."""
    plain = "".join(str(unicodedata.decimal(digit)) for digit in digits)
    if base in DECLINED_NUMBERS:
        return plain[-1] in "12" and plain[-2:] not in ("11", "12")
    return base in AGREEING_DIGITS and re.search(AGREEING_DIGITS[base], plain) is not None


def _begins(pattern: str | None, word: str) -> bool:
    return pattern is not None and re.match(pattern, word, re.IGNORECASE) is not None


def _value(written: str, language: str) -> tuple[int, str] | None:
    """Digits before and after the decimal sign, or None if the separators are not the language's."""
    decimal, thousands = (".", ",") if language.split("_")[0] in DECIMAL_POINT else (",", ".")
    plain = "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in written)
    plain = plain.replace("٫", decimal).replace("٬", thousands).replace("’", "'")
    grouped = rf"\d{{1,3}}(?:\{thousands}\d{{3}})+|\d{{1,3}}(?:'\d{{3}})+"
    if language in INDIAN_GROUPS:
        grouped += r"|\d{1,2}(?:,\d{2})*,\d{3}"
    parts = re.fullmatch(rf"({grouped}|\d+)(?:\{decimal}(\d+))?", plain)
    if not parts or (parts[1].isdecimal() and len(parts[1]) > MAX_DIGITS):
        return None
    whole = re.sub(r"\D", "", parts[1])
    return (int(whole), parts[2] or "") if whole == "0" or not whole.startswith("0") else None


def _words(number: float, lang: str, **options: Any) -> str:  # options of an untyped library
    from num2words import num2words  # takes a tenth of a second, and no other verb needs it

    return str(num2words(number, lang=lang, **options))


def _cardinal(whole: int, fraction: str, language: str, may_be_year: bool) -> str | None:
    base = language.split("_")[0]
    if not fraction:
        year = may_be_year and base in READ_YEARS and 1100 <= whole < 2100
        return _words(whole, lang=language, to="year" if year else "cardinal")
    if base not in READ_DIGITS:
        return None
    one = _words(1, lang=language)
    pattern = _words(whole + 0.1, lang=language)
    if not pattern.endswith(one):
        return None
    digits = ("" if base in NO_WORD_SPACES else " ").join(_words(int(digit), lang=language) for digit in fraction)
    return pattern.removesuffix(one) + digits


def _negative(words: str, language: str) -> str | None:
    one, negative = _words(1, lang=language), _words(-1, lang=language)
    minus = negative.removesuffix(one)
    return minus + words if negative.endswith(one) and minus else None


def _money(whole: int, fraction: str, currency: str, language: str) -> str | None:
    base = language.split("_")[0]
    if base not in BEFORE_CENTS or len(fraction) not in (0, 2) or (currency == "GBP" and base in ("fr", "pt")):
        return None
    amount = float(f"{whole}.{fraction or '00'}")
    units, cents = _words(amount, lang=language, to="currency", currency=currency, separator="#").split("#")
    if base == "en":
        units = re.sub("euro$", "euros" if whole != 1 else "euro", units.replace(" sterling", ""))
    return units if not int(fraction or 0) else units + BEFORE_CENTS[base] + cents.strip()


def _ordinal(word: str, whole: int, fraction: str, ending: str, language: str) -> str | None:
    base = language.split("_")[0]
    if fraction or base not in ORDINAL_ENDINGS or not re.fullmatch(ORDINAL_ENDINGS[base], ending):
        return None
    if base == "en" and _words(whole, lang=language, to="ordinal_num") != word:
        return None  # 2th
    if base == "fr" and (ending == "er") != (whole == 1):
        return None
    return _words(whole, lang=language, to="ordinal")


def _is_number_or_spoken(character: str) -> bool:
    return unicodedata.category(character)[0] == "N" or is_spoken_symbol(character)


def number_report(before: Sequence[str], spelled: Sequence[Spelled] | None) -> str | None:
    """Report the numbers and spoken symbols of transcripts.

    Args:
        before: Transcripts as they were.
        spelled: The same transcripts after `spell_numbers`, or None if they stay as they are.

    Returns:
        A sentence, or None if there are no numbers and symbols.
    """
    numbers = [words_with_digits_or_symbols(text) for text in before]
    count, num_texts = sum(map(len, numbers)), sum(map(bool, numbers))
    if not count:
        return None
    texts = f"{num_texts} of {counted(len(before), 'transcript')}"
    start = f"numbers or symbols that are said as words in {texts} ({count} in all"
    if spelled is None:
        return (
            f"{start}, {_summary_of(numbers)}): `hubert fit` refuses those that its vocabulary has no tokens for; "
            "--spell_numbers LANGUAGE spells numbers out"
        )
    done, left = [text.numbers for text in spelled], [text.left for text in spelled]
    examples = f", {_summary_of(done)}" if any(done) else ""
    rest = f", {_summary_of(left)}" if any(left) else ""
    return (
        f"{start}): {sum(map(len, done))} spelled out in {counted(sum(map(bool, done)), 'transcript')}{examples}; "
        f"{sum(map(len, left))} left in {sum(map(bool, left))}{rest}"
    )


def _summary_of(words: Sequence[Sequence[str]], most: int = 5) -> str:
    different = list(dict.fromkeys(word for words_of_text in words for word in words_of_text))
    return "such as " + ", ".join(different[:most])
