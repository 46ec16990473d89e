"""Numbers in transcripts, spelled out as words: those alone whose reading is certain.

The words of a number are num2words'. A number that may be read in several ways stays as it is, and is counted:
telephone numbers, times, dates, ranges, `3D`, German `3.` before a noun, numbers that agree with a noun or are
declined, `$5 million`, and any number next to another one.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from hubert_lightning.characters import is_spoken_symbol
from hubert_lightning.errors import UserError

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
AGREE: dict[str, str] = {
    "de": r"^1$|01$",
    "fr": r"1(?<!11)$",
    "it": r"1(?<!11)$",
    "hu": r"2$",
    "ro": r"[12](?<!11)(?:\d{3})?$",
    **dict.fromkeys(("sv", "no"), r"1(?<!11)$"),
    "da": r"^1$|01$",
    "es": r"(?:1(?<!11)|[2-9]\d\d)(?:\d{3})?$",
    **dict.fromkeys(("pt", "ca"), r"(?:[12](?<!11)(?<!12)|[2-9]\d\d)(?:\d{3})?$"),
    **dict.fromkeys(("ko", "he", "ar", "te", "kn", "cy", "ce"), r"$"),
}
"""Digits of numbers whose words depend on the noun after them, by gender, number or kind: ein Tag, eine Woche."""
DECLINED = {"ru", "uk", "be", "pl", "cs", "sk", "sl", "sr", "lt", "lv", "fi", "is"}
"""Languages that decline all numbers, by case and gender: only one that begins a sentence is certain."""
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
MAGNITUDE = (
    r"(?:hundred|thousand|lakh|crore|tausend|duizend|tusen|tusind|mio|mln|mld|mrd|mdr?|[kmb]n?|tn"
    r"|(?:m|b|tr)il[^\W\d]*)\b"
)
"""Words after an amount of money that come before the currency as it is read: $5 million."""
MONTHS = {
    "en": r"(?:january|february|march|april|may|june|july|august|september|october|november|december"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\b",
    "de": r"(?:januar|jänner|februar|märz|april|mai|juni|juli|august|september|oktober|november|dezember)\b",
    "sv": r"(?:januari|februari|mars|april|maj|juni|juli|augusti|september|oktober|november|december)\b",
    "no": r"(?:januar|februar|mars|april|mai|juni|juli|august|september|oktober|november|desember)\b",
    "da": r"(?:januar|februar|marts|april|maj|juni|juli|august|september|oktober|november|december)\b",
    "hu": r"(?:január|február|március|április|május|június|július|augusztus|szeptember|október|november|december)",
    "ru": r"(?:янв|фев|мар|апр|ма[йя]|июн|июл|авг|сен|окт|ноя|дек)",
}
"""Months, next to which the number of a day is an ordinal; in the other languages with a table it is not."""
BEFORE_YEARS = {
    "en": r"(?:in|since|of|by|until|till|from|before|after|year|circa|early|late|mid|spring|summer|autumn|winter)$",
    "de": r"(?:in|im|jahre?s?|seit|bis|von|vor|nach|ab|anno|frühjahr|sommer|herbst|winter)$",
    "nl": r"(?:in|jaar|sinds|van|tot|voor|na|vanaf|anno|lente|zomer|herfst|winter)$",
}
COUNTED = {"en": r"[^\W\d_]+s\b", "de": r"[^\W\d_a-zäöüß]", "nl": r"\w+(?:en|s)\b"}
"""Words after a number, such as plurals, that tell a count from a year: in 1500 cases."""
DETERMINERS = {
    "en": r"(?:an?|the|this|that|each|every|per|my|your|his|her|its|our|their|another|no)$",
    "de": r"(?:d(?:er|ie|as|em|en|es)|am|vom|zum|zur|beim|bis|ab|im|jede[rmns]?|(?:ein|kein|mein|sein)(?:e[rmns]?)?)$",
    **dict.fromkeys(("da", "no"), r"(?:den|det|de)$"),
    "hu": r"az?$",
}
"""Words before what is no plain number: a $5 bill, der 3."""
BETWEEN_NUMBERS = re.compile(r"[-‐-―−×xX*:/]")
"""Signs between numbers that are read in several ways: a range, a score, a difference."""
GAP = "\ue000"
"""Stands for a space within a number, or between it and its sign."""
LONGEST = 6
"""Digits of a number without separators; longer ones are rather read digit by digit."""


class Spelled(NamedTuple):
    """A text with numbers spelled out; which ones, as they were written; and what of the kind is left in it."""

    text: str
    numbers: tuple[str, ...]
    left: tuple[str, ...]


def check_language(language: str) -> None:
    """Raise `UserError` unless numbers can be spelled out in this language."""
    from num2words import CONVERTER_CLASSES

    if language not in CONVERTER_CLASSES:
        raise UserError(
            f"spell_numbers {language}: no language that num2words knows; choose one of "
            f"{', '.join(CONVERTER_CLASSES)}, or spell numbers out in the transcripts"
        )


def words_with_digits_or_symbols(text: str) -> tuple[str, ...]:
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
    text = re.sub(grouped, lambda match: re.sub(spaces, GAP, match[0]), text)
    text = re.sub(rf"(\d)\s+([%{sign}])(?!\w)", rf"\1{GAP}\2", text)
    text = re.sub(rf"(?<!\S)([{sign}])\s+(?=\d)", rf"\1{GAP}", text)
    text = re.sub(r"(?<=\d)[٪％]", "%", text)
    done: list[str] = []

    def replaced(word: str, spell: Callable[[str], str | None]) -> str:
        plain = re.sub(rf"(?<=\d){GAP}(?=\d)", "'", word).replace(GAP, "")
        said = spell(plain)
        if said is None:
            return word
        done.append(plain)
        return said

    if language in UNSPACED:
        beside = r"[-‐-―−~〜～×:]"  # another number, of a range or a score
        alone = rf"(?<![A-Za-z\d.,:/+−~〜～-])(?<!\d\s)(?<!{beside}\s){number}%?(?![A-Za-z\d/])(?!\s*{beside}|\s\d)"
        text = re.sub(alone, lambda match: replaced(match[0], partial(_spelled, language=language)), text)
    else:
        words = text.split()
        is_number = [any(unicodedata.category(one)[0] == "N" for one in word) for word in words]
        telephone = _telephone(words)
        as_written = list(words)
        for index, word in enumerate(as_written):
            if word == "&" and base in AND and 0 < index < len(words) - 1:
                words[index] = replaced(word, lambda _: AND[base])
            elif any(map(str.isdecimal, word)) and index not in telephone:
                inner = word.strip(OPENING + CLOSING)
                opening, closing = word.split(inner, 1)
                if not _is_by_a_number(as_written, is_number, index) and not _is_doubtful(
                    as_written[:index], opening, inner, closing, as_written[index + 1 :], base
                ):
                    words[index] = opening + replaced(inner, partial(_spelled, language=language)) + closing
        text = " ".join(words)
    text = text.replace(GAP, " ")
    return Spelled(text, tuple(done), words_with_digits_or_symbols(text))


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
    if said is None or "ttt" in said:  # Swedish etttusen, which is spelled ettusen
        return None
    said = said.replace(",", "")
    return said.replace("-", " ") if base == "en" else said


def _telephone(words: Sequence[str]) -> set[int]:
    """Indices of digits that follow one another as those of telephone numbers do: three groups, or after 0 or +."""
    digits = [re.fullmatch(r"[(]?[+]?[\d/()-]+[.,;:!?)]?", word) is not None for word in words]
    indices: set[int] = set()
    for alike, run in groupby(range(len(words)), digits.__getitem__):
        group = list(run)
        first = words[group[0]].lstrip("(")
        if alike and (len(group) > 2 or (len(group) > 1 and first[0] in "0+")):
            indices.update(group)
    return indices


def _is_by_a_number(words: Sequence[str], is_number: Sequence[bool], index: int) -> bool:
    """Whether nothing, or a sign such as a hyphen, is between a number and another one: 555 1234, 2 1/2, 5 - 6."""

    def are_joined(first: int) -> bool:
        """Whether the word at an index, and the next one, are parts of one number."""
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
    """Whether the words around a number make it one that may be read otherwise.

    Args:
        before: Words before it in the text.
        opening: Punctuation before it in its word.
        number: The number, with its sign of currency or percent.
        closing: Punctuation after it in its word.
        after: Words after it in the text.
        base: Language, without its country.
    """
    previous = before[-1] if before and before[-1][-1] not in ".!?:;,…" and not opening else ""
    following = after[0] if after and not closing else ""
    is_followed = following[:1].isalpha()
    determined = _begins(DETERMINERS.get(base), previous)
    digits = re.sub(rf"[.,'’٬٫{GAP}]", "", number)
    if any(sign in number for sign in CURRENCIES):
        of_a_country = number[0] in CURRENCIES and re.fullmatch("[A-Z]{2,3}|[AC]", previous)  # US $5
        if _begins(MAGNITUDE, following) or (is_followed and determined) or of_a_country:
            return True
    return (
        # The end of a sentence, or an ordinal
        (closing.startswith(".") and base in DOTTED and (bool(after) or determined))
        or (closing[:1] in set("'’\"”") and not opening)  # feet, inches, minutes
        or (bool(before) and before[-1] in ("-", "−"))  # a dash, or minus
        or (is_followed and digits.isdecimal() and _agrees(digits, base))
        or (base in ("sv", "no") and re.fullmatch(rf"1{GAP}?%", number) is not None)  # en, and not ett
        or (digits != number and _begins(r"[ap]\.?m\b|h\b", following))  # 3.30 pm
        or (base in DECLINED and bool(before) and before[-1][-1] not in ".!?…")
        or (number.isdecimal() and _is_date(int(number), before, previous, following, base))
    )


def _is_date(whole: int, before: Sequence[str], previous: str, following: str, base: str) -> bool:
    """Whether a number may be a day of a month, or a year, and is read otherwise then; or may be none, though it seems
    to be a year."""
    months = MONTHS.get(base)
    by_month = _begins(months, before[-1] if before else ""), _begins(months, following)
    if whole <= 31 and (any(by_month) or (base in DECLINED and months is None and following[:1].isalpha())):
        return True
    if base in YEARS and (1100 <= whole < 2000 or (base == "en" and 2010 <= whole < 2100)):
        is_year = by_month[0] or _begins(BEFORE_YEARS[base], previous)
        return not is_year or re.match(COUNTED[base], following) is not None
    return (base in ("sv", "no", "da") and 1100 <= whole < 2000) or (
        base in DECLINED and 1100 <= whole < 2100 and following[:1].isalpha()
    )


def _agrees(digits: str, base: str) -> bool:
    """Whether the words of a number depend on the noun after it."""
    plain = "".join(str(unicodedata.decimal(digit)) for digit in digits)
    if base in DECLINED:
        return plain[-1] in "12" and plain[-2:] not in ("11", "12")
    return base in AGREE and re.search(AGREE[base], plain) is not None


def _begins(pattern: str | None, word: str) -> bool:
    return pattern is not None and re.match(pattern, word, re.IGNORECASE) is not None


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
    return unicodedata.category(character)[0] == "N" or is_spoken_symbol(character)


def number_report(before: Sequence[str], spelled: Sequence[Spelled] | None) -> str | None:
    """A sentence on what transcripts have of numbers and symbols; none if they have none."""
    numbers = [words_with_digits_or_symbols(text) for text in before]
    count, num_texts = sum(map(len, numbers)), sum(map(bool, numbers))
    if not count:
        return None
    start = f"{num_texts} of {len(before)} transcripts have numbers or symbols that are said as words ({count} in all"
    if spelled is None:
        return (
            f"{start}, {_summary_of(numbers)}): `hubert fit` refuses those that its vocabulary has no tokens for; "
            "--spell_numbers LANGUAGE spells numbers out"
        )
    done, left = [one.numbers for one in spelled], [one.left for one in spelled]
    examples = f", {_summary_of(done)}" if any(done) else ""
    rest = f", {_summary_of(left)}" if any(left) else ""
    return (
        f"{start}): {sum(map(len, done))} spelled out in {sum(map(bool, done))} transcripts{examples}; "
        f"{sum(map(len, left))} left in {sum(map(bool, left))}{rest}"
    )


def _summary_of(words: Sequence[Sequence[str]], most: int = 5) -> str:
    different = list(dict.fromkeys(word for words_of_text in words for word in words_of_text))
    return "such as " + ", ".join(different[:most])
