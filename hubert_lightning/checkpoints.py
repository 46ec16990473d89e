"""A run's state on disk: written whole or not at all, the newest good one found, and read by any number of ranks."""

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.lr_scheduler import LambdaLR

from hubert_lightning.files import replacing

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all; a `last.ckpt` that is replaced stays as `previous.ckpt`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Raises `ValueError` if the disk is full; what was saved before stays."""
        path = Path(path)
        with replacing(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # which torch makes another of, as when the disk is full
                    raise error.__context__ from None
                raise
            if path.name == LAST and path.exists():
                os.replace(path, path.with_name(PREVIOUS))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that can be read to its end; none if the run has not saved any.

    Raises:
        ValueError: There are some, but all are damaged.
    """
    there = [path for name in (LAST, PREVIOUS) if (path := folder / name).exists()]
    for path in there:
        if is_whole(path):
            return path
        log.warning("%s is damaged, and passed over; what it was is trained again", path)
    if there:
        raise ValueError(
            f"{there[0]}: damaged, and no other checkpoint of this run is whole; restore one, or remove "
            f"{' and '.join(path.name for path in there)} to start anew"
        )
    return None


def is_whole(path: Path) -> bool:
    """Whether every byte of a checkpoint is as it was written, by its checksums."""
    try:
        with zipfile.ZipFile(path) as records:
            return records.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


class WholeSteps(Callback):
    """Lets a checkpoint be one of whole optimiser steps, from which any number of ranks can go on.

    The Trainer counts the batches of one rank, and saves in the middle of accumulating, too, where gradients are lost.
    A checkpoint says of how many ranks its counts are, and counts the batches of finished steps alone, so that the
    sampler goes on behind those that all ranks together have trained on.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ranks"], checkpoint["accumulate"] = trainer.world_size, trainer.accumulate_grad_batches
        _count_whole_steps(checkpoint, trainer.accumulate_grad_batches, trainer.accumulate_grad_batches)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        ranks, accumulate = trainer.world_size, trainer.accumulate_grad_batches
        before = checkpoint.get("ranks", ranks), checkpoint.get("accumulate", accumulate)
        if before[0] * before[1] != ranks * accumulate:
            raise ValueError(
                f"the checkpoint is of steps of {before[0]} ranks x {before[1]} batches, not {ranks} x {accumulate}; "
                "keep the product by trainer.accumulate_grad_batches, or start another run from its encoder "
                "(model.init_args.pretrained)"
            )
        _count_whole_steps(checkpoint, before[1], accumulate)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the learning rate of the schedule, which has changed where a run is given more steps."""
        for config in trainer.lr_scheduler_configs:
            schedule = config.scheduler
            if isinstance(schedule, LambdaLR):
                groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
                for group, peak, factor in groups:
                    group["lr"] = peak * factor(schedule.last_epoch)


def _count_whole_steps(checkpoint: dict[str, Any], before: int, accumulate: int) -> None:
    """Count the batches of finished steps, of so many batches each; then of so many."""
    loops = checkpoint["loops"]["fit_loop"]
    counts = loops["epoch_loop.batch_progress"]
    total = counts["total"]
    rest = total["processed"] % before
    at_step_end = not rest and total["completed"] < total["processed"]
    if not rest and not at_step_end and counts["is_last_batch"]:
        # At the end of an epoch, the Trainer would go on in it; after its last batch, it begins the next
        at_step_end = True
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    for count in (total, counts["current"]):
        done = count["processed"] // before * accumulate
        count["ready"] = count["started"] = count["processed"] = done
        count["completed"] = done - at_step_end
