"""YAML that others wrote: how large, how deep and how often repeated it may be, before anything is made of it.

Without such limits, a text of 200 000 brackets ends the process in libyaml, and a few lines of aliases fill the memory.
"""

from pathlib import Path
from typing import Any

import yaml

from hubert_lightning.errors import UserError
from hubert_lightning.files import read_regular

LARGEST = 10**7
"""Bytes of a config; those of a run have a few thousand."""
DEEPEST = 100
"""Lists and mappings inside each other; ours have ten."""
MOST = 10**6
"""Values of a config, with those that aliases repeat."""


def read_yaml(path: Path, largest: int = LARGEST) -> Any:
    """Read a YAML file.

    Args:
        path: YAML file.
        largest: Bytes that it may have.

    Returns:
        Its content: mappings, lists, texts, numbers, booleans, dates and None.

    Raises:
        UserError: The file is no regular file, or larger, or as `parse_yaml` raises.
        OSError: It cannot be read.
    """
    try:
        return parse_yaml(read_regular(path, largest).decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({_reason(error)}); correct it, or give another file") from error


def parse_yaml(text: str) -> Any:
    """Parse YAML that may be damaged or hostile.

    Args:
        text: One document of YAML.

    Returns:
        Its content.

    Raises:
        yaml.YAMLError: As `check_yaml` raises.
        UserError: It holds a number or a date that there is not.
    """
    check_yaml(text)
    return yaml.load(text, Loader=LOADER)


def check_yaml(text: str) -> None:
    """Refuse YAML that nests or repeats itself too much, which makes nothing of it yet.

    Raises:
        yaml.YAMLError: It is no YAML, nests deeper than 100, holds itself, or has more than a million values.
    """
    if len(text) <= DEEPEST:
        return
    known: dict[str, tuple[int, int]] = {}  # values of an anchor, and their depth
    parts: list[list[Any]] = [[None, 0, 0]]  # of what is open: its anchor, values, and depth
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            parts.append([event.anchor, 1, 0])
            count, depth = 0, 0
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            anchor, count, depth = parts.pop()
            depth += 1
            if anchor:
                known[anchor] = count, depth
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _, _ in parts]:
                raise yaml.YAMLError(f"the alias *{event.anchor} is inside of its own anchor")
            count, depth = known.get(str(event.anchor), (1, 0))
        elif isinstance(event, yaml.ScalarEvent):
            count, depth = 1, 0
            if event.anchor:
                known[event.anchor] = count, depth
        else:
            continue
        whole = parts[-1]
        whole[1], whole[2] = whole[1] + count, max(whole[2], depth)
        if len(parts) - 1 + depth > DEEPEST:
            raise yaml.YAMLError(f"nested deeper than {DEEPEST}")
        if whole[1] > MOST:
            raise yaml.YAMLError(f"more than {MOST} values")


def check_yaml_file(path: Path) -> None:
    """Check a YAML file that another reader is going to load.

    Raises:
        UserError: The file is not regular, too large, cannot be read, or is refused by `check_yaml`.
    """
    try:
        check_yaml(read_regular(path, LARGEST).decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not YAML ({_reason(error)}); give a config") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({_reason(error)}); correct it, or give another config") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
