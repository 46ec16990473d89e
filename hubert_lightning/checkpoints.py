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


class Ranks(Callback):
    """Lets a run go on with another number of ranks.

    The Trainer counts batches of one rank. The checkpoint says of how many, and its counts are converted, so that the
    sampler goes on behind the batches that all ranks together have trained on.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ranks"] = trainer.world_size

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        before, ranks = checkpoint.get("ranks", trainer.world_size), trainer.world_size
        if before == ranks:
            return
        accumulate = trainer.accumulate_grad_batches
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            # A multiple of what makes a step: all of them, unless the global batch has another size, too
            done = counts[part]["processed"] * before // ranks // accumulate * accumulate
            behind = counts[part]["completed"] - counts[part]["processed"]  # 1 if saved at the end of a batch
            for name in ("ready", "started", "processed"):
                counts[part][name] = done
            counts[part]["completed"] = done + behind
