"""A record of the settings of a run, as they were built, for every logger."""

import inspect
import json
import math
import os
import platform
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR

from hubert_lightning import __version__
from hubert_lightning.data.resources import usable_cores
from hubert_lightning.files import write_whole
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.training.finetuning_data import TranscribedData
from hubert_lightning.training.metrics_table import RECORD
from hubert_lightning.training.pretraining_data import PretrainingData
from hubert_lightning.training.relabelling import Relabel, labelling
from hubert_lightning.training.run_config import SaveRunConfig
from hubert_lightning.training.wandb_runs import log_labelling, start_run
from hubert_lightning.units.label_store import LabelStore

TRAINER_SETTINGS = (
    "max_steps",
    "max_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "num_nodes",
    "num_devices",
    "val_check_interval",
    "check_val_every_n_epoch",
    "log_every_n_steps",
    "overfit_batches",
    "limit_train_batches",
    "limit_val_batches",
    "max_time",
)
"""Attributes of the Trainer that change what a run learns, or how fast."""
MASKING = ("mask_prob", "mask_length", "channel_mask_prob", "channel_mask_length")
"""Arguments of the data modules that the record has under `masks/`."""
NOT_IN_MODEL = ("_class_path", "_instantiator", "pretrained", "keep_head", "encoder", "vocabulary")
"""Hyper-parameters that LightningCLI adds, that a checkpoint does not need, or that the record has by another name."""


