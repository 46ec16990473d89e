"""The long form of a short command: a `hubert prepare` and a `hubert fit`, and what they need to know of a config."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubert_lightning.data.prepare_split import split_names
from hubert_lightning.errors import UserError
from hubert_lightning.short_options import long_options, named_configs, settings_of

MANIFESTS = (".jsonl", ".jsonl.gz", ".shar")
"""Ends of the names of manifests."""

Options = Mapping[str, object] | Sequence[str]
"""Other options of `hubert fit`: values by their keys, or a command line."""


@dataclass(frozen=True)
class Preparation:
    """A verb that makes files which a fit reads, and the files.

    Args:
        command: Command line after `hubert`.
        options: The same options by the names of the verb's function.
        sources: Folder, table or manifests that it reads.
        train: Manifests that it makes to train on.
        heldout: Manifests of what is held out; one is not made if there is but one recording.
    """

    command: list[str]
    options: dict[str, Any]
    sources: list[Path]
    train: list[Path]
    heldout: list[Path]


@dataclass(frozen=True)
class Recipe:
    """What a short command stands for.

    Args:
        output: Folder of the run.
        fit: Command line after `hubert fit`.
        preparation: How its manifests are made; None if they are given.
        vocabulary: Whether a vocabulary is made of their transcripts.
        train: Manifests to train on.
        validation: Manifests to validate on.
    """

    output: Path
    fit: list[str]
    preparation: Preparation | None = None
    vocabulary: bool = False
    train: list[Path] = field(default_factory=list)
    validation: list[Path] = field(default_factory=list)

    @property
    def vocabulary_file(self) -> Path:
        return self.output / "manifests" / "vocabulary.json"

    def long_form(self) -> list[str]:
        """The commands, as they are typed."""
        commands = [["hubert", *self.preparation.command]] if self.preparation else []
        if self.vocabulary:
            manifests = dict.fromkeys(map(str, [*self.train, *self.validation]))
            commands.append(["hubert", "vocabulary", *manifests, str(self.vocabulary_file)])
        return [shlex.join(command) for command in [*commands, ["hubert", "fit", *self.fit]]]

    @property
    def fit_options(self) -> list[str]:
        """The command line of the fit without short forms."""
        return long_options(named_configs(self.fit))

    @property
    def existing_validation(self) -> list[Path]:
        """Manifests to validate on, once they are made: where nothing could be held out, there is none."""
        planned = self.preparation.heldout if self.preparation else []
        return [path for path in self.validation if path not in planned or path.is_file()]


def words_of(options: Options | None) -> list[str]:
    """Write other options of `hubert fit` as a command line."""
    if not isinstance(options, Mapping):
        return list(options or ())
    return [f"--{name}={value if isinstance(value, (str, Path)) else json.dumps(value)}"
            for name, value in options.items()]  # fmt: skip


def names_option(words: Sequence[str], key: str) -> bool:
    """Whether a command line has an option of `hubert fit`, in its short form or in the long one."""
    names = {word.partition("=")[0].lstrip("-").replace(".init_args.", ".") for word in words if word.startswith("-")}
    return key.replace(".init_args.", ".") in names


def refuse_for_manifests(manifest: Path, options: Mapping[str, Any]) -> None:
    """Refuse options that name the languages of recordings, if manifests are given, which have theirs.

    Raises:
        UserError: There is such an option.
    """
    if options:
        raise UserError(
            f"{manifest}: a manifest, which has its languages and corpora; leave out --{', --'.join(options)}, or give "
            "them to `hubert prepare`"
        )


def given(**options: object) -> list[str]:
    """Write options that are not None as a command line."""
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def is_manifest(path: Path) -> bool:
    """Whether a path is named as manifests are."""
    return path.name.endswith(MANIFESTS)


def divided(manifests: Sequence[Path], output: Path, heldout: float) -> Preparation | None:
    """How a share of given manifests is held out; None if nothing is, as of corpora that are streamed.

    Args:
        manifests: Manifests to train on.
        output: Folder of the run.
        heldout: Share of the audio, from 0 to below 1.
    """
    if not heldout or any(path.name.endswith(".shar") for path in manifests):
        return None
    made = output / "manifests"
    command = ["prepare", "split", *map(str, manifests), str(made), *given(heldout=heldout)]
    names = split_names(manifests)
    train, dev = ([made / f"{name}{end}.jsonl.gz" for name in names] for end in ("", "-dev"))
    return Preparation(command, {"heldout": heldout}, list(manifests), train, dev)


def paths_of(data: Path | str | Sequence[Path | str]) -> list[Path]:
    """The paths of an argument that takes one or several.

    Raises:
        UserError: There is none, one is missing, or several are not all manifests.
    """
    paths = [Path(data)] if isinstance(data, (str, Path)) else [Path(path) for path in data]
    if not paths:
        raise UserError("no recordings are named; give a folder of recordings, or manifests of `hubert prepare`")
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: there is no such file or folder; correct the path")
    others = [path for path in paths if not is_manifest(path)]
    if others and len(paths) > 1:
        raise UserError(f"{others[0]}: one of several inputs, and not a manifest; give one folder or table, or several "
                        "manifests of `hubert prepare`")  # fmt: skip
    return paths


def adapted_to_steps(words: Sequence[str], steps: int, others: Sequence[str], validates: bool) -> list[str]:
    """Options that a run of few steps needs: a validation at its end, and phases that are shorter than the run.

    Args:
        words: Command line of the fit.
        steps: Optimizer steps of the run, or of each iteration.
        others: Options that the user gave, which stay as they are.
        validates: Whether the run has validation manifests.
    """
    settings = settings_of(named_configs(words))
    trainer, model = settings.get("trainer") or {}, (settings.get("model") or {}).get("init_args") or {}
    changes: dict[str, Any] = {}
    batches = steps * int(trainer.get("accumulate_grad_batches") or 1)
    interval = trainer.get("val_check_interval")
    if validates and isinstance(interval, int) and interval > batches:
        changes["trainer.val_check_interval"] = batches
    if isinstance(warmup := model.get("warmup_steps"), int) and warmup > steps // 4:
        changes["model.init_args.warmup_steps"] = "null"  # the share of the steps then counts
    if isinstance(frozen := model.get("freeze_steps"), int) and frozen > steps // 4:
        changes["model.init_args.freeze_steps"] = steps // 10
    return [
        word for key, value in changes.items() if not names_option(others, key) for word in (f"--{key}", str(value))
    ]


def check_numbers(**numbers: float | None) -> None:
    """Refuse numbers that are not above zero.

    Raises:
        UserError: One is not.
    """
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise UserError(f"{name} is {number}; give a number above 0")
