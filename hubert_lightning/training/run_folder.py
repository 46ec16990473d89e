"""Config and metrics in the output folder of a run, and their repair if they are corrupt.

Checkpoints hold a copy of both, from which a corrupt file is written again.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from hubert_lightning.errors import UserError
from hubert_lightning.files import kind_of, read_regular, write_whole
from hubert_lightning.first_process import is_first_process
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.training.checkpoints import BEST, LAST, PREVIOUS
from hubert_lightning.untrusted.yaml_file import MAX_CONFIG_BYTES, parse_yaml

log = logging.getLogger(__name__)

CONFIG, METRICS = "config.yaml", "metrics.json"
KEPT_CONFIG, KEPT_METRICS, SAVED_METRICS = "config", "final_metrics", "metrics"
"""Entries of a checkpoint with the copies."""


def check_files(folder: Path) -> None:
    """Refuse an output folder with a pipe, a socket or a device, which a command would read without an end.

    Args:
        folder: Folder; it need not exist.

    Raises:
        UserError: The folder holds one of them, or a link to one.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(
                f"{path}: {kind_of(path)}, where a run has its files; remove it, or choose another --output"
            )


def kept_config(folder: Path) -> dict[str, Any]:
    """Read the config of a run that has checkpoints; a corrupt `config.yaml` is restored from one of them.

    Args:
        folder: Output folder of the run.

    Returns:
        Content of `config.yaml`.

    Raises:
        UserError: The config is corrupt or missing, and no checkpoint holds a copy.
    """
    path = folder / CONFIG
    reason = "missing"
    if path.exists():
        config, reason = _read_config(path)
        if config is not None:
            return config
    for checkpoint, config in saved_configs(folder):
        restore_config(path, reason, checkpoint)
        return config
    if reason == "missing":
        raise UserError(f"{folder}: holds checkpoints but no {CONFIG}, so it is no run folder; choose another --output")
    raise UserError(
        f"{path}: corrupt ({reason}), and no checkpoint beside it holds a copy; restore it from a backup, or give the "
        f"run's options with another --output and --ckpt_path {folder / LAST}"
    )


