"""Sets of phone symbols: ARPAbet with or without stress, and others."""

import re
from collections.abc import Collection, Iterable, Mapping

from hubert_lightning.errors import UserError

VOWELS = frozenset(["AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"])
CONSONANTS = frozenset([*"BDFGKLMNPRSTVWYZ", "CH", "DH", "HH", "JH", "NG", "SH", "TH", "ZH"])
ARPABET = VOWELS | CONSONANTS
"""Phones of the CMU pronouncing dictionary, without stress."""
NO_PHONES = frozenset(("sil", "spn"))
"""Silence, and spoken noise, in any set."""
LEAST_SHARE = 0.8
"""Share of the symbols of an utterance that shows its set: foreign names may add a symbol to ARPAbet."""


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


def check_one_phone_set(phones_of: Mapping[str, Collection[str]], way_out: str) -> None:
    """Refuse utterances whose phones are of different sets: a phone with two symbols would count as two.

    Args:
        phones_of: Symbols of each utterance by its id.
        way_out: What the user can do.

    Raises:
        UserError: There are two sets.
    """
    firsts: dict[str, str] = {}
    counts: dict[str, int] = {}
    for utterance, symbols in phones_of.items():
        name = phone_set_of(symbols)
        if name is not None:
            firsts.setdefault(name, utterance)
            counts[name] = counts.get(name, 0) + 1
    if len(firsts) > 1:
        parts = [
            f"{counts[name]} utterances have {name} ({first}: {', '.join(examples[:4])})"
            for name, first in firsts.items()
            for examples in [sorted(set(phones_of[first]) - NO_PHONES)]
        ]
        raise UserError(f"phones of different sets: {' and '.join(parts)}; {way_out}")
