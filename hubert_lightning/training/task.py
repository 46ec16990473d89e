"""The base of both training tasks: seeds, gradients, logging, optimizer, checkpoints, compilation and sharding."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hubert_lightning.errors import UserError
from hubert_lightning.model.compilation import compile_methods
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.training.batches import PretrainingBatch, TranscribedBatch
from hubert_lightning.training.distributed import shard
from hubert_lightning.training.global_batch import GlobalBatch, build_optimizer, check_finite
from hubert_lightning.training.restoring import MapLocation, load_task
from hubert_lightning.training.schedules import Schedule

CHANGEABLE_ON_RESUME = ("max_skipped", "compile", "activation_checkpointing", "decoder")
"""Options that change how a step is computed or a test is decoded, not what is learned: a resumed run may change them,
and checkpoints do not store them."""


class Task(LightningModule, ABC):
    """A model that trains with exact global batches, skipped steps and a schedule over the whole fit.

    Args:
        encoder: Size and regularisation of the encoder.
        optimizer: Constructor of the optimizer from the parameters.
        max_skipped: Consecutive steps with a non-finite loss or gradient before training stops.
        compile: Whether torch compiles the encoder.
        activation_checkpointing: Whether the backward pass recomputes the activations of each layer.
    """

    warmup: float
    """Fraction of the steps over which the learning rate rises to its peak."""

    def __init__(
        self,
        encoder: EncoderConfig,
        optimizer: OptimizerCallable,
        max_skipped: int,
        compile: bool,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.encoder = HubertEncoder(encoder)
        self.encoder.checkpointing = activation_checkpointing
        self.optimizer = optimizer
        self.global_batch = GlobalBatch(max_skipped)
        self.compiling = compile
        self.trained_steps: int | None = None
        """Optimizer steps of the checkpoint that was loaded."""

    @property
    @abstractmethod
    def heads(self) -> Iterable[nn.Module]:
        """The modules on top of the encoder."""

    @abstractmethod
    def operations(self, batch: Any) -> int:  # Any: the batch of the task
        """Count the floating-point operations of a training step on one batch."""

    @abstractmethod
    def schedule(self, total_steps: int) -> Schedule:
        """Build the learning-rate schedule of a fit with this number of optimizer steps."""

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # no open files: `load_task` checks a path
        cls,
        checkpoint_path: str | Path,
        map_location: MapLocation | None = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a task from a checkpoint of `hubert fit` without running anything in the file; see `load_task`."""
        return load_task(cls, checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs)

    def configure_model(self) -> None:
        if self.compiling:
            self.encoder.compile_parts()
            compile_methods(*self.heads)
        shard(self, self.encoder, self.heads)

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps until the learning rate reaches its peak."""
        return round(self.warmup * total_steps(self.trainer))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self, self.optimizer)
        rate = self.schedule(total_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # Lightning would keep the gradients in memory during the next forward pass

    def seed_step(self, batch: PretrainingBatch | TranscribedBatch) -> list[bool]:
        """Seed the dropout of a training step by its batch, so that it is the same on any rank and after a resume.

        Returns:
            (layers,), whether each layer is computed; the same for all batches of an optimizer step.
        """
        torch.manual_seed(batch.seed)
        return self.encoder.draw_kept(torch.Generator().manual_seed(batch.step_seed))

    @property
    def logs_this_step(self) -> bool:
        """Whether the Trainer writes the metrics of this step; logging at all others costs a tenth of a small step."""
        return logs_step(self.trainer, self.global_step + 1)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        logging = self.logs_this_step
        parts = self._parts() if logging else {}  # another pass over the gradients
        norm, norms = self.global_batch.finish(self, optimizer, gradient_clip_val, gradient_clip_algorithm, parts)
        if logging:
            self.log("train/gradient_norm", norm)
            for part, value in norms.items():
                self.log(f"train/gradient_norm_{part}", value)
            # Lightning would copy a number to the GPU, and wait for it
            self.log("train/learning_rate", torch.as_tensor(optimizer.param_groups[0]["lr"]))
            self.log("train/skipped_steps", self.global_batch.skipped)

    def _parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of the convolutions, of the Transformer with its positional convolution, and of the heads."""
        convolutions = [*self.encoder.convolutions.parameters()]
        own = set(map(id, convolutions))
        return {
            "convolutions": convolutions,
            "transformer": [parameter for parameter in self.encoder.parameters() if id(parameter) not in own],
            "head": [parameter for head in self.heads for parameter in head.parameters()],
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_finite(self)
        checkpoint["skipped_steps"] = float(self.global_batch.skipped)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.global_batch.skipped = torch.tensor(checkpoint.get("skipped_steps", 0.0))
        self.trained_steps = checkpoint.get("global_step")


def encoder_config(encoder: EncoderConfig | Mapping[str, Any]) -> EncoderConfig:
    """Return the configuration of an encoder, which a checkpoint stores as a plain dict."""
    return EncoderConfig(**encoder) if isinstance(encoder, Mapping) else encoder


def logs_step(trainer: Trainer, step: int) -> bool:
    """Whether the Trainer writes the metrics of an optimizer step, counted from 1."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it without declaring it
    return every > 0 and step % every == 0


def total_steps(trainer: Trainer) -> int:
    """Return the optimizer steps of a fit, over which the learning rate follows its schedule.

    Raises:
        UserError: The fit has no fixed number of steps, as with `max_time` alone.
    """
    steps = trainer.estimated_stepping_batches
    if steps == float("inf"):
        raise UserError(
            "the learning-rate schedule needs the number of steps of the fit, which is not set; set trainer.max_steps, "
            "also if trainer.max_time is set"
        )
    return int(steps)
