"""Work on rank 0 for all ranks; a failure on one rank fails all, so that none is left waiting."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from lightning import Trainer

from hubert_lightning.data.workers import killed_worker

T = TypeVar("T")


def on_rank_zero(trainer: Trainer, work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; the others wait for it, and fail if it fails."""
    result = together(lambda: work() if trainer.is_global_zero else None)
    return trainer.strategy.broadcast(result)  # type: ignore[return-value]


def together(work: Callable[[], T]) -> T:
    """What `work` returns. If it fails on one rank it fails on all, which would otherwise wait for that one."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the other ranks must hear of it
        failure = error
    if dist.is_initialized():
        failures: list[str | None] = [None] * dist.get_world_size()
        sentence = None if failure is None else killed_worker(failure) or str(failure) or repr(failure)
        dist.all_gather_object(failures, sentence)
        if failure is None and (first := next(filter(None, failures), None)):
            raise ValueError(first)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
