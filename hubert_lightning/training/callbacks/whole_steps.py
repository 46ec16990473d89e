"""Checkpoints at the end of whole optimizer steps, from which any number of ranks resumes exactly."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.lr_scheduler import LambdaLR

from hubert_lightning.errors import UserError
from hubert_lightning.training.lightning_internals import (
    batches_trained,
    begin_with_end_of_step,
    count_whole_steps,
    stop_after_validation,
    validation_follows,
)


class WholeSteps(Callback):
    """Changes checkpoints so that they hold whole optimizer steps, and any number of ranks resumes from them exactly.

    Lightning's Trainer counts the batches of one rank. It also saves between accumulated batches, whose gradients are
    then lost, and before the validation that follows a step. With this callback, a checkpoint counts only the batches
    of finished steps. It also holds the number of ranks, and whether the validation of its last step has still to run.
    A resumed run first finishes that step: it runs the missing validation, ends the epoch if it was the last step, and
    then trains the next step. So callbacks, metrics and best checkpoints are those of an uninterrupted run. A restart
    repeats at most one validation, and no saved training step.

    Checkpoints hold the metrics, so that a run without steps left to train can report them.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let EarlyStopping decide after a validation instead of at the end of the epoch.

        Then the checkpoints of that validation hold its decision.
        """
        self._step, self._resumed, self._due, self._ended = 0, False, False, False
        self._validated = -1  # batches of this rank at the last validation
        self._metrics: dict[str, float] = {}
        if trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1:
            for stopping in trainer.early_stopping_callbacks:
                if stopping.monitor.startswith("val/"):
                    stop_after_validation(stopping)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the number of ranks, the metrics and the pending validation, and count finished steps alone."""
        checkpoint["ranks"], checkpoint["accumulate"] = trainer.world_size, trainer.accumulate_grad_batches
        checkpoint["validation_due"] = self._validation_due(trainer)
        checkpoint["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self._ended:
            checkpoint["ended_by"] = trainer.max_steps
        count_whole_steps(checkpoint, trainer.accumulate_grad_batches, trainer.accumulate_grad_batches)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Convert the counts of a checkpoint to this number of ranks.

        Raises:
            UserError: A step has another number of batches, over all ranks, than in the checkpoint.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        ranks, accumulate = trainer.world_size, trainer.accumulate_grad_batches
        saved = checkpoint.get("ranks", ranks), checkpoint.get("accumulate", accumulate)
        if saved[0] * saved[1] != ranks * accumulate:
            raise UserError(
                f"a step of the checkpoint has {saved[0]} ranks x {saved[1]} batches, not {ranks} x {accumulate}; keep "
                "the product by trainer.accumulate_grad_batches, or start another run from its encoder "
                "(model.init_args.pretrained)"
            )
        batches = count_whole_steps(checkpoint, saved[1], accumulate)
        self._step, self._resumed = checkpoint["global_step"], batches > 0
        self._due = self._resumed and checkpoint.get("validation_due", False)
        self._validated = -1 if self._due else batches
        self._metrics = checkpoint.get("metrics", {})
        _resume_early_stopping(trainer, checkpoint)
        if trainer.strategy.restore_checkpoint_after_setup:  # then this hook comes after `on_fit_start`
            self._resume(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._resume(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the end of the checkpoint's step, and set the learning rate of the schedule.

        The schedule has changed if the run is given more steps.
        """
        if self._resumed:
            begin_with_end_of_step(trainer, validate=self._due, max_steps=self._max_steps)
        for config in trainer.lr_scheduler_configs:
            schedule = config.scheduler
            if isinstance(schedule, LambdaLR):
                groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
                for group, peak, factor in groups:
                    group["lr"] = peak * factor(schedule.last_epoch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = batches_trained(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = True

    def _validation_due(self, trainer: Trainer) -> bool:
        """Whether the Trainer is about to validate the step that it has just finished."""
        batches = batches_trained(trainer)
        return not self._ended and batches > 0 and batches != self._validated and validation_follows(trainer)

    def _resume(self, trainer: Trainer) -> None:
        """Restore metrics and a last validation, once the optimizers know how many steps there are."""
        # A property of the Trainer that returns its own dict
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._metrics.items()})
        self._max_steps = trainer.max_steps
        if self._due and 0 < trainer.max_steps <= self._step:  # otherwise the loop would not start
            trainer.fit_loop.epoch_loop.max_steps = self._step + 1


def _resume_early_stopping(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Stop again where EarlyStopping had stopped, unless more steps are asked for."""
    stoppings = trainer.early_stopping_callbacks
    states = [checkpoint.get("callbacks", {}).get(stopping.state_key) for stopping in stoppings]
    if any(state and state["stopping_reason_message"] for state in states) and not _more_steps(trainer, checkpoint):
        trainer.should_stop = True  # the run was killed before it could end
        return
    for stopping, state in zip(stoppings, states, strict=True):
        if state:  # the user may have changed the patience
            state |= {"patience": stopping.patience, "stopping_reason_message": None}


def _more_steps(trainer: Trainer, checkpoint: dict[str, Any]) -> bool:
    """Whether the run of a checkpoint had not ended, or had ended with fewer steps than this one asks for."""
    before, max_steps = checkpoint.get("ended_by"), trainer.max_steps
    return before is None or (before > 0 and not 0 < max_steps <= before)
