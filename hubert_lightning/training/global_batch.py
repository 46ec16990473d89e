"""The exact mean over the global batch of an optimizer step, for any number of ranks and accumulated batches.

Each batch adds a sum of losses; the gradient is divided by the total number of terms at the end of the step. So every
masked frame (or utterance) of a step has the same weight, on any rank and in any accumulated batch. A mean of means
does not give that. The same pass over the gradients clips them, and skips a step on all ranks if one of them has a
loss or a gradient that is not finite.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from hubert_lightning.errors import UserError
from hubert_lightning.training.distributed import trainer_of
from hubert_lightning.training.lightning_internals import (
    is_fused,
    multiply_in_place,
    scale_in_step,
    tries_learning_rates,
)

LOSS_UNIT = 2.0**-10
"""Factor of the sums of losses, so that they fit into float16; a power of two rounds nothing."""


class AddedBatch(NamedTuple):
    """Facts about a batch for the message about skipped steps.

    Args:
        ids: Ids of its utterances.
        finite: (), whether its loss is finite; read late, because reading waits for the GPU.
    """

    ids: Sequence[str]
    finite: Tensor


class GlobalBatch:
    """The sum of the batches of an optimizer step. A task adds each loss and finishes the step when it clips gradients.

    Args:
        max_skipped: Consecutive steps with a non-finite loss or gradient before training stops.
    """

    def __init__(self, max_skipped: int) -> None:
        if not 1 <= max_skipped <= 2**30:
            raise UserError(f"max_skipped is {max_skipped}; at least one step must be allowed to fail")
        self.max_skipped = max_skipped
        self.skipped = torch.zeros(())
        """(), float32, skipped steps of the run, also before a restart."""
        self._consecutive, self._most_consecutive = torch.zeros(()), torch.zeros(())
        self._weight = 0.0
        self._batches: list[AddedBatch] = []
        self._last_steps: deque[list[AddedBatch]] = deque(maxlen=2 * max_skipped)
        self._num_steps = 0

    def add(self, loss: Tensor, weight: float, ids: Sequence[str]) -> Tensor:
        """Add a batch to the step.

        Args:
            loss: (), mean over the terms of the batch.
            weight: Number of these terms.
            ids: Ids of the utterances, for the error message if the loss is not finite.

        Returns:
            (), the scaled sum that `training_step` returns.
        """
        self._weight += weight
        self._batches.append(AddedBatch(ids, loss.detach().isfinite()))
        return loss * (weight * LOSS_UNIT)

    def finish(
        self,
        module: LightningModule,
        optimizer: Optimizer,
        clip: float | None,
        algorithm: str | None,
        parts: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Turn the gradients of sums into those of the mean and clip them; skip the step if one is not finite.

        Args:
            module: Task whose gradients are complete.
            optimizer: Optimizer that steps next.
            clip: Largest norm of the gradient, or largest value by `algorithm`; None does not clip.
            algorithm: "value" to clip each value, anything else to clip the norm.
            parts: Parameters of the parts of the model whose norms are computed as well, the same parts on all ranks.

        Returns:
            (), norm of the gradient before clipping, and that of each part that has a gradient, ().

        Raises:
            UserError: The gradients were not finite in `max_skipped` consecutive steps.
        """
        trainer = module.trainer
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        norms = _norms(parts or {})
        norm = torch.nn.utils.get_total_norm(gradients).float()
        if isinstance(norm, DTensor):  # each rank has a part of every gradient
            norm = norm.full_tensor()
            gradients = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
        shared = torch.stack([torch.full_like(norm, self._weight), (~norm.isfinite()).float()])
        if trainer.world_size > 1:
            dist.all_reduce(shared)
        weight, broken = shared[0], shared[1].clamp(max=1)
        # Lightning divides by the number of accumulated batches, and ranks average
        scale = trainer.world_size * trainer.accumulate_grad_batches / (weight * LOSS_UNIT)
        norm = norm * scale
        norms = {name: value * scale for name, value in norms.items()}
        if clip and algorithm != "value":
            scale = scale * (clip / (norm + 1e-6)).clamp(max=1)  # torch.nn.utils.clip_grad_norm_
        by_value = bool(clip) and algorithm == "value"
        if is_fused(optimizer) and not by_value:
            scale_in_step(optimizer, scale)  # saves a pass over the gradients
        else:
            multiply_in_place(gradients, scale)
        if clip and by_value:
            torch.nn.utils.clip_grad_value_(module.parameters(), clip)
        _skip_if(broken, optimizer)
        if not tries_learning_rates(trainer):  # the highest rates of a search are meant to be too high
            self._last_steps.append(self._batches)
            self._count(broken)
        self._weight, self._batches = 0.0, []
        return norm, norms

    def _count(self, broken: Tensor) -> None:
        self.skipped = self.skipped.to(broken.device) + broken
        self._consecutive = (self._consecutive.to(broken.device) + 1) * broken
        self._most_consecutive = torch.maximum(self._most_consecutive.to(broken.device), self._consecutive)
        self._num_steps += 1
        # Reading a number waits for the GPU, so it is read every `max_skipped` steps
        readable = broken.device.type == "cpu" or self._num_steps % self.max_skipped == 0
        if readable and self._most_consecutive >= self.max_skipped:
            raise UserError(self._failure())

    def _failure(self) -> str:
        steps = [[(list(ids), bool(finite)) for ids, finite in step] for step in self._last_steps]
        steps_of_ranks = [steps]
        if dist.is_initialized():
            steps_of_ranks = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(steps_of_ranks, steps)
        broken = [
            (rank, ids)
            for rank, steps in enumerate(steps_of_ranks)
            for step in steps
            for ids, finite in step
            if not finite
        ]
        if broken:
            rank, ids = broken[-1]
            cause = f"the loss was not finite (last on rank {rank}, utterances {', '.join(ids)})"
            advice = "listen to these utterances, remove them if they are corrupt, or lower the learning rate"
        else:
            ids = steps_of_ranks[0][-1][-1][0]
            cause = f"the gradient was not finite (last of utterances {', '.join(ids)})"
            advice = "lower the learning rate or gradient_clip_val, or train in float32 or bfloat16"
        return (
            f"skipped {self.max_skipped} steps in a row because {cause}; {advice}, and run the same command again to "
            "resume from the last checkpoint"
        )


