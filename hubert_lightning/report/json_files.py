"""Files that others may have written, and which may be missing or corrupt."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from hubert_lightning.errors import UserError
from hubert_lightning.files import read_regular
from hubert_lightning.untrusted.json_file import parse_json

Json = Any
"""A value of a file that others may have written."""
LARGEST_FILE = 2**28
"""Bytes of a file that is read whole."""


def is_number(value: Json) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def flat(content: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    """Flatten nested mappings: `{"encoder": {"dim": 768}}` becomes `{"encoder/dim": 768}`."""
    values: dict[str, Json] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            values |= flat(value, f"{name}/")
        else:
            values[name] = value
    return values


def natural(text: str) -> list[tuple[int, str | int]]:
    """Return a key that sorts iteration2 before iteration10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", text) if part]


def json_lines(path: Path) -> Iterator[dict[str, Json]]:
    """Read the objects of a file of JSON lines; other lines, such as an unfinished last one, are left out."""
    for line in read_regular(path, LARGEST_FILE).splitlines():
        with suppress(UserError, ValueError):
            row = parse_json(line)
            if isinstance(row, dict):
                yield row


def json_object(path: Path, problems: list[str]) -> dict[str, Json]:
    """Read a JSON file of a run; an empty object if it is missing, or corrupt, which `problems` then names."""
    content = checked(path, problems, lambda path: json.loads(read_regular(path, LARGEST_FILE)))
    return content if isinstance(content, dict) else {}


def checked(path: Path, problems: list[str], read: Callable[[Path], Json]) -> Json:
    """Read a file; None if it is missing, or corrupt, which `problems` then names."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except (OSError, ValueError, RecursionError, csv.Error, yaml.YAMLError, OverflowError, TypeError) as error:
        problems.append(f"{path} cannot be read ({' '.join(str(error).split())[:200]})")
        return None
