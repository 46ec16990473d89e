"""A search for the peak learning rate before the first step."""

from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR

from hubert_lightning.errors import UserError


class PeakRateFinder(LearningRateFinder):
    """Find the peak learning rate with Lightning's learning-rate finder.

    Before the first step, a hundred steps with rising rates are trained and undone; the rate at which the loss falls
    fastest becomes the peak of the schedule. These steps train the whole model, also if the encoder is frozen at first.
    The highest rates may be far too high, so losses that are not finite do not count. A resumed run keeps its peak.

    Args:
        lowest: First rate to try.
        highest: Last rate to try, if the loss does not explode before.
        steps: Number of rates to try.
    """

    def __init__(self, lowest: float = 1e-6, highest: float = 1e-1, steps: int = 100) -> None:
        if not 0 < lowest < highest < float("inf") or not 20 <= steps <= 10**6:
            raise UserError(
                f"PeakRateFinder: lowest {lowest}, highest {highest}, steps {steps}; try 20 steps or more, from a rate "
                "above 0 to a higher rate"
            )
        super().__init__(min_lr=lowest, max_lr=highest, num_training_steps=steps, update_attr=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path:  # the checkpoint has the peak
            return
        super().on_fit_start(trainer, pl_module)
        peak = steepest_rate(self.optimal_lr.results) if self.optimal_lr else None
        if peak is None:
            raise UserError(
                "PeakRateFinder: the loss exploded too early to find a rate, or was never finite; lower its lowest and "
                "highest, or remove the callback and give the optimizer a rate"
            )
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            assert isinstance(scheduler, LambdaLR)
            scheduler.base_lrs = [peak] * len(scheduler.base_lrs)
            for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["initial_lr"], group["lr"] = peak, peak * factor(0)
        rank_zero_info(f"peak learning rate {peak:.2e}, where the loss fell fastest; it replaces the optimizer's lr")


def steepest_rate(results: dict[str, Any]) -> float | None:
    """Return the rate at which the loss falls fastest over the logarithm of the rate, None if too few are finite.

    Lightning's own suggestion takes the slope over the rate itself, which is always steepest at the lowest rates.
    """
    rates, losses = np.array(results["lr"]), np.array(results["loss"])
    usable = np.flatnonzero(np.isfinite(losses))[10:-1]  # the first losses are noise, the last one explodes
    if len(usable) < 2:
        return None
    slope = np.gradient(losses[usable], np.log(rates[usable]))
    return float(rates[usable][np.argmin(slope)])
