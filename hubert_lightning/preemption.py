"""A cluster that takes its machines back: the run is saved at the next step, and leaves."""

import os
import signal
import subprocess
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from hubert_lightning.checkpoints import LAST

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption(Callback):
    """Saves `last.ckpt` and ends the process when it is told to end; the same command goes on from there.

    SIGTERM is what SLURM and others send before they kill; on SIGUSR1, the job is also put back into the queue
    (`scontrol requeue`). Told twice, it ends at once. A validation is finished first.

    Lightning's own handlers save in the middle of whatever the process is doing, on each rank at another point. Here
    the ranks agree, every ten batches, whether one of them has been told, and save after the same step.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._told = 0
        self._step = trainer.global_step
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        # Lightning asks rank 0 before each batch whether it was told to end, and waits for the GPU to hear the answer
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # in the middle of accumulating
            return
        self._step = trainer.global_step
        told = self._told
        if trainer.world_size > 1:
            every = max(10 // trainer.accumulate_grad_batches, 1)  # asking waits for the GPU
            told = self._anyone_told(trainer) if self._step % every == 0 else 0
        if told:
            trainer.save_checkpoint(os.path.join(trainer.default_root_dir, LAST), weights_only=False)
            if trainer.is_global_zero:
                print(f"told to end ({signal.Signals(told).name}): saved after step {self._step}", flush=True)
                if told == signal.SIGUSR1 and (job := _slurm_job()):
                    subprocess.run(["scontrol", "requeue", job], check=False)
            raise SystemExit(128 + told)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._told:  # again: whoever says so does not want to wait for the step
            self._restore()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._told = number

    def _anyone_told(self, trainer: Trainer) -> int:
        told = torch.tensor(self._told, device=trainer.strategy.root_device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def _restore(self) -> None:
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)
        self._before = {}


def _slurm_job() -> str | None:
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")
