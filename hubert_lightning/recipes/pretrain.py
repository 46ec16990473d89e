"""Pre-training in one go: recordings in, an encoder out."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.packaged_configs import packaged
from hubert_lightning.pretrained.load import encoder_size
from hubert_lightning.pretrained.speech_encoder import EncoderSize
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
from hubert_lightning.recipes.sizes import SIZES
from hubert_lightning.short_options import named_configs, settings_of
from hubert_lightning.training.pretraining import ARCHITECTURE

log = logging.getLogger(__name__)

OF_ANOTHER_MODEL = ("large", "xlarge")
"""Sizes whose labels the paper makes of another model."""
DEFAULTS = {"heldout": 0.05, "max_duration": 30.0}
"""Defaults of `hubert prepare folder`, which a long form leaves out."""
SMALL_DIM = 384
"""Width of a Transformer below which the config of the small model fits a model of another size better."""


@dataclass(frozen=True)
class PretrainingRun:
    """A finished pre-training.

    Args:
        folder: Folder of the run.
        checkpoint: Checkpoint of the last iteration, to fine-tune, or to load with `load_encoder`.
        iterations: Folders of the iterations.
        metrics: Last metrics of the last iteration, such as `val/masked_accuracy`, by name.
        report: Web page that shows the run; None if it was not asked for.
    """

    folder: Path
    checkpoint: Path
    iterations: tuple[Path, ...]
    metrics: dict[str, Any]
    report: Path | None


def pretrain(
    data: Path | str | Sequence[Path | str],
    output: Path | str,
    config: str | Path | None = None,
    *,
    init: str | Path | None = None,
    validation: Path | str | Sequence[Path | str] | None = None,
    heldout: float = 0.05,
    max_duration: float = 30.0,
    language: str | None = None,
    language_folders: bool = False,
    corpus_name: str | None = None,
    steps: int | None = None,
    lr: float | None = None,
    batch_seconds: float | None = None,
    options: Options | None = None,
    report: bool = True,
    progress: bool = False,
) -> PretrainingRun:
    """Pre-train an encoder on recordings, from their preparation to the last iteration.

    The same call resumes a run that was interrupted, and leaves a finished one as it is.

    Args:
        data: Folder of recordings, or manifests of `hubert prepare`; a share of them is held out for validation.
        output: Folder of the run, which also gets the manifests.
        config: Size of the model, small, base, large or xlarge; or a config of `hubert fit`, by name or path. Default:
            small, or the size of `init`.
        init: Model to start from, in any format that `load_encoder` reads: its features make the labels, and if it is a
            HuBERT of the size of the config, its weights are the initial ones.
        validation: Manifests to validate on; default: the recordings that are held out.
        heldout: Share of the audio to hold out, from 0 to below 1.
        max_duration: Longest cut in seconds of a recording in a folder; longer ones are cut into equal pieces.
        language: Language of the recordings in a folder.
        language_folders: Whether the first folder of a recording's path names its language.
        corpus_name: Name of the corpus.
        steps: Optimizer steps of each iteration; default: those of the config.
        lr: Peak learning rate; default: that of the config.
        batch_seconds: Seconds of audio in a batch; default: those of the config.
        options: Other options of `hubert fit`, by their keys, such as {"trainer.devices": 1}.
        report: Whether to write `report.html` into the output at the end.
        progress: Whether to print what is done, as the verb does; otherwise only warnings are shown.

    Returns:
        The run: its checkpoint, metrics and report.

    Raises:
        UserError: An argument cannot be used; nothing was trained.
    """
    if report:
        check_page()
    recipe = pretraining_recipe(
        data, output, config, init=init, validation=validation, heldout=heldout, max_duration=max_duration,
        language=language, language_folders=language_folders, corpus_name=corpus_name,
        steps=steps, lr=lr, batch_seconds=batch_seconds, options=options,
    )  # fmt: skip
    execute(recipe, progress)
    folder = recipe.output
    iterations = iterations_in(folder)
    last = iterations[-1] if iterations else folder
    page = write_page(folder, progress) if report else None
    return PretrainingRun(folder, last / "last.ckpt", iterations, metrics_of(last, last / "last.ckpt"), page)


def iterations_in(folder: Path) -> tuple[Path, ...]:
    """List the folders `iteration1`, `iteration2`, … of a run in their order."""
    numbers = {path: path.name.removeprefix("iteration") for path in folder.glob("iteration*")}
    named = [path for path, number in numbers.items() if number.isdecimal()]
    return tuple(sorted(named, key=lambda path: int(numbers[path])))


def pretraining_recipe(
    data: Path | str | Sequence[Path | str],
    output: Path | str,
    config: str | Path | None = None,
    *,
    init: str | Path | None = None,
    validation: Path | str | Sequence[Path | str] | None = None,
    heldout: float = 0.05,
    max_duration: float = 30.0,
    language: str | None = None,
    language_folders: bool = False,
    corpus_name: str | None = None,
    steps: int | None = None,
    lr: float | None = None,
    batch_seconds: float | None = None,
    options: Options | None = None,
) -> Recipe:
    """Return what `pretrain` stands for, without doing it. Arguments as in `pretrain`."""
    check_numbers(steps=steps, lr=lr, batch_seconds=batch_seconds)
    output, paths, others = Path(output), paths_of(data), words_of(options)
    heldout_manifests = paths_of(validation) if validation is not None else []
    share = 0.0 if heldout_manifests else heldout
    names: dict[str, Any] = {"language": language, "language_folders": language_folders, "corpus_name": corpus_name}
    names = {name: value for name, value in names.items() if value}
    if is_manifest(paths[0]):
        refuse_for_manifests(paths[0], names)
        preparation = divided(paths, output, share)
    else:
        preparation = _of_folder(paths[0], output, {"heldout": share, "max_duration": max_duration} | names)
    if preparation is not None:
        paths, heldout_manifests = preparation.train, heldout_manifests or preparation.heldout
    words = _config_words(config, init)
    adapted = adapted_to_steps(words, steps, others, bool(heldout_manifests)) if steps else []
    words += [
        "--data.init_args.train", *map(str, paths),
        "--data.init_args.validation", *(map(str, heldout_manifests) if heldout_manifests else ["null"]),
        *([] if names_option(others, "trainer.logger") else ["--trainer.logger", "false"]),
        *given(steps=steps, lr=lr, batch_seconds=batch_seconds), *adapted, *others, "--output", str(output),
    ]  # fmt: skip
    return Recipe(output, words, preparation, train=paths, validation=heldout_manifests)


def _of_folder(folder: Path, output: Path, settings: dict[str, Any]) -> Preparation:
    """How manifests are made of a folder of recordings, with options of `hubert prepare folder`."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: a file, and not a manifest; give a folder of recordings, or manifests of `hubert prepare`"
        )
    shown = {
        name: "true" if value is True else value for name, value in settings.items() if value != DEFAULTS.get(name)
    }
    made, name = output / "manifests", folder.resolve().name
    command = ["prepare", "folder", str(folder), str(made), *given(**shown)]
    dev = [made / f"{name}-dev.jsonl.gz"] if settings["heldout"] else []
    return Preparation(command, settings, [folder], [made / f"{name}.jsonl.gz"], dev)


