"""The verbs `pretrain` and `finetune`. Help and simple mistakes are answered before heavy packages are imported."""

from collections import deque
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.recipes.sizes import SIZES

PRETRAIN_HELP = """usage: hubert pretrain FOLDER --output FOLDER [options]
       hubert pretrain MANIFEST ... --output FOLDER [options]

Pre-train an encoder on recordings in one go: prepare them, hold some out for validation, and fit all iterations.
The same command resumes. It prints the long form that it stands for.

  FOLDER                      recordings of any format, also in subfolders
  MANIFEST ...                manifests of `hubert prepare`, in place of a folder

Options
  --output FOLDER             folder of the run, which also gets the manifests (needed)
  --size SIZE                 small (the default, for two CPU cores), base, large or xlarge
  --config CONFIG             config of `hubert fit` in place of a size, by name or path
  --init MODEL                model to start from, of any system: its features make the labels, and if it has the size
                              of the model to train, its weights are the initial ones
  --heldout SHARE             share of the audio that is held out for validation; 0.05 if not given, 0 for none
  --validation MANIFEST ...   manifests to validate on, in place of a share
  --max_duration SECONDS      longest piece of a recording, 30 if not given
  --language LANGUAGE         language of the recordings; --corpus_name names the corpus
  --language_folders true     the first folder of a recording's path is its language
  --steps STEPS               optimizer steps of each iteration
  --lr RATE                   peak learning rate
  --batch_seconds SECONDS     seconds of audio in a batch, on each GPU
  --report false              write no report.html at the end

Every option of `hubert fit` can be added, such as --trainer.devices 2 or --iterations.1.max_steps 1000
(`hubert fit --help`).
"""

FINETUNE_HELP = """usage: hubert finetune TABLE --init MODEL --output FOLDER [options]
       hubert finetune FOLDER --init MODEL --output FOLDER [options]
       hubert finetune MANIFEST ... --init MODEL --output FOLDER [options]

Fine-tune an encoder with CTC in one go: prepare recordings and transcripts, hold some out, make the vocabulary, and
fit. The same command resumes. It prints the long form that it stands for.

  TABLE                       CSV or TSV file with the columns path and text, in UTF-8 or UTF-16
  FOLDER                      recordings with their transcripts beside them, a.wav and a.txt
  MANIFEST ...                manifests of `hubert prepare`, with transcripts

Options
  --init MODEL                pre-trained model of any system (needed)
  --output FOLDER             folder of the run, which also gets the manifests (needed)
  --config CONFIG             config of `hubert fit`, by name or path; finetune/small for a small model, else
                              finetune/own, if not given
  --heldout SHARE             share that is held out for validation; 0.1 if not given
  --validation MANIFEST ...   manifests to validate on, in place of a share
  --path_column NAME          column of the audio paths; --text_column and --speaker_column likewise
  --audio FOLDER              folder that relative paths of the table start from
  --language LANGUAGE         language of the recordings; --corpus_name names the corpus
  --language_column NAME      column of the languages; of a folder, --language_folders true takes the first folder
  --spell_numbers LANGUAGE    write numbers as words, in a language such as en
  --steps STEPS               optimizer steps
  --lr RATE                   peak learning rate
  --batch_seconds SECONDS     seconds of audio in a batch, on each GPU
  --report false              write no report.html at the end

Every option of `hubert fit` can be added, such as --trainer.devices 2 (`hubert fit --help`).
"""

NUMBERS: dict[str, type] = {
    "heldout": float, "max_duration": float, "steps": int, "lr": float, "batch_seconds": float
}  # fmt: skip
TEXTS = ("output", "init", "config")
NAMES = ("language", "corpus_name")
OF_PRETRAIN = {
    **NUMBERS,
    **dict.fromkeys((*TEXTS, *NAMES, "size", "validation", "report", "language_folders"), str),
}
OF_FINETUNE = {
    **{name: kind for name, kind in NUMBERS.items() if name != "max_duration"},
    **dict.fromkeys((*TEXTS, "validation", "report"), str),
    **dict.fromkeys(("path_column", "text_column", "speaker_column", "audio", "spell_numbers"), str),
    **dict.fromkeys((*NAMES, "language_column", "language_folders"), str),
}
"""Options of the verbs, and the types of their values; other options are those of `hubert fit`."""
LISTS = ("validation",)
RENAMED = {"max_steps": "steps", "out": "output"}


