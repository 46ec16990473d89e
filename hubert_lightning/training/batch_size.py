"""`max_duration: auto`: the largest batch whose training step fits into memory, found by steps that are undone."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from lightning import LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hubert_lightning.data.resources import available_memory
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE, num_samples
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.training.batches import PretrainingBatch, TranscribedBatch
from hubert_lightning.training.data_checks import check_durations
from hubert_lightning.training.distributed import LayerwiseFSDP
from hubert_lightning.training.global_batch import GlobalBatch
from hubert_lightning.training.loaders import trainer_and_model
from hubert_lightning.training.optimizer_state import UNUSABLE
from hubert_lightning.training.restoring import ADVICE

AUTO = "auto"
GPU_SHARE = 0.85
"""Share of a GPU's free memory that a step may take: the allocator loses some between batches of many shapes."""
CPU_SHARE = 0.5
"""Share of the available memory of a host that its ranks may take: not all that a step on a CPU takes is counted."""
TRIALS = 8
"""Batches that are tried at most."""
CERTAIN = 1.1
"""Largest share of the limit that a batch of a sharded model may take at most, if it is to be tried: below
1 / GPU_SHARE, so that no rank runs out of memory while others wait for it."""
RAN_OUT = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")
"""Parts of the messages of errors of CUDA, its libraries and NCCL, and of the CPU's allocator, when memory runs out."""
CLOSE = 0.97
"""Share of the predicted number of rows at which no larger batch is tried."""
ADAM_BYTES = 8
"""Bytes of state for each parameter, of an optimizer that cannot step on a CPU."""


class MemoryMeter(Protocol):
    """Measures the memory of a training step.

    Attributes:
        limit: Bytes that a step may take.
    """

    limit: float

    def peak(self, step: Callable[[], None]) -> float:
        """Return the bytes at the peak of a step, infinity if memory runs out."""


class GpuMemory:
    """The memory of tensors on a GPU.

    Args:
        device: GPU of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        free, _ = torch.cuda.mem_get_info(device)
        self.limit = GPU_SHARE * (free + torch.cuda.memory_reserved(device))

    def peak(self, step: Callable[[], None]) -> float:
        try:
            step()  # makes the gradients, and what kernels keep
            torch.cuda.reset_peak_memory_stats(self.device)
            step()
        except RuntimeError as error:
            if not ran_out(error):
                raise
            return math.inf
        finally:
            gc.collect()
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return peak


def ran_out(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out: libraries of CUDA allocate some themselves."""
    return isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in RAN_OUT)


class CpuMemory:
    """The weights, their gradients and what is saved for the backward pass, which is most of a step's memory.

    Args:
        model: Model that trains.
        ranks: Number of ranks that share the host.
    """

    def __init__(self, model: nn.Module, ranks: int) -> None:
        parameters = [_local(parameter) for parameter in model.parameters()]
        self._standing = 2 * sum(parameter.nbytes for parameter in parameters)
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.limit = CPU_SHARE * available_memory() / ranks

    def peak(self, step: Callable[[], None]) -> float:
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = _local(tensor).untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            step()
        return self._standing + sum(size for storage, size in saved.items() if storage not in self._weights)


class Trial(NamedTuple):
    """What the search for a batch size tries.

    Args:
        row: Function from a seed to a batch of one row, of the longest utterance.
        frames: Frames of that row.
        epoch: Frames of an epoch.
    """

    row: Callable[[int], PretrainingBatch | TranscribedBatch]
    frames: int
    epoch: int


def given_duration(max_duration: float | str) -> float | None:
    """Return the seconds of a batch that a data module is given, None if they are to be found.

    Raises:
        UserError: They are too few, or no duration.
    """
    if max_duration == AUTO:
        return None
    assert not isinstance(max_duration, str)  # jsonargparse accepts no other text
    check_durations(max_duration=max_duration)
    return max_duration


def kept_duration(state: object) -> float | None:
    """Return the seconds of a batch that the data of a checkpoint has, None if it has none.

    Raises:
        UserError: They are no duration.
    """
    if not isinstance(state, Mapping) or (kept := state.get("max_duration")) is None:
        return None
    if type(kept) not in (int, float):
        raise UserError(
            f"the max_duration of the checkpoint is {kept!r:.40}, and must be a number of seconds; {ADVICE}"
        )
    check_durations(max_duration=kept)
    return float(kept)


def find_duration(
    data: LightningDataModule, default: float, trial: Callable[[], Trial], meter: MemoryMeter | None
) -> float | None:
    """Return the seconds of a batch of a data module that is given none: those of the run, or the largest that fit.

    None in an evaluation, after which a run may still find them.

    Args:
        data: Data module, whose Trainer has its model on the device.
        default: Most seconds on a CPU.
        trial: Function that prepares the search.
        meter: Measures memory; that of the Trainer's device if not given.

    Raises:
        UserError: A batch of one row does not fit.
    """
    trainer, _ = trainer_and_model(data)
    if trainer.state.fn != TrainerFn.FITTING:
        return None
    if trainer.ckpt_path:  # a strategy that restores late, as LayerwiseFSDP, has not loaded the state yet
        kept = kept_duration(read_checkpoint(Path(trainer.ckpt_path)).get(type(data).__qualname__))
        if kept is not None:
            return kept
    return largest_duration(trainer, trial(), default, meter)


