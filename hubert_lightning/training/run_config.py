"""The config of one run: where it writes, which checkpoint it takes, and the copy in its folder."""

import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from hubert_lightning.asr.results import results_folder
from hubert_lightning.errors import UserError
from hubert_lightning.files import write_whole
from hubert_lightning.parsing import given_configs, typed_options
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.training.checkpoints import newest_checkpoint
from hubert_lightning.training.restoring import check_kind
from hubert_lightning.training.run_folder import CONFIG, KEPT_CONFIG, KEPT_METRICS, check_files, kept_config

log = logging.getLogger(__name__)

LOGGER_RUN_KEYS = ("id", "version", "run_id", "experiment_key", "with_id")
"""Arguments by which loggers (W&B, CSV, MLflow, Comet, Neptune) resume an existing run."""
SWEEP, TRIAL = "WANDB_SWEEP_ID", "WANDB_RUN_ID"
"""Variables by which `wandb agent` names a sweep and its trial."""


class SaveRunConfig(SaveConfigCallback):
    """Saves the config in the run's folder, where the next command looks for it, and in its checkpoints.

    Attributes:
        metrics: Metrics of a finished run, which its last checkpoint holds, too; None before.
    """

    metrics: dict[str, Any] | None = None  # JSON values

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            path, text = Path(trainer.default_root_dir) / CONFIG, self._text.encode()
            if not path.exists() or path.stat().st_size != len(text) or path.read_bytes() != text:
                write_whole(path, text)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEPT_CONFIG] = self._text
        if self.metrics is not None:
            checkpoint[KEPT_METRICS] = self.metrics

    @cached_property
    def _text(self) -> str:
        run = self.config.clone()
        run.ckpt_path = None  # the run is the same wherever this start of it resumed
        for callback in listed(run.trainer.callbacks):
            if callback.get("init_args", {}).get("dirpath") == run.output:
                callback.init_args.dirpath = None  # and wherever its folder is moved
        return str(self.parser.dump(run, skip_none=False))


def check_output(config: Namespace) -> None:
    """Check where a fit ends and where it writes.

    Raises:
        UserError: The fit has no end, an option contradicts `iterations`, or the output is a file or holds the other
            kind of run.
    """
    folder, trainer = Path(config.output), config.trainer
    if not config.iterations and trainer.max_steps < 1 and (trainer.max_epochs or 0) < 1:
        raise UserError("this fit has no end; set trainer.max_steps, or the max_steps of iterations")
    if (clip := trainer.gradient_clip_val) is not None and clip < 0:
        raise UserError(f"trainer.gradient_clip_val is {clip}; give the largest gradient, or 0 or null for no limit")
    if trainer.gradient_clip_algorithm not in (None, "norm", "value"):
        raise UserError(f"trainer.gradient_clip_algorithm is {trainer.gradient_clip_algorithm}; choose norm or value")
    if config.iterations and config.ckpt_path:
        raise UserError(
            f"ckpt_path {config.ckpt_path} would start every iteration; each resumes from its own last.ckpt, or name "
            "the checkpoint in the features of an iteration"
        )
    if config.iterations and (labels := config.data.init_args.get("labels")):
        raise UserError(f"data.labels {labels} and iterations, which make their own labels, are both given; drop one")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, not a folder; choose another --output")
    other = sorted(folder.glob("*.ckpt" if config.iterations else "iteration*/config.yaml"))
    if other:
        raise UserError(f"{folder}: already holds another run ({other[0]}); choose another --output")


def write_to_output(config: Namespace) -> None:
    """Redirect everything that a run writes to its folder."""
    config.trainer.default_root_dir = config.output
    config.checkpoint.dirpath = config.output
    for logger in loggers_of(config):
        if "save_dir" in logger.init_args:
            logger.init_args.save_dir = config.output
    for callback in listed(config.trainer.callbacks):
        if "dirpath" in callback.get("init_args", {}) and callback.init_args.dirpath is None:
            callback.init_args.dirpath = config.output


def log_separately(config: Namespace, verb: str) -> Path:
    """Redirect a validation, test or prediction to its own files and logger runs, so that those of the fit stay.

    Args:
        config: Config of the command.
        verb: "validate", "test" or "predict".

    Returns:
        Folder of its output.
    """
    model, data = config.model.init_args, config.data.init_args
    run = Path(config.output)
    folder = run / verb
    if verb in ("test", "predict") and data.get("test"):
        limit = config.trainer.get(f"limit_{verb}_batches")
        whole = limit is None or (isinstance(limit, float) and limit == 1.0)  # 1 is one batch
        folder = results_folder(run, verb, data.test, model.get("decoder"), config.ckpt_path, whole)
    check_files(folder)
    for logger in loggers_of(config):
        settings = logger.init_args
        if "save_dir" in settings:
            settings.save_dir = str(folder)
        if "job_type" in settings or _has_id(logger):  # W&B
            fits = ("pretrain", "finetune")
            settings.job_type = verb
            settings.tags = [verb, *(tag for tag in settings.get("tags") or () if tag not in fits)]
            settings.group = settings.get("group") or settings.get("name") or settings.get("id")
            settings.name = f"{settings.get('name') or run.name}-{verb}-{folder.name}"
        for name in LOGGER_RUN_KEYS:
            if name in settings:
                settings[name] = None
    return folder


