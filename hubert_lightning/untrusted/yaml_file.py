"""Reader of untrusted YAML; limits on its size, nesting and aliases are checked before it is loaded.

Without them, a text of 200 000 brackets crashes the process in libyaml, and a few lines of aliases fill the memory.
"""

from pathlib import Path
from typing import Any

import yaml

from hubert_lightning.errors import UserError
from hubert_lightning.files import read_regular

MAX_CONFIG_BYTES = 10**7
"""Bytes of a YAML file; the config of a run has a few thousand."""
MAX_NESTING = 100
"""Lists and mappings inside each other; configs of this package have ten."""
MAX_VALUES = 10**6
"""Values of a config, those that aliases repeat counted each time."""


def read_yaml(path: Path, largest: int = MAX_CONFIG_BYTES) -> Any:
    """Read a YAML file.

    Args:
        path: YAML file.
        largest: Bytes that the file may have.

    Returns:
        Mappings, lists, texts, numbers, booleans, dates and None.

    Raises:
        UserError: The file is not regular, too large, or no YAML within the limits.
        OSError: The file cannot be read.
    """
    try:
        return parse_yaml(_text(path, largest))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({_reason(error)}); correct it, or give another file") from error


def parse_yaml(text: str) -> Any:
    """Parse YAML that may be corrupt or hostile.

    Args:
        text: One document of YAML.

    Raises:
        yaml.YAMLError: The text is refused by `check_yaml`.
        ValueError: The text holds an impossible number or date.
    """
    check_yaml(text)
    return yaml.load(text, Loader=LOADER)


def check_yaml(text: str) -> None:
    """Check the nesting and the aliases of YAML without loading it.

    Raises:
        yaml.YAMLError: The text is no YAML, nests deeper than 100, holds itself, or has more than a million values.
    """
    if len(text) <= MAX_NESTING:
        return
    known: dict[str, tuple[int, int]] = {}  # anchor → values under it, and their nesting
    parts: list[list[Any]] = [[None, 0, 0]]  # for each open list or mapping: its anchor, values, and nesting
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
        if len(parts) - 1 + depth > MAX_NESTING:
            raise yaml.YAMLError(f"nested deeper than {MAX_NESTING}")
        if whole[1] > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES} values")


def check_yaml_file(path: Path) -> None:
    """Check a config that another reader is going to load.

    Raises:
        UserError: The file is not regular, too large, cannot be read, is refused by `check_yaml`, or holds anything but
            keys with values.
    """
    try:
        text = _text(path, MAX_CONFIG_BYTES)
        check_yaml(text)
        nodes = [event for event in yaml.parse(text, Loader=LOADER) if isinstance(event, yaml.NodeEvent)]
        if not nodes or not isinstance(nodes[0], yaml.MappingStartEvent):
            raise UserError(f"{path}: not a config, which is YAML with lines such as 'key: value'; correct the path")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not YAML ({_reason(error)}); give a config") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({_reason(error)}); correct it, or give another config") from error


def _text(path: Path, largest: int) -> str:
    if path.is_file() and path.stat().st_size > largest:
        raise UserError(f"{path}: has more than {largest} bytes, where a config has a few thousand; correct the path")
    return read_regular(path, largest).decode()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
