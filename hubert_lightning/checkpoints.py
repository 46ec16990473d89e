"""A run's state on disk: written whole or not at all, the newest good one found, and read by any number of ranks."""

import logging
import os
import zipfile
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hubert_lightning.averaging import save_tensors, write_average
from hubert_lightning.files import also_named, replacing
from hubert_lightning.ranks import on_rank_zero

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
BEST, AVERAGE = "best.ckpt", "average.ckpt"


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all; a `last.ckpt` that is replaced stays as `previous.ckpt`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Raises `ValueError` if the disk is full; what was saved before stays."""
        path = Path(path)
        with replacing(path) as file:
            save_tensors(checkpoint, file)
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
        for stopping in trainer.early_stopping_callbacks:
            if state := checkpoint.get("callbacks", {}).get(stopping.state_key):
                # Whoever goes on from where it stopped has asked for more, and may be more patient
                state |= {"patience": stopping.patience, "stopping_reason_message": None}

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


class BestCheckpoints(ModelCheckpoint):
    """Keeps the best few checkpoints of a run by what validation finds, and in the end the mean of their weights.

    They are called `best-<step>.ckpt`; `best.ckpt` is at every moment the best of them, and takes no room of its own.
    When the fit ends, their mean is `average.ckpt`: for `hubert test --ckpt_path`, or to fine-tune from. Where what is
    monitored is not finite, nothing is kept.

    Args:
        keep: How many.
        monitor: A metric of validation.
        mode: Whether the smallest or the largest is the best.
        dirpath: Where they go; the run's folder if not given.
    """

    def __init__(
        self,
        keep: int = 5,
        monitor: str = "val/wer",
        mode: Literal["min", "max"] = "min",
        dirpath: Path | None = None,
    ) -> None:
        if not 1 <= keep <= 10**6:
            raise ValueError(f"BestCheckpoints: keep is {keep}; keep one or more, or leave the callback out")
        super().__init__(
            dirpath=None if dirpath is None else str(dirpath),
            filename="best-{step}",
            monitor=monitor,
            mode=mode,
            save_top_k=keep,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The files are looked for where the run's folder is, which may be moved."""
        paths = ("best_model_path", "kth_best_model_path")
        moved: dict[str, Any] = {name: self._here(state_dict[name]) for name in paths}
        moved["best_k_models"] = {self._here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | moved | {"dirpath": self.dirpath})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._take_stock(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not `on_train_end`, which does not come where nothing was left to train."""
        self._take_stock(trainer)
        if not self.best_k_models:
            return
        kept = [Path(path) for path in self.best_k_models]
        out = Path(self._here(AVERAGE))
        on_rank_zero(trainer, lambda: write_average(kept, out))
        scores = ", ".join(f"{path.name} ({float(self.best_k_models[str(path)]):.4f})" for path in kept)
        rank_zero_info(f"{out}: the mean of the best by {self.monitor}, {scores}")

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        if current is None:
            return False
        if not trainer.strategy.reduce_boolean_decision(bool(current.isfinite())):
            rank_zero_warn(f"step {trainer.global_step}: {self.monitor} is {float(current)}; this model is not kept")
            return False
        return super().check_monitor_top_k(trainer, current)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor not in monitor_candidates:
            there = ", ".join(name for name in monitor_candidates if name.startswith("val/")) or "nothing"
            raise ValueError(f"BestCheckpoints: validation finds {there}, but no {self.monitor}; correct its monitor")
        super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        # Of a step that is validated again, after a restart: it must not push out another
        self.best_k_models.pop(self.format_checkpoint_name(monitor_candidates), None)
        super()._update_best_and_save(current, trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if filepath == self.best_model_path:
            self._name_best(trainer)

    def _take_stock(self, trainer: Trainer) -> None:
        """Know what is there: files may have been removed, or fewer are to be kept, since the state was saved."""
        there = on_rank_zero(trainer, lambda: [path for path in self.best_k_models if os.path.isfile(path)])
        there.sort(key=lambda path: float(self.best_k_models[path]), reverse=self.mode == "max")
        kept, others = there[: self.save_top_k], there[self.save_top_k :]
        self.best_k_models = {path: self.best_k_models[path] for path in kept}
        self.best_model_path, self.kth_best_model_path = (kept[0], kept[-1]) if kept else ("", "")
        self.best_model_score = self.best_k_models.get(self.best_model_path)
        if kept:
            self.kth_value = self.best_k_models[self.kth_best_model_path]
            self._name_best(trainer)
        for path in others:
            self._remove_checkpoint(trainer, path)

    def _name_best(self, trainer: Trainer) -> None:
        best, name = Path(self.best_model_path), Path(self._here(BEST))
        on_rank_zero(trainer, lambda: also_named(best, name))

    def _here(self, path: str) -> str:
        return os.path.join(self.dirpath or "", os.path.basename(path)) if path else ""
