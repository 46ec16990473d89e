"""What a run's folder says of the run: its config and its last metrics, and what to do where they are damaged.

Checkpoints hold a copy of both, from which a damaged file is written again.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from hubert_lightning.console import is_first_process
from hubert_lightning.errors import UserError
from hubert_lightning.files import kind_of, read_regular, write_whole
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.training.checkpoints import BEST, LAST, PREVIOUS
from hubert_lightning.untrusted.yaml_file import LARGEST, parse_yaml

log = logging.getLogger(__name__)

CONFIG, METRICS = "config.yaml", "metrics.json"
KEPT_CONFIG, KEPT_METRICS = "config", "final_metrics"  # in a checkpoint


def check_files(folder: Path) -> None:
    """Refuse a folder of a run or of results in which something else has the place of a file.

    A pipe would be waited for, and a device such as /dev/zero read without an end.

    Args:
        folder: Folder; it need not exist.

    Raises:
        UserError: A pipe, a socket or a device is in it, or a link to one.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(
                f"{path}: {kind_of(path)}, where a run has its files; remove it, or choose another --output"
            )


def kept_config(folder: Path) -> dict[str, Any]:
    """The config of the run in a folder that has checkpoints; a damaged `config.yaml` is restored from one of them.

    Args:
        folder: Folder of the run.

    Returns:
        Content of `config.yaml`.

    Raises:
        UserError: It is damaged or missing, and no checkpoint holds a copy.
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
        raise UserError(f"{folder}: holds checkpoints of something else (no {CONFIG}); choose another --output")
    raise UserError(
        f"{path}: damaged ({reason}), and no checkpoint beside it holds a copy; restore it from a backup, or give the "
        f"run's options with another --output and --ckpt_path {folder / LAST}"
    )


def saved_configs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Checkpoints of a run, the newest first, with the config that each of them holds."""
    best = sorted(folder.glob(f"{Path(BEST).stem}*.ckpt"))
    for checkpoint in (folder / LAST, folder / PREVIOUS, *best):
        text = _read_entry(checkpoint, KEPT_CONFIG)
        config = _parsed_config(text)[0] if isinstance(text, str) else None
        if config is not None:
            yield checkpoint, config


def restore_config(path: Path, reason: str, checkpoint: Path) -> None:
    """Write a config again.

    Args:
        path: File of the config.
        reason: What is wrong with it.
        checkpoint: Checkpoint that holds a copy.

    Raises:
        UserError: It cannot be written.
    """
    if is_first_process():
        write_whole(path, _read_entry(checkpoint, KEPT_CONFIG).encode())
    log.warning("%s: damaged (%s); restored from %s", path, reason, checkpoint.name)


def restore_given_config(path: Path) -> None:
    """Restore a config that a command names, if it is one of a run's and is damaged.

    A config names classes, which are imported. So the user reviews a copy from a checkpoint before it is used.

    Raises:
        UserError: It was damaged; the sentence says whether it is restored.
    """
    if path.name != CONFIG or not path.is_file() or not any(path.parent.glob("*.ckpt")):
        return
    config, reason = _read_config(path)
    if config is None:
        kept_config(path.parent)
        raise UserError(
            f"{path}: was damaged ({reason}), and is restored from the checkpoint beside it; look whether it is your "
            "run's, and run the same command again"
        )


def says_manifests(checkpoint: Path, class_path: str) -> bool:
    """Whether a checkpoint says which manifests it was trained with.

    Args:
        checkpoint: File, or the folder of a run, whose newest that can be read counts.
        class_path: Class of the run's data.
    """
    name = class_path.rsplit(".", 1)[-1]
    for path in [checkpoint / LAST, checkpoint / PREVIOUS] if checkpoint.is_dir() else [checkpoint]:
        if _read_entry(path, "state_dict") is not None:
            return _read_entry(path, name) is not None
    return False


def kept_metrics(folder: Path) -> dict[str, Any]:
    """The last metrics of a finished run; a damaged `metrics.json` is restored from its checkpoint.

    Args:
        folder: Folder of the run.

    Returns:
        Content of `metrics.json`; empty if the run is not finished, or if that is to be found out by going on.
    """
    path = folder / METRICS
    try:
        metrics = json.loads(read_regular(path))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        metrics = None
    if _are_metrics(metrics):
        return metrics
    saved = _read_entry(folder / LAST, KEPT_METRICS)
    if _are_metrics(saved):
        if is_first_process():
            write_json(path, saved)
        log.warning("%s: damaged; restored from %s", path, LAST)
        return saved
    log.warning("%s: damaged; made again from %s", path, LAST)
    return {}


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON, whole or not at all, null for numbers that are not finite; raises as `write_whole` does."""
    known = {name: None if isinstance(of, float) and not math.isfinite(of) else of for name, of in values.items()}
    write_whole(path, (json.dumps(known, indent=2, allow_nan=False) + "\n").encode())


def _are_metrics(metrics: Any) -> bool:
    """Whether values are those of a finished run, of the types that the next start asks for."""
    if not isinstance(metrics, dict) or not _is_count(metrics.get("steps")):
        return False
    stopped = "stopped_early" in metrics
    return not stopped or (isinstance(metrics["stopped_early"], str) and _is_count(metrics.get("max_steps")))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_config(path: Path) -> tuple[dict[str, Any] | None, str]:
    """A config, or none and what is wrong with it."""
    try:
        return _parsed_config(read_regular(path, LARGEST).decode())
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct that, and run again") from error


def _parsed_config(text: str) -> tuple[dict[str, Any] | None, str]:
    if not text.strip("\0 \n"):
        return None, "empty"
    try:
        config = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that there is not
        return None, "not YAML"
    parts: list[tuple[str, Callable[[Any], bool]]] = [
        ("model", _is_of_class),
        ("data", _is_of_class),
        ("trainer", lambda trainer: isinstance(trainer, dict) and {"callbacks", "logger"} <= trainer.keys()),
        ("seed_everything", lambda seed: isinstance(seed, (int, bool))),
    ]
    for name, fits in parts:
        if not isinstance(config, dict) or not fits(config.get(name)):
            return None, f"no {name}, or something else under that name"
    listed = config["trainer"]["callbacks"] or []
    if not isinstance(listed, (list, dict)) or not all(
        map(_is_of_class, listed if isinstance(listed, list) else [listed])
    ):
        return None, "trainer.callbacks are no classes"
    return config, ""


def _is_of_class(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and isinstance(part.get("class_path"), str)
        and isinstance(part.get("init_args", {}), dict)
    )


def _read_entry(checkpoint: Path, name: str) -> Any:
    """What a checkpoint holds under a name, None if it is damaged or holds none."""
    if not checkpoint.is_file():
        return None
    try:
        return read_checkpoint(checkpoint).get(name)
    except ValueError:
        return None
