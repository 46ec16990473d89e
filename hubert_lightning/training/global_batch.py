"""One optimiser step is one mean over the global batch, however that is split into ranks and accumulated batches.

Each batch adds a sum of losses; the gradient is divided by the number of terms once all of them are known. So every
masked frame (or utterance) of a step weighs the same, whichever rank or accumulated batch it came in, which averaging
means does not give. The same pass over the gradients clips them, and leaves a step out on all ranks if one of them has
a loss or a gradient that is not finite.
"""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from hubert_lightning.errors import UserError
from hubert_lightning.training.distributed import trainer_of
from hubert_lightning.training.lightning_internals import is_fused, multiply_in_place, tries_learning_rates

HOW_NOT_WHAT = ("max_skipped", "compile", "activation_checkpointing", "decoder")
"""Options of the tasks that say how a step is computed, or a test decoded, and not what is learnt: a run that goes on
may have others."""

UNIT = 2.0**-10
"""Sums of losses are told in these, so that float16 has room for them; a power of two rounds nothing."""


class GlobalBatch:
    """What the batches of an optimiser step add up to. One for each training task, which hands it every loss and leaves
    `configure_gradient_clipping` to it.

    Args:
        max_skipped: Steps in a row that may be left out because they are not finite, before training stops.
    """

    def __init__(self, max_skipped: int) -> None:
        if not 1 <= max_skipped <= 2**30:
            raise UserError(f"max_skipped is {max_skipped}; at least one step must be allowed to fail")
        self.max_skipped = max_skipped
        self.skipped = torch.zeros(())
        """Steps of the run that were left out, also before a restart, (), float32."""
        self._in_a_row, self._longest = torch.zeros(()), torch.zeros(())
        self._weight = 0.0
        self._batches: list[tuple[Sequence[str], Tensor]] = []  # of this step: ids, and whether the loss is finite
        self._last: deque[list[tuple[Sequence[str], Tensor]]] = deque(maxlen=2 * max_skipped)
        self._steps = 0

    def made(self, module: LightningModule, make: Callable[[ParamsT], Optimizer]) -> Optimizer:
        """The optimizer of a task.

        Raises:
            UserError: It cannot be made, not be sharded, or gets gradients multiplied by what float16 needs.
        """
        try:
            optimizer = make(module.parameters())
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"the optimizer cannot be made ({error}); correct model.init_args.optimizer") from error
        self._check(module, optimizer)
        return optimizer

    def _check(self, module: LightningModule, optimizer: Optimizer) -> None:
        fused = is_fused(optimizer)
        sharded = isinstance(module.trainer.strategy, ModelParallelStrategy)
        if fused and sharded and not isinstance(optimizer, (Adam, AdamW)):
            raise UserError(
                f"a fused {type(optimizer).__name__} cannot work on a sharded model; give the optimizer `fused: false`"
            )
        scaled = getattr(module.trainer.precision_plugin, "scaler", None) is not None
        if scaled and fused:
            raise UserError(
                f"precision {module.trainer.precision} with a fused {type(optimizer).__name__}: its gradients cannot "
                "be clipped; give the optimizer `fused: false`, or train with precision bf16-mixed"
            )

    def add(self, loss: Tensor, weight: float, ids: Sequence[str]) -> Tensor:
        """What `training_step` returns for one batch.

        loss:   (), mean over the batch
        weight: how many terms it is the mean of
        ids:    of the utterances, for the message if it is not finite
        """
        self._weight += weight
        self._batches.append((ids, loss.detach().isfinite()))
        return loss * (weight * UNIT)

    def finish(
        self, module: LightningModule, optimizer: Optimizer, clip: float | None, algorithm: str | None
    ) -> Tensor:
        """Turn the gradients of sums into those of the mean, clip them, and leave the step out if they are not finite.

        clip:    largest norm (or value, by `algorithm`) of the gradient; none to leave it as it is
        returns: (), norm of the gradient before it was clipped

        Raises:
            UserError: It was not finite `max_skipped` times in a row.
        """
        trainer = module.trainer
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).float()
        sharded = isinstance(norm, DTensor)
        if isinstance(norm, DTensor):  # each rank has a part of every gradient
            norm = norm.full_tensor()
            gradients = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
        shared = torch.stack([torch.full_like(norm, self._weight), (~norm.isfinite()).float()])
        if trainer.world_size > 1:
            dist.all_reduce(shared)
        weight, broken = shared[0], shared[1].clamp(max=1)
        # Lightning divides by the batches that it accumulates, and ranks average
        scale = trainer.world_size * trainer.accumulate_grad_batches / (weight * UNIT)
        norm = norm * scale
        if clip and algorithm != "value":
            scale = scale * (clip / (norm + 1e-6)).clamp(max=1)  # torch.nn.utils.clip_grad_norm_
        multiply_in_place(gradients, scale)
        if clip and algorithm == "value":
            torch.nn.utils.clip_grad_value_(module.parameters(), clip)
        self._leave_out(optimizer, broken, sharded)
        if not tries_learning_rates(trainer):  # of which the highest are to be too high
            self._last.append(self._batches)
            self._count(broken)
        self._weight, self._batches = 0.0, []
        return norm

    def _leave_out(self, optimizer: Optimizer, broken: Tensor, sharded: bool) -> None:
        if is_fused(optimizer) and not sharded:
            optimizer.found_inf = broken  # type: ignore[attr-defined]  # fused kernels read it; nobody waits for a GPU
        elif broken:
            optimizer.zero_grad(set_to_none=True)  # which leaves out every parameter

    def _count(self, broken: Tensor) -> None:
        self.skipped = self.skipped.to(broken.device) + broken
        self._in_a_row = (self._in_a_row.to(broken.device) + 1) * broken
        self._longest = torch.maximum(self._longest.to(broken.device), self._in_a_row)
        self._steps += 1
        # Looking at a GPU's number waits for it: once in a while will do
        if (broken.device.type == "cpu" or self._steps % self.max_skipped == 0) and self._longest >= self.max_skipped:
            raise UserError(self._sentence())

    def _sentence(self) -> str:
        steps = [[(list(ids), bool(finite)) for ids, finite in step] for step in self._last]
        everyone = [steps]
        if dist.is_initialized():
            everyone = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, steps)
        guilty = [(rank, ids) for rank, of in enumerate(everyone) for step in of for ids, finite in step if not finite]
        if guilty:
            rank, ids = guilty[-1]
            where = f"the loss (at last on rank {rank}, of {', '.join(ids)})"
            out = "listen to these utterances, leave them out if they are damaged, or lower the learning rate"
        else:
            where = f"the gradient (at last of {', '.join(everyone[0][-1][-1][0])})"
            out = "lower the learning rate or gradient_clip_val, or train in float32 or bfloat16"
        return (
            f"{self.max_skipped} steps in a row were left out because {where} was not finite; {out}, and run the same "
            "command again: it goes on from the checkpoint before"
        )

    def refuse_unsound(self, module: LightningModule) -> None:
        """Refuse to save weights or optimizer states that are not finite, on all ranks if they are so on one.

        A step with finite gradients can make such: where the rate is high, or where the optimizer's numbers overflow.

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
        kept = next((path for name in ("last.ckpt", "previous.ckpt") if (path := folder / name).exists()), None)
        start = f"from the checkpoint before, {kept}" if kept else "from the start, since none was saved before"
        raise UserError(
            f"step {trainer.global_step}: {broken or 'a weight of another rank'} is NaN or infinite, so this state is "
            "not saved; lower trainer.gradient_clip_val or train in float32 and run the same command again, which goes "
            f"on {start}; or start a run with a lower learning rate in another --output"
        )


def total_steps(trainer: Trainer) -> int:
    """Optimiser steps of a fit, over which the learning rate follows its schedule.

    Raises:
        UserError: The fit has no such number, as with `max_time` alone.
    """
    steps = trainer.estimated_stepping_batches
    if steps == float("inf"):
        raise UserError(
            "the learning rate follows a schedule over the steps of a fit, and this one has no number of them; give "
            "the Trainer max_steps, also beside max_time"
        )
    return int(steps)


def _first_not_finite(module: LightningModule) -> str | None:
    """The name of a weight, or of a state of the optimizer, that is not finite on this rank."""
    named: dict[str, Any] = dict(module.state_dict(keep_vars=True))
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    trainer = trainer_of(module)
    used = trainer.optimizers if trainer else []
    optimizers = [optimizer for optimizer in used if isinstance(optimizer, Optimizer)]
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            named |= {f"{key} (optimizer) of {names.get(parameter, 'a weight')}": of for key, of in state.items()}
    tensors = {name: _local(of).detach() for name, of in named.items() if isinstance(of, Tensor)}
    tensors = {name: of for name, of in tensors.items() if of.is_floating_point() or of.is_complex()}
    finite = [of.isfinite().all() for of in tensors.values()]
    if not finite or bool(torch.stack([of.to(module.device) for of in finite]).all()):  # one wait for the GPU
        return None
    return next(name for name, of in zip(tensors, finite, strict=True) if not of)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
