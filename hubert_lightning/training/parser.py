"""The parser behind `hubert fit` and its like: what cannot be parsed is answered in one sentence."""

import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import NoReturn

import yaml
from jsonargparse import set_loader
from lightning.pytorch.cli import LightningArgumentParser

from hubert_lightning.untrusted.yaml_file import load_value

# What jsonargparse says of types that it tried in turn, and of what it was given
ASIDE = re.compile(
    r"(- )?Does not validate against any|Subtypes:|Errors:$|(- )?Expected a <class 'NoneType'>|Given value|"
    r"- Expected a path but|(- )?Expected a dot import path"
)
UNKNOWN = re.compile(r"Option '(?P<option>[^']+)' is not accepted|does not accept option '(?P<key>[^']+)'")
UNRECOGNIZED = re.compile(r"unrecognized arguments: -*(?P<argument>[^\s=]+)")

INSIDE = {
    "optimizer": "did you mean model.init_args.optimizer? Its rate follows the schedule of the recipe",
    "lr_scheduler": "the schedule is that of the recipe: model.init_args.warmup and, to fine-tune, decay",
}
"""What LightningCLI offers for models that leave it to the command line, and where ours have it."""


set_loader("yaml", load_value, (yaml.YAMLError,))


class SentenceParser(LightningArgumentParser):
    """Refuses with the key, the fact and the way out, without pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse only tries whether the input parses
            super().error(message, ex)
        print(f"hubert: {self._sentence(message)}", file=sys.stderr)
        self.exit(2)
        raise AssertionError("exit does not return")

    def _sentence(self, message: str) -> str:
        lines = [line.strip() for line in message.splitlines()]
        key = ".".join(name for line in lines for name in re.findall(r'^Parser key "([^"]+)"', line))
        facts = [re.sub(r'^Parser key "[^"]+":\s*|^- ', "", line) for line in lines if line and not ASIDE.match(line)]
        given = re.search(r"class_path '([^']+)'", message)
        facts = [fact for fact in facts if fact and not fact.startswith("Problem with given class_path")]
        if unknown := UNKNOWN.search(message) or UNRECOGNIZED.search(message):
            return f"{key or 'command line'}: {self._unknown(unknown.group(unknown.lastgroup or 0), given, key)}"
        if "codec can't decode" in message:  # it took the path for a file that lists paths
            return f"{key}: a list of manifests is wanted, and one path was given; put it in brackets: [path]"
        value = re.search(r"Given value: (.*)", message)
        if value and not facts:
            return f"{key}: {value[1]} is no class; give a class_path such as hubert_lightning.HubertPretraining"
        if value and not given and "Got value" not in message:
            facts.append(f"Got value: {value[1]}")
        way = "correct the path" if "does not exist" in message else f"{self._help(given, key)} lists what fits"
        return f"{f'{key}: ' if key else ''}{' '.join(facts)}; {way}"

    def _unknown(self, option: str, given: re.Match[str] | None, key: str) -> str:
        if (root := option.split(".")[0]) in INSIDE and not key:
            return f"there is no option {root}; {INSIDE[root]}"
        known = [name.lstrip("-") for name in self._option_string_actions]
        start, last = option.rpartition(".")[::2]
        if given and key:  # what the class takes, and what it takes it in, such as encoder.dim
            meant = next(iter(get_close_matches(last, sorted(_options(given[1])), n=1)), None)
            if meant and start:
                meant = f"{start}.{meant}"
        elif key:
            meant = next(iter(get_close_matches(last, sorted({name.rsplit(".", 1)[-1] for name in known}), n=1)), None)
        else:
            below = [name for name in known if not start or name.startswith(f"{start}.")]
            ends = {name.rsplit(".", 1)[-1]: name for name in reversed(below)}
            similar = get_close_matches(option, below or known, n=1)
            meant = similar[0] if similar else next((ends[end] for end in get_close_matches(last, ends, n=1)), None)
        guess = f"did you mean {meant}? " if meant else ""
        return f"there is no option {option}; {guess}{self._help(given, key)} lists what there is"

    def _help(self, given: re.Match[str] | None, key: str) -> str:
        verb = " ".join(dict.fromkeys(["hubert", self.prog.split()[-1]]))
        of_class = given is not None and key in ("model", "data")
        return f"`{verb} --{key}.help {given[1]}`" if given and of_class else f"`{verb} --help`"


def _options(class_path: str) -> Iterator[str]:
    """Names of a class's arguments, and of the fields of those that are dataclasses."""
    module, _, name = class_path.rpartition(".")
    parameters = signature(getattr(import_module(module), name)).parameters.values()
    for parameter in parameters:
        yield parameter.name
        if is_dataclass(parameter.annotation):
            yield from (field.name for field in fields(parameter.annotation))
