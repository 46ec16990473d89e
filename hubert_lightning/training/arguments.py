"""Checks of a config before anything is built: values that parse but cannot work."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from hubert_lightning.asr.language_scores import is_metric_by_name
from hubert_lightning.errors import UserError, within
from hubert_lightning.training.parser import KEYS_OF_RECIPE, check_class_installed
from hubert_lightning.training.run_config import listed, loggers_of

TRAINER_RANGES = {
    "num_nodes": (1, 2**16),
    "accumulate_grad_batches": (1, 2**20),
    "check_val_every_n_epoch": (1, 2**62),
    "log_every_n_steps": (0, 2**62),
    "num_sanity_val_steps": (-1, 2**62),
    "min_epochs": (0, 2**62),
    "min_steps": (-1, 2**62),
    "reload_dataloaders_every_n_epochs": (0, 2**62),
    "limit_train_batches": (0, 2**62),
    "limit_val_batches": (0, 2**62),
    "limit_test_batches": (0, 2**62),
    "limit_predict_batches": (0, 2**62),
    "fast_dev_run": (0, 1000),
}
"""Options of the Trainer, and their smallest and largest values."""
MAX_DEVICES = 1024
LAST_CKPT_VALUES: dict[str, tuple[Any, ...]] = {
    "filename": ("last",),
    "save_top_k": (1,),
    "save_last": (None, False),
    "save_weights_only": (False,),
    "monitor": (None,),
    "enable_version_counter": (False,),
}
"""Options of `checkpoint` that `last.ckpt` depends on, and the values that keep it."""
DATA_OF_TASK = {
    "HubertPretraining": "PretrainingData",
    "CTCFinetuning": "TranscribedData",
}
"""Data module of each task."""
VALIDATION_METRICS = {
    "HubertPretraining": (
        "val/loss",
        "val/masked_loss",
        "val/masked_accuracy",
        "val/unmasked_loss",
        "val/unmasked_accuracy",
        "val/feature_penalty",
        "units/label_perplexity",
        "units/label_coverage",
        "units/predicted_perplexity",
        "units/predicted_coverage",
    ),
    "CTCFinetuning": ("val/loss", "val/wer", "val/cer"),
}
"""Metrics that the validation of each task logs."""
METRICS_OF_LAYERS = ("val/masked_loss", "val/masked_accuracy", "val/unmasked_loss", "val/unmasked_accuracy")
"""Metrics that are also logged for each intermediate layer that predicts, with its number."""
SPAWNING_STRATEGIES = ("ddp_spawn", "ddp_fork", "ddp_notebook")
REFUSED_CALLBACKS = {
    "StochasticWeightAveraging": (
        "would replace the schedule of the recipe; use hubert_lightning.BestCheckpoints, which averages the best "
        "checkpoints, or average checkpoints afterwards with `hubert average`"
    ),
    "LearningRateFinder": "does not know the schedule of the recipe; use hubert_lightning.PeakRateFinder",
    "Timer": "cannot be kept in the run's config; set trainer.max_time, which makes one",
}
"""Callbacks of Lightning that cannot work here, the reason, and the replacement."""


def check_arguments(config: Namespace, verb: str) -> None:
    """Check the values of a config.

    Args:
        config: Parsed config of `hubert fit` or its like.
        verb: "fit", "validate", "test" or "predict".

    Raises:
        UserError: A number is not finite, an option of the Trainer, the seed, or the encoder cannot be used, or the
            package of a logger is not installed.
    """
    for logger in loggers_of(config):
        check_class_installed(logger.class_path)
    for key, value in _numbers(config, ""):
        if not math.isfinite(value):
            raise UserError(f"{key} is {value}; give a finite number")
    _check_classes(config)
    seed = config.seed_everything
    if isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(
            f"seed_everything is {seed}; give a number from 0 to {2**32 - 1}, with which the run can be repeated"
        )
    for name, instead in KEYS_OF_RECIPE.items():
        if config.get(name):
            raise UserError(f"there is no option {name}; {instead}")
    trainer, settings = config.trainer, config.model.get("init_args") or {}
    if "encoder" in settings and settings["encoder"] is None:
        raise UserError("model.init_args.encoder is null; leave it out, or give its sizes, such as {dim: 768}")
    for name, (least, most) in TRAINER_RANGES.items():
        if isinstance(value := trainer.get(name), (int, float)):
            within(least, most, **{f"trainer.{name}": value})
    for name in ("max_steps", "max_epochs"):
        if (value := trainer.get(name)) is not None and value != -1:
            within(1, **{f"trainer.{name}": value})
    _check_devices(trainer.devices)
    interval = trainer.val_check_interval
    if isinstance(interval, (int, float)) and (interval <= 0 or (isinstance(interval, float) and interval > 1)):
        raise UserError(
            f"trainer.val_check_interval is {interval}; give a number of batches, 1 or more, or a share of an epoch, "
            "above 0.0 and up to 1.0"
        )
    if verb == "fit" and trainer.limit_train_batches == 0:
        raise UserError("trainer.limit_train_batches is 0, which leaves nothing to train on; give 1 or more")
    if trainer.get("barebones"):
        raise UserError("trainer.barebones is true, which would keep no checkpoint and log nothing; leave it out")
    if trainer.overfit_batches:
        raise UserError(
            f"trainer.overfit_batches is {trainer.overfit_batches}, which would replace our sampler; leave it out, and "
            "give a manifest of a few utterances in data.init_args.train"
        )
    if isinstance(trainer.strategy, str) and trainer.strategy.split("_find")[0] in SPAWNING_STRATEGIES:
        raise UserError(
            f"trainer.strategy is {trainer.strategy}, whose processes do not start as the command did; use ddp"
        )
    if verb == "fit":
        _check_last_checkpoint(config)
        _check_callbacks(config)
    endless = trainer.max_steps == -1 and (trainer.max_epochs or -1) == -1 and not config.iterations
    if verb == "fit" and trainer.get("max_time") is not None and endless:
        raise UserError(
            "trainer.max_time is given and trainer.max_steps is not; give max_steps too: the learning rate follows "
            "a schedule over these steps, and the fit ends at whichever comes first"
        )


def check_ignored(config: Namespace, given: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Check options that another option replaces: both have the same value, or the config of a run repeats them.

    Args:
        config: Parsed config.
        given: Name and options of each config and of the command line, options by their dotted names.

    Raises:
        UserError: Such an option has another value.
    """
    for name, options in given:
        if {"output", "trainer.default_root_dir", "checkpoint.dirpath"} <= options.keys():
            continue  # a run's own config, whose output or seed may have been edited
        output = options.get("output", config.output)
        for option in ("trainer.default_root_dir", "checkpoint.dirpath"):
            value = options.get(option)
            if value not in (None, "null") and Path(str(value)) not in (Path(str(output)), Path(config.output)):
                raise UserError(
                    f"{name}: {option} is {value}, and a run writes to its output, {config.output}; give "
                    "--output instead"
                )
        seed = options.get("seed_everything", config.seed_everything)
        for option in ("data.init_args.seed", "data.seed"):
            value = options.get(option)
            if value is not None and str(value) not in (str(seed), str(config.seed_everything)):
                raise UserError(
                    f"{name}: {option} is {value}, and the data takes the seed of the run, {config.seed_everything}; "
                    "give --seed_everything instead"
                )


