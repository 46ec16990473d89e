"""Keys that `hubert fit` accepts, read from the source of the classes that take them: none of them is imported."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import yaml

from hubert_lightning.class_sources import CLASSES, arguments_of, fields_of, trainer_arguments
from hubert_lightning.errors import UserError
from hubert_lightning.parsing import load_value

ROOTS = (
    "checkpoint", "ckpt_path", "config", "data", "iterations", "model", "output", "pictures", "seed_everything",
    "stalls", "trainer", "weights_only",
)  # fmt: skip
"""First keys of a config of `hubert fit`."""


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuse keys that `hubert fit` does not know, in the parts of a config that a plan reads.

    Args:
        config: Config with its parts merged.

    Raises:
        UserError: A key is not known; with the most similar one.
    """
    _check(config, ROOTS, "", "`hubert fit --help`")
    if known := trainer_arguments():
        _check(config["trainer"], known, "trainer.", "`hubert fit --help all`")
    for part in ("model", "data"):
        _check(config[part], ("class_path", "init_args"), f"{part}.", "`hubert fit --help`")
        class_path = str(config[part].get("class_path", ""))
        name = class_path.rpartition(".")[2]
        if class_path in (name, f"hubert_lightning.{name}") and name in CLASSES:
            known, way = arguments_of(name), f"`hubert fit --{part}.help {class_path}`"
            _check(config[part].get("init_args") or {}, known, f"{part}.init_args.", way)
    iterations = config.get("iterations")
    for number, iteration in enumerate(iterations if isinstance(iterations, list) else [], start=1):
        if isinstance(iteration, Mapping):
            _check(iteration, fields_of("Iteration"), f"iterations.{number}.", "`hubert fit --help all`")


def with_settings(config: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Return a config with keys of a command line.

    Args:
        config: Config, which is changed.
        settings: Keys and values such as "data.init_args.max_duration=175".

    Raises:
        UserError: A value is no YAML, or a key goes below a value.
    """
    for setting in settings:
        key, _, text = setting.partition("=")
        try:
            value = load_value(text)
        except yaml.YAMLError as error:
            raise UserError(f"{key} is {text!r:.60}, which is no YAML; quote it") from error
        names = key.split(".")
        if names in (["model"], ["data"]) and isinstance(value, str):
            names = [*names, "class_path"]
        elif names[0] in ("model", "data") and len(names) > 1 and names[1] not in ("class_path", "init_args"):
            names.insert(1, "init_args")  # which may be left out on a command line
        place: Any = config
        for name in names[:-1]:
            if place.get(name) is None:
                place[name] = {}
            place = place[name]
            if not isinstance(place, dict):
                raise UserError(f"{key}: {name} has a value, not keys below it; correct the key")
        place[names[-1]] = value
    return config


def _check(given: object, known: Iterable[str], place: str, way: str) -> None:
    if not isinstance(given, Mapping):
        raise UserError(f"{place.rstrip('.')} is {given!r:.40}; give names and values")
    known = sorted(known)
    for key in given:
        if key not in known:
            similar = get_close_matches(str(key), known, n=1)
            guess = f"did you mean {place}{similar[0]}? " if similar else ""
            raise UserError(f"there is no option {place}{key}; {guess}{way} lists the options")
