"""Training steps of the product with a real Trainer, recorded on the phantom in processes of their own."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from helpers import TINY
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from phantom.record import Record
from phantom.recorder import Recorder
from torch import Tensor
from torch.distributed import GradBucket
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

from hubert_lightning.frames import num_frames, seconds_to_samples
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.training.batches import PretrainingBatch, TranscribedBatch
from hubert_lightning.training.callbacks.preemption import Preemption
from hubert_lightning.training.distributed import LayerwiseFSDP
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.masking import span_mask
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.task import Task

CLUSTERS = 500
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}


class RecordStep(Callback):
    """Record the third optimizer step of a fit, from the end of the second to its own end.

    The first makes the optimizer's state, and the second the buckets of DistributedDataParallel.

    Args:
        recorder: What records.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.recording = recorder, ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.recorder.modules.name(pl_module)

    def on_train_batch_start(self, *args: Any) -> None:
        self.recorder.begin("forward")

    def on_after_backward(self, *args: Any) -> None:
        self.recorder.begin("finish")

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, index: int) -> None:
        self.recorder.begin("transfer")
        accumulated = trainer.accumulate_grad_batches
        if index == 2 * accumulated - 1:
            self.recording.enter_context(self.recorder.recording("transfer"))
        elif index == 3 * accumulated - 1:
            self.recording.close()


def fit(module: Task, batch: Any, recorder: Recorder, **trainer: Any) -> Record:
    """Train a task for three steps on one batch, and record the third.

    Returns:
        The record, with the number of operations that the task counts of the batch as its result.
    """
    settings = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "max_steps": 3}
    settings |= {"gradient_clip_val": 10.0, "log_every_n_steps": 100, "use_distributed_sampler": False} | trainer
    module.cpu = lambda: module  # type: ignore[method-assign]  # at the end: tensors without values stay where they are
    batches = [batch] * 3 * trainer.get("accumulate_grad_batches", 1)
    with tempfile.TemporaryDirectory() as folder, recorder:
        made = Trainer(default_root_dir=folder, callbacks=[Preemption(), RecordStep(recorder)], **settings, **QUIET)
        made.fit(module, DataLoader(batches, batch_size=None, pin_memory=True))
    return recorder.record(module.operations(batch))


def pretraining_batch(rows: int, seconds: float, clusters: int = CLUSTERS) -> PretrainingBatch:
    """A batch of noise-free audio with one mask for each row."""
    samples = seconds_to_samples(seconds)
    frames = num_frames(samples)
    mask = span_mask([frames] * rows, 0.8, 10, torch.Generator().manual_seed(0), same_count=True)
    cluster = torch.zeros(rows, 1, frames, dtype=torch.int64)
    names = tuple(f"row{row}" for row in range(rows))
    return PretrainingBatch(torch.zeros(rows, samples), cluster, mask, int(mask[0].sum()), names)


def encoder(size: str, **changes: Any) -> EncoderConfig:
    """Configuration of a size: "tiny" or "base"."""
    return replace(TINY if size == "tiny" else EncoderConfig(), **changes)


def pretraining(
    size: str = "tiny",
    rows: int = 3,
    seconds: float = 2.0,
    checkpointing: bool = False,
    trainer: dict[str, Any] | None = None,
    **changes: Any,
) -> Record:
    """A step of pre-training; its result is the number of operations that the task counts.

    Args:
        size: "tiny" or "base".
        rows: Rows of the batch.
        seconds: Duration of each row.
        checkpointing: Whether the backward pass recomputes the layers.
        trainer: Arguments of the Trainer.
        **changes: Fields of the encoder's configuration.
    """
    model = HubertPretraining(encoder(size, **changes), CLUSTERS, activation_checkpointing=checkpointing)
    return fit(model, pretraining_batch(rows, seconds), Recorder(), **(trainer or {}))