def saved_configs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Iterate over the checkpoints of a run that hold a config, the newest first.

    Args:
        folder: Output folder of the run.

    Yields:
        Path of a checkpoint, and the config in it.
    """
    best = sorted(folder.glob(f"{Path(BEST).stem}*.ckpt"))
    for checkpoint in (folder / LAST, folder / PREVIOUS, *best):
        text = _read_entry(checkpoint, KEPT_CONFIG)
        config = _parse_config(text)[0] if isinstance(text, str) else None
        if config is not None:
            yield checkpoint, config


def restore_config(path: Path, reason: str, checkpoint: Path) -> None:
    """Write the config in a checkpoint to a file.

    Args:
        path: Path of the config.
        reason: Defect of the present file, for the log.
        checkpoint: Checkpoint that holds a copy.

    Raises:
        UserError: The config cannot be written.
    """
    if is_first_process():
        write_whole(path, _read_entry(checkpoint, KEPT_CONFIG).encode())
    log.warning("%s: corrupt (%s); restored from %s", path, reason, checkpoint.name)


def restore_given_config(path: Path) -> None:
    """Restore a config that a command names, if it belongs to a run and is corrupt.

    A config names classes, which are imported. So the user reviews a copy from a checkpoint before it is used.

    Args:
        path: Path of the config.

    Raises:
        UserError: The config was corrupt; the sentence tells whether it is restored.
    """
    if path.name != CONFIG or not path.is_file() or not any(path.parent.glob("*.ckpt")):
        return
    config, reason = _read_config(path)
    if config is None:
        kept_config(path.parent)
        raise UserError(
            f"{path}: was corrupt ({reason}), and is restored from the checkpoint beside it; check that it is your "
            "run's, and run the same command again"
        )


def names_manifests(checkpoint: Path, class_path: str) -> bool:
    """Return whether a checkpoint states the manifests of its training, as those of this version do.

    Args:
        checkpoint: Path of the checkpoint; or output folder of a run, whose newest readable checkpoint counts.
        class_path: Class of the run's data.
    """
    name = class_path.rsplit(".", 1)[-1]
    for path in [checkpoint / LAST, checkpoint / PREVIOUS] if checkpoint.is_dir() else [checkpoint]:
        if _read_entry(path, "state_dict") is not None:
            return _read_entry(path, name) is not None
    return False


def kept_metrics(folder: Path) -> dict[str, Any]:
    """Read the last metrics of a finished run; a corrupt `metrics.json` is restored from its checkpoint.

    Args:
        folder: Output folder of the run.

    Returns:
        Content of `metrics.json`; empty if the run is not finished, or must resume to find out.
    """
    path = folder / METRICS
    try:
        metrics = json.loads(read_regular(path))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):  # UserError, UnicodeDecodeError and JSONDecodeError are ValueErrors
        metrics = None
    if _are_metrics(metrics):
        return dict(metrics)
    saved = _read_entry(folder / LAST, KEPT_METRICS)
    if _are_metrics(saved):
        if is_first_process():
            write_json(path, saved)
        log.warning("%s: corrupt; restored from %s", path, LAST)
        return dict(saved)
    log.warning("%s: corrupt; the run resumes from %s to write it again", path, LAST)
    return {}


def metrics_at(checkpoint: Path) -> dict[str, Any]:
    """Read the metrics that the run had when it saved a checkpoint; empty if they cannot be read."""
    metrics = _read_entry(checkpoint, SAVED_METRICS)
    return dict(metrics) if isinstance(metrics, dict) else {}


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON, whole or not at all; numbers that are not finite become null.

    Args:
        path: Path of the file.
        values: Values by name.

    Raises:
        UserError: The file cannot be written.
    """
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    write_whole(path, (json.dumps(finite, indent=2, allow_nan=False) + "\n").encode())


def _are_metrics(metrics: Any) -> bool:
    """Whether values have the types of a finished run's, as far as the next start reads them."""
    if not isinstance(metrics, dict) or not _is_count(metrics.get("steps")):
        return False
    stopped = "stopped_early" in metrics
    return not stopped or (isinstance(metrics["stopped_early"], str) and _is_count(metrics.get("max_steps")))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_config(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return a config, or None and its defect."""
    try:
        return _parse_config(read_regular(path, MAX_CONFIG_BYTES).decode())
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct that, and run again") from error


def _parse_config(text: str) -> tuple[dict[str, Any] | None, str]:
    if not text.strip("\0 \n"):
        return None, "empty"
    try:
        config = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that does not exist
        return None, "not YAML"
    parts: list[tuple[str, Callable[[Any], bool]]] = [
        ("model", _names_class),
        ("data", _names_class),
        ("trainer", lambda trainer: isinstance(trainer, dict) and {"callbacks", "logger"} <= trainer.keys()),
        ("seed_everything", lambda seed: isinstance(seed, (int, bool))),
    ]
    for name, is_valid in parts:
        if not isinstance(config, dict) or not is_valid(config.get(name)):
            return None, f"no {name}, or something else under that name"
    callbacks = config["trainer"]["callbacks"] or []
    if not isinstance(callbacks, (list, dict)) or not all(
        map(_names_class, callbacks if isinstance(callbacks, list) else [callbacks])
    ):
        return None, "trainer.callbacks are no classes"
    return config, ""


def _names_class(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and isinstance(part.get("class_path"), str)
        and isinstance(part.get("init_args", {}), dict)
    )


def _read_entry(checkpoint: Path, name: str) -> Any:
    """Return an entry of a checkpoint, None if there is none or the checkpoint is corrupt."""
    if not checkpoint.is_file():
        return None
    try:
        return read_checkpoint(checkpoint).get(name)
    except UserError:
        return None
