"""Options and configs read with jsonargparse, and its messages as sentences.

Messages of jsonargparse, which have no public form, are read here alone.
"""

import ast
import re
from argparse import Action
from collections import deque
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular
from hubert_lightning.untrusted.yaml_file import MAX_CONFIG_BYTES, check_yaml, check_yaml_file

LIST_OPTIONS = ("data.init_args.train", "data.init_args.validation", "data.init_args.test")
"""Options of `hubert fit` that take a list of manifests, and that jsonargparse would read from a file."""

# Messages of jsonargparse and argparse. tests/test_parsing.py provokes each one and fails if an upgrade rewords it.
KEY = re.compile(r'Parser key "(?P<key>[^"]+)"')
UNRECOGNIZED = re.compile(r"unrecognized arguments: -*(?P<option>[^\s=]+)")
UNKNOWN = re.compile(r"Option '(?P<option>[^']+)' is not accepted|does not accept option '(?P<key>[^']+)'")
REQUIRED = re.compile(r"the following arguments are required: (?P<names>.+)")
GIVEN_CLASS = re.compile(r"class_path '(?P<path>[^']+)'")
GIVEN_VALUE = re.compile(r"Given value: (?P<value>.*)")
REFUSED_VALUE = re.compile(r"(?:Got value|Given value): (?P<value>.*)")
EXPECTED = re.compile(r"Expected (?:an? )?(?P<kind>.+?)(?:\. Got value.*)?$", re.MULTILINE)
LITERAL = re.compile(r"typing\.Literal(?P<choices>\[[^\]]*\])")
CLASS_PROBLEM = "Problem with given class_path"
NOT_A_LIST = re.compile(r"codec can't decode|Expected a (<class ')?list")
"""A single value where a list is expected; a path is taken for a file that lists paths."""
ASIDE = re.compile(
    r"(- )?Does not validate against any|Subtypes:|Errors:$|(- )?Expected a <class 'NoneType'>|Given value|"
    r"- Expected a path but|(- )?Expected a dot import path"
)
"""Lines on the types that jsonargparse tried in turn, and on the value."""

KINDS = {"<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'bool'>": "true or false"}
"""Types of values as jsonargparse names them, and as a sentence does."""

_load_value = get_loader("yaml")


def load_value(text: str) -> Any:
    """Load a value of a command line or a config for jsonargparse.

    Raises:
        yaml.YAMLError: The text is no YAML, or nests or repeats itself too much.
    """
    check_yaml(text)
    return _load_value(text)


set_loader("yaml", load_value, (yaml.YAMLError,))