def transcribed_batch(seconds: Sequence[float], dim: int, masked: bool = True) -> TranscribedBatch:
    """A padded batch of silence with twelve letters a row."""
    length = torch.tensor([seconds_to_samples(duration) for duration in seconds])
    rows, samples = len(length), int(length.max())
    rng = torch.Generator().manual_seed(0)
    mask = channel_mask = None
    if masked:
        mask = span_mask(num_frames(length).tolist(), 0.65, 10, rng)
        channel_mask = span_mask([dim] * rows, 0.5, 8, rng, min_spans=0)
    token, num_tokens = torch.randint(2, 28, (rows, 12), generator=rng), (12,) * rows
    names = tuple(f"row{row}" for row in range(rows))
    texts = ("TEN LETTERS",) * rows
    return TranscribedBatch(
        waveform=torch.zeros(rows, samples),
        length=length,
        token=token,
        num_frames=tuple(num_frames(length).tolist()),
        num_tokens=num_tokens,
        mask=mask,
        channel_mask=channel_mask,
        text=texts,
        id=names,
        speaker=("",) * rows,
    )


def finetuning(
    size: str = "tiny",
    seconds: Sequence[float] = (2.0, 1.5, 1.0),
    freeze_steps: int = 0,
    freeze_convolutions: bool = True,
    checkpointing: bool = False,
    trainer: dict[str, Any] | None = None,
    **changes: Any,
) -> Record:
    """A step of fine-tuning; its result is the number of operations that the task counts.

    Args:
        size: "tiny" or "base".
        seconds: Duration of each row.
        freeze_steps: Steps in which only the head learns.
        freeze_convolutions: Whether the convolutions keep their weights.
        checkpointing: Whether the backward pass recomputes the layers.
        trainer: Arguments of the Trainer.
        **changes: Fields of the encoder's configuration.
    """
    config = encoder(size, **changes)
    model = CTCFinetuning(
        encoder=config,
        freeze_steps=freeze_steps,
        freeze_convolutions=freeze_convolutions,
        activation_checkpointing=checkpointing,
        layer_drop=config.layer_drop,
    )
    return fit(model, transcribed_batch(seconds, config.dim), Recorder(), **(trainer or {}))


def finetuning_without_kernels() -> Record:
    """A step of fine-tuning on a GPU on which the kernels of the CTC loss do not work."""
    with patch("hubert_lightning.model.ctc.is_right", lambda device, block: False):
        return finetuning()


def validation(task: str, batches: int) -> Record:
    """A validation of a tiny model.

    Args:
        task: "pre-training" or "fine-tuning".
        batches: Batches.
    """
    model: Task
    if task == "pre-training":
        model, batch = HubertPretraining(TINY, CLUSTERS), pretraining_batch(3, 2.0)
    else:
        model, batch = CTCFinetuning(encoder=TINY), transcribed_batch((2.0, 1.5, 1.0), TINY.dim, masked=False)
    model.cpu = lambda: model  # type: ignore[method-assign]
    loader = DataLoader([batch] * batches, batch_size=None, pin_memory=True)
    with tempfile.TemporaryDirectory() as folder, Recorder() as recorder:
        made = Trainer(default_root_dir=folder, accelerator="gpu", precision="bf16-mixed", **QUIET)
        with recorder.recording("validation"):
            made.validate(model, loader, verbose=False)
    return recorder.record()


def on_ranks(task: str, ranks: int = 4, **options: Any) -> Record:
    """A step of a rank, whose peers a fake process group stands for.

    Args:
        task: "pretraining" or "finetuning".
        ranks: Number of ranks.
        **options: Arguments of the function of that name; the Trainer's strategy is "ddp" or "fsdp", LayerwiseFSDP.
    """

    def summed(state: None, bucket: GradBucket) -> Future[Tensor]:
        """In the place of torch's own reduction, which expects a value from the peers."""
        future: Future[Tensor] = Future()
        future.set_result(bucket.buffer())
        return future

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)  # type: ignore[no-untyped-call]
    trainer = {"num_nodes": ranks} | options.pop("trainer")
    trainer["strategy"] = LayerwiseFSDP() if trainer["strategy"] == "fsdp" else DDPStrategy(ddp_comm_hook=summed)
    # Peers have no parameters to compare with; and tensors without values say that they are meta, to be materialised
    peers = patch("torch.distributed._verify_params_across_processes", lambda *args: None)
    meta = patch("lightning.pytorch.strategies.model_parallel._materialize_distributed_module", lambda *args: None)
    with peers, meta:
        return {"pretraining": pretraining, "finetuning": finetuning}[task](trainer=trainer, **options)
