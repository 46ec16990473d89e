"""A run's state on disk: written whole or not at all, the newest good one found, and read by any number of ranks."""

import csv
import io
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hubert_lightning.errors import UserError
from hubert_lightning.files import also_named, check_regular, replacing, sync_folder, unfinished_name, write_whole
from hubert_lightning.pretrained.formats.own import read_checkpoint, save_tensors
from hubert_lightning.training.averaging import first_not_finite, write_average
from hubert_lightning.training.distributed import on_rank_zero
from hubert_lightning.untrusted.file_kind import has_zip_directory, is_whole_zip

log = logging.getLogger(__name__)

LONGEST_ROW = 2**16
"""Bytes that a row of metrics.csv may have."""
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
BEST, AVERAGE = "best.ckpt", "average.ckpt"


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all; a `last.ckpt` that is replaced stays as `previous.ckpt`.

    `previous.ckpt` is replaced last, when the new `last.ckpt` is on the disk: at every moment one of the two is sound.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Raises `UserError` if the disk is full; what was saved before stays."""
        path = Path(path)
        if path.name != LAST:
            with replacing(path) as file:
                save_tensors(checkpoint, file)
            return
        new, before = unfinished_name(path), unfinished_name(path)
        try:
            with replacing(new) as file:
                save_tensors(checkpoint, file)
        except ValueError as error:
            raise UserError(str(error).replace(str(new), str(path), 1)) from error
        try:
            if path.exists() and not has_zip_directory(path):
                set_aside(path)
            linked = path.exists() and _linked(path, before)
            if path.exists() and not linked:  # without links, it loses its name first: it must be sound
                os.replace(path, path.with_name(PREVIOUS)) if is_whole_zip(path) else set_aside(path)
            os.replace(new, path)
            sync_folder(path.parent)
            if linked:
                os.replace(before, path.with_name(PREVIOUS))
                sync_folder(path.parent)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be replaced ({error.strerror}); what was saved before is kept, so correct that and "
                "run the same command again"
            ) from error
        finally:
            for name in (new, before):
                with suppress(OSError):
                    name.unlink(missing_ok=True)


def _linked(path: Path, name: Path) -> bool:
    """Whether a file could be given a second name, which some disks do not allow."""
    try:
        os.link(path, name)
    except OSError:
        return False
    return True


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which no command reads it."""
    aside = path.with_name(f"{path.name}.damaged")
    os.replace(path, aside)
    sync_folder(path.parent)
    return aside


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest sound checkpoint of a run; none if the run has not saved any.

    A checkpoint is sound if every byte is as it was written and every weight is finite.

    Raises:
        UserError: There are some, but none is sound.
    """
    there = [path for name in (LAST, PREVIOUS) if (path := folder / name).exists()]
    for path in there:
        if (reason := _unsound(path)) is None:
            return path
        log.warning("%s is %s, and passed over; what it was is trained again", path, reason)
    if there:
        raise UserError(
            f"{there[0]}: damaged, and no other checkpoint of this run is whole; restore one, or remove "
            f"{' and '.join(path.name for path in there)} to start anew"
        )
    return None


def set_damaged_aside(folder: Path, newest: Path | None) -> None:
    """Rename a `last.ckpt` that was passed over, so that the next one does not make it `previous.ckpt`.

    Args:
        folder: Folder of the run.
        newest: Its newest sound checkpoint.

    Raises:
        UserError: The folder cannot be written to.
    """
    last = folder / LAST
    if newest is None or newest == last or not last.exists():
        return
    try:
        log.warning("%s is kept as %s", last, set_aside(last).name)
    except OSError as error:
        raise UserError(
            f"{last}: damaged, and cannot be renamed ({error.strerror}); make {folder} writable, and run the same "
            "command again"
        ) from error


def _unsound(path: Path) -> str | None:
    """Why training cannot go on from a checkpoint; None if it can."""
    if not is_whole_zip(path):
        return "damaged"
    try:
        state = read_checkpoint(path)["state_dict"]
    except ValueError:  # whole, and something else, which is said when it is read
        return None
    if name := first_not_finite(state):
        return f"not finite (its {name} is NaN or infinite)"
    return None


class WholeSteps(Callback):
    """Makes every checkpoint one of whole optimiser steps, from which any number of ranks resumes exactly.

    The Trainer counts the batches of one rank, and saves in the middle of accumulating, too, where gradients are lost,
    and before the validation that follows a step. A checkpoint here states the ranks that its counts belong to, counts
    the batches of finished steps alone, and states whether the validation of its last step is still due. A run that
    resumes begins with the end of that step: it validates if that is due, ends the epoch if that was its last step,
    then trains the next. So whatever a kill interrupted is repeated, at the end of a run, too: callbacks, metrics and
    the best checkpoints become those of a run that nothing interrupted. A restart costs one validation more at most,
    and no training step that was saved.

    Metrics are part of a checkpoint: those of a run that has nothing left to train come from there.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._step, self._resumed, self._due, self._ended = 0, False, False, False
        self._validated = -1  # batches of this rank at the last validation
        self._metrics: dict[str, float] = {}
        for stopping in trainer.early_stopping_callbacks:
            # After the validation, whose checkpoints are to hold its verdict, and not when the epoch ends thereupon
            if trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1:
                stopping._check_on_train_epoch_end &= not stopping.monitor.startswith("val/")  # type: ignore[operator]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ranks"], checkpoint["accumulate"] = trainer.world_size, trainer.accumulate_grad_batches
        checkpoint["validation_due"] = self._validation_due(trainer)
        checkpoint["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self._ended:
            checkpoint["ended_by"] = trainer.max_steps
        _count_whole_steps(checkpoint, trainer.accumulate_grad_batches, trainer.accumulate_grad_batches)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        ranks, accumulate = trainer.world_size, trainer.accumulate_grad_batches
        before = checkpoint.get("ranks", ranks), checkpoint.get("accumulate", accumulate)
        if before[0] * before[1] != ranks * accumulate:
            raise UserError(
                f"the checkpoint is of steps of {before[0]} ranks x {before[1]} batches, not {ranks} x {accumulate}; "
                "keep the product by trainer.accumulate_grad_batches, or start another run from its encoder "
                "(model.init_args.pretrained)"
            )
        batches = _count_whole_steps(checkpoint, before[1], accumulate)
        self._step, self._resumed = checkpoint["global_step"], batches > 0
        self._due = self._resumed and checkpoint.get("validation_due", False)
        self._validated = -1 if self._due else batches
        self._metrics = checkpoint.get("metrics", {})
        states = [checkpoint.get("callbacks", {}).get(of.state_key) for of in trainer.early_stopping_callbacks]
        if any(state and state["stopping_reason_message"] for state in states) and not _more_steps(trainer, checkpoint):
            trainer.should_stop = True  # it had stopped, and was killed before it had said so
        else:
            for stopping, state in zip(trainer.early_stopping_callbacks, states, strict=True):
                if state:  # more steps are asked for, and the patience may have changed
                    state |= {"patience": stopping.patience, "stopping_reason_message": None}
        if trainer.strategy.restore_checkpoint_after_setup:  # and after `on_fit_start`
            self._resume(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._resume(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the step of the checkpoint, and take the learning rate of the schedule.

        That has changed where a run is given more steps.
        """
        if self._resumed:
            self._finish_step(trainer)
        for config in trainer.lr_scheduler_configs:
            schedule = config.scheduler
            if isinstance(schedule, LambdaLR):
                groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
                for group, peak, factor in groups:
                    group["lr"] = peak * factor(schedule.last_epoch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = _batches(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = True

    def _validation_due(self, trainer: Trainer) -> bool:
        """Whether the Trainer is about to validate the step that it has just finished."""
        loop, batches = trainer.fit_loop.epoch_loop, _batches(trainer)
        if self._ended or not batches or batches == self._validated or loop._should_accumulate():
            return False
        return loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    def _resume(self, trainer: Trainer) -> None:
        """Restore what the Trainer does not, once its optimizers know how many steps there are."""
        metrics = {name: torch.tensor(value) for name, value in self._metrics.items()}
        trainer._logger_connector._callback_metrics.update(metrics)
        self._max_steps = trainer.max_steps
        if self._due and 0 < trainer.max_steps <= self._step:  # it would not even begin
            trainer.fit_loop.epoch_loop.max_steps = self._step + 1

    def _finish_step(self, trainer: Trainer) -> None:
        """Let the Trainer's first turn be the rest of the step that was saved, instead of another batch."""
        loop = trainer.fit_loop.epoch_loop

        def finish(data_fetcher: Any) -> None:
            del loop.advance
            loop.max_steps = self._max_steps
            loop._skip_next_val = not self._due

        loop.advance = finish  # type: ignore[method-assign]


def _batches(trainer: Trainer) -> int:
    """Batches that this rank has trained on since the first."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


def _more_steps(trainer: Trainer, checkpoint: dict[str, Any]) -> bool:
    """Whether more steps are asked for than when the run of a checkpoint ended; or it had not ended there."""
    before, asked = checkpoint.get("ended_by"), trainer.max_steps
    return before is None or (before > 0 and not 0 < asked <= before)


def _count_whole_steps(checkpoint: dict[str, Any], before: int, accumulate: int) -> int:
    """Let a checkpoint be one that is saved at the end of a step, before the epoch ends, if it does.

    Args:
        checkpoint: Is changed.
        before: Batches of a step, on each rank, as they are counted.
        accumulate: Batches of a step, as they are to be counted.

    Returns:
        Batches of whole steps since the first.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    batches["is_last_batch"] &= batches["total"]["processed"] % before == 0
    for count in (batches["total"], batches["current"]):
        count |= dict.fromkeys(count, count["processed"] // before * accumulate)
    for count in (epochs["total"], epochs["current"]):
        begun = count["started"]
        count |= {"ready": begun, "processed": max(begun - 1, 0), "completed": max(begun - 1, 0)}
    checkpoint["epoch"] = epochs["current"]["completed"]
    # Which the Trainer counts when the step is at its end
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = max(checkpoint["global_step"] - 1, 0)
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for name, count in optimizer["zero_grad"].items():  # that of a step that has begun is done again
        count |= dict.fromkeys(count, optimizer["step"][name]["completed"])
    validated = loops["epoch_loop.val_loop.batch_progress"]
    for count in (validated["total"], validated["current"]):
        count |= dict.fromkeys(count, 0)
    validated["is_last_batch"] = False
    return int(batches["total"]["processed"])


def keep_rows(logger: CSVLogger, checkpoint: dict[str, Any]) -> None:
    """Let the table of a CSVLogger, which begins anew at every start, go on after its rows up to a checkpoint.

    The row of the checkpoint's own step is missing if the run was killed between saving and logging it. The table is
    replaced whole; later, the CSVLogger itself rewrites it in place whenever a metric is logged for the first time.

    Args:
        logger: Logger that has logged nothing yet.
        checkpoint: Content of the checkpoint.

    Raises:
        UserError: The table cannot be read; or the disk is full, or cannot be written to.
    """
    table = Path(logger.log_dir) / ExperimentWriter.NAME_METRICS_FILE
    if rank_zero_only.rank or not table.exists():  # type: ignore[attr-defined]
        return
    check_regular(table)
    try:
        with table.open("rb") as file:
            read = list(csv.DictReader(_rows(file)))
    except (OSError, csv.Error) as error:
        raise UserError(f"{table}: cannot be read ({error}); move it away, and run the same command again") from error
    sound = [row for row in read if "\ufffd" not in str(row)]
    if len(sound) < len(read):
        log.warning("%s: %d damaged rows are left out", table, len(read) - len(sound))
    rows = [row for row in sound if (row.get("step") or "").isdecimal() and row["step"].isascii()]
    last = checkpoint["global_step"] - 1  # the Trainer counts from 0
    again = last if checkpoint.get("validation_due") else None
    kept = [row for row in rows if int(row["step"]) <= last and not (int(row["step"]) == again and _validated(row))]
    if kept:
        names = sorted({name for row in kept for name, value in row.items() if name and value})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        write_whole(table, text.getvalue().encode())
    else:
        names = []
        table.unlink()
    with TemporaryDirectory() as empty:  # in the table's own folder, it would remove the table
        experiment = ExperimentWriter(empty)
    experiment.log_dir, experiment.metrics_file_path = logger.log_dir, str(table)
    experiment.metrics_keys = names
    logger._experiment = experiment


def _rows(file: BinaryIO) -> Iterator[str]:
    while line := file.readline(LONGEST_ROW):
        if len(line) == LONGEST_ROW:
            raise csv.Error(f"a row of more than {LONGEST_ROW} bytes")
        yield line.decode(errors="replace")


def _validated(row: dict[str, str]) -> bool:
    return any(value and name.startswith("val/") for name, value in row.items())


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
            raise UserError(f"BestCheckpoints: keep is {keep}; keep one or more, or leave the callback out")
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
        self.current_score = state_dict["current_score"]

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
            raise UserError(f"BestCheckpoints: validation finds {there}, but no {self.monitor}; correct its monitor")
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
        self.best_model_path = kept[0] if kept else ""
        self.best_model_score = self.best_k_models.get(self.best_model_path)
        self.kth_best_model_path = ""
        if len(kept) == self.save_top_k:  # of those that are as bad the first, as in a run that nothing interrupts
            self.kth_value = self.best_k_models[kept[-1]]
            self.kth_best_model_path = next(path for path in kept if self.best_k_models[path] == self.kth_value)
        if kept:
            self._name_best(trainer)
        for path in others:
            self._remove_checkpoint(trainer, path)

    def _name_best(self, trainer: Trainer) -> None:
        best, name = Path(self.best_model_path), Path(self._here(BEST))
        on_rank_zero(trainer, lambda: also_named(best, name))

    def _here(self, path: str) -> str:
        return os.path.join(self.dirpath or "", os.path.basename(path)) if path else ""
