"""Short forms of the options of `hubert fit`, rewritten as the keys that they stand for.

They are rewritten before heavy packages are imported, so that a mistake in them is answered at once.
"""

import json
import re
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from hubert_lightning.default_optimizers import BASE_ADAM, TEN_HOURS_ADAM
from hubert_lightning.errors import UserError
from hubert_lightning.packaged_configs import packaged
from hubert_lightning.parsing import LIST_OPTIONS, configs_and_rest, given_configs, typed_options
from hubert_lightning.untrusted.yaml_file import parse_yaml, read_yaml

STEPS, RATE, DURATION = "trainer.max_steps", "model.init_args.optimizer.init_args.lr", "data.init_args.max_duration"
ALIASES = {"steps": STEPS, "max_steps": STEPS, "lr": RATE, "batch_seconds": DURATION}
"""Short name → key. With iterations, the number of steps is that of each iteration."""

ITERATION_KEYS = (
    "features", "layer", "clusters", "parts", "max_frames", "kmeans", "quantizer", "weights", "max_steps", "residual",
    "relabel_every",
)  # fmt: skip
"""Keys of an entry of iterations."""

CONFIG_OPTIONS, CLASS_OPTIONS = ("--config", "-c"), ("--model", "--data")
ITERATION = re.compile(r"iterations\.(?P<entry>[^.]*)(\.(?P<key>.*))?")
OPTIMIZER = "model.init_args.optimizer"


def named_configs(args: Sequence[str]) -> list[str]:
    """Replace the names of this package's configs by their paths, and put them first.

    jsonargparse takes the last value of a key, wherever it stands; so an option before a --config would be lost.
    Classes that are given before the configs stay there, since a config may have only options of a class.

    Args:
        args: Command line after the verb.
    """
    configs, rest = configs_and_rest(args)
    before = next((number for number, arg in enumerate(args) if arg.partition("=")[0] in CONFIG_OPTIONS), 0)
    classes: list[str] = []
    number = 0
    while number < min(before, len(rest)):
        size = (1 if "=" in rest[number] else 2) if rest[number].partition("=")[0] in CLASS_OPTIONS else 0
        classes += rest[number : number + size]
        del rest[number : number + size]
        number, before = number + (not size), before - size
    return [*classes, *(f"--config={packaged(config)}" for config in configs), *rest]


def long_options(args: Sequence[str], of_fit: bool = True) -> list[str]:
    """Rewrite the short forms of a command line.

    Args:
        args: Command line after the verb; names of configs are replaced already.
        of_fit: Whether the verb trains, so that the number of steps, the learning rate and the iterations count.

    Returns:
        The same command line in keys of configs. Lists of manifests are in brackets.

    Raises:
        UserError: An entry of iterations, or a key of it, does not exist, or a value is missing.
    """
    short: list[tuple[str, str]] = []
    rest: list[str] = []
    remaining = deque(args)
    while remaining:
        arg = remaining.popleft()
        name, equals, value = arg.removeprefix("--").partition("=") if arg.startswith("--") else ("", "", "")
        key = name.replace("-", "_")
        if _long_name(name) in LIST_OPTIONS:
            values = [value] if equals else _values(remaining)
            rest.append(f"--{_long_name(name)}={_as_list(values)}" if values else arg)
        elif of_fit and (key in ALIASES or ITERATION.fullmatch(name)):
            if not equals and (not remaining or remaining[0].startswith("--")):
                raise UserError(f"--{name}: expects a value; `hubert fit --help` lists the short forms")
            short.append((key if key in ALIASES else name, value if equals else remaining.popleft()))
        elif not of_fit and key == "batch_seconds":
            rest.append(f"--{DURATION}{equals}{value}")
        else:
            rest.append(arg)
    return [*rest, *_keys_of(short, rest)] if short else rest


def settings_of(args: Sequence[str]) -> dict[str, Any]:
    """Merge the configs that a command line names, as `hubert fit` does: a later one overrides an earlier one.

    Args:
        args: Command line after the verb.

    Returns:
        Content of the configs; the options of the command line itself are not in it, except `iterations`.
    """
    settings: dict[str, Any] = {}
    for path in given_configs(args):
        try:
            content = read_yaml(path) if path.is_file() else parse_yaml(str(path))
        except (yaml.YAMLError, OSError):  # the parser of the whole command line answers it
            continue
        settings = _merged(settings, content) if isinstance(content, dict) else settings
    typed = [value for name, value in typed_options(args) if name == "iterations"]
    if typed:
        try:
            settings["iterations"] = parse_yaml(typed[-1])
        except (yaml.YAMLError, ValueError):
            settings["iterations"] = None
    return settings


