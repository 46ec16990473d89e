"""The settings that tell two runs apart, as they were built, for every logger."""

import inspect
from dataclasses import asdict
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from hubert_lightning import __version__
from hubert_lightning.units.label_store import LabelStore

OF_TRAINER = (
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
"""Attributes of the Trainer that change what is learned, or how fast."""
NOT_BUILT = ("_class_path", "_instantiator", "pretrained", "keep_head")
"""Hyper-parameters of LightningCLI's own, and those that a checkpoint does not need to rebuild its model."""


class RunRecord(Callback):
    """Logs what a run consists of, to whatever loggers it has: W&B's config, `hparams.yaml`, TensorBoard.

    The record of a fit holds the model, optimizer, batch, masks, data, labels, seed and package version after they were
    built, not what the YAML asked for. The record of a validation or test holds the checkpoint and the data. The
    settings of the command line are not logged twice: models save their hyper-parameters with `logger=False`.
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
    """The settings of a fit whose model, data and optimizer are set up.

    Returns:
        Nested dict of numbers, strings and lists.
    """
    model, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    optimizer = trainer.optimizers[0]
    record: dict[str, Any] = {
        "version": __version__,
        "folder": trainer.default_root_dir,
        "task": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "model": {name: value for name, value in model.hparams.items() if name not in NOT_BUILT},
        "pretrained": getattr(model, "pretrained", None),
        "keep_head": getattr(model, "keep_head", False),
        "optimizer": {"class": type(optimizer).__name__, **_own_settings(optimizer.defaults)},
        "schedule": {"warmup_steps": model.warmup_steps, "total_steps": trainer.estimated_stepping_batches},
        "trainer": {name: getattr(trainer, name, None) for name in OF_TRAINER},
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "strategy": type(trainer.strategy).__name__,
        "accelerator": type(trainer.accelerator).__name__,
        "callbacks": _callbacks(trainer),
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
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "recipe"):  # Relabel: how these labels were made
            record["labels"] = record.get("labels", {}) | {"recipe": callback.recipe.as_record()}
    return plain(record)


def evaluation_record(trainer: Trainer, part: str) -> dict[str, Any]:
    """The checkpoint and the data of a validation or a test."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    record = {
        "version": __version__,
        "task": type(trainer.lightning_module).__name__,
        "checkpoint": trainer.ckpt_path,
        "step": getattr(trainer.lightning_module, "trained_steps", None),
        "decoder": getattr(trainer.lightning_module, "decoder", None) if part == "test" else None,
        "limit_batches": trainer.limit_test_batches if part == "test" else trainer.limit_val_batches,
        "data": data.record(part) if hasattr(data, "record") else None,
    }
    return plain(record)


def plain(value: Any) -> Any:
    """The same as dicts, lists, numbers and strings, which every logger and file can hold."""
    if isinstance(value, dict):
        return {str(name): plain(of) for name, of in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(of) for of in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _callbacks(trainer: Trainer) -> dict[str, Any]:
    """Class of each callback → its numbers and words, as it was built; not what it has counted."""
    told = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        asked = inspect.signature(type(callback)).parameters
        values = {name: getattr(callback, name) for name in asked if name != "dirpath" and hasattr(callback, name)}
        told[type(callback).__name__] = {
            name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))
        }
    return dict(sorted(told.items()))


def _own_settings(defaults: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in defaults.items() if value is not None and name != "differentiable"}


def _log(trainer: Trainer, record: dict[str, Any]) -> None:
    for logger in trainer.loggers:
        logger.log_hyperparams(record)
        logger.save()