class VerbParser(ArgumentParser):
    """Parses options and configs, and reads no other file that an argument names.

    Raises `UserError` with one sentence where argparse would print its usage.
    """

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:  # type: ignore[override]
        check_configs(args or [])
        if args is not None:
            configs, rest = configs_and_rest(args)
            args = [*(f"--config={config}" for config in configs), *rest]
        return super().parse_args(args, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries one type after another
            super().error(message, ex)
        verb = self.prog.removeprefix("hubert ")
        key = KEY.search(message)
        if key and (wrong := wrong_value(message)):
            value, fact = wrong
            name = f"--{key['key']}" if key["key"] in option_names(self) else key["key"].upper()
            way = "" if fact.startswith("choose") else f"; `hubert {verb} --help` lists the options"
            raise UserError(f"{name} {value}: {fact}{way}")
        message = re.sub(r"<class '(\w+)'>", r"\1", KEY.sub(r"\g<key>", message))
        if key and NOT_A_LIST.search(message):
            raise UserError(f"{key['key']}: expects a list, in brackets: '[{key['key']}]'")
        if unknown := UNRECOGNIZED.match(message):
            raise unknown_option(verb, unknown["option"], [])
        if missing := REQUIRED.match(message):
            raise missing_arguments(verb, missing["names"].split(", "))
        raise UserError(f"{' '.join(message.split()).rstrip('.')}; `hubert {verb} --help` lists the options")


def unknown_option(verb: str, option: str, known: list[str]) -> UserError:
    """The refusal of an option that the verb does not have.

    Args:
        verb: The verb as it is typed.
        option: Option as it is typed.
        known: Options of the verb, without dashes, of which the most similar one is suggested.
    """
    name = option.lstrip("-")
    similar = get_close_matches(name.replace("-", "_"), known, n=1)
    guess = f"did you mean --{similar[0]}? " if similar else ""
    return UserError(f"there is no option {name}; {guess}`hubert {verb} --help` lists the options")


def missing_arguments(verb: str, names: list[str], took_several: str = "") -> UserError:
    """The refusal of a command line without some positional arguments.

    Args:
        verb: The verb as it is typed.
        names: Arguments that are missing.
        took_several: Option that took several values, which may have been meant as arguments.
    """
    if took_several:
        way = (
            f"--{took_several} took all values up to the next option, so write its list as '[a,b]' if arguments follow"
        )
    else:
        way = f"`hubert {verb} --help` lists the arguments"
    return UserError(f"{', '.join(names).upper()} missing; {way}")


def wrong_value(message: str) -> tuple[str, str] | None:
    """Find the value that jsonargparse refuses, and what it is not, such as "not a whole number".

    Args:
        message: Message of jsonargparse.

    Returns:
        The value and the fact, or a choice of values; None if values of several types are allowed.
    """
    value = REFUSED_VALUE.search(message)
    kinds = {found["kind"] for found in EXPECTED.finditer(message)} - {"<class 'NoneType'>", "<class 'list'>"}
    if value is None or not kinds:
        return None
    words = [
        word
        for kind in sorted(kinds)
        if (found := LITERAL.fullmatch(kind))
        for word in ast.literal_eval(found["choices"])
    ]
    numbers = kinds & KINDS.keys()
    if words and len(numbers) == 1 and len(kinds) == 2:  # such as a number of seconds, or auto
        return value["value"], f"not {KINDS[numbers.pop()]}, nor {' or '.join(words)}"
    if len(kinds) != 1:
        return None
    [kind] = kinds
    if literal := LITERAL.fullmatch(kind):
        *others, last = map(str, ast.literal_eval(literal["choices"]))
        return value["value"], "choose " + " or ".join([*filter(None, [", ".join(others)]), last])
    return (value["value"], f"not {KINDS[kind]}") if kind in KINDS else None


def option_names(parser: ArgumentParser) -> list[str]:
    """Names of a parser's options."""
    return [name.lstrip("-") for action in actions_of(parser) for name in action.option_strings]


def actions_of(parser: ArgumentParser) -> list[Action]:
    """Arguments of a parser, which argparse keeps in a private list."""
    return parser._actions


def check_typed(args: Sequence[str]) -> None:
    """Check the files that a command line names, before jsonargparse reads them.

    Args:
        args: Command line.

    Raises:
        UserError: A config cannot be used, or a value is a pipe or a device; or a file that jsonargparse would read is
            larger than a config.
    """
    for name, value in typed_options(args):
        path = Path(value)
        try:
            is_file = bool(value) and path.exists() and not path.is_dir()
        except (OSError, ValueError):  # no path, such as a value that is too long for one
            continue
        if not is_file:
            continue
        check_regular(path)
        if name in ("config", "c"):
            check_yaml_file(path)
        elif name in LIST_OPTIONS and path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{name}: expects a list of manifests; put the path in brackets: [path]")
        elif name.count(".") < 2 and name not in ("ckpt_path", "output") and path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(
                f"{path}: has more than {MAX_CONFIG_BYTES} bytes, where configs have a few thousand; give another file"
            )


def check_configs(args: Sequence[str]) -> None:
    """Check the configs that a command line names; raises as `check_typed` does."""
    for path in given_configs(args):
        if path.exists():
            check_yaml_file(path)


def given_configs(args: Sequence[str]) -> list[Path]:
    """Configs that a command line names."""
    return [Path(value) for value in configs_and_rest(args)[0]]


def configs_and_rest(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a command line into the configs that it names and everything else, both in order."""
    configs, rest, remaining = [], [], deque(args)
    while remaining:
        arg = remaining.popleft()
        name, equals, value = arg.partition("=")
        if name in ("--config", "-c") and (equals or remaining):
            configs.append(value if equals else remaining.popleft())
        else:
            rest.append(arg)
    return configs, rest


def typed_options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of the options of a command line."""
    for arg, following in pairwise([*args, ""]):
        if arg.startswith("-"):
            name, equals, value = arg.partition("=")
            yield name.lstrip("-").removesuffix("+"), value if equals else following
