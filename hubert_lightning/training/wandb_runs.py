"""What W&B gets of a run beside its metrics and settings: group and job type, axes, best values, files and alerts.

The package does not import `wandb`: a WandbLogger brings it. Other loggers get the metrics and the settings alone.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.files import read_regular
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.load import KMEANS_FILE
from hubert_lightning.training.iterations import parts_of
from hubert_lightning.training.run_config import SWEEP, TRIAL, listed, loggers_of
from hubert_lightning.training.run_folder import CONFIG

log = logging.getLogger(__name__)

STEP = "trainer/global_step"
"""Name under which a WandbLogger logs the optimizer step, counted from 0."""
BEST: dict[str, Literal["min", "max"]] = {
    "train/loss": "min",
    "val/loss": "min",
    "val/masked_loss": "min",
    "val/masked_accuracy": "max",
    "val/unmasked_accuracy": "max",
    "val/wer": "min",
    "val/cer": "min",
    "layers/best_pnmi": "max",
    "units/predicted_perplexity": "max",
    "speed/audio_seconds_per_second": "max",
    "speed/mfu": "max",
    "speed/memory_gib": "max",
}
"""Metrics whose best value the summary holds beside the last: `val/wer.min`, `val/masked_accuracy.max`."""
JOB_TYPES = {"HubertPretraining": "pretrain", "CTCFinetuning": "finetune"}

Level = Literal["INFO", "WARN", "ERROR"]


def is_wandb(logger: Logger) -> bool:
    """Return whether a logger is W&B's, or has its methods."""
    return hasattr(logger, "log_table")


def own_folder(config: Namespace) -> None:
    """Give a trial of a W&B sweep a folder of its own in the output: its id, by which it also resumes.

    Raises:
        UserError: The trial has several iterations, each of which would need a run of its own.
    """
    if not os.environ.get(SWEEP):
        return
    if (number := sum(1 for _ in parts_of(config.iterations))) > 1:
        raise UserError(
            f"{number} iterations in a trial of a W&B sweep, which is one run; sweep one iteration, "
            "with the labels of a run before it (data.init_args.labels, or features of a checkpoint)"
        )
    trial = os.environ.get(TRIAL, "")
    if Path(config.output).name != trial:
        config.output = str(Path(config.output) / trial)


def name_group(config: Namespace) -> None:
    """Name W&B's run and group for the folder of the command, unless the config names them.

    A trial of a sweep keeps the name and the id that the sweep gives it.
    """
    recipe, sweeps = Path(config.output).name, bool(os.environ.get(SWEEP))
    for logger in _wandb_settings(config):
        logger.group = logger.group or logger.name or recipe
        logger.name = None if sweeps else logger.name or recipe


def describe_run(config: Namespace, number: int | None) -> None:
    """Add W&B's job type and tags of a fit: the task, the iteration, and what its labels are clusters of.

    Args:
        config: Config of the run.
        number: Number of its iteration, None if there is only one.
    """
    job = JOB_TYPES.get(config.model.class_path.rsplit(".", 1)[-1], "fit")
    relabel = [callback for callback in listed(config.trainer.callbacks) if callback.class_path.endswith("Relabel")]
    tags = [job]
    if number is not None:
        tags.append(f"iteration {number}")
    for labels in (callback.get("init_args", {}) for callback in relabel):
        layer = labels.get("layer")
        tags.append("mfcc labels" if layer is None else f"layer {layer} labels")
    for logger in _wandb_settings(config):
        logger.job_type = logger.job_type or job
        logger.tags = list(dict.fromkeys([*(logger.tags or ()), *tags]))


def _wandb_settings(config: Namespace) -> list[Namespace]:
    loggers = loggers_of(config)
    return [logger.init_args for logger in loggers if logger.class_path.endswith(WandbLogger.__name__)]


