"""A run's state on disk: written whole or not at all, the newest good one found, and read by any number of ranks."""

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO

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
            torch.save(checkpoint, file)
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
        checkpoint["ranks"] = trainer.world_size
        _count_whole_steps(checkpoint, trainer.accumulate_grad_batches)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        before = checkpoint.get("ranks", trainer.world_size)
        # If the global batch has another size, too, there may be a rest, which is trained on again
        _count_whole_steps(checkpoint, trainer.accumulate_grad_batches, before / trainer.world_size)


def _count_whole_steps(checkpoint: dict[str, Any], accumulate: int, factor: float = 1.0) -> None:
    counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for count in (counts["total"], counts["current"]):
        done = round(count["processed"] * factor)
        rest = done % accumulate
        ended = rest or count["completed"] == count["processed"]  # or saved at the end of the step's last batch
        count["ready"] = count["started"] = count["processed"] = done - rest
        count["completed"] = done - rest - (not ended)
