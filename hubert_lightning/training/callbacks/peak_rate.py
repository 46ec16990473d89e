"""The peak learning rate, looked for before the first step."""

from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR

from hubert_lightning.errors import UserError


class PeakRateFinder(LearningRateFinder):
    """Lightning's learning rate finder for our tasks, whose rate is the peak of a schedule.

    Before the first step, a hundred steps at rising rates are tried and undone; where the loss falls fastest is the
    peak. They are tried on all that is ever trained, also where the encoder is frozen at first; the highest may be far
    too high, so that losses which are not finite do not count. A run that goes on keeps the peak that it has.

    Args:
        lowest: Rate to begin with.
        highest: Rate to end with, if the loss does not explode before.
        steps: How many are tried.
    """

    def __init__(self, lowest: float = 1e-6, highest: float = 1e-1, steps: int = 100) -> None:
        if not 0 < lowest < highest < float("inf") or not 20 <= steps <= 10**6:
            raise UserError(
                f"PeakRateFinder: lowest {lowest}, highest {highest}, steps {steps}; try 20 steps or more, from a rate "
                "above 0 to a higher one"
            )
        super().__init__(min_lr=lowest, max_lr=highest, num_training_steps=steps, update_attr=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path:  # it has its peak
            return
        super().on_fit_start(trainer, pl_module)
        peak = _steepest(self.optimal_lr.results) if self.optimal_lr else None
        if peak is None:
            raise UserError(
                "PeakRateFinder: the loss exploded before a rate could be told, or was never finite; lower its lowest "
                "and highest, or leave it out and give the optimizer a rate"
            )
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            assert isinstance(scheduler, LambdaLR)
            scheduler.base_lrs = [peak] * len(scheduler.base_lrs)
            for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["initial_lr"], group["lr"] = peak, peak * factor(0)
        rank_zero_info(f"the peak learning rate is {peak:.2e}, where the loss fell fastest, not the optimizer's lr")


def _steepest(results: dict[str, Any]) -> float | None:
    """The rate at which the loss falls fastest by the logarithm of the rate; Lightning's own suggestion is by the rate
    itself, of which the lowest are always steepest."""
    rates, losses = np.array(results["lr"]), np.array(results["loss"])
    usable = np.flatnonzero(np.isfinite(losses))[10:-1]  # the first ones are noise, the last one explodes
    if len(usable) < 2:
        return None
    slope = np.gradient(losses[usable], np.log(rates[usable]))
    return float(rates[usable][np.argmin(slope)])
