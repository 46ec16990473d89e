"""The best few checkpoints of a run by a validation metric, and the mean of their weights."""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.files import also_named
from hubert_lightning.training.averaging import write_average
from hubert_lightning.training.checkpoints import AVERAGE, BEST
from hubert_lightning.training.distributed import on_rank_zero


class BestCheckpoints(ModelCheckpoint):
    """Keeps the best few checkpoints of a run by a validation metric, and at the end the mean of their weights.

    They are called `best-<step>.ckpt`. `best.ckpt` is always the best of them and takes no room of its own. When the
    fit ends, `average.ckpt` holds their mean: for `hubert test --ckpt_path`, or to fine-tune from. Where the metric is
    NaN or infinite, no checkpoint is kept.

    Lightning's ModelCheckpoint keeps models whose metric is NaN and loses track of its files when they are moved or
    removed. After a repeated validation it removes another model, and it has no `best.ckpt`.

    Args:
        keep: Number of checkpoints to keep.
        monitor: Validation metric.
        mode: Whether the smallest ("min") or the largest ("max") value is the best.
        dirpath: Folder of the checkpoints; the run's output folder if not given.
    """

    def __init__(
        self,
        keep: int = 5,
        monitor: str = "val/wer",
        mode: Literal["min", "max"] = "min",
        dirpath: Path | None = None,
    ) -> None:
        if not 1 <= keep <= 10**6:
            raise UserError(f"BestCheckpoints: keep is {keep}; keep one or more, or remove the callback")
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
        """Restore scores, and paths in the present output folder, which may have been moved."""
        paths = ("best_model_path", "kth_best_model_path")
        moved: dict[str, Any] = {name: self._here(state_dict[name]) for name in paths}
        moved["best_k_models"] = {self._here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | moved | {"dirpath": self.dirpath})
        self.current_score = state_dict["current_score"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the checkpoints that exist."""
        super().on_train_start(trainer, pl_module)
        self._take_stock(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the model if it is among the best.

        Raises:
            UserError: Validation logs no such metric.
        """
        judged = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        metrics = trainer.callback_metrics
        is_trial = trainer.fast_dev_run  # type: ignore[attr-defined]  # Lightning does not declare it
        if judged and self.monitor not in metrics and not is_trial:
            names = ", ".join(name for name in metrics if name.startswith("val/")) or "nothing"
            raise UserError(f"BestCheckpoints: validation logs {names}, but no {self.monitor}; correct its monitor")
        super().on_validation_end(trainer, pl_module)
        if judged and self.best_model_path == self._path_of_step(trainer):
            self._name_best(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the mean; not in `on_train_end`, which Lightning skips if no step was left to train."""
        self._take_stock(trainer)
        if not self.best_k_models:
            return
        kept = [Path(path) for path in self.best_k_models]
        out = Path(self._here(AVERAGE))
        on_rank_zero(trainer, lambda: write_average(kept, out))
        scores = ", ".join(f"{path.name} ({float(self.best_k_models[str(path)]):.4f})" for path in kept)
        rank_zero_info(f"{out}: the mean of the best by {self.monitor}, {scores}")

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether the model of this step is finite in the metric and among the best."""
        if current is None:
            return False
        if not trainer.strategy.reduce_boolean_decision(bool(current.isfinite())):
            rank_zero_warn(f"step {trainer.global_step}: {self.monitor} is {float(current)}; this model is not kept")
            return False
        if is_among_best := super().check_monitor_top_k(trainer, current):
            # A step that is validated again after a restart replaces itself, not another
            self.best_k_models.pop(self._path_of_step(trainer), None)
        return is_among_best

    def _path_of_step(self, trainer: Trainer) -> str:
        return self.format_checkpoint_name({"step": torch.tensor(trainer.global_step)})

    def _take_stock(self, trainer: Trainer) -> None:
        """Forget checkpoints that were removed, and remove those beyond `keep`, which may have changed."""
        files = on_rank_zero(trainer, lambda: [path for path in self.best_k_models if os.path.isfile(path)])
        files.sort(key=lambda path: float(self.best_k_models[path]), reverse=self.mode == "max")
        kept, others = files[: self.save_top_k], files[self.save_top_k :]
        self.best_k_models = {path: self.best_k_models[path] for path in kept}
        self.best_model_path = kept[0] if kept else ""
        self.best_model_score = self.best_k_models.get(self.best_model_path)
        self.kth_best_model_path = ""
        if len(kept) == self.save_top_k:  # of equally bad ones the first, as in an uninterrupted run
            self.kth_value = self.best_k_models[kept[-1]]
            self.kth_best_model_path = next(path for path in kept if self.best_k_models[path] == self.kth_value)
        if kept:
            self._name_best(trainer)
        for path in others:
            trainer.strategy.remove_checkpoint(path)

    def _name_best(self, trainer: Trainer) -> None:
        best, name = Path(self.best_model_path), Path(self._here(BEST))
        on_rank_zero(trainer, lambda: also_named(best, name))

    def _here(self, path: str) -> str:
        return os.path.join(self.dirpath or "", os.path.basename(path)) if path else ""