def _check_classes(config: Namespace) -> None:
    """Refuse classes that are not ours, and data of another task."""
    tasks = [name for name in _bases(config.model.class_path) if name in DATA_OF_TASK]
    if not tasks:
        raise UserError(
            f"model: {config.model.class_path} is not a task of this package; use hubert_lightning."
            f"{' or hubert_lightning.'.join(DATA_OF_TASK)}, or a subclass; train other modules with your own Trainer"
        )
    data = DATA_OF_TASK[tasks[0]]
    if data not in _bases(config.data.class_path):
        raise UserError(
            f"data: {config.data.class_path} does not fit {config.model.class_path}; use hubert_lightning.{data}, "
            "or a subclass"
        )


def _bases(class_path: str) -> list[str]:
    """Names of a class and of its base classes in this package."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(import_module(module), name)
    return [base.__name__ for base in cls.__mro__ if base.__module__.split(".")[0] == "hubert_lightning"]


def _check_last_checkpoint(config: Namespace) -> None:
    """Refuse options that would leave a run without a `last.ckpt` to resume from."""
    checkpoint, trainer = config.checkpoint, config.trainer
    more = (
        "leave it out; for more checkpoints add hubert_lightning.BestCheckpoints, or another ModelCheckpoint, to "
        "trainer.callbacks"
    )
    for name, values in LAST_CKPT_VALUES.items():
        if name in checkpoint and not any(checkpoint[name] is value or checkpoint[name] == value for value in values):
            raise UserError(
                f"checkpoint.{name}={checkpoint[name]} would not keep the last.ckpt that a run resumes from; {more}"
            )
    for name in ("every_n_train_steps", "every_n_epochs"):
        if (every := checkpoint.get(name)) is not None:
            within(1, **{f"checkpoint.{name}": every})
    if trainer.enable_checkpointing is False:
        raise UserError(
            "trainer.enable_checkpointing is false, which would not keep the last.ckpt that a run resumes from; leave "
            "it out, and save less often by checkpoint.every_n_train_steps"
        )


def _check_callbacks(config: Namespace) -> None:
    """Refuse callbacks that cannot work with our tasks, overwrite our files, or monitor an unknown metric."""
    callbacks = [callback for callback in listed(config.trainer.callbacks) if isinstance(callback, Namespace)]
    packages = {callback.class_path.split(".")[0] for callback in callbacks}
    ours = packages <= {"hubert_lightning", "lightning", "pytorch_lightning"}  # no other callback logs metrics
    for callback in callbacks:
        package, name = callback.class_path.split(".")[0], callback.class_path.rsplit(".", 1)[-1]
        settings = callback.get("init_args") or {}
        if package != "hubert_lightning" and name in REFUSED_CALLBACKS:
            raise UserError(f"trainer.callbacks: {name} {REFUSED_CALLBACKS[name]}")
        if name == "ModelCheckpoint" and settings.get("filename") in ("last", "previous"):
            raise UserError(
                f"trainer.callbacks: a ModelCheckpoint with filename {settings['filename']} would overwrite the "
                "checkpoint that a run resumes from; give it another filename"
            )
        task, monitor = config.model.class_path.rsplit(".", 1)[-1], settings.get("monitor")
        known = list(VALIDATION_METRICS.get(task, ()))
        layers = (config.model.get("init_args") or {}).get("intermediate_layers") or []
        known += [f"{metric}_layer{layer}" for layer in layers for metric in METRICS_OF_LAYERS]
        by_name = task == "CTCFinetuning" and is_metric_by_name(monitor or "", "val")  # checked when data are read
        if monitor and ours and known and not monitor.startswith("train/") and monitor not in known and not by_name:
            raise UserError(
                f"trainer.callbacks: {name} monitors {monitor}, which validation of {task} does not log; use one of "
                f"{', '.join(known)}"
            )


def _check_devices(devices: Any) -> None:  # Any: a number, a list or a text
    number = int(devices) if isinstance(devices, str) and devices.lstrip("-").isdigit() else devices
    empty = isinstance(number, (str, list)) and not number
    if empty or (isinstance(number, int) and number != -1 and not 1 <= number <= MAX_DEVICES):
        raise UserError(
            f"trainer.devices is {devices}; give a number of devices from 1 to {MAX_DEVICES}, -1 or auto for all, or "
            "a list of their numbers"
        )


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """The floats of a config, each with its key."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, Namespace):
        yield from _numbers(vars(value), key)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{key}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _numbers(getattr(value, field.name), f"{key}.{field.name}")
