"""A record of the settings of a run, as they were built, for every logger."""

import inspect
from dataclasses import asdict
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from hubert_lightning import __version__
from hubert_lightning.units.label_store import LabelStore

TRAINER_SETTINGS = (
    "max_steps",
    "max_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
    "num_nodes",
    "num_devices",
    "world_size",
    "val_check_interval",
    "check_val_every_n_epoch",
    "overfit_batches",
    "limit_train_batches",
    "limit_val_batches",
    "max_time",
)
"""Attributes of the Trainer that change what a run learns, or how fast."""
NOT_IN_MODEL = ("_class_path", "_instantiator", "pretrained", "keep_head")
"""Hyper-parameters that LightningCLI adds, and those that a checkpoint does not need to rebuild its model."""


class RunRecord(Callback):
    """Log the settings of a run to all its loggers: W&B's config, `hparams.yaml`, TensorBoard.

    The record of a fit describes the model, optimizer, batch, masks, data, labels, seed and package version as they
    were built, which the YAML may not state. The record of a validation or a test describes the checkpoint and the
    data. Models save their hyper-parameters with `logger=False`, so that no setting is logged twice.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _log(trainer, fit_record(trainer))

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
        Nested dict of numbers, strings and lists.
    """
    model: Any = trainer.lightning_module  # a task, or the user's own module that looks like one
    data, callbacks = _data_and_callbacks(trainer)
    optimizer = trainer.optimizers[0]
    record: dict[str, Any] = {
        "version": __version__,
        "folder": trainer.default_root_dir,
        "task": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "model": {name: value for name, value in model.hparams.items() if name not in NOT_IN_MODEL},
        "pretrained": getattr(model, "pretrained", None),
        "keep_head": getattr(model, "keep_head", False),
        "optimizer": {"class": type(optimizer).__name__, **_own_settings(optimizer.defaults)},
        "schedule": {"warmup_steps": model.warmup_steps, "total_steps": trainer.estimated_stepping_batches},
        "trainer": {name: getattr(trainer, name, None) for name in TRAINER_SETTINGS},
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "strategy": type(trainer.strategy).__name__,
        "accelerator": type(trainer.accelerator).__name__,
        "callbacks": _callback_settings(callbacks),
    }
    if hasattr(data, "record"):
        record["data"] = data.record("train", "validation")
        record["batch"] = {
            "max_duration": data.max_duration,
            "global_max_duration": data.max_duration * trainer.world_size * trainer.accumulate_grad_batches,
        }
    labels = getattr(data, "labels", None)
    if isinstance(labels, LabelStore):
        record["labels"] = asdict(labels.source)
    for callback in callbacks:
        if hasattr(callback, "recipe"):  # Relabel
            record["labels"] = record.get("labels", {}) | {"recipe": callback.recipe.as_record()}
    return _plain_dict(record)


def evaluation_record(trainer: Trainer, part: str) -> dict[str, Any]:
    """Describe the checkpoint and the data of a validation or a test.

    Args:
        trainer: Trainer that evaluates.
        part: Part of the data, "validation" or "test".

    Returns:
        Nested dict of numbers, strings and lists.
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
    return _plain_dict(record)


def plain(value: Any) -> Any:
    """Convert a value to dicts, lists, numbers and strings, which every logger and file can hold."""
    if isinstance(value, dict):
        return _plain_dict(value)
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _plain_dict(record: dict[str, Any]) -> dict[str, Any]:
    return {str(name): plain(value) for name, value in record.items()}


def _data_and_callbacks(trainer: Trainer) -> tuple[Any, list[Callback]]:
    """Return the data module, None if there is none, and the callbacks; Lightning sets both without declaring them."""
    return trainer.datamodule, trainer.callbacks  # type: ignore[attr-defined]


def _callback_settings(callbacks: list[Callback]) -> dict[str, Any]:
    """Return the numbers and texts that each callback was built with, by its class, without what it has counted."""
    settings = {}
    for callback in callbacks:
        arguments = inspect.signature(type(callback)).parameters
        values = {name: getattr(callback, name) for name in arguments if name != "dirpath" and hasattr(callback, name)}
        settings[type(callback).__name__] = {
            name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))
        }
    return dict(sorted(settings.items()))


def _own_settings(defaults: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in defaults.items() if value is not None and name != "differentiable"}


def _log(trainer: Trainer, record: dict[str, Any]) -> None:
    for logger in trainer.loggers:
        logger.log_hyperparams(record)
        logger.save()
