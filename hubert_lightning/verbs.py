"""The verbs of a command line: found in a table, and called as their functions' signatures state.

Names of options are checked against the source of the function, so that a mistake is answered before the heavy packages
that the function needs are imported.
"""

import ast
import importlib
import json
import logging
import re
import shutil
import textwrap
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.parsing import VerbParser, actions_of, missing_arguments, unknown_option
from hubert_lightning.short_options import ALIASES
from hubert_lightning.verb_stub import stub_of, unchecked_options

log = logging.getLogger(__name__)

Verbs = dict[str, dict[str, str | dict[str, str]]]
"""Group → verb → "room.module:function", or the verbs of a verb; an empty name is the verb without another."""

RENAMED_OPTIONS: dict[str, dict[str, str]] = {
    "vocabulary": {"kept": "keep_punctuation"},
}
"""Verb → former option → option. The former names work in this version, with a warning, and go in the next."""

PASSED_ON = "settings"
"""Option of a verb that gets the keys of a config that are typed as options, such as --trainer.devices 2, as a list of
"key=value"; --config adds a config to its arguments."""
KEYS_OF_CONFIGS = (
    "checkpoint", "ckpt_path", "data", "iterations", "model", "output", "seed_everything", "trainer", *ALIASES
)  # fmt: skip

BOOLEANS = ("true", "false", "yes", "no")
"""Values that may follow an option that is true or false."""

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Signature:
    """A verb's function as its source states it.

    Args:
        summary: First line of the docstring.
        required: Annotations of the positional arguments by their names.
        optional: Annotations of the options by their names.
    """

    summary: str
    required: dict[str, str]
    optional: dict[str, str]

    @property
    def parses_itself(self) -> bool:
        """Whether the function takes the command line as it was typed."""
        return list(self.required) == ["args"]


