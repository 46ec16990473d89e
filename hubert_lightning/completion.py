"""The verb `completion`: a script that completes command lines of `hubert` in a shell.

The script is static: it knows verbs, options, choices and configs from the sources, and a completion starts no Python.
"""

import re
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from hubert_lightning.class_sources import CLASSES, arguments_of, trainer_arguments
from hubert_lightning.packaged_configs import config_names
from hubert_lightning.short_options import ALIASES
from hubert_lightning.verb_stub import stub_of
from hubert_lightning.verb_table import VERBS
from hubert_lightning.verbs import PASSED_ON, signature_of

Shell = Literal["bash", "zsh", "fish"]
TRAINING_VERBS = ("fit", "pretrain", "finetune", "validate", "test", "predict", "plan")
"""Verbs that take the keys of `hubert fit`."""
RECIPE_OPTIONS = {
    "pretrain": (
        "init", "size", "heldout", "validation", "max_duration", "language", "language_folders", "corpus_name",
        "report",
    ),
    "finetune": (
        "init", "heldout", "validation", "path_column", "text_column", "speaker_column", "audio", "language",
        "language_column", "language_folders", "corpus_name", "spell_numbers", "report",
    ),
}  # fmt: skip
"""Options of verbs that divide their command lines themselves."""
CHOICES = {
    "size": ("small", "base", "large", "xlarge"),
    "report": ("true", "false"),
    "language_folders": ("true", "false"),
}
FILES = ("output", "init", "validation", "audio", "ckpt_path", "data.init_args.train", "data.init_args.validation")
"""Options of these verbs whose values are files or folders."""


def completion(shell: Shell) -> None:
    """Print a script that completes verbs, options, choices, files and config names in a shell.

    bash: `hubert completion bash > ~/.local/share/bash-completion/completions/hubert`. zsh: write it to a file
    `_hubert` in a folder of $fpath. fish: write it to `~/.config/fish/completions/hubert.fish`. Make it again after an
    upgrade.

    Args:
        shell: bash, zsh or fish.
    """
    print(script_of(shell))


def script_of(shell: Shell) -> str:
    """Make the script of a shell."""
    import shtab

    names = " ".join(name for name, _ in config_names())
    preambles = {
        "bash": f'_hubert_configs() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f'_hubert_configs() {{ _alternative "configs:config:({names})" "files:file:_files" }}',
        "fish": "",
    }
    configs = {
        "bash": "_hubert_configs",
        "zsh": "_hubert_configs",
        "fish": f"(string split ' ' '{names}'; __fish_complete_path (commandline -ct))",
    }
    script: str = shtab.complete(_parser(shtab.FILE, configs), shell, preamble=preambles[shell])
    return script


def _parser(files: Any, configs: Any) -> ArgumentParser:
    """A parser with the verbs and options of `hubert`, for shtab; it parses nothing."""
    parser = ArgumentParser("hubert")
    parser.add_argument("--version", "-V", action="store_true", help="Print the version.")
    verbs = parser.add_subparsers()
    for group in VERBS.values():
        for verb, target in group.items():
            if isinstance(target, str):
                _add_verb(verbs, verb, verb, target, files, configs)
                continue
            inner = verbs.add_parser(verb, help=", ".join(filter(None, target))).add_subparsers()
            for name, function in target.items():
                if name:
                    _add_verb(inner, name, f"{verb} {name}", function, files, configs)
    return parser


def _add_verb(
    verbs: "_SubParsersAction[ArgumentParser]", name: str, verb: str, target: str, files: Any, configs: Any
) -> None:
    signature = signature_of(target)
    parser = verbs.add_parser(name, help=_help(signature.summary))
    parser.add_argument("--config", help="YAML file of options.").complete = configs  # type: ignore[attr-defined]
    annotations = dict(signature.optional)
    annotations.pop(PASSED_ON, None)
    choices = _choices_of(target)
    for option, annotation in annotations.items():
        _add_option(parser, option, annotation, choices.get(option, ()), files)
    if verb in TRAINING_VERBS:
        for option in [*RECIPE_OPTIONS.get(verb, ()), *_keys()]:
            if f"--{option}" not in parser._option_string_actions:
                kind = "Path" if option in FILES else ""
                _add_option(parser, option, kind, CHOICES.get(option, ()), files)
    takes_configs = list(signature.required) == ["configs"] or verb == "configs copy"
    values = choices.get(next(iter(signature.required), ""))
    argument = parser.add_argument("argument", nargs="*", choices=values)
    if not values:
        argument.complete = configs if takes_configs else files  # type: ignore[attr-defined]


def _add_option(parser: ArgumentParser, name: str, annotation: str, choices: Sequence[str], files: Any) -> None:
    if annotation == "bool":
        choices = ("true", "false")
    action = parser.add_argument(f"--{name}", nargs="?", choices=choices or None)
    if re.search(r"\bPath\b", annotation):
        action.complete = files  # type: ignore[attr-defined]


def _choices_of(target: str) -> dict[str, tuple[str, ...]]:
    """Values of the arguments that are literals, by name."""
    stub = stub_of(target)
    annotations = {} if stub is None else stub.__annotations__
    choices = {name: tuple(_literals(annotation)) for name, annotation in annotations.items()}
    return {name: values for name, values in choices.items() if values}


def _literals(annotation: Any) -> Iterable[str]:
    for value in get_args(annotation):
        if isinstance(value, str):
            yield value
        else:
            yield from _literals(value)


def _keys() -> list[str]:
    """Keys of `hubert fit`, as options without dashes."""
    keys = ["output", "seed_everything", "ckpt_path", "iterations", "model", "data", *ALIASES]
    keys += [f"trainer.{name}" for name in trainer_arguments()]
    for name in CLASSES:
        part = "data" if name.endswith("Data") else "model"
        keys += [f"{part}.init_args.{argument}" for argument in arguments_of(name)]
    return list(dict.fromkeys(keys))


def _help(summary: str) -> str:
    """A sentence without characters that argparse would format."""
    return summary.replace("%", "%%").rstrip(".")