def largest_duration(trainer: Trainer, trial: Trial, default: float, meter: MemoryMeter | None = None) -> float:
    """Return the seconds of audio of the largest batch whose training step fits into the memory of every rank.

    Memory is nearly linear in the number of rows. So two small batches predict the largest, which is then tried as
    well. Random states, weights, the optimizer and the position in the data stay as they are.

    Args:
        trainer: Trainer whose model is on its device.
        trial: What is tried.
        default: Most seconds on a CPU, where larger batches are not faster.
        meter: Measures memory; that of the Trainer's device if not given.

    Raises:
        UserError: A batch of one row does not fit.
    """
    task: Any = trainer.lightning_module  # one of our tasks
    device, clock = trainer.strategy.root_device, task.encoder.config.clock
    row_seconds = clock.duration(trial.frames)
    most, why = max(trial.epoch // (trial.frames * trainer.world_size * trainer.accumulate_grad_batches), 1), "an epoch"
    if meter is None and device.type == "cpu" and (usual := max(int(default // row_seconds), 1)) < most:
        most, why = usual, f"the {default} s of the recipe, on a CPU"
    meter = meter or _meter(trainer)
    standing = optimizer_bytes(task)
    seed = next(seed for seed in count() if all(task.encoder.draw_kept(torch.Generator().manual_seed(seed))))
    with _undone(trainer):
        row: Any = trial.row(seed)

        def share(rows: int) -> float:
            batch = trainer.strategy.batch_to_device(_repeated(row, rows))
            peak = meter.peak(lambda: _step(trainer, batch))
            if math.isinf(peak):
                _forget_step(task)
            return _largest_of_ranks((peak + standing) / meter.limit, trainer, device)

        fixed = (standing + _weights_and_gradients(task)) / meter.limit
        sharded = isinstance(trainer.strategy, LayerwiseFSDP)
        rows, taken = largest_rows(share, most, _smallest_of_ranks(fixed, trainer, device) if sharded else None)
    limit = meter.limit / 2**30
    if not rows:
        raise UserError(
            f"data.max_duration {AUTO}: a batch of one utterance of {row_seconds:.1f} s takes more than the "
            f"{limit:.1f} GiB that it may; set model.init_args.activation_checkpointing to true, shard the model "
            "(docs/many-gpus.md), or train on shorter utterances"
        )
    seconds = num_samples(rows * trial.frames, clock) / SAMPLE_RATE
    hours = seconds * trainer.world_size * trainer.accumulate_grad_batches / 3600
    bound = f", as much as {why}" if rows == most else ""
    rank_zero_info(
        f"data.max_duration {AUTO}: {seconds:.2f} s, {rows} rows of {row_seconds:.2f} s{bound}; each batch takes about "
        f"{taken * limit:.2f} of {limit:.2f} GiB, and an optimizer step has {hours:.2f} hours of audio "
        f"({trainer.world_size} ranks x {trainer.accumulate_grad_batches} batches)"
    )
    return seconds


def largest_rows(share: Callable[[int], float], most: int, fixed: float | None = None) -> tuple[int, float]:
    """Return the largest number of rows whose share of memory is 1 or less, and that share.

    Where ranks exchange parameters in a step, none may run out of memory alone: the others would wait for it. So only
    batches are tried then that take no more than `CERTAIN` if all but the fixed part grows in proportion to the rows;
    memory never grows faster.

    Args:
        share: Function from a number of rows to their share of the memory, nearly linear; infinity if it runs out.
        most: Largest number of rows.
        fixed: Share of what does not grow, if nothing but one row may run out of memory; None if anything may.

    Returns:
        Number of rows, 0 if one row does not fit, and its share, or that of one row.
    """
    measured = {1: share(1)}
    if most > 1 and math.isfinite(measured[1]) and (more := min(3, most, _bound(measured, fixed))) > 1:
        measured[more] = share(more)
    while len(measured) < TRIALS:
        fits = max((rows for rows in measured if measured[rows] <= 1), default=0)
        too_many = min((rows for rows in measured if measured[rows] > 1), default=most + 1)
        predicted = _predicted(measured, most)
        if not fits or fits >= min(predicted * CLOSE, too_many - 1):
            break
        rows = min(max(predicted, fits + 1), too_many - 1, _bound(measured, fixed))
        if rows <= fits:
            break
        measured[rows] = share(rows)
    fits = max((rows for rows in measured if measured[rows] <= 1), default=0)
    return fits, measured[fits or 1]


def _bound(measured: dict[int, float], fixed: float | None) -> int:
    """Return the number of rows that take `CERTAIN` at most, by the most rows that fit and `largest_rows`'s `fixed`."""
    fits = max((rows for rows in measured if measured[rows] <= 1), default=0)
    if fixed is None or not fits or measured[fits] <= fixed:
        return 2**30 if fixed is None or fits else 1
    return math.floor(fits * (CERTAIN - fixed) / (measured[fits] - fixed))


def _predicted(measured: dict[int, float], most: int) -> int:
    """Return the number of rows that fits by the line through the two largest batches that were measured."""
    finite = sorted(rows for rows in measured if math.isfinite(measured[rows]))[-2:]
    if len(finite) < 2:
        return (finite[0] + min(rows for rows in (*measured, most + 1) if rows not in finite)) // 2 if finite else 0
    less, more = finite
    slope = (measured[more] - measured[less]) / (more - less)
    return min(most, math.floor(more + (1 - measured[more]) / slope)) if slope > 0 else most


def optimizer_bytes(task: Any) -> int:  # Any: one of our tasks
    """Return the bytes of the state that the optimizer of a task keeps on this rank once it has stepped."""
    each = ADAM_BYTES
    probe = nn.Parameter(torch.zeros(8, 8))
    try:
        optimizer = task.optimizer([probe])
        probe.grad = torch.zeros_like(probe)
        optimizer.step(lambda: torch.zeros(()))
        states = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor)]
        each = -(-sum(value.nbytes for value in states if value.numel() > 1) // probe.numel())
    except (AssertionError, *UNUSABLE):
        pass  # it needs a GPU
    return each * sum(_local(parameter).numel() for parameter in task.parameters() if parameter.requires_grad)


def _meter(trainer: Trainer) -> MemoryMeter:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return GpuMemory(device)
    return CpuMemory(trainer.lightning_module, trainer.num_devices)


def _step(trainer: Trainer, batch: PretrainingBatch | TranscribedBatch) -> None:
    """Take a training step, without the optimizer's part.

    Ranks do not wait for each other, unless the model is sharded: one of them may run out of memory.
    """
    strategy = trainer.strategy
    with ExitStack() as stack:
        if isinstance(strategy, DDPStrategy):
            stack.enter_context(strategy.block_backward_sync())
        loss = strategy.training_step(batch)
        assert isinstance(loss, Tensor)
        strategy.backward(loss, None)


def _forget_step(task: Any) -> None:  # Any: one of our tasks
    """Let a sharded model forget a step that memory ran out in: its next backward pass would reduce no gradients."""
    task.zero_grad(set_to_none=True)  # also of layers that are gathered now, and would keep them
    for module in (task.encoder, *task.heads):
        if isinstance(module, FSDPModule):
            with suppress(AttributeError):  # before torch 2.13, or of a module that the step did not reach
                module.reset_iter_state()


@contextmanager
def _undone(trainer: Trainer) -> Iterator[None]:
    """Leave no trace of training steps: random states, gradients, counted batches, logged metrics."""
    task: Any = trainer.lightning_module
    logged, added, frozen = trainer.log_every_n_steps, task.global_batch, getattr(task, "freeze_steps", None)  # type: ignore[attr-defined]  # undeclared
    training = {module: module.training for module in task.modules()}
    trainer.log_every_n_steps, task.global_batch = 0, GlobalBatch(added.max_skipped)  # type: ignore[attr-defined]
    if frozen is not None:
        task.freeze_steps = 0  # the encoder takes most memory once it is trained
    task.train()
    try:
        with isolate_rng(), torch.inference_mode(False), torch.enable_grad():  # also before a first validation
            yield
    finally:
        trainer.log_every_n_steps, task.global_batch = logged, added  # type: ignore[attr-defined]
        if frozen is not None:
            task.freeze_steps = frozen
        for module, mode in training.items():
            module.training = mode
        task.zero_grad(set_to_none=True)


def _repeated(row: Any, rows: int) -> Any:  # Any: a batch of either task
    """Make a batch of one row into one of several."""
    values: dict[str, Any] = {}
    for name, value in row._asdict().items():
        if isinstance(value, Tensor):
            values[name] = value.repeat_interleave(rows, dim=0)
        elif isinstance(value, tuple):
            values[name] = value * rows
    return row._replace(**values)


def _weights_and_gradients(task: nn.Module) -> int:
    """Bytes of the parameters on this rank, and of their gradients."""
    return sum(_local(value).nbytes * (1 + value.requires_grad) for value in task.parameters())


def _smallest_of_ranks(share: float, trainer: Trainer, device: torch.device) -> float:
    return -_largest_of_ranks(-share, trainer, device)


def _largest_of_ranks(share: float, trainer: Trainer, device: torch.device) -> float:
    if trainer.world_size == 1:
        return share
    largest = torch.tensor(share, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
