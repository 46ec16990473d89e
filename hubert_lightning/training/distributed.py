"""Models that one GPU does not hold: parameters, gradients and optimiser states are shared by all ranks (FSDP)."""

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from hubert_lightning.data.workers import killed_worker
from hubert_lightning.errors import UserError
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.training.lightning_internals import shard_over_all_ranks


class LayerwiseFSDP(ModelParallelStrategy):
    """Fully sharded data parallel training: each Transformer layer is gathered while it is computed.

    Checkpoints are whole, as those of other strategies.

    Args:
        timeout_minutes: Minutes that ranks wait for one another in a collective operation. If not given, `stalls` sets
            it in `hubert fit`; elsewhere it is torch's default.
    """

    def __init__(self, timeout_minutes: float | None = None) -> None:
        if timeout_minutes is not None and not 0 < timeout_minutes <= 2**20:
            raise UserError(f"timeout_minutes is {timeout_minutes}; it is a number of minutes above 0")
        timeout = default_pg_timeout if timeout_minutes is None else timedelta(minutes=timeout_minutes)
        super().__init__(save_distributed_checkpoint=False, timeout=timeout)
        self.timeout_minutes = timeout_minutes

    def setup_environment(self) -> None:
        shard_over_all_ranks(self)
        super().setup_environment()


def shard(task: LightningModule, encoder: HubertEncoder, heads: Iterable[nn.Module]) -> None:
    """Share the parameters of a task among the ranks, if that is the Trainer's strategy.

    Gradients are added up in float32. The layers are gathered in the precision that they are computed in; what lies
    before and after them in float32, since the cosines of the heads need it.
    """
    trainer = trainer_of(task)
    if trainer is None or not isinstance(trainer.strategy, LayerwiseFSDP):
        return  # without a Trainer, a checkpoint is loaded
    assert task.device_mesh is not None
    mesh = task.device_mesh["data_parallel"]
    reduced = torch.bfloat16 if "bf16" in str(trainer.precision) else None
    policy = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in encoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    for whole in (encoder, *heads):
        fully_shard(whole, mesh=mesh)
    for method in ("local_features", "contextual"):  # what a step calls
        register_fsdp_forward_method(encoder, method)


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the Trainer of a module, None if it has none."""
    try:
        return module.trainer
    except RuntimeError:
        return None


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
            raise UserError(first)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