def start_run(trainer: Trainer) -> None:
    """Define the axes and best values of a fit's metrics, and keep its config and K-means as artifacts."""
    folder = Path(trainer.default_root_dir)
    for run in _runs(trainer):
        for name, best in BEST.items():
            run.define_metric(name, step_metric=STEP, summary=f"{best},last")
        run.define_metric("labels/kmeans_round", hidden=True)
        run.define_metric("labels/kmeans_inertia*", step_metric="labels/kmeans_round")
        if (folder / CONFIG).exists():
            with TemporaryDirectory() as copy:
                path = Path(copy) / CONFIG
                path.write_text(config_as_built(folder / CONFIG, trainer.lightning_module))
                run.log_artifact(str(path), name=f"config-{run.id}", type="config")
        if (folder / KMEANS_FILE).exists():
            run.log_artifact(str(folder / KMEANS_FILE), name=f"kmeans-{run.id}", type="kmeans")


def config_as_built(path: Path, model: Any) -> str:
    """Return a run's config with the encoder as it was built: the config of a fine-tuning run need not state it.

    Args:
        path: The run's config.yaml.
        model: Task of the run.
    """
    config = yaml.safe_load(read_regular(path))
    arguments, encoder = config["model"].get("init_args") or {}, getattr(model, "encoder", None)
    if "encoder" in arguments and isinstance(encoder, HubertEncoder):
        arguments["encoder"] = asdict(encoder.config)
    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def log_labelling(trainer: Trainer, made: Mapping[str, Any]) -> None:
    """Log to all loggers how the labels of a run were made: K-means rounds, time and speed.

    Args:
        trainer: Trainer whose fit starts.
        made: Content of labelling.json.
    """
    streams = [stream.get("inertia") or [] for stream in made.get("streams") or []]
    for logger in trainer.loggers:
        for number, inertias in enumerate(streams, start=1):
            name = "labels/kmeans_inertia" if len(streams) == 1 else f"labels/kmeans_inertia_{number}"
            for kmeans_round, inertia in enumerate(inertias, start=1):
                values = {"labels/kmeans_round": float(kmeans_round), name: inertia}
                logger.log_metrics(values, step=None if is_wandb(logger) else kmeans_round - 1)
        numbers = {f"labels/{name}": made[name] for name in ("seconds", "hours", "hours_per_hour") if name in made}
        if numbers:
            logger.log_metrics(numbers, step=0)


def log_once(logger: WandbLogger, logged: Mapping[int, set[str]]) -> None:
    """Let a WandbLogger leave out metrics that its run has already: those of steps that a resumed fit repeats.

    Args:
        logger: Logger of a run that resumes.
        logged: Names of the metrics that were logged, by step.
    """
    log_metrics = logger.log_metrics

    def log_new(metrics: Mapping[str, Any], step: int | None = None) -> None:
        known = logged.get(step, set()) if step is not None else set()
        validated = any(name.startswith("val/") for name in known)  # and its pictures are there, which no table has
        new = {
            name: value
            for name, value in metrics.items()
            if name not in known and (isinstance(value, (int, float, Tensor)) or not validated)
        }
        if not known or new.keys() - {"epoch"}:
            log_metrics(new, step)

    logger.log_metrics = log_new  # type: ignore[method-assign]  # W&B cannot replace rows of a run


def alert(trainer: Trainer, title: str, text: str, level: Level = "WARN") -> None:
    """Send an alert to those who watch a run in W&B.

    Args:
        trainer: Trainer of the run.
        title: Kind of the event; W&B sends one alert of a title in a minute.
        text: Sentence that says what happened, and what to do.
        level: Importance.
    """
    for run in _runs(trainer):
        run.alert(title=title, text=text, level=level)


def warn(trainer: Trainer, title: str, text: str) -> None:
    """Print a warning, and send it as an alert."""
    log.warning(text)
    alert(trainer, title, text)


def mark_preempted(trainer: Trainer) -> None:
    """Tell W&B that the run will resume, so that a sweep queues its trial again."""
    for run in _runs(trainer):
        run.mark_preempting()


def _runs(trainer: Trainer) -> list[Any]:
    """W&B's runs of a Trainer, on rank 0; their class is W&B's."""
    return [logger.experiment for logger in trainer.loggers if is_wandb(logger)] if trainer.is_global_zero else []  # type: ignore[attr-defined]
