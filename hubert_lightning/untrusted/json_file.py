"""JSON that others wrote: how large, how deep and of which values it may be, before anything is made of it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.text_file import open_text

LARGEST = 2**24
"""Bytes of a file of settings; a vocabulary of a million tokens has as many."""
DEEPEST = 100
"""Lists and objects inside each other; ours have five."""
DIGITS = 100  # of a number; tokenizers of transformers have one of 31 for no limit


def read_json(path: Path, way_out: str, largest: int = LARGEST, fact: str = " is not JSON") -> Any:
    """Read a JSON file, UTF-8 or UTF-16.

    Args:
        path: JSON file.
        way_out: End of the sentence that refuses the file, such as "download it again".
        largest: Bytes that the file may have.
        fact: What that sentence says of a file that is no JSON, after its name.

    Returns:
        Objects, lists, texts, finite numbers, booleans and None.

    Raises:
        UserError: The file cannot be read or is larger, or as `parse_json` raises.
    """
    with open_text(path) as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise UserError(f"{path}: has more than {largest} bytes, where settings have a few thousand; {way_out}")
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}{fact} ({error}); {way_out}") from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that may be damaged or hostile.

    Args:
        text: One JSON value.

    Returns:
        Objects, lists, texts, finite numbers, booleans and None.

    Raises:
        UserError: The text is no JSON, nests deeper than 100, names a key twice, has a number that is not finite or
            has over 100 digits, or half of a character. The message is a reason, to be put into a sentence.
    """
    try:
        content = DECODER.decode(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError as error:
        raise UserError(f"nested deeper than {DEEPEST}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start} is no UTF-8") from error
    for depth, value in _values(content):
        if depth >= DEEPEST and isinstance(value, (list, dict)):
            raise UserError(f"nested deeper than {DEEPEST}")
        if isinstance(value, str) and not is_text(value):
            raise UserError(f"{shown(value)} holds half of a character")
    return content


def is_text(value: str) -> bool:
    """Whether a text has no half of a character (a lone surrogate), which no encoding has."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value as a sentence quotes it: on one line, and short."""
    text = ascii(value) if isinstance(value, str) and not is_text(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _values(content: Any) -> Iterator[tuple[int, Any]]:
    """Every value and key, and how many lists and objects it is in."""
    waiting = [(0, content)]
    while waiting:
        depth, value = waiting.pop()
        yield depth, value
        if isinstance(value, dict):
            waiting += [(depth + 1, inner) for pair in value.items() for inner in pair]
        elif isinstance(value, list):
            waiting += [(depth + 1, inner) for inner in value]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise UserError(f"the key {shown(twice)} is there twice")
    return content


def _number(kind: Callable[[str], int | float], text: str) -> int | float:
    if len(text) > DIGITS:
        raise UserError(f"a number of {len(text)} digits")
    number = kind(text)
    if number - number != 0:
        raise UserError(f"{shown(text)[1:-1]}, which is no finite number")
    return number


def _no_number(name: str) -> None:
    raise UserError(f"{name}, which is no number of JSON")


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=partial(_number, int),
    parse_float=partial(_number, float),
    parse_constant=_no_number,
)
