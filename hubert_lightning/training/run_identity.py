"""Whether a folder holds the run that a config describes, and whether that run is finished."""

import copy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning import Trainer

from hubert_lightning.errors import UserError
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.training.mixing import Mixing
from hubert_lightning.training.run_config import listed
from hubert_lightning.training.run_folder import (
    CONFIG,
    kept_config,
    kept_metrics,
    names_manifests,
    restore_config,
    saved_configs,
)
from hubert_lightning.training.task import CHANGEABLE_ON_RESUME
from hubert_lightning.units.label_recipe import is_auto, is_mfcc


def refuse_another_run(config: Namespace, parser: ArgumentParser) -> None:
    """Refuse a folder with checkpoints of another model, other data or other labels.

    A corrupt config in the folder is restored from a checkpoint.

    Args:
        config: Config of the run.
        parser: Parser of the config.

    Raises:
        UserError: The folder holds another run.
    """
    folder = Path(config.output)
    if not any(folder.glob("*.ckpt")):
        return  # nothing was trained here
    by_content = names_manifests(folder, config.data.class_path)
    requested = _identity(yaml.safe_load(parser.dump(config, skip_none=False)), by_content)
    difference = _first_difference(_identity(kept_config(folder), by_content), requested)
    if difference is None:
        return
    for checkpoint, saved in saved_configs(folder):
        if _first_difference(_identity(saved, by_content), requested) is None:
            restore_config(folder / CONFIG, f"another {difference} than its checkpoint", checkpoint)
            return
        break
    raise UserError(
        f"{folder}: already holds another run, which differs in {difference}; "
        "choose another --output, or remove that folder"
    )


def is_finished(config: Namespace) -> bool:
    """Whether all steps are done, or the run stopped early with no more steps to do than before."""
    metrics = kept_metrics(Path(config.output))
    if "stopped_early" in metrics:
        before, requested = metrics["max_steps"], config.trainer.max_steps
        return bool(before < 1 or 0 < requested <= before)
    return bool(0 < config.trainer.max_steps <= metrics.get("steps", 0))


def finished_sentence(config: Namespace, output: Path) -> str:
    """Explain why a fit does nothing.

    Args:
        config: Config of the last run.
        output: Folder of the command.
    """
    if reason := kept_metrics(Path(config.output)).get("stopped_early"):
        return (
            f"{output}: finished already, stopped early ({reason}); to resume, raise max_steps, and the patience of "
            "EarlyStopping or leave it out; for a new run choose another --output"
        )
    return f"{output}: finished already (metrics.json); for a new run choose another --output"


def early_stop(trainer: Trainer) -> str | None:
    """The reason that EarlyStopping gives, if it ended the run."""
    done = 0 < trainer.max_steps <= trainer.global_step
    if done or not trainer.should_stop:
        return None
    reasons = [callback.stopping_reason_message for callback in trainer.early_stopping_callbacks]
    return next((" ".join(reason.split()) for reason in reasons if reason), None)


def _identity(config: dict[str, Any], by_content: bool) -> dict[str, Any]:
    """The options that determine the result of a run: all but those for hardware, speed and logging.

    Args:
        config: Config of the run.
        by_content: Whether checkpoints identify manifests and labels by content, so that their paths may change.

    Returns:
        The part that two configs of one run have in common.
    """
    callbacks = listed(config["trainer"]["callbacks"])
    relabel = [
        dict(callback.get("init_args", {})) for callback in callbacks if callback["class_path"].endswith("Relabel")
    ]
    for labels in relabel:
        # The path of a checkpoint moves with the run; Relabel compares its content
        features = listed(labels.get("features", ""))
        labels["features"] = [name if is_mfcc(name) else "a checkpoint" for name in features]
        if labels.get("residual") == 1:  # which configs of earlier versions lack
            labels.pop("residual")
        if labels.get("continues"):
            labels["continues"] = "a run"  # likewise
        if labels.get("quantizer"):
            labels["quantizer"] = "a file"  # likewise
    identity: dict[str, Any] = {key: copy.deepcopy(config.get(key)) for key in ("seed_everything", "model", "data")}
    model, data = identity["model"]["init_args"], identity["data"]["init_args"]
    if any(is_auto(labels.get("clusters")) for labels in relabel):
        model.pop("num_clusters", None)  # which is chosen after the run begins
    # Configs of earlier versions lack these options, whose defaults change nothing
    model["encoder"] = _with_defaults(EncoderConfig(), model.get("encoder"))
    if config["data"]["class_path"].endswith(("PretrainingData", "TranscribedData")):
        data["mixing"] = _with_defaults(Mixing(), data.get("mixing"))
    for option in CHANGEABLE_ON_RESUME:
        model.pop(option, None)
    for option in ("test", *(("train", "validation", "weights", "labels") if by_content else ())):
        data.pop(option, None)
    if model.get("warmup_steps") is not None:
        model.pop("warmup", None)  # the share that this number replaces
    if model.get("pretrained"):
        model["pretrained"] = "a checkpoint"  # its path may change, like that of the features
    return identity | {"labels": relabel[0] if relabel else None}


def _with_defaults(default: EncoderConfig | Mixing, given: dict[str, Any] | None) -> dict[str, Any]:
    """Return options with the defaults of those that are not given, as YAML has them."""
    values = asdict(default) | (given or {})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _first_difference(kept: dict[str, Any], requested: dict[str, Any]) -> str | None:
    return next((difference for key in kept for difference in _differences(kept[key], requested[key], key)), None)


def _differences(kept: Any, requested: Any, key: str) -> Iterator[str]:  # Any: values of YAML
    if isinstance(kept, dict) and isinstance(requested, dict):
        for name in sorted(kept.keys() | requested.keys()):
            unused = name not in kept and not requested[name]  # an option that the kept config does not know
            if name != "num_workers" and not unused:
                yield from _differences(kept.get(name), requested.get(name), f"{key}.{name}")
    elif kept != requested:
        yield f"{key} ({kept} there, {requested} here)"
