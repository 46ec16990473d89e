"""Values in a config that parse, and that no run can have: refused by name, before anything is made."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from jsonargparse import Namespace

from hubert_lightning.parser import INSIDE
from hubert_lightning.ranges import within

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


def check_arguments(config: Namespace, verb: str) -> None:
    """Refuse what no run can have.

    Args:
        config: Parsed config of `hubert fit` or its like.
        verb: "fit", "validate", "test" or "predict".

    Raises:
        ValueError: A number is not finite, or an option of the Trainer, the seed, or the encoder makes no sense.
    """
    for key, value in _numbers(config, ""):
        if not math.isfinite(value):
            raise ValueError(f"{key} is {value}; give a finite number")
    seed = config.seed_everything
    if isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(
            f"seed_everything is {seed}; give a number from 0 to {2**32 - 1}, with which the run can be repeated"
        )
    for name, instead in INSIDE.items():
        if config.get(name):
            raise ValueError(f"there is no option {name}; {instead}")
    trainer, settings = config.trainer, config.model.get("init_args") or {}
    if "encoder" in settings and settings["encoder"] is None:
        raise ValueError("model.init_args.encoder is null; leave it out, or give its sizes, such as {dim: 768}")
    for name, (least, most) in COUNTS.items():
        if isinstance(value := trainer.get(name), (int, float)):
            within(least, most, **{f"trainer.{name}": value})
    for name in ("max_steps", "max_epochs"):
        if (value := trainer.get(name)) is not None and value != -1:
            within(1, **{f"trainer.{name}": value})
    _check_devices(trainer.devices)
    interval = trainer.val_check_interval
    if isinstance(interval, (int, float)) and (interval <= 0 or (isinstance(interval, float) and interval > 1)):
        raise ValueError(
            f"trainer.val_check_interval is {interval}; give a number of batches, 1 or more, or a share of an epoch, "
            "above 0.0 and up to 1.0"
        )
    if verb == "fit" and trainer.limit_train_batches == 0:
        raise ValueError("trainer.limit_train_batches is 0, which leaves nothing to train on; give 1 or more")
    if trainer.overfit_batches:
        raise ValueError(
            f"trainer.overfit_batches is {trainer.overfit_batches}, which would replace our plan of batches; leave it "
            "out, and name a manifest of a few utterances in data.init_args.train"
        )
    if isinstance(trainer.strategy, str) and trainer.strategy.split("_find")[0] in SPAWNING:
        raise ValueError(
            f"trainer.strategy is {trainer.strategy}, whose processes do not start as the command did; take ddp"
        )
    if (every := config.checkpoint.every_n_train_steps) is not None:
        within(1, **{"checkpoint.every_n_train_steps": every})


SPAWNING = ("ddp_spawn", "ddp_fork", "ddp_notebook")


def _check_devices(devices: Any) -> None:
    number = int(devices) if isinstance(devices, str) and devices.lstrip("-").isdigit() else devices
    nothing = isinstance(number, (str, list)) and not number
    if nothing or (isinstance(number, int) and number != -1 and not 1 <= number <= MOST_DEVICES):
        raise ValueError(
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