class RunRecord(Callback):
    """Log the settings of a run to all its loggers: W&B's config, `hparams.yaml`, TensorBoard; and to `record.json`.

    The record of a fit describes the model, optimizer, batch, masks, data, labels, seed and package version as they
    were built, which the YAML may not state. Its names are flat, joined by "/", so that a table can be filtered and
    sorted by any of them. The record of a validation or a test describes the checkpoint and the data. Models save
    their hyper-parameters with `logger=False`, so that no setting is logged twice.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(data := _data_and_callbacks(trainer)[0], (PretrainingData, TranscribedData)):
            data.find_duration()
        record = fit_record(trainer)
        if trainer.is_global_zero:
            write_whole(Path(trainer.default_root_dir) / RECORD, (json.dumps(record, indent=2) + "\n").encode())
        _log(trainer, record)
        start_run(trainer)
        labels = getattr(trainer.datamodule, "labels", None)  # type: ignore[attr-defined]  # undeclared in Lightning
        if trainer.ckpt_path is None and isinstance(labels, LabelStore):  # a run that resumes has logged it
            log_labelling(trainer, labelling(labels.path.parent, labels.source.kmeans))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            _log(trainer, evaluation_record(trainer, "validation"))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _log(trainer, evaluation_record(trainer, "test"))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _log(trainer, evaluation_record(trainer, "test"))


def fit_record(trainer: Trainer) -> dict[str, Any]:
    """Describe a fit whose model, data and optimizer are set up.

    Returns:
        Numbers, texts and None by names that are joined by "/".
    """
    model: Any = trainer.lightning_module  # a task, or the user's own module that looks like one
    data, callbacks = _data_and_callbacks(trainer)
    optimizer, encoder = trainer.optimizers[0], getattr(model, "encoder", None)
    hparams = {name: value for name, value in model.hparams.items() if name not in NOT_IN_MODEL}
    record: dict[str, Any] = {
        "version": __version__,
        "folder": trainer.default_root_dir,
        "iteration": _iteration(Path(trainer.default_root_dir)),
        "task": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "encoder": asdict(encoder.config) if isinstance(encoder, HubertEncoder) else None,
        "model": hparams,
        "vocabulary": model.hparams.get("vocabulary"),
        "pretrained": getattr(model, "pretrained", None),
        "keep_head": getattr(model, "keep_head", False),
        "optimizer": {"class": type(optimizer).__name__, **_own_settings(optimizer)},
        "schedule": {
            "class": _schedule_name(trainer),
            "warmup_steps": model.warmup_steps,
            "total_steps": trainer.estimated_stepping_batches,
        },
        "seed": _seed(),
        "precision": str(trainer.precision),
        "world_size": trainer.world_size,
        "trainer": {name: getattr(trainer, name, None) for name in TRAINER_SETTINGS},
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "strategy": type(trainer.strategy).__name__,
        "accelerator": type(trainer.accelerator).__name__,
        "device": _device_name(trainer.strategy.root_device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": usable_cores(),
        "callbacks": _callback_settings(callbacks),
    }
    if hasattr(data, "record"):
        described = data.record("train", "validation")
        record["masks"] = {name: described.pop(name) for name in MASKING if name in described}
        record["data"] = described
        record["batch"] = {
            "seconds": data.max_duration,
            "accumulated": trainer.accumulate_grad_batches,
            "global_seconds": data.max_duration * trainer.world_size * trainer.accumulate_grad_batches,
        }
    labels = getattr(data, "labels", None)
    if isinstance(labels, LabelStore):
        recipe = next((callback for callback in callbacks if isinstance(callback, Relabel)), None)
        brought = labels.source.origin() | {"fingerprint": labels.fingerprint}
        record["labels"] = recipe.record(labels) if recipe else brought
    return flat(record)


def evaluation_record(trainer: Trainer, part: str) -> dict[str, Any]:
    """Describe the checkpoint and the data of a validation or a test.

    Args:
        trainer: Trainer that evaluates.
        part: Part of the data, "validation" or "test".

    Returns:
        Numbers, texts and None by names that are joined by "/".
    """
    data, _ = _data_and_callbacks(trainer)
    record = {
        "version": __version__,
        "task": type(trainer.lightning_module).__name__,
        "checkpoint": trainer.ckpt_path,
        "step": getattr(trainer.lightning_module, "trained_steps", None),
        "decoder": getattr(trainer.lightning_module, "decoder", None) if part == "test" else None,
        "limit_batches": trainer.limit_test_batches if part == "test" else trainer.limit_val_batches,
        "data": data.record(part) if hasattr(data, "record") else None,
    }
    return flat(record)


def flat(record: dict[str, Any], start: str = "") -> dict[str, Any]:
    """Join the names of nested dicts by "/", and the values of lists by ", ", so that loggers can filter by each.

    Returns:
        Numbers, texts, True, False and None by name, which every logger and file can hold.
    """
    joined: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            joined |= flat(value, f"{start}{name}/")
        else:
            joined[f"{start}{name}"] = _plain(value)
    return joined


def _plain(value: Any) -> bool | int | float | str | None:
    if isinstance(value, (list, tuple, set)):
        items = [_plain(item) for item in value]
        return items[0] if len(items) == 1 else ", ".join(map(str, items))
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no infinity
    return str(value)


def _data_and_callbacks(trainer: Trainer) -> tuple[Any, list[Callback]]:
    """Return the data module, None if there is none, and the callbacks; Lightning sets both without declaring them."""
    return trainer.datamodule, trainer.callbacks  # type: ignore[attr-defined]


def _callback_settings(callbacks: list[Callback]) -> dict[str, Any]:
    """Return the numbers and texts that each callback was built with, by its class, without what it has counted."""
    settings = {}
    for callback in callbacks:
        if type(callback) in (SaveRunConfig, ModelCheckpoint):  # which save, and change nothing
            continue
        arguments = inspect.signature(type(callback)).parameters
        values = {name: getattr(callback, name) for name in arguments if name != "dirpath" and hasattr(callback, name)}
        settings[type(callback).__name__] = {
            name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))
        }
    return dict(sorted(settings.items()))


def _own_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the settings of an optimizer, with the peak of the learning rate, which a search may have changed."""
    settings = {name: value for name, value in optimizer.defaults.items() if value is not None}
    settings.pop("differentiable", None)
    return settings | {"lr": optimizer.param_groups[0].get("initial_lr", settings.get("lr"))}


def _schedule_name(trainer: Trainer) -> str | None:
    """Return the name of the function that gives the learning rate its shape."""
    scheduler = trainer.lr_scheduler_configs[0].scheduler if trainer.lr_scheduler_configs else None
    if not isinstance(scheduler, LambdaLR):
        return None if scheduler is None else type(scheduler).__name__
    shape: Any = scheduler.lr_lambdas[0]
    return str(getattr(getattr(shape, "func", shape), "__name__", type(shape).__name__)).strip("_")


def _iteration(folder: Path) -> int | None:
    """Return the number of the iteration that a folder is named for."""
    match = re.fullmatch(r"iteration(\d+)", folder.name)
    return int(match[1]) if match else None


def _seed() -> int | None:
    seed = os.environ.get("PL_GLOBAL_SEED", "")  # where Lightning's seed_everything keeps it
    return int(seed) if seed.isdecimal() else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def _log(trainer: Trainer, record: dict[str, Any]) -> None:
    for logger in trainer.loggers:
        logger.log_hyperparams(record)
        logger.save()
