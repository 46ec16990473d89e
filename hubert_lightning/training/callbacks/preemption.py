"""Checkpoint and exit on Ctrl-C, SIGTERM or SIGUSR1, after the step that all ranks are in."""

import os
import signal
import subprocess
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from hubert_lightning import interrupts
from hubert_lightning.interrupts import Interrupted
from hubert_lightning.training.checkpoints import LAST
from hubert_lightning.training.lightning_internals import ask_for_no_signals, leave_signals


class Preemption(Callback):
    """Saves `last.ckpt` and ends the process on Ctrl-C, SIGTERM or SIGUSR1; the same command resumes.

    SLURM and other schedulers send SIGTERM before they kill. On SIGUSR1, the job is also put back into the queue
    (`scontrol requeue`). A second signal ends the process at once. A validation is abandoned, since it may take longer
    than a cluster waits; the same command repeats it.

    Lightning's own handlers save in the middle of any operation, on each rank in another one. Here the ranks agree,
    every ten batches, whether one of them received a signal, and save after the same step.
    """

    def __init__(self) -> None:
        self._signals: interrupts.Interrupts | None = None
        self._own = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to signals, if the command line does not."""
        leave_signals(trainer)
        if interrupts.current() is None:  # as in a script that calls `Trainer.fit`
            self._own.enter_context(
                interrupts.listening(interrupts.SIGNALS, lambda name: f"{name}: ended before training")
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let signals wait for the end of a step from here on."""
        self._step = trainer.global_step
        self._signals = interrupts.current()
        if self._signals:
            self._signals.hold()
        ask_for_no_signals(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and exit after a step if a rank received a signal."""
        if trainer.global_step == self._step:  # in the middle of accumulating
            return
        self._step = trainer.global_step
        every = max(10 // trainer.accumulate_grad_batches, 1)  # the ranks' exchange waits for the GPU
        if number := self._received(trainer, exchange=self._step % every == 0):
            self._save_and_exit(trainer, number)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on the number of validation batches that every rank has."""
        if self._signals:
            self._signals.saving = "saving; the same command repeats this validation"
            batches = torch.tensor(sum(trainer.num_val_batches), device=trainer.strategy.root_device)
            if trainer.world_size > 1:
                dist.all_reduce(batches, dist.ReduceOp.MIN)
            self._common = int(batches)
            self._validated = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save and exit in the middle of a validation if a rank received a signal."""
        if self._signals:
            self._validated += 1
            if number := self._received(trainer, self._validated % 10 == 0 and self._validated <= self._common):
                self._save_and_exit(trainer, number)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._signals:
            self._signals.saving = interrupts.AFTER_STEP

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signals, self._signals = self._signals, None
        if signals:
            signals.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._own.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._signals:
            self._signals.drop()
        self._signals = None
        self._own.close()

    def _received(self, trainer: Trainer, exchange: bool) -> int:
        """Number of the signal that a rank received, 0 if none; several ranks know it only after an exchange."""
        number = self._signals.received if self._signals else 0
        if trainer.world_size == 1:
            return number
        if not exchange:
            return 0
        received = torch.tensor(number, device=trainer.strategy.root_device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        return int(received)

    def _save_and_exit(self, trainer: Trainer, number: int) -> NoReturn:
        trainer.save_checkpoint(os.path.join(trainer.default_root_dir, LAST), weights_only=False)
        if trainer.is_global_zero:
            if self._signals:
                name = interrupts.name_of(number)
                self._signals.show(f"{name}: saved at step {self._step}; the same command resumes")
            if number == signal.SIGUSR1 and (job := _slurm_job()):
                subprocess.run(["scontrol", "requeue", job], check=False)
        raise Interrupted(number)


def _slurm_job() -> str | None:
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")
