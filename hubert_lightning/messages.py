"""Messages on standard error: information and warnings, each once for a run of any number of processes."""

import logging
import os
import sys

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
"""Environment variables by which torchrun, SLURM and Lightning number the processes of a run."""
NOISE = (
    "💡 Tip:",  # advertisements
    "`Trainer(limit_val_batches=",  # that what was asked for is done, once a start
    "`weights_only` was not set",  # a choice of Lightning's own
)
"""Beginnings of messages of libraries that say nothing to a user of this package."""


def show_messages() -> None:
    """Show this package's information and warnings on standard error, and hide messages that are noise.

    Without this call, as in a notebook, Python's defaults hold: warnings are shown, information is not.
    """
    package = logging.getLogger("hubert_lightning")
    if not any(isinstance(handler, _FirstRankHandler) for handler in package.handlers):
        package.addHandler(_FirstRankHandler())
    package.setLevel(logging.INFO)
    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(library).handlers:
            handler.addFilter(_is_no_noise)


class _FirstRankHandler(logging.Handler):
    """Prints the messages of a run's first process: the others have the same ones."""

    def emit(self, record: logging.LogRecord) -> None:
        if rank() == 0:
            print(self.format(record), file=sys.stderr, flush=True)


def rank() -> int:
    """The number of this process among those of the run, before the Trainer knows it: 0 for the first one."""
    return max((int(value) for name in RANK_VARIABLES if (value := os.environ.get(name, "")).isdigit()), default=0)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)
