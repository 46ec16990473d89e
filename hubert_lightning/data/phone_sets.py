"""Sets of phone symbols: ARPAbet with or without stress, and others."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import combinations

from hubert_lightning.errors import UserError, counted

VOWELS = frozenset(["AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"])
CONSONANTS = frozenset([*"BDFGKLMNPRSTVWYZ", "CH", "DH", "HH", "JH", "NG", "SH", "TH", "ZH"])
ARPABET = VOWELS | CONSONANTS
"""Phones of the CMU pronouncing dictionary, without stress."""
NO_PHONES = frozenset(("sil", "spn"))
"""Silence, and spoken noise, in any set."""
LEAST_SHARE = 0.8
"""Share of the symbols that must belong to a set, since foreign names may add one. Of two parts, share of the symbols
of the part with fewer ones that the other part must have too."""


def phone_set_of(symbols: Iterable[str]) -> str | None:
    """Name the set of phones that an utterance uses.

    Args:
        symbols: Phones, silence among them.

    Returns:
        "ARPAbet", "ARPAbet with stress" or "another set"; None without phones, or if either ARPAbet is possible.
    """
    phones = set(symbols) - NO_PHONES
    if not phones:
        return None
    stressed = {phone for phone in phones if re.fullmatch(r"[A-Z]{2}[012]", phone) and phone[:2] in VOWELS}
    if len(stressed | phones & ARPABET) < LEAST_SHARE * len(phones):
        return "another set"
    plain = phones & VOWELS
    return ("ARPAbet with stress" if len(stressed) > len(plain) else "ARPAbet") if stressed or plain else None


def check_one_phone_set(parts: Mapping[str, Mapping[str, Collection[str]]], way_out: str) -> None:
    """Refuse utterances whose phones are of different sets: a phone with two symbols would count as two.

    Sets other than ARPAbet are compared between parts only: one utterance has too few symbols for that.

    Args:
        parts: Name of each part, such as a manifest → symbols of each utterance by its id.
        way_out: What the user can do.

    Raises:
        UserError: There are two sets.
    """
    firsts: dict[str, tuple[str, Collection[str]]] = {}
    counts = Counter[str]()
    for symbols_of in parts.values():
        for utterance, symbols in symbols_of.items():
            if (name := phone_set_of(symbols)) is not None:
                firsts.setdefault(name, (utterance, symbols))
                counts[name] += 1
    if len(firsts) > 1:
        examples = [
            f"{name} in {counted(counts[name], 'utterance')} ({first}: {', '.join(sorted({*symbols} - NO_PHONES)[:4])})"
            for name, (first, symbols) in firsts.items()
        ]
        raise UserError(f"phones of different sets: {' and '.join(examples)}; {way_out}")
    sets = {part: frozenset().union(*symbols_of.values()) - NO_PHONES for part, symbols_of in parts.items()}
    for (part, phones), (other, others) in combinations([(part, phones) for part, phones in sets.items() if phones], 2):
        smaller, larger = sorted((phones, others), key=len)
        if len(smaller & larger) < LEAST_SHARE * len(smaller):
            strange = ", ".join(sorted(smaller - larger)[:3])
            raise UserError(
                f"{part} and {other}: phones of different sets ({strange} are in one of them only); {way_out}"
            )
