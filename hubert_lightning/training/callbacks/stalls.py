"""The callback that ends a run if a rank stops, hangs or ends, and names that rank."""

import math
import subprocess
import threading
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.constants import default_pg_timeout

from hubert_lightning import current_work, interrupts
from hubert_lightning.data.workers import killed_worker
from hubert_lightning.errors import UserError, explains_errors
from hubert_lightning.training.lightning_internals import extend_timeout, is_collective_error, take_launched_processes
from hubert_lightning.training.rank_watch import Limits, RankWatch, end_unless_set
from hubert_lightning.training.wandb_runs import alert

START_TIMEOUT = default_pg_timeout.total_seconds()
"""Seconds in which all ranks must start: torch's time-out, which the callback extends for what comes after."""


class StalledRanks(Callback):
    """Ends a run of several ranks if one of them stops, hangs or ends, with a sentence that names it.

    The same command resumes; torchrun and SLURM start it again. A run of one process is only warned.

    Args:
        timeout: Minutes without a sign of life after which a rank counts as stopped or ended. Threads give the signs
            while a rank computes or waits.
        step_timeout: Minutes within which at least one rank must finish a batch of training, validation or test.
        labelling_timeout: Minutes within which at least one rank must finish a part of the work before training:
            reading manifests, a batch of features, K-means, the choice of a layer. Collective operations wait for this
            time and `step_timeout` together, unless trainer.strategy sets a time-out.
    """

    def __init__(self, timeout: float = 5, step_timeout: float = 30, labelling_timeout: float = 1440) -> None:
        minutes = {"timeout": timeout, "step_timeout": step_timeout, "labelling_timeout": labelling_timeout}
        for name, value in minutes.items():
            if not 0 < value < math.inf:
                raise UserError(f"stalls.{name} is {value}; it is a number of minutes above 0")
        self.limits = Limits(60 * timeout, 60 * step_timeout, 60 * labelling_timeout, START_TIMEOUT)

    def attach(self, trainer: Trainer) -> None:
        """Watch from the moment at which the ranks have connected; Lightning calls no callback hook at that moment.

        Args:
            trainer: Trainer, before it starts.
        """
        strategy: Any = trainer.strategy  # LayerwiseFSDP has `timeout_minutes`
        if getattr(strategy, "timeout_minutes", None) is None:
            extend_timeout(strategy, self.limits.labelling + self.limits.step)
        setup_environment = strategy.setup_environment

        def meet() -> None:
            started = threading.Event()
            if trainer.world_size > 1:
                waiting = (started, self.limits.silence, self.limits.start)
                threading.Thread(target=end_unless_set, args=waiting, name="start", daemon=True).start()
            try:
                setup_environment()
            finally:
                started.set()
            current_work.note("setting up")
            _watch(trainer, self.limits)

        strategy.setup_environment = meet

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        current_work.note("starting the training")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        current_work.note(f"training (step {trainer.global_step + 1})", in_steps=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        current_work.note(f"training (after step {trainer.global_step})", in_steps=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        current_work.note(f"ending the training (step {trainer.global_step})")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        fits = trainer.state.fn == TrainerFn.FITTING
        at = " before training" if trainer.sanity_checking else f" at step {trainer.global_step}" if fits else ""
        current_work.note(f"validating{at} (batch {batch_idx + 1})", in_steps=True)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        current_work.note(f"testing (batch {batch_idx + 1})", in_steps=True)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        current_work.note(f"predicting (batch {batch_idx + 1})", in_steps=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the other ranks why this one ends."""
        if isinstance(exception, SystemExit) or is_collective_error(exception):
            end("")
        else:
            end(killed_worker(exception) or " ".join(str(exception).split())[:300] or type(exception).__name__)


_starts = 0
_launched: dict[int, subprocess.Popen[bytes]] = {}
_current: RankWatch | None = None


def _watch(trainer: Trainer, limits: Limits) -> None:
    """Watch the ranks of a Trainer, which have met."""
    global _starts, _current
    end("")
    _starts += 1
    signals = interrupts.current()
    _launched.update(enumerate(take_launched_processes(trainer.strategy), start=trainer.global_rank + 1))
    if signals:
        signals.prints = trainer.is_global_zero
        signals.launched = list(_launched.values())
    _current = RankWatch(limits, trainer.global_rank, trainer.world_size, _launched, f"stalls{_starts}")
    _current.tell = lambda sentence: alert(trainer, "run stalls", sentence, "ERROR")


def end(reason: str) -> None:
    """Tell other ranks that this one ends, and stop watching.

    Args:
        reason: Error, empty after a clean end.
    """
    if _current is not None:
        _current.end(reason)


@explains_errors
def ended_rank(error: BaseException) -> str | None:
    """Name the rank whose end caused an error of a collective operation.

    Args:
        error: Error that ended this rank.

    Returns:
        A sentence for the user, None for another error.
    """
    if _current is None or _current.num_ranks == 1 or not is_collective_error(error):
        return None
    sentence = _current.culprit(6 * _current.interval + 2)
    sentence = sentence or "another rank ended; look at the output of the others"
    return f"{sentence}. This run ends; the same command resumes"
