"""The parser of `hubert fit`, `validate`, `test` and `predict`: mistakes are answered in one sentence."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from hubert_lightning.errors import UserError, check_installed
from hubert_lightning.parsing import (
    ASIDE,
    CLASS_PROBLEM,
    GIVEN_CLASS,
    GIVEN_VALUE,
    KEY,
    NOT_A_LIST,
    UNKNOWN,
    UNRECOGNIZED,
    option_names,
    wrong_value,
)

KEYS_OF_RECIPE = {
    "optimizer": "did you mean model.init_args.optimizer? Its rate follows the schedule of the recipe",
    "lr_scheduler": "the recipe sets the schedule: model.init_args.warmup and, for fine-tuning, decay",
}
"""Options of LightningCLI for models without an optimizer, and the keys that our models have instead."""

WITHOUT_VALUE = re.compile(r"argument (-\w/)?--(?P<option>\S+): expected one argument")
"""argparse's message on an option at the end of the command line, or before another option."""


PACKAGE_OF_CLASS = {"lightning.pytorch.loggers.WandbLogger": "wandb"}
"""Packages without which a class can be imported but has other arguments, and cannot be built."""


def check_class_installed(class_path: str) -> None:
    """Check that the package that a class needs is installed.

    Raises:
        UserError: It is not.
    """
    if package := PACKAGE_OF_CLASS.get(class_path):
        check_installed(package, "or edit trainer.logger in a copy of the config (hubert configs copy)")


class SentenceParser(LightningArgumentParser):
    """Raises `UserError` with the key, the fact and the way out, instead of printing pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries one type after another
            super().error(message, ex)
        raise UserError(self._sentence(message)) from ex

    def _sentence(self, message: str) -> str:
        lines = [line.strip() for line in message.splitlines()]
        key = ".".join(name for line in lines for name in re.findall(f"^{KEY.pattern}", line))
        facts = [re.sub(rf"^{KEY.pattern}:\s*|^- ", "", line) for line in lines if line and not ASIDE.match(line)]
        facts = [fact for fact in facts if fact and not fact.startswith(CLASS_PROBLEM)]
        if without_value := WITHOUT_VALUE.search(message):
            return f"{without_value['option']}: expects a value; {self._help(None, '')} lists the options"
        match = GIVEN_CLASS.search(message)
        given = match["path"] if match else None
        check_class_installed(given or "")
        if unknown := UNKNOWN.search(message) or UNRECOGNIZED.search(message):
            return f"{key or 'command line'}: {self._unknown(unknown.group(unknown.lastgroup or 0), given, key)}"
        if "codec can't decode" in message and NOT_A_LIST.search(message):
            return f"{key}: expects a list of manifests, not one path; put it in brackets: [path]"
        if key and (wrong := wrong_value(message)):
            return f"{key} {wrong[0]}: {wrong[1]}; {self._help(given, key)} lists the options"
        value = GIVEN_VALUE.search(message)
        if value and not facts:
            return f"{key}: {value['value']} is not a class; give one, such as hubert_lightning.HubertPretraining"
        if value and not given and "Got value" not in message:
            facts.append(f"Got value: {value['value']}")
        way = "correct the path" if "does not exist" in message else f"{self._help(given, key)} lists the options"
        return f"{f'{key}: ' if key else ''}{' '.join(facts)}; {way}"

    def _unknown(self, option: str, class_path: str | None, key: str) -> str:
        """The sentence for an option that does not exist.

        Args:
            option: Dotted name of the option.
            class_path: Class that was given for the key.
            key: Key below which the option was given; empty for the command line.
        """
        if (root := option.split(".")[0]) in KEYS_OF_RECIPE and not key:
            return f"there is no option {root}; {KEYS_OF_RECIPE[root]}"
        if option.endswith((".yaml", ".yml")) and not key:
            return f"{option} is given without --config; write --config {option}"
        known = option_names(self)
        if option in known and not key:
            return f"{option} is given without --; write --{option}"
        start, last = option.rpartition(".")[::2]
        if class_path and key:  # options of the class, and the argument that holds them, such as encoder.dim
            best = next(iter(get_close_matches(last, sorted(_options(class_path)), n=1)), None)
            if best and start:
                best = f"{start}.{best}"
        elif key:
            best = next(iter(get_close_matches(last, sorted({name.rsplit(".", 1)[-1] for name in known}), n=1)), None)
        else:
            below = [name for name in known if not start or name.startswith(f"{start}.")]
            ends = {name.rsplit(".", 1)[-1]: name for name in reversed(below)}
            similar = get_close_matches(option, below or known, n=1)
            best = similar[0] if similar else next((ends[end] for end in get_close_matches(last, ends, n=1)), None)
        guess = f"did you mean {best}? " if best else ""
        return f"there is no option {option}; {guess}{self._help(class_path, key)} lists the options"

    def _help(self, class_path: str | None, key: str) -> str:
        verb = " ".join(dict.fromkeys(["hubert", self.prog.split()[-1]]))
        return f"`{verb} --{key}.help {class_path}`" if class_path and key in ("model", "data") else f"`{verb} --help`"


def _options(class_path: str) -> Iterator[str]:
    """Names of a class's arguments, and of the fields of those that are dataclasses."""
    module, _, name = class_path.rpartition(".")
    parameters = signature(getattr(import_module(module), name)).parameters.values()
    for parameter in parameters:
        yield parameter.name
        if is_dataclass(parameter.annotation):
            yield from (field.name for field in fields(parameter.annotation))