def pretrain(args: list[str]) -> None:
    """Pre-train an encoder on a folder of recordings in one go: hubert pretrain FOLDER --output FOLDER.

    Args:
        args: Command line after the verb.
    """
    if _shows_help(args, PRETRAIN_HELP):
        return
    inputs, options, others = _parsed("pretrain", args, OF_PRETRAIN)
    size = options.pop("size", None)
    if size is not None and "config" in options:
        raise UserError(f"--size {size} and --config {options['config']} both name a config; give one of them")
    if size is not None and size not in SIZES:
        raise UserError(f"--size {size}: choose {', '.join(SIZES[:-1])} or {SIZES[-1]}; --config takes a config")
    _check_inputs("pretrain", inputs, options, ["output"])
    from hubert_lightning.recipes import pretrain as recipe

    config = options.pop("config", size)
    run = recipe.pretrain(inputs, options.pop("output"), config, **options, options=others, progress=True)
    _print_end(run.checkpoint, run.metrics)
    print(f"next: hubert finetune TABLE --init {run.checkpoint} --output FOLDER")


def finetune(args: list[str]) -> None:
    """Fine-tune an encoder on a table of sentences in one go: hubert finetune TABLE --init MODEL --output FOLDER.

    Args:
        args: Command line after the verb.
    """
    if _shows_help(args, FINETUNE_HELP):
        return
    inputs, options, others = _parsed("finetune", args, OF_FINETUNE)
    _check_inputs("finetune", inputs, options, ["init", "output"])
    from hubert_lightning.recipes import finetune as recipe

    run = recipe.finetune(
        inputs, options.pop("init"), options.pop("output"), **options, options=others, progress=True
    )  # fmt: skip
    _print_end(run.checkpoint, run.metrics)
    print(f"next: hubert transcribe {run.checkpoint} RECORDING")


def _shows_help(args: Sequence[str], text: str) -> bool:
    if args and not {"-h", "--help"} & set(args):
        return False
    print(text, end="")
    return True


def _parsed(verb: str, args: Sequence[str], known: Mapping[str, type]) -> tuple[list[str], dict[str, Any], list[str]]:
    """Divide a command line.

    Returns:
        The inputs, the options of the verb by their names, and the command line of the options of `hubert fit`.
    """
    inputs: list[str] = []
    options: dict[str, Any] = {}
    others: list[str] = []
    remaining = deque(args)
    while remaining:
        arg = remaining.popleft()
        if not arg.startswith("--"):
            inputs.append(arg)
            continue
        typed, equals, value = arg.removeprefix("--").partition("=")
        name = typed.replace("-", "_")
        name = RENAMED.get(name, name)
        values = [value] if equals else _values(remaining, several=name in LISTS or typed.startswith("data."))
        if name in known:
            if not values or not values[0]:
                raise UserError(f"--{typed}: expects a value; `hubert {verb} --help` lists the options")
            options[name] = values if name in LISTS else _typed(typed, values[0], known[name])
        elif "." in name or name.removesuffix("+") in FIT_OPTIONS:
            others += [f"--{typed}={values[0]}"] if len(values) == 1 else [f"--{typed}", *values]
        else:
            similar = get_close_matches(name, [*known, *FIT_OPTIONS], n=1)
            guess = f"did you mean --{similar[0]}? " if similar else ""
            raise UserError(f"there is no option {typed}; {guess}`hubert {verb} --help` lists the options")
    for name in {"report", "language_folders"} & options.keys():
        if options[name].lower() not in ("true", "false"):
            raise UserError(f"--{name} {options[name]}: not true or false")
        options[name] = options[name].lower() == "true"
    return inputs, options, others


FIT_OPTIONS = (
    "model",
    "data",
    "trainer",
    "iterations",
    "seed_everything",
    "checkpoint",
    "stalls",
    "pictures",
    "verbose",
)
"""Options of `hubert fit` without a dot in their names."""


def _values(remaining: deque[str], several: bool) -> list[str]:
    """Take the value of an option, or its values up to the next option."""
    values: list[str] = []
    while remaining and not remaining[0].startswith("--") and (several or not values):
        values.append(remaining.popleft())
    return values


def _typed(name: str, value: str, kind: type) -> Any:
    if kind is str:
        return value
    try:
        return kind(value)
    except ValueError:
        thing = "whole number" if kind is int else "number"
        raise UserError(f"--{name} {value}: not a {thing}") from None


def _check_inputs(verb: str, inputs: list[str], options: Mapping[str, Any], needed: Sequence[str]) -> None:
    """Refuse a command line without its inputs, or whose inputs are not there, before heavy packages are imported."""
    what = "a folder of recordings" if verb == "pretrain" else "a table of paths and sentences"
    if not inputs:
        raise UserError(f"{what[2:]} missing; give {what}, as `hubert {verb} --help` shows")
    for name in needed:
        if name not in options:
            raise UserError(f"--{name} missing; `hubert {verb} --help` lists the options")
    for path in inputs:
        if not Path(path).exists():
            raise UserError(f"{path}: there is no such file or folder; correct the path")


def _print_end(checkpoint: Path, metrics: Mapping[str, Any]) -> None:
    shown = ["val/wer", "val/cer", "val/masked_accuracy", "val/loss"]
    numbers = ", ".join(f"{name} {metrics[name]:.3g}" for name in shown if metrics.get(name) is not None)
    print(f"{checkpoint}: {numbers or 'not validated'}")