def _long_name(name: str) -> str:
    """Name of an option with `init_args`, which may be left out."""
    return re.sub(r"^(data|model)\.(?!init_args\.)(?=[a-z_]+$)", r"\1.init_args.", name)


def _values(remaining: deque[str]) -> list[str]:
    """Take the values of a list: those up to the next option, or one in brackets."""
    values = [remaining.popleft()] if remaining and not remaining[0].startswith("--") else []
    while values and not values[0].startswith("[") and remaining and not remaining[0].startswith("-"):
        values.append(remaining.popleft())
    return values


def _as_list(values: Sequence[str]) -> str:
    """Write manifests as a list; commas separate several, unless a file is called so."""
    if len(values) == 1 and (values[0].startswith("[") or values[0] in ("", "null")):
        return values[0]
    paths = [path for value in values for path in ([value] if Path(value).exists() else value.split(",")) if path]
    return json.dumps(paths, ensure_ascii=False)


def _keys_of(short: Sequence[tuple[str, str]], rest: Sequence[str]) -> list[str]:
    """The keys that short forms stand for."""
    settings = settings_of(rest)
    iterations = settings.get("iterations") or []
    entries = [dict(entry) for entry in iterations] if _are_entries(iterations) else []
    changed = False
    keys = []
    for name, value in short:
        if match := ITERATION.fullmatch(name):
            _set_in_iteration(entries, match["entry"], match["key"] or "", _value(value))
            changed = True
        elif ALIASES[name] == STEPS and entries:
            for entry in entries:
                entry["max_steps"] = _value(value)
            changed = True
        elif name == "lr" and not _names_optimizer(settings, rest):
            adam = TEN_HOURS_ADAM if "CTC" in str((settings.get("model") or {}).get("class_path")) else BASE_ADAM
            optimizer = {"class_path": "torch.optim.AdamW", "init_args": adam | {"lr": _value(value)}}
            keys.append(f"--{OPTIMIZER}={json.dumps(optimizer)}")
        else:
            keys.append(f"--{ALIASES[name]}={value}")
    return [*keys, f"--iterations={json.dumps(entries, ensure_ascii=False, default=str)}"] if changed else keys


def _set_in_iteration(entries: list[dict[str, Any]], typed: str, key: str, value: Any) -> None:
    """Set a key of an entry of iterations.

    Args:
        entries: Entries of iterations.
        typed: Number of the entry, counted from 1.
        key: Name of the key; names of parts of K-means follow after dots.
        value: Value of YAML.

    Raises:
        UserError: There is no such entry, or it has no such key.
    """
    if not entries:
        raise UserError(f"--iterations.{typed}.{key}: the config has no iterations; give --iterations, or --steps")
    if not typed.isdecimal() or not 1 <= int(typed) <= len(entries):
        count = "one iteration, 1" if len(entries) == 1 else f"iterations 1 to {len(entries)}"
        raise UserError(f"--iterations.{typed}.{key}: the config has {count}; write --iterations.1.{key or 'KEY'}")
    entry = entries[int(typed) - 1]
    first, *inner = key.split(".")
    if first not in ITERATION_KEYS or (inner and first != "kmeans"):
        raise UserError(f"--iterations.{typed}.{key}: an iteration has no {key or 'such key'}; its keys are "
                        f"{', '.join(ITERATION_KEYS)}")  # fmt: skip
    for name in [first, *inner][:-1]:
        entry[name] = dict(entry.get(name) or {})
        entry = entry[name]
    entry[[first, *inner][-1]] = value


def _names_optimizer(settings: dict[str, Any], args: Sequence[str]) -> bool:
    model = settings.get("model") or {}
    configured = isinstance(model, dict) and isinstance(model.get("init_args"), dict) and model["init_args"]
    typed = any(_long_name(name).startswith(OPTIMIZER) for name, _ in typed_options(args))
    return typed or bool(configured and configured.get("optimizer"))


def _are_entries(iterations: object) -> bool:
    return isinstance(iterations, list) and all(isinstance(entry, dict) for entry in iterations)


def _value(text: str) -> Any:
    """A value of a command line as YAML has it, with numbers such as 1e-3; a text that is no YAML stays a text."""
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        return text


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
