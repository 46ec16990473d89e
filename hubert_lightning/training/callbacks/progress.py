"""One progress bar for a run, with the numbers that tell whether it learns."""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from hubert_lightning.console import say
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.progress_bar import Bar, progress
from hubert_lightning.training.task import logs_step

NUMBERS: dict[str, tuple[str, float]] = {
    "train/loss": ("loss {:.3f}", 1),
    "train/masked_accuracy": ("masked accuracy {:.1f} %", 100),
    "val/masked_accuracy": ("{:.1f} % in validation", 100),
    "val/wer": ("WER {:.1f} % in validation", 100),
    "speed/audio_seconds_per_second": ("{:.0f} × real time", 1),
}
"""Metrics beside the bar of a fit, their form, and the factor to its unit."""


class RunProgress(ProgressBar):
    """Shows a fit, a validation, a test or a prediction as one bar; without a terminal, as a line now and then.

    The bar of a fit counts optimizer steps. Beside it are the minutes left, the loss, the masked accuracy, the result
    of the last validation, and the seconds of audio that all ranks together train on in a second. A validation inside
    of a fit is named there too. A run leaves one line with its duration and its last numbers.

    Args:
        title: Name of a fit, such as "iteration 2 of 3".
    """

    def __init__(self, title: str = "") -> None:
        super().__init__()
        self.title = title or "training"
        self._enabled = True
        self._resources = ExitStack()
        self._bar: Bar | None = None
        self._step = self._first_step = 0
        self._validated = False
        self._numbers: dict[str, float] = {}

    def disable(self) -> None:
        """Show nothing, as on ranks other than the first, or while Lightning tries learning rates."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open_fit(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open_fit(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is None or trainer.global_step == self._step:
            return
        if logs_step(trainer, trainer.global_step - 1):  # its metrics are known from the end of that step on
            self._read(trainer.logged_metrics)
        self._bar(trainer.global_step - self._step, self._note())
        self._step = trainer.global_step

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._bar is None:
            return
        if trainer.state.fn != TrainerFn.FITTING:
            self._count(trainer, batch)
        else:
            batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            self._bar(0, f"{self._note()}, validation {batch_idx + 1} of {_sum(batches)}".removeprefix(", "))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._end(trainer.callback_metrics)
        elif self._bar is not None and not trainer.sanity_checking:
            self._validated = True
            self._read(trainer.callback_metrics)
            self._bar(0, self._note())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar with what this process has measured; metrics of a checkpoint that it resumed from are older."""
        trained = any(logs_step(trainer, step) for step in range(self._first_step + 1, trainer.global_step + 1))
        metrics = trainer.callback_metrics.items()
        self._end({name: of for name, of in metrics if (self._validated if name.startswith("val/") else trained)})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._open("validation", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("prediction", trainer.num_predict_batches)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count(trainer, batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count(trainer, batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end({})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end({})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._bar = None
        self._resources.__exit__(type(exception), exception, exception.__traceback__)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on standard output, above the bar."""
        print(*args, **kwargs)

    def _open_fit(self, trainer: Trainer) -> None:
        if self._bar is not None or not self._enabled:
            return
        self._step = self._first_step = trainer.global_step
        self._numbers, self._validated = {}, False
        if self._step:
            say(f"{self.title}: resumes after step {self._step}")
        steps = _finite(trainer.estimated_stepping_batches)
        shown = progress(self.title, steps, "steps", self._step, keep=True)
        self._bar = self._resources.enter_context(shown)

    def _open(self, title: str, batches: int | float | list[int | float]) -> None:
        if self._enabled:
            shown = progress(title, _finite(_sum(batches)), "batches")
            self._bar = self._resources.enter_context(shown)
            self._seconds, self._began = 0.0, time.perf_counter()

    def _count(self, trainer: Trainer, batch: Any) -> None:  # Any: a batch of either task, or of the user's own
        if self._bar is None:
            return
        if hasattr(batch, "waveform"):
            self._seconds += batch.waveform.numel() / SAMPLE_RATE * trainer.world_size
        speed = self._seconds / (time.perf_counter() - self._began)
        self._bar(1, f"{speed:.0f} × real time" if self._seconds else "")

    def _end(self, metrics: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._read(metrics)
            self._bar.note = self._note() or self._bar.note
            self._bar = None
            self._resources.close()

    def _read(self, metrics: Mapping[str, Any]) -> None:
        self._numbers |= {name: float(metrics[name]) for name in NUMBERS if name in metrics}

    def _note(self) -> str:
        known = {name: form for name, form in NUMBERS.items() if name in self._numbers}
        return ", ".join(form.format(factor * self._numbers[name]) for name, (form, factor) in known.items())


def _finite(number: int | float) -> int | None:
    return None if math.isinf(number) else int(number)


def _sum(batches: int | float | list[int | float]) -> int | float:
    return sum(batches) if isinstance(batches, list) else batches