def signature_of(target: str) -> Signature:
    """Read a function's signature without importing its module.

    Args:
        target: "room.module:function".
    """
    module, _, name = target.partition(":")
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())
    [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    arguments = function.args
    annotations = {
        argument.arg: ast.unparse(argument.annotation) if argument.annotation else ""
        for argument in [*arguments.args, *arguments.kwonlyargs]
    }
    num_required = len(arguments.args) - len(arguments.defaults)
    names = list(annotations)
    return Signature(
        summary=(ast.get_docstring(function) or "").split("\n")[0],
        required={name: annotations[name] for name in names[:num_required]},
        optional={name: annotations[name] for name in names[num_required:]},
    )


def call_verb(verb: str, target: str, args: list[str]) -> Any:
    """Call the function of a verb with a command line.

    Args:
        verb: The verb as it is typed, such as "prepare csv".
        target: "room.module:function". A function whose only argument is `args` gets the command line as it is.
        args: Command line after the verb. An argument or an option that is a list takes several values, or one in
            brackets: `a.jsonl.gz b.jsonl.gz` or `[a.jsonl.gz,b.jsonl.gz]`. The values of an option end at the next
            option; those of a list of numbers, at the first value that is no number.

    Returns:
        The value that the function returns.

    Raises:
        UserError: An option or a value cannot be used.
        SystemExit: Help was asked for.
    """
    signature = signature_of(target)
    module, _, name = target.partition(":")
    if not signature.parses_itself:
        options, positional, took_several = _split(verb, signature, args)
        from_config = len(positional) < len(signature.required) and any(map(_names_config, options))
        if "--help" not in options and not from_config:
            positional = _packed(verb, signature, positional, took_several)
        args = [*options, *positional]
    if not signature.parses_itself and (stub := stub_of(target)) is not None:
        unchecked = tuple(f"--{name}" for name in unchecked_options(stub))
        if not unchecked or not any(arg.startswith((*unchecked, "--print_config")) for arg in args):
            _parsed(verb, signature, stub, args)  # help and mistakes are answered before the heavy imports
    function = getattr(importlib.import_module(f"hubert_lightning.{module}"), name)
    if signature.parses_itself:
        return function(args)
    values = _parsed(verb, signature, function, args)
    values.pop("config")
    return function(**values)


def _parsed(verb: str, signature: Signature, function: Callable[..., Any], args: list[str]) -> dict[str, Any]:
    """Values of the arguments of a verb's function."""
    parser = VerbParser(prog=f"hubert {verb}", usage=_usage(verb, signature), description=signature.summary)
    parser.add_argument("--config", action="config", help="YAML file of options.")
    parser.add_function_arguments(function, as_group=False, as_positional=True, sub_configs=False)
    for action in actions_of(parser):
        if action.dest in signature.required:
            action.metavar = _shown(action.dest, signature.required[action.dest])
    values: dict[str, Any] = parser.instantiate_classes(parser.parse_args(args)).as_dict()
    return values


def usage(verbs_of: Verbs, verb: str = "") -> str:
    """List the verbs, each with the first line of its function's docstring.

    Args:
        verbs_of: Table of the verbs.
        verb: Verb whose verbs are listed; all if not given.
    """
    lines = [f"usage: hubert {verb or 'VERB'} {'VERB ' if verb else ''}...", ""]
    if not verb:
        lines += ["HuBERT: pre-train speech encoders on untranscribed audio, re-cluster, fine-tune with CTC.", ""]
    width = min(shutil.get_terminal_size().columns, 120)
    for group, verbs in verbs_of.items():
        rows: list[tuple[str, str]] = []
        for name, target in verbs.items():
            if isinstance(target, dict):
                rows += [(f"{name} {inner}".rstrip(), function) for inner, function in target.items()]
            else:
                rows.append((name, target))
        rows = [row for row in rows if not verb or f"{row[0]} ".startswith(f"{verb} ")]
        lines += [group] * bool(rows and not verb)
        for name, function in rows:
            summary = signature_of(function).summary.rstrip(".")
            lines += textwrap.wrap(f"  {name:21} {summary}", width, subsequent_indent=" " * 24)
        lines += [""] * bool(rows)
    return "\n".join(
        [*lines, f"Each verb has its own help: hubert {verb or 'prepare'} {'VERB' if verb else 'csv'} --help"]
    )


def find_verb(verbs_of: Verbs, args: list[str]) -> tuple[str, str | dict[str, str], list[str]]:
    """Find the verb of a command line.

    Args:
        verbs_of: Table of the verbs.
        args: Command line, at least one argument.

    Returns:
        The verb as it is typed, its function (or its verbs, if help on them was asked for), and the other arguments.

    Raises:
        UserError: There is no such verb.
    """
    known = {name: target for verbs in verbs_of.values() for name, target in verbs.items()}
    target = known.get(args[0])
    if target is None:
        raise _unknown_verb(args[0], "hubert", known)
    if isinstance(target, dict) and "" in target and not args[1:]:
        return args[0], target[""], []
    if isinstance(target, str) or not args[1:] or args[1] in ("-h", "--help"):
        return args[0], target, args[1:]
    if args[1] not in target or not args[1]:
        raise _unknown_verb(args[1], f"hubert {args[0]}", {name: target[name] for name in target if name})
    return f"{args[0]} {args[1]}", target[args[1]], args[2:]


def _unknown_verb(typed: str, command: str, known: dict[str, str] | dict[str, str | dict[str, str]]) -> UserError:
    similar = get_close_matches(typed, known, n=1)
    guess = f"did you mean {similar[0]}? " if similar else ""
    return UserError(f"{typed!r} is not a verb of {command}; {guess}the verbs are {', '.join(known)}")


def _usage(verb: str, signature: Signature) -> str:
    names = [_shown(name, kind) for name, kind in signature.required.items()]
    return " ".join(["hubert", verb, *names, "[options]"])


def _shown(name: str, annotation: str) -> str:
    return f"{name.upper()}{' ...' * _is_list(annotation)}"


def _is_list(annotation: str) -> bool:
    return annotation.startswith(("list[", "Sequence["))


def _is_option(arg: str) -> bool:
    return arg.startswith("--") or re.match(r"-[A-Za-z]", arg) is not None


def _taken(kind: str, first: str, remaining: deque[str]) -> list[str]:
    """The values of an option: the first one, and if it is a list that is not in brackets, those that follow."""
    values = [first]
    if re.search(r"\b(list|Sequence)\[", kind) and not first.startswith("["):
        while remaining and not _is_option(remaining[0]) and ("[int]" not in kind or remaining[0].isdigit()):
            values.append(remaining.popleft())
    return values


def _names_config(option: str) -> bool:
    return option.startswith("--config=")


def _as_list(kind: str, values: list[str]) -> str:
    """The values of an option as one argument, those of a list in brackets."""
    if len(values) == 1 and (not _is_list(kind) or values[0].startswith("[") or values[0] == "null"):
        return values[0]
    return f"[{', '.join(values)}]" if "[int]" in kind else json.dumps(values, ensure_ascii=False)


def _split(verb: str, signature: Signature, args: list[str]) -> tuple[list[str], list[str], str]:
    """The options, each as `--name=value`, the positional arguments, and the last option that took several values."""
    options: list[str] = []
    positional: list[str] = []
    took_several = ""
    remaining = deque(args)
    if PASSED_ON in signature.optional:
        remaining, passed, positional = _without_keys(verb, remaining)
        options += [f"--{PASSED_ON}={json.dumps(passed, ensure_ascii=False)}"] * bool(passed)
    while remaining:
        arg = remaining.popleft()
        if arg == "--":
            return options, [*positional, *remaining], took_several
        if not _is_option(arg):
            positional.append(arg)
            continue
        typed, equals, value = ("--help" if arg == "-h" else arg).lstrip("-").partition("=")
        name, inner = _current_name(verb, signature, typed)
        kind = "" if inner or name.endswith("+") else signature.optional.get(name, "")
        if equals:
            value = f"={_as_list(kind, [value])}"
        elif name in ("help", "print_config") or inner == ".help":
            value = ""
        elif signature.optional.get(name.removesuffix("+")) == "bool":
            value = f"={remaining.popleft()}" if remaining and remaining[0].lower() in BOOLEANS else "=true"
        elif remaining:
            values = _taken(kind, remaining.popleft(), remaining)
            took_several = name if len(values) > 1 else took_several
            value = f"={_as_list(kind, values)}"
        else:
            raise UserError(f"{name}: expects a value; `hubert {verb} --help` lists the options")
        options.append(f"--{name}{inner}{value}")
    return options, positional, took_several


def _without_keys(verb: str, args: deque[str]) -> tuple[deque[str], list[str], list[str]]:
    """The other arguments, the keys of configs as "key=value", and the configs that --config names."""
    others: deque[str] = deque()
    keys, configs = [], []
    while args:
        arg = args.popleft()
        key, equals, value = arg.removeprefix("--").partition("=")
        root = key.partition(".")[0]
        if not arg.startswith("--") or (root not in KEYS_OF_CONFIGS and key != "config"):
            others.append(arg)
            continue
        if not equals:
            if not args:
                raise UserError(f"{key}: expects a value; `hubert {verb} --help` lists the options")
            value = args.popleft()
        if key == "config":
            configs.append(value)
        else:
            keys.append(f"{key}={value}")
    return others, keys, configs


def _current_name(verb: str, signature: Signature, typed: str) -> tuple[str, str]:
    """The name of an option as the function has it, with the + that extends a list, and the name of a part of it."""
    first, dot, inner = typed.partition(".")
    first = first.replace("-", "_")
    name = first.removesuffix("+")
    if current := RENAMED_OPTIONS.get(verb, {}).get(name):
        log.warning("hubert: --%s: renamed to --%s; the next version will refuse the former name", name, current)
        return first.replace(name, current), dot + inner
    if name in signature.required:
        raise UserError(f"{name.upper()} is given without its name: `{_usage(verb, signature)}`")
    known = [*signature.optional, "help", "config", "print_config"]
    if name not in known:
        raise unknown_option(verb, typed, known)
    return first, dot + inner


def _packed(verb: str, signature: Signature, given: list[str], took_several: str) -> list[str]:
    """One argument for each positional argument of the function, the plain arguments of a list in brackets.

    A list of numbers takes the arguments that are numbers; of several other lists, the first takes as many as it can.
    """
    kinds = signature.required
    if len(given) < len(kinds):
        raise missing_arguments(verb, list(kinds)[len(given) :], took_several)
    letters = "".join("B" if arg[:1] + arg[-1:] == "[]" else "N" if arg.isdigit() else "A" for arg in given)
    other = "[A]" if any("[int]" in kind for kind in kinds.values()) else "[AN]"
    patterns = [
        f"({other}|B)" if not _is_list(kind) else "(B|N+)" if "[int]" in kind else f"(B|{other}+)"
        for kind in kinds.values()
    ]
    match = re.fullmatch("".join(patterns), letters)
    if match is None:
        raise UserError(
            f"{given[len(kinds)] if len(given) > len(kinds) else given[-1]}: no such argument; "
            f"`{_usage(verb, signature)}` takes {', '.join(kinds).upper()}"
        )
    packed = []
    for number, kind in enumerate(kinds.values(), start=1):
        values = given[match.start(number) : match.end(number)]
        if not _is_list(kind) or match[number] == "B":
            packed += values
        elif "[int]" in kind:
            packed.append(f"[{', '.join(values)}]")
        else:
            packed.append(json.dumps(values, ensure_ascii=False))
    return packed