def _config_words(config: str | Path | None, init: str | Path | None) -> list[str]:
    """The config and the changes that the initial model needs, as a command line."""
    model = None if init is None else encoder_size(init)
    name = str(config) if config is not None else _size_of(model)
    name = f"pretrain/{name}" if name in SIZES else name
    if not packaged(name).is_file():
        raise UserError(
            f"{name}: neither a size ({', '.join(SIZES)}) nor a config; `hubert configs` lists those of this package"
        )
    if model is None:
        if name.removeprefix("pretrain/") in OF_ANOTHER_MODEL:
            raise UserError(
                f"{name}: its labels are made of another model, as in the paper; name one with --init, such as "
                "facebook/hubert-base-ls960"
            )
        return ["--config", name]
    settings = settings_of(named_configs(["--config", name]))
    encoder = ((settings.get("model") or {}).get("init_args") or {}).get("encoder") or {}
    own = EncoderConfig(
        **{key: encoder[key] for key in encoder if key in {field.name for field in fields(EncoderConfig)}}
    )
    words = ["--config", name]
    is_hubert = isinstance(model, EncoderConfig)
    different = [key for key in ARCHITECTURE if getattr(own, key) != getattr(model, key)] if is_hubert else []
    if not is_hubert:
        log.info("%s: only makes the labels, since it is no HuBERT; %s trains from fresh weights", init, name)
    elif config is None:  # the model decides on the size
        words += [f"--model.init_args.encoder.{key}={json.dumps(getattr(model, key))}" for key in different]
    elif different:
        log.info("%s: only makes the labels, since it has another %s than %s", init, different[0], name)
    entries = settings.get("iterations") or [{}]
    entry = dict(entries[-1]) | {"features": str(init), "layer": round(0.75 * model.num_layers) or 1}
    if is_hubert and (not different or config is None):
        entry["weights"] = str(init)
    return [*words, f"--iterations={json.dumps([entry], ensure_ascii=False)}"]


def _size_of(model: EncoderSize | None) -> str:
    """The config for a model of any size: that of the same size, or of a similar one."""
    if model is None:
        return "small"
    for size in SIZES if isinstance(model, EncoderConfig) else ():
        settings = settings_of(named_configs(["--config", f"pretrain/{size}"]))
        encoder = settings["model"]["init_args"].get("encoder") or {}
        if all(getattr(EncoderConfig(**encoder), key) == getattr(model, key) for key in ARCHITECTURE):
            return size
    return "small" if model.dim < SMALL_DIM else "base"
