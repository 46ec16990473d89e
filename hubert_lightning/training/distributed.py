"""Work of several ranks: a model sharded over them (FSDP), and functions that succeed on all ranks or fail on all."""

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar, cast

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
    """Fully sharded data parallel training, for models that one GPU cannot hold.

    Parameters, gradients and optimizer states are shared by all ranks; each Transformer layer is gathered while it is
    computed. A checkpoint is one file with the whole model, as with other strategies.

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
        """Shard the model over all ranks of all nodes."""
        shard_over_all_ranks(self)
        super().setup_environment()


def shard(task: LightningModule, encoder: HubertEncoder, heads: Iterable[nn.Module]) -> None:
    """Shard the parameters of a task over the ranks, if the Trainer's strategy is LayerwiseFSDP.

    Gradients are added up in float32. The Transformer layers are gathered in the precision of their computation, the
    parts before and after them in float32, which the cosines of the heads need.

    Args:
        task: Task, which a Trainer configures.
        encoder: Encoder of the task.
        heads: Other modules of the task with parameters.
    """
    trainer = trainer_of(task)
    if trainer is None or not isinstance(trainer.strategy, LayerwiseFSDP):
        return  # there is no Trainer when a checkpoint is loaded
    assert task.device_mesh is not None
    mesh = task.device_mesh["data_parallel"]
    reduced = torch.bfloat16 if "bf16" in str(trainer.precision) else None
    policy = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in encoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    for whole in (encoder, *heads):
        fully_shard(whole, mesh=mesh)
    for method in ("local_features", "contextual", "contextual_layers"):  # a step calls these, not `forward`
        register_fsdp_forward_method(encoder, method)


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the Trainer of a module, None if it has none, as when a checkpoint is loaded."""
    try:
        return module.trainer
    except RuntimeError:
        return None


T = TypeVar("T")


def on_rank_zero(trainer: Trainer, work: Callable[[], T]) -> T:
    """Do work on rank 0 alone; the others wait for it, and fail if it fails.

    Args:
        trainer: Trainer whose ranks have met.
        work: Function without arguments, with a result that can be pickled.

    Returns:
        The result, on every rank.

    Raises:
        UserError: The work failed on rank 0, with its sentence; rank 0 itself raises the error as it is.
    """
    result: Any = together(lambda: work() if trainer.is_global_zero else None)
    return cast(T, trainer.strategy.broadcast(result))


def together(work: Callable[[], T]) -> T:
    """Do work on every rank; if it fails on one, it fails on all, which would otherwise wait for that rank.

    Args:
        work: Function without arguments.

    Returns:
        The result of this rank.

    Raises:
        UserError: The work failed on another rank, with its sentence; the failed rank raises the error as it is.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # the other ranks must know of every error
        failure = error
    if dist.is_initialized():
        failures: list[str | None] = [None] * dist.get_world_size()
        sentence = None if failure is None else killed_worker(failure) or str(failure) or repr(failure)
        dist.all_gather_object(failures, sentence)
        if failure is None and (first := next(filter(None, failures), None)):
            raise UserError(first)
    if failure is not None:
        raise failure
    return cast(T, result)
