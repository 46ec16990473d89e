"""How fast training is, and what it waits for."""

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.throughput import get_available_flops

from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.training.lightning_internals import time_fetches


class Throughput(Callback):
    """Logs, of the steps since it last did:

    train/audio_seconds_per_second  audio that all ranks together trained on
    train/waste                     share of the audio that was cropped away (pre-training) or added as padding
    train/data_wait                 share of the time in which this rank waited for a batch from its workers
    train/mfu                       model FLOPs utilisation: operations of the model (`operations` of the task) a second
                                    as a share of what the device can do: by its maker's numbers, or on a processor that
                                    Lightning has none of, what a product of two matrices is measured to take

    Where a GPU works through a queue, the wait is the host's, so it is an upper bound of the GPU's. Writing checkpoints
    is in the time, validation is not.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._peak = _peak(trainer)
        self._start(trainer)

        def ask() -> None:
            self._asked = time.perf_counter()

        def receive() -> None:
            self._waited += time.perf_counter() - self._asked

        time_fetches(trainer, ask, receive)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer)  # validation is no step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds = batch.waveform.numel() / SAMPLE_RATE
        self._seconds += seconds
        self._wasted += seconds * batch.waste
        self._operations += pl_module.operations(batch)  # type: ignore[operator]
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and trainer.global_step != self._step and trainer.global_step % every == 0:
            passed = time.perf_counter() - self._since
            pl_module.log("train/audio_seconds_per_second", self._seconds * trainer.world_size / passed)
            pl_module.log("train/waste", self._wasted / self._seconds)
            pl_module.log("train/data_wait", self._waited / passed)
            pl_module.log("train/mfu", self._operations / passed / self._peak)
            self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        self._seconds, self._wasted, self._operations, self._waited = 0.0, 0.0, 0, 0.0
        self._since = self._asked = time.perf_counter()
        self._step = trainer.global_step


def _peak(trainer: Trainer) -> float:
    """Operations a second of one rank's device at the trainer's precision."""
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    reduced = torch.float16 if "16" in precision and "bf" not in precision else torch.bfloat16
    dtype = reduced if "16" in precision else torch.float32
    known = get_available_flops(device, dtype) if device.type == "cuda" else None
    return float(known) if known else _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype, size: int = 1024, times: int = 5) -> float:
    size = 8 * size if device.type == "cuda" else size
    matrix = torch.randn(size, size).to(device, dtype)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # which waits for it
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
