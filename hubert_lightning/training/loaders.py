"""The loader of planned batches: the dataset of batches, their plan, and the worker processes."""

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
from lightning import LightningDataModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from hubert_lightning.data.workers import WatchedReads, quiet_worker
from hubert_lightning.errors import UserError
from hubert_lightning.frames import CLOCK, Clock
from hubert_lightning.training.batches import PretrainingBatch, PretrainingBatches, TranscribedBatch, TranscribedBatches
from hubert_lightning.training.lightning_internals import batches_trained
from hubert_lightning.training.sampler import PlannedBatches

Batch = TypeVar("Batch")
Loader = DataLoader[PretrainingBatch] | DataLoader[TranscribedBatch]
MAX_WORKERS = 1024


def planned_loader(
    trainer: Trainer,
    batches: PretrainingBatches | TranscribedBatches,
    frames: Sequence[int] | np.ndarray,
    max_frames: int,
    *,
    num_workers: int,
    seed: int,
    shuffle: bool,
    corpora: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    groups: np.ndarray | None = None,
    shares: np.ndarray | None = None,
    block_cuts: int = 1_000_000,
    crop: int | None = None,
) -> Loader:
    """Build the loader of one rank.

    Args:
        trainer: Trainer, which knows the rank, the number of ranks and the batches already trained.
        batches: Data set that makes a batch from its plan.
        frames: (cuts,), frames that each cut contributes.
        max_frames: Maximum number of frames of a batch, with padding.
        num_workers: Number of processes that read audio; 0 reads in this process.
        seed: Seed of the plan in training; validation has one plan for all seeds.
        shuffle: Whether it trains: another plan in each epoch, and the same number of batches on each rank.
        corpora: (corpora,), consecutive cuts that belong to each corpus; all belong to one if not given.
        weights: (corpora,), share of each corpus in an epoch; if not given, every cut comes once.
        groups: (cuts,), number of the group of each cut, such as its language, instead of corpora.
        shares: (groups,), share of each group in an epoch.
        block_cuts: Number of cuts that are shuffled together.
        crop: Maximum number of frames of a row, if batches are cropped to their shortest cut and filled.

    Raises:
        UserError: `overfit_batches` of the Trainer would replace the plan.
    """
    overfit_batches: float = trainer.overfit_batches  # type: ignore[attr-defined]  # Lightning does not declare it
    if overfit_batches:
        raise UserError(
            f"overfit_batches is {overfit_batches}, which would replace our plan of batches; leave it out, and give "
            "the data a manifest of a few utterances"
        )
    sampler = PlannedBatches(
        frames,
        max_frames,
        corpora=corpora,
        weights=weights,
        groups=groups,
        shares=shares,
        seed=seed if shuffle else 0,
        position=partial(batches_trained, trainer),  # restored from checkpoints, so a resumed run takes the next batch
        shuffle=shuffle,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        accumulate=trainer.accumulate_grad_batches,
        even=isinstance(trainer.strategy, ModelParallelStrategy),  # its ranks compute every layer together
        block_cuts=block_cuts,
        crop=crop,
    )
    return DataLoader(
        WatchedReads(batches, attrgetter("cuts"), partial(_cut_id, batches), num_workers),
        sampler=sampler,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=trainer.strategy.root_device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=quiet_worker if num_workers else None,
    )


def _cut_id(batches: PretrainingBatches | TranscribedBatches, index: int) -> str:
    cut_id: str = batches.cuts[index].id
    return cut_id


def _as_it_is(batch: Batch) -> Batch:
    return batch


def resuming_trainer(data: LightningDataModule) -> Trainer | None:
    """Return the Trainer if it resumes training; an evaluation does not compare the data of its checkpoint."""
    assert data.trainer is not None
    return data.trainer if data.trainer.state.fn == TrainerFn.FITTING else None


def clock_of_model(data: LightningDataModule) -> Clock:
    """Return the clock of the encoder of the model that a Trainer gives to data; that of 20 ms without a model."""
    if data.trainer is None or data.trainer.lightning_module is None:
        return CLOCK
    model: Any = data.trainer.lightning_module  # a task of the kind of the data
    clock: Clock = model.encoder.config.clock
    return clock


def trainer_and_model(data: LightningDataModule) -> tuple[Trainer, Any]:  # Any: a task of the kind of the data
    """Return the Trainer and its model, which knows its clusters, its vocabulary and its width.

    Raises:
        UserError: The data has no Trainer, or its Trainer has no model.
    """
    if data.trainer is None or data.trainer.lightning_module is None:
        name = type(data).__name__
        raise UserError(
            f"{name}: its batches depend on the model, which it takes from its Trainer; call trainer.fit(model, "
            f"datamodule=data), or set {name}.trainer to a Trainer that has the model"
        )
    return data.trainer, data.trainer.lightning_module
