"""Reader of untrusted JSON, with limits on its size, nesting and values."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.text_file import open_text

MAX_CHARACTERS = 2**24
"""Characters of a file of settings; a vocabulary of a million tokens has as many."""
MAX_NESTING = 100
"""Lists and objects inside each other; files of this package have five."""
MAX_DIGITS = 100  # of a number; tokenizers of transformers have one of 31, for no limit


def read_json(path: Path, way_out: str, largest: int = MAX_CHARACTERS, fact: str = " is not JSON") -> Any:
    """Read a JSON file, UTF-8 or UTF-16.

    Args:
        path: JSON file.
        way_out: End of the sentence that refuses the file, such as "download it again".
        largest: Characters that the file may have.
        fact: Part of that sentence after the name of a file that is no JSON.

    Returns:
        Objects, lists, texts, finite numbers, booleans and None.

    Raises:
        UserError: The file cannot be read, is too large, or is refused by `parse_json`.
    """
    with open_text(path) as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise UserError(f"{path}: has more than {largest} characters, where settings have a few thousand; {way_out}")
    try:
        return parse_json(text)
    except UserError as error:
        raise UserError(f"{path}{fact} ({error}); {way_out}") from error


def read_json_object(path: Path, way_out: str = "copy or download it again") -> dict[str, Any]:
    """Read a JSON file that holds one object, such as settings.

    Args:
        path: JSON file.
        way_out: End of the sentence that refuses the file.

    Raises:
        UserError: The file is refused by `read_json`, or holds something else than an object.
    """
    content = read_json(path, way_out)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; {way_out}")
    return content


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that may be corrupt or hostile.

    Args:
        text: One JSON value.

    Returns:
        Objects, lists, texts, finite numbers, booleans and None.

    Raises:
        UserError: The text is no JSON, nests deeper than 100, repeats a key, has a number that is not finite or has
            over 100 digits, or half of a character. The message is a reason for a sentence.
    """
    try:
        content = DECODER.decode(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError as error:
        raise UserError(f"nested deeper than {MAX_NESTING}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(str(error)) from error
    for depth, value in _values(content):
        if depth >= MAX_NESTING and isinstance(value, (list, dict)):
            raise UserError(f"nested deeper than {MAX_NESTING}")
        if isinstance(value, str) and not is_text(value):
            raise UserError(f"{shown(value)} holds half of a character")
    return content


def is_text(value: str) -> bool:
    """Check that a text has no half of a character (a lone surrogate), which has no encoding."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """Quote a value for a sentence: on one line, and short."""
    text = ascii(value) if isinstance(value, str) and not is_text(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _values(content: Any) -> Iterator[tuple[int, Any]]:
    """Yield every value and key, and its nesting: the number of lists and objects around it."""
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
    if len(text) > MAX_DIGITS:
        raise UserError(f"a number of {len(text)} digits")
    number = kind(text)
    if number - number != 0:
        raise UserError(f"{shown(text)[1:-1]}, which is not a finite number")
    return number


def _no_number(name: str) -> None:
    raise UserError(f"{name}, which is not a JSON number")


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=partial(_number, int),
    parse_float=partial(_number, float),
    parse_constant=_no_number,
)
