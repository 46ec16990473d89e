"""Values in a config that parse, and that no run can have: refused by name, before anything is made."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from hubert_lightning.errors import UserError, within
from hubert_lightning.training.parser import KEYS_OF_RECIPE

COUNTS = {
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
"""Options of the Trainer: the least and the most that they can be."""
MOST_DEVICES = 1024
KEEPING: dict[str, tuple[Any, ...]] = {
    "filename": ("last",),
    "save_top_k": (1,),
    "save_last": (None, False),
    "save_weights_only": (False,),
    "monitor": (None,),
    "enable_version_counter": (False,),
}
"""Options of `checkpoint` that `last.ckpt` depends on, and the values that keep it."""
FITTING = {
    "HubertPretraining": "PretrainingData",
    "CTCFinetuning": "TranscribedData",
}
"""The tasks, and the data that each one trains on."""
VALIDATED = {
    "HubertPretraining": (
        "loss",
        "masked_loss",
        "masked_accuracy",
        "unmasked_loss",
        "unmasked_accuracy",
        "feature_penalty",
        "label_clusters",
        "label_perplexity",
        "predicted_clusters",
        "predicted_perplexity",
    ),
    "CTCFinetuning": ("loss", "wer", "cer"),
}
"""The tasks, and the metrics that a validation of each one finds, without `val/`."""
REFUSED_CALLBACKS = {
    "StochasticWeightAveraging": (
        "would replace the schedule of the recipe; take hubert_lightning.BestCheckpoints, which averages the best "
        "checkpoints, or average some afterwards with `hubert average`"
    ),
    "LearningRateFinder": "does not know the schedule of the recipe; take hubert_lightning.PeakRateFinder",
    "Timer": "cannot be kept in the run's config; set trainer.max_time, which makes one",
}
"""Callbacks of Lightning that cannot work here, why, and what does."""


def check_arguments(config: Namespace, verb: str) -> None:
    """Refuse what no run can have.

    Args:
        config: Parsed config of `hubert fit` or its like.
        verb: "fit", "validate", "test" or "predict".

    Raises:
        UserError: A number is not finite, or an option of the Trainer, the seed, or the encoder makes no sense.
    """
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
    for name, (least, most) in COUNTS.items():
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
            f"trainer.overfit_batches is {trainer.overfit_batches}, which would replace our plan of batches; leave it "
            "out, and name a manifest of a few utterances in data.init_args.train"
        )
    if isinstance(trainer.strategy, str) and trainer.strategy.split("_find")[0] in SPAWNING:
        raise UserError(
            f"trainer.strategy is {trainer.strategy}, whose processes do not start as the command did; take ddp"
        )
    if verb == "fit":
        _check_keeping(config)
        _check_callbacks(config)
    endless = trainer.max_steps == -1 and (trainer.max_epochs or -1) == -1 and not config.iterations
    if verb == "fit" and trainer.get("max_time") is not None and endless:
        raise UserError(
            "trainer.max_time is given and trainer.max_steps is not; give max_steps too: the learning rate follows "
            "a schedule over these steps, and the fit ends at whichever comes first"
        )


def check_ignored(config: Namespace, given: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse options that another one replaces, unless both say the same, or the config of a run repeats them.

    Args:
        config: Parsed config.
        given: Name and content of every file of options and of the command line, options by their dotted names.

    Raises:
        UserError: Somebody gave such an option another value.
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
    """Refuse models and data that are not ours, or not for each other."""
    tasks = [name for name in _bases(config.model.class_path) if name in FITTING]
    if not tasks:
        raise UserError(
            f"model: {config.model.class_path} is none of this package's tasks; take hubert_lightning."
            f"{' or hubert_lightning.'.join(FITTING)}, or a subclass; other modules train with a Trainer of their own"
        )
    wanted = FITTING[tasks[0]]
    if wanted not in _bases(config.data.class_path):
        raise UserError(
            f"data: {config.data.class_path} does not fit {config.model.class_path}; take hubert_lightning.{wanted}, "
            "or a subclass"
        )


def _bases(class_path: str) -> list[str]:
    """Names of a class and those that it is made of."""
    module, _, name = class_path.rpartition(".")
    made = getattr(import_module(module), name)
    return [base.__name__ for base in made.__mro__ if base.__module__.split(".")[0] == "hubert_lightning"]


def _check_keeping(config: Namespace) -> None:
    """Refuse what would leave a run without a `last.ckpt` from which it goes on."""
    checkpoint, trainer = config.checkpoint, config.trainer
    more = (
        "leave it out; for more checkpoints add hubert_lightning.BestCheckpoints, or another ModelCheckpoint, to "
        "trainer.callbacks"
    )
    for name, values in KEEPING.items():
        if name in checkpoint and not any(checkpoint[name] is value or checkpoint[name] == value for value in values):
            raise UserError(
                f"checkpoint.{name}={checkpoint[name]} would not keep the last.ckpt from which a run goes on; {more}"
            )
    for name in ("every_n_train_steps", "every_n_epochs"):
        if (every := checkpoint.get(name)) is not None:
            within(1, **{f"checkpoint.{name}": every})
    if trainer.enable_checkpointing is False:
        raise UserError(
            "trainer.enable_checkpointing is false, which would not keep the last.ckpt from which a run goes on; leave "
            "it out, and save less often by checkpoint.every_n_train_steps"
        )


def _check_callbacks(config: Namespace) -> None:
    """Refuse callbacks that cannot work with our tasks, overwrite our files, or monitor what no validation finds."""
    given = config.trainer.callbacks or []
    callbacks = [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, Namespace)]
    ours = all(
        one.class_path.split(".")[0] in ("hubert_lightning", "lightning", "pytorch_lightning") for one in callbacks
    )
    for callback in callbacks:
        package, name = callback.class_path.split(".")[0], callback.class_path.rsplit(".", 1)[-1]
        settings = callback.get("init_args") or {}
        if package != "hubert_lightning" and name in REFUSED_CALLBACKS:
            raise UserError(f"trainer.callbacks: {name} {REFUSED_CALLBACKS[name]}")
        if name == "ModelCheckpoint" and settings.get("filename") in ("last", "previous"):
            raise UserError(
                f"trainer.callbacks: a ModelCheckpoint with filename {settings['filename']} would overwrite the "
                "checkpoint from which a run goes on; give it another filename"
            )
        task, monitor = config.model.class_path.rsplit(".", 1)[-1], settings.get("monitor")
        known = [f"val/{metric}" for metric in VALIDATED.get(task, ())]
        if monitor and ours and known and not monitor.startswith("train/") and monitor not in known:
            raise UserError(
                f"trainer.callbacks: {name} monitors {monitor}, which no validation of {task} finds; take one of "
                f"{', '.join(known)}"
            )


SPAWNING = ("ddp_spawn", "ddp_fork", "ddp_notebook")


def _check_devices(devices: Any) -> None:
    number = int(devices) if isinstance(devices, str) and devices.lstrip("-").isdigit() else devices
    nothing = isinstance(number, (str, list)) and not number
    if nothing or (isinstance(number, int) and number != -1 and not 1 <= number <= MOST_DEVICES):
        raise UserError(
            f"trainer.devices is {devices}; give a number of devices from 1 to {MOST_DEVICES}, -1 or auto for all, or "
            "a list of their numbers"
        )


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Every float in a config, and its key."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, Namespace):
        yield from _numbers(vars(value), key)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from _numbers(inner, f"{key}[{place}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _numbers(getattr(value, field.name), f"{key}.{field.name}")
