"""Parts of Lightning and torch that have no public name, each behind one function.

Other modules call these functions and touch no private part themselves. `test_lightning_internals.py` names every
private part. If an upgrade moves one, that test fails, and this file is the one to correct.
"""

import re
import subprocess
from collections.abc import Callable, Mapping
from datetime import timedelta
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.tuner.lr_finder import _LRCallback
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _get_default_store
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # torch.distributed has it, and does not declare it for mypy

METRICS_TABLE = ExperimentWriter.NAME_METRICS_FILE
"""File name of CSVLogger's table."""
COLLECTIVE_ERROR = re.compile(
    r"gloo|Connection (closed|reset|refused)|Broken pipe|NCCL|ncclRemoteError|recvValue failed|Failed to recv"
)
"""Texts in the errors of collective operations whose peer has ended."""
OTHERS, DATA, BACKWARD = "waits for other ranks", "waits for data", "is in the backward pass"
WAITING = {
    "torch/utils/data/dataloader.py": DATA,
    "torch/distributed/": OTHERS,
    "lightning/fabric/utilities/distributed.py": OTHERS,
    "torch/autograd/graph.py": BACKWARD,  # where DDP adds up the gradients of all ranks
}
"""Source files whose functions wait, and what for."""


# The training loop


def batches_trained(trainer: Trainer) -> int:
    """Return the number of batches that this rank has trained on, also before a restart.

    `Trainer.global_step` counts optimizer steps, and restarts with the run's.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return int(progress.total.processed)


def validation_follows(trainer: Trainer) -> bool:
    """Return whether the batch in hand ends an optimizer step that the Trainer is about to validate.

    The answer depends on steps, epochs, time and EarlyStopping; no hook or property of the Trainer gives it.
    """
    loop = trainer.fit_loop.epoch_loop
    fetcher: Any = trainer.fit_loop._data_fetcher
    return not loop._should_accumulate() and loop._should_check_val_fx(fetcher)


def begin_with_end_of_step(trainer: Trainer, validate: bool, max_steps: int) -> None:
    """Replace the first batch of a resumed fit by the end of the step that its checkpoint holds.

    The Trainer would train the next batch first. A hook can add work to a batch, but it cannot skip one.

    Args:
        trainer: Trainer whose training starts.
        validate: Whether the end of the step includes a validation.
        max_steps: Number of steps of the fit, set after the end of the step.
    """
    loop: Any = trainer.fit_loop.epoch_loop

    def advance(data_fetcher: Any) -> None:
        del loop.advance
        loop.max_steps = max_steps
        loop._skip_next_val = not validate

    loop.advance = advance


def count_whole_steps(checkpoint: dict[str, Any], before: int, accumulate: int) -> int:
    """Set the loop counts of a checkpoint to the end of its last whole step, even if that step ends the epoch.

    The Trainer counts the batches of one rank, including those of an unfinished step, whose gradients are lost.

    Args:
        checkpoint: Content of the checkpoint, which is changed.
        before: Number of batches in a step, on each rank, when it was saved.
        accumulate: Number of batches in a step from here on.

    Returns:
        Number of batches in all finished steps.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    batches["is_last_batch"] &= batches["total"]["processed"] % before == 0
    for count in (batches["total"], batches["current"]):
        count |= dict.fromkeys(count, count["processed"] // before * accumulate)
    for count in (epochs["total"], epochs["current"]):
        started = count["started"]
        count |= {"ready": started, "processed": max(started - 1, 0), "completed": max(started - 1, 0)}
    checkpoint["epoch"] = epochs["current"]["completed"]
    # The Trainer counts this step at its end
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = max(checkpoint["global_step"] - 1, 0)
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for name, count in optimizer["zero_grad"].items():  # a step in progress clears its gradients again
        count |= dict.fromkeys(count, optimizer["step"][name]["completed"])
    validated = loops["epoch_loop.val_loop.batch_progress"]
    for count in (validated["total"], validated["current"]):
        count |= dict.fromkeys(count, 0)
    validated["is_last_batch"] = False
    return int(batches["total"]["processed"])


def optimizer_steps(checkpoint: Mapping[str, Any]) -> int:
    """Return the number of optimizer steps by the loops of a checkpoint, which restarts count from."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
    return int(progress["optimizer"]["step"]["total"]["completed"])


def time_fetches(trainer: Trainer, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call functions around the fetch of each training batch, where Lightning calls its profiler.

    Hooks come after the copy to the device, so they cannot tell how long the loader took.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    profile_before, profile_after = loop._on_before_fetch, loop._on_after_fetch

    def start() -> None:
        profile_before()
        before()

    def stop() -> None:
        after()
        profile_after()

    loop._on_before_fetch, loop._on_after_fetch = start, stop


def stop_after_validation(stopping: EarlyStopping) -> None:
    """Let EarlyStopping decide when a validation ends, not when the epoch ends after it.

    Checkpoints of the validation hold its decision then. The argument of its constructor belongs to the user.
    """
    stopping._check_on_train_epoch_end = False


def tries_learning_rates(trainer: Trainer) -> bool:
    """Return whether the steps are those of Lightning's learning-rate finder, which are undone afterwards."""
    return any(isinstance(callback, _LRCallback) for callback in callbacks_of(trainer))


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer, a public attribute that Lightning does not declare for type checkers."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


# Signals


def leave_signals(trainer: Trainer) -> None:
    """Keep the Trainer from installing handlers of signals.

    Its handlers send to other ranks and wait for them, in the middle of whatever the process computes.
    """
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None


def ask_for_no_signals(trainer: Trainer) -> None:
    """Keep the ranks from asking rank 0 before each batch whether it received SIGTERM, which waits for the GPU."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None


# Ranks


def take_launched_processes(strategy: Strategy) -> list[subprocess.Popen[bytes]]:
    """Return the processes of further ranks that Lightning started, which it watches no longer.

    Its own observer would kill this process before it can print why.
    """
    launcher: Any = strategy.launcher
    processes = getattr(launcher, "procs", None) or []
    launched = list(processes)
    processes.clear()
    return launched


def extend_timeout(strategy: Strategy, seconds: float) -> None:
    """Set the time-out of collective operations, unless the user gave the strategy one of another length."""
    if getattr(strategy, "_timeout", None) == default_pg_timeout:
        strategy._timeout = timedelta(seconds=seconds)  # type: ignore[attr-defined]  # strategies of one device have none


def connect_to_store() -> "Store":
    """Return a new connection to the store by which the ranks met; torch has no public way to this store."""
    store: Any = _get_default_store()  # `clone` is not declared
    return cast("Store", store.clone())


def is_collective_error(error: BaseException) -> bool:
    """Return whether an error is one of a collective operation whose peer has ended; torch has no class for it."""
    return isinstance(error, (RuntimeError, dist.DistError)) and bool(COLLECTIVE_ERROR.search(str(error)))


def waiting_in(frame: FrameType | None) -> str | None:
    """Return what a thread waits for, by the source files of its functions, innermost first; None if it computes."""
    while frame is not None:
        for file, what in WAITING.items():
            if file in frame.f_code.co_filename:
                return what
        frame = frame.f_back
    return None


def shard_over_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Set the size of the groups of a strategy, whose constructor is called before the number of ranks is known."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
    strategy._tensor_parallel_size = 1


def finds_unused_parameters(strategy: DDPStrategy) -> bool:
    """Return whether DDP looks for parameters without a gradient; the strategy keeps its arguments to itself."""
    return bool(strategy._ddp_kwargs.get("find_unused_parameters"))


# Loggers


def continue_table(logger: CSVLogger, path: str, names: list[str]) -> None:
    """Let a CSVLogger append to a table of an earlier start, which it would remove.

    Args:
        logger: Logger that has logged nothing yet.
        path: Path of the table.
        names: Columns of the table.
    """
    with TemporaryDirectory() as empty:  # the constructor removes a table in its folder
        writer = ExperimentWriter(empty)
    writer.log_dir, writer.metrics_file_path, writer.metrics_keys = logger.log_dir, path, names
    logger._experiment = writer


def wandb_arguments(logger: Logger) -> dict[str, Any] | None:
    """Return the arguments with which a WandbLogger will start its run, to be changed in place; None for others."""
    arguments = getattr(logger, "_wandb_init", None)
    return arguments if isinstance(arguments, dict) else None


# Optimizers


def is_fused(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's kernels skip a step by themselves if `found_inf` is set, as torch's fused ones."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def scale_in_step(optimizer: Optimizer, factor: Tensor) -> None:
    """Let a fused optimizer multiply the gradients of its next step by a factor, in the kernels of the step."""
    optimizer.grad_scale = factor.reciprocal()  # type: ignore[attr-defined]  # which the kernels divide by


def multiply_in_place(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors by one factor in one kernel; torch's public optimizers and clipping use the same function."""
    torch._foreach_mul_(tensors, factor)
