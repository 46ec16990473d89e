"""LightningCLI for the two tasks: one YAML, one run folder, one or several iterations.

A fit that lists iterations is taken apart into fits of one iteration each. Each has a folder of its own
(`iteration1`, `iteration2`, …) with the config that would run it alone, its labels, and its checkpoint, from which the
next one takes its labels. What is finished is not done again: the same command goes on where it was interrupted.
"""

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger


@dataclass(frozen=True)
class Iteration:
    """One round of pre-training: what its labels are clusters of, and how long it lasts.

    Args:
        features: "mfcc", "previous" (the model of the iteration before), or a checkpoint.
        layer: Which Transformer layer of that model is clustered, counted from 1.
        clusters: Number of K-means clusters.
        max_frames: Frames that K-means is fitted on.
        max_steps: Optimiser steps.
    """

    features: str = "mfcc"
    layer: int | None = None
    clusters: int = 100
    max_frames: int = 300_000
    max_steps: int = 250_000


class SaveRunConfig(SaveConfigCallback):
    """Keeps the config in the run's folder, where the next command looks for it."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)


class HubertCLI(LightningCLI):
    """`hubert fit|validate|test|predict`: any of our models with its data, in subclass mode."""

    def __init__(self, args: ArgsType) -> None:
        with warnings.catch_warnings():
            # `main(args)` passes on what was typed; Lightning warns that somebody typed something
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().__init__(
                LightningModule,
                LightningDataModule,
                save_config_callback=SaveRunConfig,
                save_config_kwargs={"save_to_log_dir": False},
                trainer_defaults={"use_distributed_sampler": False},  # our batches are dealt to ranks already
                seed_everything_default=0,
                subclass_mode_model=True,
                subclass_mode_data=True,
                parser_kwargs={"prog": "hubert"},
                args=args,
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, default="checkpoints/run", help="The run's folder.")
        parser.add_argument("--iterations", type=list[Iteration], default=[], help="Rounds of pre-training, in order.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.save_last": True,
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        if path := config.get("ckpt_path"):
            _check_kind(Path(path), config.model.class_path)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        config.weights_only = True  # a checkpoint is data, never code
        if self.subcommand == "fit":
            if config.iterations:
                config = self._fit_all_but_last(config)
            _settle(config)
            self._claim(config)
        else:
            _settle(config)
            config.ckpt_path = config.ckpt_path or _newest_checkpoint(Path(config.output))
        self.config[self.subcommand] = config

    def _fit_all_but_last(self, config: Namespace) -> Namespace:
        *earlier, last = _single_iterations(config)
        for iteration in earlier:
            if not _finished(iteration):
                HubertCLI(Namespace(subcommand="fit", fit=iteration))
        if _finished(last):
            print(f"{config.output}: every iteration is finished; see its metrics.json files")
            raise SystemExit(0)
        return last

    def _claim(self, config: Namespace) -> None:
        """Go on with the run that the folder holds if it is the same one.

        Raises:
            ValueError: The folder holds another run.
        """
        folder = Path(config.output)
        if not any(folder.glob("*.ckpt")):
            return  # nothing was trained here; labels know by themselves what they are of
        if not (folder / "config.yaml").exists():
            raise ValueError(f"{folder}: holds checkpoints of something else (no config.yaml); choose another --output")
        kept = yaml.safe_load((folder / "config.yaml").read_text())
        asked = yaml.safe_load(self._parser("fit").dump(config, skip_none=False))
        for key in ("seed_everything", "model", "data"):
            if difference := next(_differences(kept.get(key), asked.get(key), key), None):
                raise ValueError(
                    f"{folder}: already holds another run, which differs in {difference}; "
                    "choose another --output, or remove that folder"
                )
        if (folder / "last.ckpt").exists() and not config.ckpt_path:
            config.ckpt_path = str(folder / "last.ckpt")

    def after_test(self) -> None:
        if self.trainer.is_global_zero:
            _write_metrics(self.trainer, "test-metrics.json")

    def after_fit(self) -> None:
        trainer = self.trainer
        if trainer.interrupted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt")
        if trainer.is_global_zero:
            _write_metrics(trainer, "metrics.json")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.experiment.finish()  # the next iteration is a run of its own


def _single_iterations(config: Namespace) -> Iterator[Namespace]:
    """The fits of one iteration each that a fit of several consists of."""
    for number, iteration in enumerate(config.iterations, start=1):
        one = copy.deepcopy(config)
        one.pop("config", None)
        one.iterations = []
        one.output = str(Path(config.output) / f"iteration{number}")
        features = iteration.features
        if features == "previous":
            if number == 1:
                raise ValueError("iterations[0].features is 'previous', but nothing precedes it; say 'mfcc' or a path")
            features = str(Path(config.output) / f"iteration{number - 1}" / "last.ckpt")
        relabel = {
            "features": features,
            "layer": iteration.layer,
            "clusters": iteration.clusters,
            "max_frames": iteration.max_frames,
            "seed": config.seed_everything,
        }
        callbacks = one.trainer.callbacks or []
        one.trainer.callbacks = [
            *callbacks,
            Namespace(class_path="hubert_lightning.Relabel", init_args=Namespace(relabel)),
        ]
        one.trainer.max_steps = iteration.max_steps
        one.model.init_args.num_clusters = iteration.clusters
        for logger in _loggers(one):
            if logger.init_args.get("name"):
                logger.init_args.name += f"-iteration{number}"
        yield one


def _settle(config: Namespace) -> None:
    """Everything that a run writes goes to its folder."""
    config.trainer.default_root_dir = config.output
    config.checkpoint.dirpath = config.output
    for logger in _loggers(config):
        logger.init_args.save_dir = config.output


def _loggers(config: Namespace) -> list[Namespace]:
    logger = config.trainer.logger
    loggers = logger if isinstance(logger, list) else [logger]
    return [logger for logger in loggers if isinstance(logger, Namespace)]


def _finished(config: Namespace) -> bool:
    return (Path(config.output) / "metrics.json").exists()


def _newest_checkpoint(folder: Path) -> str:
    for name in ("best.ckpt", "last.ckpt"):
        if (folder / name).exists():
            return str(folder / name)
    raise ValueError(f"{folder}: holds no best.ckpt or last.ckpt; fit first, or name a checkpoint with --ckpt_path")


def _check_kind(path: Path, class_path: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; correct --ckpt_path")
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("hyper_parameters", {})
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint ({error}); choose another --ckpt_path") from error
    kind = kept.get("_class_path", class_path)
    if kind.rsplit(".", 1)[-1] != class_path.rsplit(".", 1)[-1]:
        raise ValueError(
            f"{path}: a checkpoint of {kind}, not of {class_path}; to fine-tune a pre-trained model, name it in "
            "model.init_args.pretrained, not in --ckpt_path"
        )


def _write_metrics(trainer: Trainer, name: str) -> None:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    path = Path(trainer.default_root_dir) / name
    path.write_text(json.dumps(metrics | {"steps": trainer.global_step}, indent=2) + "\n")


def _differences(kept: Any, asked: Any, key: str) -> Iterator[str]:
    if isinstance(kept, dict) and isinstance(asked, dict):
        for name in sorted(kept.keys() | asked.keys()):
            if name not in ("num_workers", "labels"):
                yield from _differences(kept.get(name), asked.get(name), f"{key}.{name}")
    elif kept != asked:
        yield f"{key} ({kept} there, {asked} here)"
