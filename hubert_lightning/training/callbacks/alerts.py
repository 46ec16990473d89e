"""Warnings of a run that does not go on as it should, and the news of its end."""

import math
from collections import deque
from typing import Any

from lightning import Callback, LightningModule, Trainer

from hubert_lightning.interrupts import Interrupted, name_of
from hubert_lightning.training.callbacks.best_checkpoints import BestCheckpoints
from hubert_lightning.training.task import logs_step
from hubert_lightning.training.wandb_runs import alert, mark_preempted, warn

AVERAGED = 20
"""Logged values of the waiting time that a warning takes the mean of."""
WAITING = 0.5
"""Fraction of the time in which training waits for data, above which a warning comes."""
RISEN = 0.1
"""Rise of an error rate above its lowest value, from which a warning comes."""
SHOWN = ("val/wer", "val/cer", "val/masked_accuracy", "val/loss", "train/loss")
"""Metrics in the alert of a finished run, as far as it has them."""


class RunAlerts(Callback):
    """Warn, in the log and by a W&B alert, of trouble in any run, and tell W&B's users how the run ended.

    Warnings are of skipped steps (the first, the tenth, the hundredth, …), of training that waits for data half of the
    time, and of a validation that is not finite or whose error rate has risen. At the end the alert says that the
    run is finished, was interrupted and will resume, or failed. Each warning comes once, also over restarts.
    """

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=AVERAGED)
        self._lowest_wer, self._warned_skipped, self._warned = math.inf, 0.0, set[str]()
        self._loggers_work = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note that the loggers have started, as the Trainer starts them before; one that cannot ends the run."""
        self._loggers_work = True

    def state_dict(self) -> dict[str, Any]:
        return {"lowest_wer": self._lowest_wer, "skipped": self._warned_skipped, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._lowest_wer, self._warned_skipped = state_dict["lowest_wer"], state_dict["skipped"]
        self._warned = set(state_dict["warned"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or step == self._step or not logs_step(trainer, step):
            return
        self._step = step
        logged = trainer.callback_metrics  # those of the previous log
        skipped = float(logged.get("train/skipped_steps", 0.0))
        if skipped and skipped >= 10 * self._warned_skipped:
            self._warned_skipped = skipped
            warn(
                trainer,
                "steps skipped",
                f"step {step}: {skipped:.0f} steps have been skipped, since a loss or a gradient was not finite; lower "
                "the learning rate or gradient_clip_val, or train in bfloat16 or float32, if more follow",
            )
        if "speed/data_wait" in logged:
            self._waits.append(float(logged["speed/data_wait"]))
        if len(self._waits) == AVERAGED and (mean := sum(self._waits) / AVERAGED) > WAITING:
            self._once(
                trainer,
                "training waits for data",
                f"step {step}: training waits for data {mean:.0%} of the time; raise data.init_args.num_workers, or "
                "read from a faster disk",
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        metrics, step = trainer.callback_metrics, trainer.global_step
        loss = float(metrics.get("val/loss", 0.0))
        if not math.isfinite(loss):
            self._once(
                trainer,
                "validation not finite",
                f"step {step}: val/loss is {loss}; resume from an earlier checkpoint with a lower learning rate",
            )
        name, kept = _watched_rate(trainer)
        if name not in metrics:
            return
        rate = float(metrics[name])
        self._lowest_wer = min(self._lowest_wer, rate)
        if rate > self._lowest_wer + RISEN:
            self._once(
                trainer,
                f"{'WER' if name.startswith('val/wer') else 'CER'} has risen",
                f"step {step}: {name} has risen from {self._lowest_wer:.3f} to {rate:.3f}; {kept}lower the learning "
                "rate, or train fewer steps",
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            metrics = trainer.callback_metrics
            numbers = [f"{name} {float(metrics[name]):.4g}" for name in SHOWN if name in metrics]
            text = ", ".join([f"{trainer.global_step} steps", *numbers])
            alert(trainer, "run finished", f"{trainer.default_root_dir}: {text}", "INFO")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not trainer.is_global_zero or not self._loggers_work:
            return
        place = f"{trainer.default_root_dir}, step {trainer.global_step}"
        if isinstance(exception, Interrupted):
            mark_preempted(trainer)
            name = name_of(exception.number)
            alert(trainer, "run interrupted", f"{place}: {name}; the same command resumes", "WARN")
        elif not isinstance(exception, SystemExit):
            reason = " ".join(str(exception).split())[:500] or type(exception).__name__
            alert(trainer, "run failed", f"{place}: {reason}", "ERROR")

    def _once(self, trainer: Trainer, title: str, text: str) -> None:
        if title not in self._warned:
            self._warned.add(title)
            warn(trainer, title, text)


def _watched_rate(trainer: Trainer) -> tuple[str, str]:
    """The error rate by which the best checkpoint is chosen, or val/wer; and what has become of that checkpoint."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, BestCheckpoints) and (callback.monitor or "").startswith(("val/wer", "val/cer")):
            return str(callback.monitor), "best.ckpt is kept; "
    return "val/wer", ""
