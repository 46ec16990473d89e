"""How languages write and read numbers: separators, years, ordinals, currencies, and the words around them."""

DECIMAL_POINT = {"en", "he", "ja", "ko", "th", "bn", "te", "kn"}
"""Languages that write 1,234.5; the others write 1.234,5."""
INDIAN_GROUPS = {"en_IN", "bn", "te", "kn"}
"""Languages that write 12,34,567."""
SPACED = {"fr", "fi", "no", "sv", "cs", "sk", "pl", "hu", "ru", "uk", "be", "lt", "lv", "sl", "fr_BE", "fr_CH", "fr_DZ"}
"""Languages that write 1 234 567 with spaces."""
NO_WORD_SPACES = {"ja", "th"}
"""Languages without spaces between a number and its neighbours."""
READ_YEARS = {"en", "de", "nl"}
"""Languages in which years are read differently from other numbers."""
READ_DIGITS = {"en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "no", "fi", "id", "he", "ja", "ko", "th", "ca"}
"""Languages that read the digits after the decimal sign one by one."""
AGREEING_DIGITS: dict[str, str] = {
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
DECLINED_NUMBERS = {"ru", "uk", "be", "pl", "cs", "sk", "sl", "sr", "lt", "lv", "fi", "is"}
"""Languages that decline all numbers, by case and gender: only one at the start of a sentence is certain."""
DOTTED_ORDINALS = {"de", "da", "no", "fi", "is", "cs", "sk", "sl", "hu", "pl", "sr", "lv", "et", "tr"}
"""Languages in which a full stop makes a number an ordinal."""
ORDINAL_ENDINGS = {
    "en": r"st|nd|rd|th",
    "fr": r"er|e|ème|eme",
    "es": "º",
    "it": "º",
    "pt": "º",
    "nl": r"e|de|ste",
}
"""Endings of ordinals after digits."""
PERCENT_WORD = {
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
"""Words for %."""
AND_WORD = {
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
"""Words for &."""
CURRENCIES = {"€": "EUR", "$": "USD", "£": "GBP"}
"""Codes of currencies by their signs."""
BEFORE_CENTS = {
    "en": " and ",
    "de": " und ",
    "fr": " et ",
    "es": " con ",
    "it": " e ",
    "pt": " e ",
    "nl": " en ",
    "ca": " amb ",
}
"""Words between units and cents, for languages whose currencies num2words writes as they are read."""
MAGNITUDES = (
    r"(?:hundred|thousand|lakh|crore|tausend|duizend|tusen|tusind|mio|mln|mld|mrd|mdr?|[kmb]n?|tn"
    r"|(?:m|b|tr)il[^\W\d]*)\b"
)
"""Words after an amount that are read before the currency: $5 million."""
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
"""Months, beside which a day is an ordinal; in the other languages with number words it is not."""
BEFORE_YEARS = {
    "en": r"(?:in|since|of|by|until|till|from|before|after|year|circa|early|late|mid|spring|summer|autumn|winter)$",
    "de": r"(?:in|im|jahre?s?|seit|bis|von|vor|nach|ab|anno|frühjahr|sommer|herbst|winter)$",
    "nl": r"(?:in|jaar|sinds|van|tot|voor|na|vanaf|anno|lente|zomer|herfst|winter)$",
}
"""Words before a year."""
COUNTED_WORDS = {"en": r"[^\W\d_]+s\b", "de": r"[^\W\d_a-zäöüß]", "nl": r"\w+(?:en|s)\b"}
"""Words after a number, such as plurals, that distinguish a count from a year: in 1500 cases."""
DETERMINERS = {
    "en": r"(?:an?|the|this|that|each|every|per|my|your|his|her|its|our|their|another|no)$",
    "de": r"(?:d(?:er|ie|as|em|en|es)|am|vom|zum|zur|beim|bis|ab|im|jede[rmns]?|(?:ein|kein|mein|sein)(?:e[rmns]?)?)$",
    **dict.fromkeys(("da", "no"), r"(?:den|det|de)$"),
    "hu": r"az?$",
}
"""Words before a number that is not a plain one: a $5 bill, der 3."""
