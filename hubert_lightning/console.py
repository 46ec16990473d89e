"""Messages on standard error: information and warnings, each once for a run of any number of processes."""

import logging
import os
import sys
from dataclasses import dataclass

GLOBAL_RANKS = ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables by which SLURM, LSF and MPI number the processes that they start, over all nodes."""
NOISE = (
    "💡 Tip:",  # advertisements
    "`Trainer(limit_val_batches=",  # that what was asked for is done, once a start
    "`weights_only` was not set",  # a choice of Lightning's own
)
"""Beginnings of messages of libraries that say nothing to a user of this package."""


def show_messages(of_ranks: bool) -> None:
    """Show this package's information and warnings on standard error, and hide messages that are noise.

    Without this call, as in a notebook, Python's defaults hold: warnings are shown, information is not.

    Args:
        of_ranks: Whether the processes that a launcher started are ranks of one run, of which only the first one
            prints; otherwise each is a job of its own.
    """
    global _of_ranks
    _of_ranks = of_ranks
    package = logging.getLogger("hubert_lightning")
    if not any(isinstance(handler, _FirstRankHandler) for handler in package.handlers):
        package.addHandler(_FirstRankHandler())
    package.setLevel(logging.INFO)
    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(library).handlers:
            handler.addFilter(_is_no_noise)


_of_ranks = False


def prints() -> bool:
    """Whether this process prints what all processes of its run have to say."""
    return not _of_ranks or is_first_process()


class _FirstRankHandler(logging.Handler):
    """Prints the messages of a run's first process: the others have the same ones."""

    def emit(self, record: logging.LogRecord) -> None:
        if prints():
            print(self.format(record), file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this process is rank 0 of its run, or the only one; known before ranks have found one another.

    torchrun states the rank, and may give rank 0 to another node than the first. Otherwise SLURM, LSF or MPI have
    numbered their processes, unless Lightning has started this one, which numbers nodes and processes of a node.
    """
    if rank := os.environ.get("RANK"):
        return rank == "0"
    if "LOCAL_RANK" not in os.environ and (given := next(filter(None, map(os.environ.get, GLOBAL_RANKS)), None)):
        return given == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)


@dataclass
class Progress:
    """The current work of this process.

    Args:
        what: The work, as in "while {what}".
        count: Pieces of work begun since the process started; a count that stands still is a stall.
        in_steps: Whether the work is batches of training, validation or test, which take seconds; other work, such as
            K-means, takes hours.
    """

    what: str = "starting"
    count: int = 0
    in_steps: bool = False


now = Progress()


def note(what: str, in_steps: bool = False) -> None:
    """Say which piece of work begins."""
    now.what, now.in_steps = what, in_steps
    now.count += 1
