"""Facts about the run of a checkpoint for its model card, without private data such as paths."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlsplit

import yaml

from hubert_lightning.files import read_regular
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.untrusted.yaml_file import read_yaml

MAX_ROWS, MAX_VALUE_LENGTH = 100, 200
"""Rows of a table, and characters of a value, that a card shows."""
MAX_NESTING = 5  # lists and mappings inside each other that are published

Json = Any  # a value of a file that others may have written


@dataclass(frozen=True)
class Facts:
    """Facts about the run that a checkpoint came from.

    Args:
        steps: Training steps, if the checkpoint states them.
        data: Names of the manifests of the training data, without their folders.
        audio: Hours, speakers and utterances of the training data, where the run has counted them.
        metrics: Metrics of the validation at the end of the run, by name.
        scores: Error rates of the last `hubert test` in the run, as `hubert score` writes them.
        units: Features, layer and clusters of the run's labels.
        quality: Quality of the run's units by layer, as `hubert quality` writes it.
        test_data: Names of the manifests of the test data, without their folders.
    """

    steps: int | None = None
    data: tuple[str, ...] = ()
    audio: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Json] = field(default_factory=dict)
    units: dict[str, Json] = field(default_factory=dict)
    quality: dict[str, Json] = field(default_factory=dict)
    test_data: tuple[str, ...] = ()

    def provenance(self) -> dict[str, Json]:
        """Return the facts that the file with the weights keeps."""
        return {"steps": self.steps, "data": list(self.data), **self.audio} if self.steps else {}


def run_facts(path: Path) -> Facts:
    """Collect facts from a checkpoint, and from the files of its run beside it.

    They are config.yaml, metrics.json, scores.json, layers.json and quality.json. Unreadable files are ignored.

    Args:
        path: Path of a model; there are no facts about any but a checkpoint.
    """
    if not path.is_file() or path.suffix != ".ckpt":
        return Facts()
    folder = path.parent
    config: Json = None
    # A date or a number in YAML may be none, which raises whatever there is
    with suppress(yaml.YAMLError, OSError, ValueError, TypeError, RecursionError, OverflowError):
        config = read_yaml(folder / "config.yaml")
    data = mapping_at(config, "data", "init_args")
    callbacks = _as_list(mapping_at(config, "trainer").get("callbacks"))
    labels = next((mapping_at(callback, "init_args") for callback in callbacks if _is_relabel(callback)), {})
    quality = _read(folder / "layers.json") or _read(folder / "quality.json") or _read(folder / "quality/quality.json")
    checkpoint = read_checkpoint(path)
    steps, metrics = checkpoint.get("global_step"), _read(folder / "metrics.json")
    if not is_count(steps):
        steps = None
    if metrics.get("steps") != steps:  # metrics of the end of the run, and not of this checkpoint
        metrics = {}
    validated = {name: value for name, value in metrics.items() if name.startswith("val/") and is_number(value)}
    return Facts(
        steps or None,
        _names(data.get("train")),
        _audio(checkpoint),
        dict([*validated.items()][:MAX_ROWS]),
        _read(folder / "scores.json"),
        {name: public(labels[name]) for name in ("features", "layer", "clusters") if labels.get(name) is not None},
        quality,
        _names(data.get("test")),
    )


def _names(manifests: Json) -> tuple[str, ...]:
    """Names of manifests, without their folders."""
    return tuple(public(manifest) for manifest in _as_list(manifests) if isinstance(manifest, str))[:MAX_ROWS]


def public_provenance(provenance: Mapping[str, Json]) -> dict[str, Json]:
    """Return the publishable part of a provenance: of paths on this machine, the file names."""
    return {public(name): public(value) for name, value in [*provenance.items()][:MAX_ROWS]}


def public(value: Json, nesting: int = 0) -> Json:
    """Remove from a value what must not be published.

    Args:
        value: Value of a checkpoint or a config, whatever is in it.
        nesting: Lists and mappings around the value.

    Returns:
        For a path, the file name; for an address, the part before a query; a number; for lists and mappings, the same
        of their first hundred entries; None for everything else.
    """
    if isinstance(value, str):
        return (_public_address(value) if "://" in value else file_name(value))[:MAX_VALUE_LENGTH]
    if value is None or isinstance(value, bool) or (isinstance(value, (int, float)) and abs(value) < 2**63):
        return value
    if nesting < MAX_NESTING and isinstance(value, Mapping):
        pairs = [(name, part) for name, part in [*value.items()][:MAX_ROWS] if _is_key(name)]
        return {public(name, nesting + 1): public(part, nesting + 1) for name, part in pairs}
    if nesting < MAX_NESTING and isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [public(part, nesting + 1) for part in value[:MAX_ROWS]]
    return None


def file_name(path: object) -> str:
    """Return the last part of a path of any system."""
    return re.split(r"[\\/]+", str(path).rstrip("\\/"))[-1]


def _public_address(address: str) -> str:
    """Remove user, password, query and fragment from an address; of one that is not of the web, keep the last part."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return file_name(address)
    if parts.scheme not in ("http", "https") or re.search(r"\s", address):
        return file_name(parts.path)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _is_key(value: Json) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _audio(checkpoint: Mapping[str, Json]) -> dict[str, float]:
    """Read the hours, speakers and utterances of the training data, as the data module saved them."""
    for name in ("PretrainingData", "TranscribedData"):
        counts = mapping_at(checkpoint, name, "audio")
        numbers = {key: counts[key] for key in ("hours", "speakers", "utterances") if is_number(counts.get(key))}
        if numbers:
            return numbers
    return {}


def is_number(value: Json) -> TypeGuard[float]:
    """Tell whether a value is a rate, a count or a loss: a finite number that is not negative."""
    return type(value) in (int, float) and 0 <= value < 2**63 and math.isfinite(value)


def is_count(value: Json) -> TypeGuard[int]:
    """Tell whether a value is a whole number that is not negative."""
    return type(value) is int and is_number(value)


def mapping_at(content: Json, *keys: str) -> dict[str, Json]:
    """Return the mapping under nested keys; an empty one if there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _as_list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else [value] if value else []


def _is_relabel(callback: Json) -> bool:
    return isinstance(callback, dict) and str(callback.get("class_path")).endswith("Relabel")


def _read(file: Path) -> dict[str, Json]:
    """Read a JSON file of a run, which may hold NaN beside other values: `read_json` would refuse it as a whole."""
    if not file.is_file():
        return {}
    try:
        return mapping_at(json.loads(read_regular(file)))
    except (OSError, ValueError, RecursionError):
        return {}