def keep_run_id(config: Namespace) -> None:
    """Give W&B the id of the run that resumes, from the config in its folder, or a new one.

    The trial of a sweep has the id that the sweep gives it.
    """
    if os.environ.get(SWEEP):
        return
    run_id = kept_run_id(Path(config.output))
    for logger in loggers_of(config):
        if _has_id(logger) and not logger.init_args.id:
            logger.init_args.id = run_id or secrets.token_hex(4)


def kept_run_id(folder: Path) -> str | None:
    """Return W&B's id of the run whose checkpoints a folder holds, None if it has none."""
    if os.environ.get(SWEEP):
        return os.environ.get(TRIAL)
    if not any(folder.glob("*.ckpt")) or not (folder / CONFIG).exists():
        return None
    loggers = listed(kept_config(folder)["trainer"]["logger"])
    return next((logger["init_args"]["id"] for logger in loggers if _has_id(logger)), None)


def follow_moved_run(config: Namespace, args: Sequence[str]) -> None:
    """Set the output to the folder of the run's config that a command names, unless it names another output."""
    given = [path for path in given_configs(args) if path.name == CONFIG and any(path.parent.glob("*.ckpt"))]
    if not given or any(name == "output" for name, _ in typed_options(args)):
        return
    if (folder := given[-1].parent).resolve() != Path(config.output).resolve():
        log.info("%s: the run was moved here from %s", folder, config.output)
        config.output = str(folder)


def given_options(args: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The options of each config that a command line names, and of the command line itself, by their dotted names."""
    for path in given_configs(args):
        content = yaml.safe_load(path.read_text()) if path.is_file() else None
        yield str(path), dict(_dotted(content or {}, ""))
    yield "command line", dict(typed_options(args))


def _dotted(value: dict[str, Any], start: str) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _dotted(inner, f"{start}{name}.")
        else:
            yield f"{start}{name}", inner


def continued_run(config: Namespace) -> Path | None:
    """Folder of the run that this one continues; None if it starts anew.

    Raises:
        UserError: That run has saved no checkpoint.
    """
    relabel = [one for one in listed(config.trainer.callbacks) if str(one.class_path).endswith("Relabel")]
    folder = next((one.init_args.get("continues") for one in relabel if one.get("init_args")), None)
    if folder is None:
        return None
    if not any((Path(folder) / name).exists() for name in ("last.ckpt", "previous.ckpt")):
        raise UserError(f"{folder}: the run to continue has no checkpoint; train it first")
    return Path(folder)


def default_precision(trainer: Namespace) -> str | None:
    """bfloat16 on a GPU that supports it."""
    gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else None


def checkpoint_to_judge(folder: Path) -> str:
    """The best checkpoint of a run, or its last one.

    Raises:
        UserError: The folder holds none.
    """
    best = folder / "best.ckpt"
    if checkpoint := best if best.exists() else newest_checkpoint(folder):
        return str(checkpoint)
    if iterations := sorted(folder.glob("iteration*/config.yaml")):
        raise UserError(
            f"{folder}: holds several iterations; choose one by its config, as in --config {iterations[-1]}"
        )
    raise UserError(f"{folder}: holds no best.ckpt or last.ckpt; fit first, or name a checkpoint with --ckpt_path")


def check_checkpoint(path: Path, class_path: str) -> None:
    """Check that a checkpoint is one of the config's task.

    Raises:
        UserError: There is no such checkpoint, or it is of another task.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; correct --ckpt_path")
    stated = read_checkpoint(path).get("hyper_parameters") or {}
    if not isinstance(stated, dict):
        raise UserError(f"{path}: its hyper_parameters are not settings; choose another checkpoint")
    check_kind(stated, class_path.rsplit(".", 1)[-1], path)


def loggers_of(config: Namespace) -> list[Namespace]:
    """The loggers that a config names; True and False are none."""
    return [logger for logger in listed(config.trainer.logger) if isinstance(logger, Namespace)]


def listed(one_or_several: Any) -> list[Any]:  # Any: a value of a config
    """The values of an option that takes one value, several or None."""
    if one_or_several is None:
        return []
    return list(one_or_several) if isinstance(one_or_several, list) else [one_or_several]


def _has_id(logger: Any) -> bool:
    return not isinstance(logger, bool) and "id" in logger.get("init_args", {})
