"""What one rank of a run does for all, and what befalls one befalls all: none is left waiting for another."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from lightning import Trainer

T = TypeVar("T")
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "GROUP_RANK")
"""Variables that launchers set, 0 for rank 0: torchrun, Lightning, SLURM, LSF; of the node, Lightning and torchrun."""


def on_rank_zero(trainer: Trainer, work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; the others wait for it, and fail if it fails."""
    result = together(lambda: work() if trainer.is_global_zero else None)
    return trainer.strategy.broadcast(result)  # type: ignore[return-value]


def is_first_process() -> bool:
    """Whether this process is rank 0 of its run, or the only one; known before ranks have found one another."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def together(work: Callable[[], T]) -> T:
    """What `work` returns. If it fails on one rank it fails on all, which would otherwise wait for that one."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the other ranks must hear of it
        failure = error
    if dist.is_initialized():
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, None if failure is None else str(failure) or repr(failure))
        if failure is None and (first := next(filter(None, failures), None)):
            raise ValueError(first)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
