"""Learning-rate schedules, as factors of the peak for `torch.optim.lr_scheduler.LambdaLR`."""

from collections.abc import Callable
from functools import partial

Schedule = Callable[[int], float]
"""Step, counted from 0 → factor of the peak. Lightning pickles it with a Trainer, so it is no nested function."""


def linear_warmup_decay(warmup_steps: int, total_steps: int) -> Schedule:
    """Rise linearly from 0 to the peak, then fall linearly to 0 at the last step (HuBERT §IV-C)."""
    return partial(_linear, warmup_steps, total_steps)


def tri_stage(
    warmup_steps: int, hold_steps: int, decay_steps: int, initial: float = 0.01, final: float = 0.05
) -> Schedule:
    """Rise linearly, hold the peak, fall exponentially, then stay at the final factor (fairseq tri_stage)."""
    return partial(_tri_stage, warmup_steps, hold_steps, decay_steps, initial, final)


def _linear(warmup_steps: int, total_steps: int, step: int) -> float:
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def _tri_stage(warmup_steps: int, hold_steps: int, decay_steps: int, initial: float, final: float, step: int) -> float:
    if step < warmup_steps:
        return initial + (1 - initial) * step / warmup_steps
    decayed = step - warmup_steps - hold_steps
    if decayed < 0:
        return 1.0
    return final ** (decayed / decay_steps) if decayed < decay_steps else final
