"""Fine-tuning in one go: transcribed recordings and an encoder in, a model that transcribes out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.packaged_configs import packaged
from hubert_lightning.pretrained.load import encoder_config
from hubert_lightning.recipes.pretrain import SMALL_DIM
from hubert_lightning.recipes.recipe import (
    Options,
    Preparation,
    Recipe,
    adapted_to_steps,
    check_numbers,
    divided,
    given,
    is_manifest,
    names_option,
    paths_of,
    refuse_for_manifests,
    words_of,
)
from hubert_lightning.recipes.run import check_page, execute, metrics_of, write_page
from hubert_lightning.training.checkpoints import LAST

CSV_SHARE = 0.1
"""Share that `hubert prepare csv` holds out by itself, which a long form leaves out."""
OWN_HEAD = ("model.init_args.vocabulary", "model.init_args.keep_head")
"""Options that decide on the tokens, so that no vocabulary is made."""


@dataclass(frozen=True)
class FinetuningRun:
    """A finished fine-tuning.

    Args:
        folder: Folder of the run.
        checkpoint: Best checkpoint, for `Transcriber.from_pretrained` and `hubert transcribe`.
        metrics: Metrics when this checkpoint was saved, such as `val/wer`, by name; `steps` is that of the whole run.
        report: Web page that shows the run; None if it was not asked for.
    """

    folder: Path
    checkpoint: Path
    metrics: dict[str, Any]
    report: Path | None


def finetune(
    data: Path | str | Sequence[Path | str],
    init: str | Path,
    output: Path | str,
    config: str | Path | None = None,
    *,
    validation: Path | str | Sequence[Path | str] | None = None,
    heldout: float = 0.1,
    path_column: str | None = None,
    text_column: str | None = None,
    speaker_column: str | None = None,
    audio: Path | str | None = None,
    spell_numbers: str | None = None,
    language_column: str | None = None,
    language: str | None = None,
    language_folders: bool = False,
    corpus_name: str | None = None,
    steps: int | None = None,
    lr: float | None = None,
    batch_seconds: float | None = None,
    options: Options | None = None,
    report: bool = True,
    progress: bool = False,
) -> FinetuningRun:
    """Fine-tune an encoder with CTC on transcribed recordings, from their preparation to the best checkpoint.

    The same call resumes a run that was interrupted, and leaves a finished one as it is.

    Args:
        data: Table of paths and sentences (CSV or TSV), folder of recordings with transcripts beside them, or manifests
            of `hubert prepare`.
        init: Pre-trained HuBERT, in any format that `load_encoder` reads.
        output: Folder of the run, which also gets the manifests and the vocabulary.
        config: Config of `hubert fit`, by name or path. Default: finetune/small for a small model, else finetune/own.
        validation: Manifests to validate on; default: what is held out.
        heldout: Share to hold out, from 0 to below 1.
        path_column: Column of the audio paths in a table, if it has no usual name; text_column and speaker_column
            likewise.
        text_column: Column of the sentences.
        speaker_column: Column of the speakers.
        audio: Folder that relative paths of a table start from; default: the folder of the table.
        spell_numbers: Language in which numbers are written as words, such as en.
        language_column: Column of the languages in a table.
        language: Language of the recordings for which the table names none.
        language_folders: Whether the first folder of a recording's path in a folder names its language.
        corpus_name: Name of the corpus.
        steps: Optimizer steps; default: those of the config.
        lr: Peak learning rate; default: that of the config.
        batch_seconds: Seconds of audio in a batch; default: those of the config.
        options: Other options of `hubert fit`, by their keys.
        report: Whether to write `report.html` into the output at the end.
        progress: Whether to print what is done, as the verb does; otherwise only warnings are shown.

    Returns:
        The run: its best checkpoint, metrics and report.

    Raises:
        UserError: An argument cannot be used; nothing was trained.
    """
    if report:
        check_page()
    check_numbers(steps=steps, lr=lr, batch_seconds=batch_seconds)
    paths, folder = paths_of(data), Path(output)
    dev = paths_of(validation) if validation is not None else []
    share = 0.0 if dev else heldout
    names: dict[str, Any] = {"language": language, "language_folders": language_folders, "corpus_name": corpus_name}
    names = {name: value for name, value in names.items() if value}
    columns: dict[str, Any] = {"path_column": path_column, "text_column": text_column}
    columns |= {"speaker_column": speaker_column, "audio": audio, "language_column": language_column}
    if is_manifest(paths[0]):
        refuse_for_manifests(paths[0], names)
        preparation = divided(paths, folder, share)
    else:
        preparation = _preparation(paths[0], folder, share, columns, spell_numbers, names)
    if preparation is not None:
        paths, dev = preparation.train, dev or preparation.heldout
    if not dev:
        raise UserError(
            "there is nothing to validate on, which decides on the best checkpoint; name manifests with --validation, "
            "or hold a share out"
        )
    recipe = _recipe(paths, dev, preparation, init, folder, config, steps, lr, batch_seconds, words_of(options))
    execute(recipe, progress)
    best = folder / "best.ckpt"
    checkpoint = best if best.is_file() else folder / LAST
    page = write_page(folder, progress) if report else None
    return FinetuningRun(folder, checkpoint, metrics_of(folder, checkpoint), page)


def _preparation(
    source: Path,
    output: Path,
    heldout: float,
    columns: dict[str, Any],
    spell_numbers: str | None,
    names: dict[str, Any],
) -> Preparation:
    """How manifests are made of a table, or of a folder with transcripts beside the recordings."""
    settings: dict[str, Any] = {"heldout": heldout} | names
    if spell_numbers is not None:
        settings["spell_numbers"] = spell_numbers
    named = {name: value for name, value in columns.items() if value is not None}
    if source.is_dir():
        if named:
            raise UserError(f"{source}: a folder, which has no columns; leave out {', '.join(named)}, or give a table")
        settings["transcribed_only"] = True
    else:
        if "language_folders" in names:
            raise UserError(f"{source}: a table; name its column of languages with --language_column")
        settings |= named
    verb = "folder" if source.is_dir() else "csv"
    made = output / "manifests"
    words = {name: str(value).lower() if value is True else value for name, value in settings.items()}
    if verb == "csv" and heldout == CSV_SHARE:
        del words["heldout"]
    command = ["prepare", verb, str(source), str(made), *given(**words)]
    train, dev = _names(source)
    return Preparation(command, settings, [source], [made / train], [made / dev] if heldout else [])


def _names(source: Path) -> tuple[str, str]:
    """Names of the manifests of a table or a folder: to train on, and held out."""
    if not source.is_dir():
        return "train.jsonl.gz", "dev.jsonl.gz"
    name = source.resolve().name
    return f"{name}.jsonl.gz", f"{name}-dev.jsonl.gz"


def _recipe(
    train: list[Path], validation: list[Path], preparation: Preparation | None, init: str | Path, output: Path,
    config: str | Path | None, steps: int | None, lr: float | None, batch_seconds: float | None, others: list[str],
) -> Recipe:  # fmt: skip
    model = encoder_config(init)
    name = str(config) if config is not None else "finetune/small" if model.dim < SMALL_DIM else "finetune/own"
    if not packaged(name).is_file():
        raise UserError(f"{name}: there is no such config; `hubert configs` lists those of this package")
    words = ["--config", name]
    if steps:
        adapted = adapted_to_steps(words, steps, others, validates=True)
    makes_vocabulary = not any(names_option(others, key) for key in OWN_HEAD)
    recipe = Recipe(output, [], preparation, makes_vocabulary, train, validation)
    words += ["--model.init_args.pretrained", str(init)]
    if makes_vocabulary:
        words += ["--model.init_args.vocabulary", str(recipe.vocabulary_file)]
    for part, manifests in (("train", train), ("validation", validation), ("test", validation)):
        if not names_option(others, f"data.init_args.{part}"):
            words += [f"--data.init_args.{part}", *map(str, manifests)]
    if not names_option(others, "trainer.logger"):
        words += ["--trainer.logger", "false"]
    words += given(steps=steps, lr=lr, batch_seconds=batch_seconds)
    words += [*(adapted if steps else []), *others, "--output", str(output)]
    return Recipe(output, words, preparation, makes_vocabulary, train, validation)