def build_optimizer(module: LightningModule, make: Callable[[ParamsT], Optimizer]) -> Optimizer:
    """Build the optimizer of a task.

    Args:
        module: Task whose parameters it gets.
        make: Constructor of the optimizer from the parameters.

    Raises:
        UserError: Its arguments are wrong, it does not work on a sharded model, or it leaves gradients multiplied by
            the loss scale of float16, which cannot be clipped.
    """
    try:
        optimizer = make(module.parameters())
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the optimizer cannot be made ({error}); correct model.init_args.optimizer") from error
    fused, name = is_fused(optimizer), type(optimizer).__name__
    if (
        fused
        and isinstance(module.trainer.strategy, ModelParallelStrategy)
        and not isinstance(optimizer, (Adam, AdamW))
    ):
        raise UserError(f"a fused {name} does not work on a sharded model; give the optimizer `fused: false`")
    if fused and getattr(module.trainer.precision_plugin, "scaler", None) is not None:
        raise UserError(
            f"precision {module.trainer.precision} with a fused {name}: its gradients cannot be clipped; give the "
            "optimizer `fused: false`, or train with precision bf16-mixed"
        )
    return optimizer


def check_finite(module: LightningModule) -> None:
    """Refuse to save weights or optimizer states that are not finite, on all ranks if one rank has them.

    A step with finite gradients can produce them if the learning rate is high or the optimizer's numbers overflow.

    Raises:
        UserError: A value is NaN or infinite.
    """
    broken, trainer = _first_not_finite(module), trainer_of(module)
    if trainer is None:  # as in `trainer.strategy.connect(model)`, which saves a model without a run
        if broken:
            raise UserError(f"{broken} is NaN or infinite, so this model is not saved; load an earlier one")
        return
    if trainer.strategy.reduce_boolean_decision(broken is None):
        return
    folder = Path(trainer.default_root_dir)
    saved = next((path for name in ("last.ckpt", "previous.ckpt") if (path := folder / name).exists()), None)
    start = f"resumes from the checkpoint before, {saved}" if saved else "starts again, since no checkpoint was saved"
    raise UserError(
        f"step {trainer.global_step}: {broken or 'a weight of another rank'} is NaN or infinite, so this state is not "
        "saved; lower trainer.gradient_clip_val or train in float32 and run the same command again, which "
        f"{start}; or start a run with a lower learning rate in another --output"
    )


def _norms(parts: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Return the norm of each part's gradient, (), without the parts that have none."""
    norms = {}
    for name, parameters in parts.items():
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            norm = torch.nn.utils.get_total_norm(gradients).float()
            norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms


def _skip_if(broken: Tensor, optimizer: Optimizer) -> None:
    if is_fused(optimizer):
        optimizer.found_inf = broken  # type: ignore[attr-defined]  # fused kernels read it without waiting for a GPU
    elif broken:
        optimizer.zero_grad(set_to_none=True)  # the optimizer steps over parameters without a gradient


def _first_not_finite(module: LightningModule) -> str | None:
    """Return the name of a weight or an optimizer state that is not finite on this rank, None if all are finite."""
    values: dict[str, Any] = dict(module.state_dict(keep_vars=True))  # an optimizer's state holds any values
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    trainer = trainer_of(module)
    optimizers = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Optimizer)] if trainer else []
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            name = names.get(parameter, "a weight")
            values |= {f"{key} (optimizer) of {name}": value for key, value in state.items()}
    tensors = {name: _local(value).detach() for name, value in values.items() if isinstance(value, Tensor)}
    tensors = {name: value for name, value in tensors.items() if value.is_floating_point() or value.is_complex()}
    finite = [value.isfinite().all() for value in tensors.values()]
    if not finite or bool(torch.stack([value.to(module.device) for value in finite]).all()):  # waits once for the GPU
        return None
    return next(name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
